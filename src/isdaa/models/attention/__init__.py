"""Pairs as one packed row: where they lie in it, and attention over it, for a GPU and for a CPU."""
