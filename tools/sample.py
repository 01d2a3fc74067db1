"""`python -m tools.sample ...` from a checkout: the same as `latent-codec sample ...`."""

from latent_codec.cli import run_command

if __name__ == "__main__":
    run_command("sample")
