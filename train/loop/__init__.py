"""Run the training loop, with checkpoints, logs and recovery."""
