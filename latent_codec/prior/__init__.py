"""Turn latents into integers and entropy-code them."""
