"""`python -m tools.info ...` from a checkout: the same as `latent-codec info ...`."""

import sys

from latent_codec.cli import main

if __name__ == "__main__":
    main(["info", *sys.argv[1:]])
