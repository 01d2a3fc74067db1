"""`python -m tools.info ...` from a checkout: the same as `latent-codec info ...`."""

from latent_codec.cli import main_of

if __name__ == "__main__":
    main_of("info")
