"""`python -m tools.decode ...` from a checkout: the same as `latent-codec decode ...`."""

from latent_codec.cli import run_command

if __name__ == "__main__":
    run_command("decode")
