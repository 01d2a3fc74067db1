"""The benchmark of stored latents reads every image by every way."""

import json
from pathlib import Path

from tools.benchmark.latents import LatentsSpeed


def test_every_way_is_timed_beside_the_others(tmp_path: Path) -> None:
    LatentsSpeed(images=5, shape=(3, 4, 2), batch=2, workers=(0,), epochs=1, out=tmp_path / "out.json").run()
    found = json.loads((tmp_path / "out.json").read_text())["results"]["0 workers"]
    speed, ratios = found["images_per_second"], found["times_as_fast"]
    assert len(speed) == len(ratios) == 4 and min(speed.values()) > 0
    for name, ratio in ratios.items():
        ours, other = name.split(" over ")
        assert ratio == speed[ours] / speed[other]
