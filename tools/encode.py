"""`python -m tools.encode ...` from a checkout: the same as `latent-codec encode ...`."""

from latent_codec.cli import main_of

if __name__ == "__main__":
    main_of("encode")
