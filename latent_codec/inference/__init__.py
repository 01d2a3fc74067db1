"""Run a model's networks within the memory of a device."""
