"""`python -m tools.evaluate ...` from a checkout: the same as `latent-codec evaluate ...`."""

import sys

from latent_codec.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
