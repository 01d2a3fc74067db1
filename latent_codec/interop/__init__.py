"""Exchange models and latents with other programs."""
