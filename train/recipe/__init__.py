"""Train a codec in stages on one GPU."""
