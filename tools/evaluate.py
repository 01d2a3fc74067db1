"""`python -m tools.evaluate ...` from a checkout: the same as `latent-codec evaluate ...`."""

from latent_codec.cli import run_command

if __name__ == "__main__":
    run_command("evaluate")
