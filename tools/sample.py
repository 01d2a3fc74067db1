"""`python -m tools.sample ...` from a checkout: the same as `latent-codec sample ...`."""

import sys

from latent_codec.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
