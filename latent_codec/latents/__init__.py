"""Store posteriors in shards, and read them as a torch Dataset."""
