"""Measure rate-distortion curves of files, with other codecs as anchors."""
