"""`python -m tools.decode ...` from a checkout: the same as `latent-codec decode ...`."""

from latent_codec.cli import main_of

if __name__ == "__main__":
    main_of("decode")
