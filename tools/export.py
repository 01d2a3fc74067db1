"""`python -m tools.export ...` from a checkout: the same as `latent-codec export ...`."""

from latent_codec.cli import run_command

if __name__ == "__main__":
    run_command("export")
