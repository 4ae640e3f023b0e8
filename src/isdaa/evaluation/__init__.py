"""Samples, KL, win rates and records of checkpoints: did a run over-optimise, and which checkpoint should be kept?"""
