"""Logps of packed pairs: the forward pass, its head, and the proof that they are those of plain rows."""
