"""Compute the losses that training minimises."""
