"""Time the networks, the entropy coder, whole commands, training and reading latents."""
