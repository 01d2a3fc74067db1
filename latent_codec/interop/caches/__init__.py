"""Latents in the layouts that other programs train from, written and, where it can be, read.

One module for each consumer says what its files are called and what their numbers mean. docs/caches.md has the table.
"""
