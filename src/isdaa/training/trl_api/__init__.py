"""What a script calls where it called TRL's `DPOTrainer`."""
