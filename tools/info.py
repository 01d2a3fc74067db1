"""`python -m tools.info ...` from a checkout: the same as `latent-codec info ...`."""

from latent_codec.cli import run_command

if __name__ == "__main__":
    run_command("info")
