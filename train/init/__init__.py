"""Initialise a codec from patch moments, from the mean image, or from another model."""
