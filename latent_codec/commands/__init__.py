"""The commands of `latent-codec`, a dataclass each: its fields are the flags, `run` does it and gives the exit code.

Nothing here imports torch until a command runs, so that --help answers at once.
"""
