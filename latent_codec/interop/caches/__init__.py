"""Write latents as the caches that other programs train from, and read such caches; docs/caches.md has the table.

CONTRIBUTING.md says how to add a format. `write.write_cache` and `read.read_cache` do what all formats share: they
overwrite nothing unasked, and leave no file half written.
"""
