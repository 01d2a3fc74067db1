"""Write and read `.lc` files, and choose their rate."""
