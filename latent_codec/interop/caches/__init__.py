"""Write latents as the caches that other programs train from, and read such caches; docs/caches.md has the table.

To add a format:

1. Write a module `NAME.py` here that defines `FORMAT = CacheFormat(writer=..., read=...)` (`cache.CacheFormat`).
   - The writer is an `ImageCacheWriter` (a file for each image: `name` and `data`) or a `ShardCacheWriter` (files that
     images share: `shards` and `write`). Its class attributes say which options matter and what the program requires.
   - `read(where, options, statistics)` yields a `FoundImage` for each image of a cache; loading it may fail by name.
   - `scaling` has the choice of raw or scaled numbers, `numpy_files` and `safetensors_files` the file types.
2. Add NAME to `registry.CacheName`.

`write.write_cache` and `read.read_cache` do the rest: they overwrite nothing unasked, and leave no file half written.
"""
