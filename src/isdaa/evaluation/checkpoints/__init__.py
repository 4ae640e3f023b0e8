"""From checkpoints to numbers: which ones, samples and KL, scores, analysis, the table."""
