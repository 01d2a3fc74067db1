"""Train the context prior of the entropy coder."""
