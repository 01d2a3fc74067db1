"""`python -m tools.evaluate ...` from a checkout: the same as `latent-codec evaluate ...`."""

from latent_codec.cli import main_of

if __name__ == "__main__":
    main_of("evaluate")
