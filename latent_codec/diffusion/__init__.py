"""Latent diffusion: a transformer that makes latents of noise, its file, and images drawn from it."""
