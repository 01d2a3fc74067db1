"""`python -m tools.encode ...` from a checkout: the same as `latent-codec encode ...`."""

import sys

from latent_codec.cli import main

if __name__ == "__main__":
    main(["encode", *sys.argv[1:]])
