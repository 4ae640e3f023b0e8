"""The Trainer of direct alignment: batches, loss, logs, checkpoints."""
