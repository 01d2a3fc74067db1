"""Define the commands of `latent-codec`: a dataclass each, whose fields are the flags and whose `run` does the work.

Nothing here imports torch until a command runs, so that --help answers at once.
"""
