"""Measure distortion between images, and compare rate-distortion curves."""
