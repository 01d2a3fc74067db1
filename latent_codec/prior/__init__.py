"""Model the probabilities of quantised latents, and code them."""
