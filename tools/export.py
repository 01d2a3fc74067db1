"""`python -m tools.export ...` from a checkout: the same as `latent-codec export ...`."""

from latent_codec.cli import main_of

if __name__ == "__main__":
    main_of("export")
