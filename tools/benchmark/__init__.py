"""Time the networks, the coder and whole commands."""
