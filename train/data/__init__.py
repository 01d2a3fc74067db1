"""Load training images, packed images and stored latents."""
