"""Test that the benchmark of stored latents reads every image by every way."""

import json
from pathlib import Path

from tools.benchmark.latents import LatentsSpeed


def test_every_way_is_timed_beside_the_others(tmp_path: Path) -> None:
    LatentsSpeed(images=5, shape=(3, 4, 2), batch=2, workers=(0,), epochs=1, out=tmp_path / "out.json").run()
    found = json.loads((tmp_path / "out.json").read_text())["results"]["0 workers"]
    assert len(found["images_per_second"]) == len(found["times_as_fast"]) == 4
    assert min(found["images_per_second"].values()) > 0
