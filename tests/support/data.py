"""Find the data that tests need and the repository does not hold: photographs, test sets and LPIPS weights."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LATENT_CODEC_DATA") or ROOT.parent / "shared")
WEIGHTS = DATA / "weights"
