"""Build, load and describe the VAE."""
