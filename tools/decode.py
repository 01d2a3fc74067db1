"""`python -m tools.decode ...` from a checkout: the same as `latent-codec decode ...`."""

import sys

from latent_codec.cli import main

if __name__ == "__main__":
    main(["decode", *sys.argv[1:]])
