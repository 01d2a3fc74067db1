"""Draw images from latent diffusion models: the network and its file, sampling, and configuration."""
