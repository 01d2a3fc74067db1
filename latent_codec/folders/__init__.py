"""Encode and decode whole folders of images."""
