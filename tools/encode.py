"""`python -m tools.encode ...` from a checkout: the same as `latent-codec encode ...`."""

from latent_codec.cli import run_command

if __name__ == "__main__":
    run_command("encode")
