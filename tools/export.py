"""`python -m tools.export ...` from a checkout: the same as `latent-codec export ...`."""

import sys

from latent_codec.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
