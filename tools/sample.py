"""`python -m tools.sample ...` from a checkout: the same as `latent-codec sample ...`."""

from latent_codec.cli import main_of

if __name__ == "__main__":
    main_of("sample")
