"""Initialise a model's weights in closed form or from another model."""
