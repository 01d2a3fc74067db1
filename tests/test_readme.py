"""What the README says can be done."""

from pathlib import Path

import pytest
from PIL import Image

from latent_codec.folders.encode_latents import encode_folder
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from tests.support.data import ROOT


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_file: Path, codec: Codec
) -> None:
    """With a tiny model in place of the shipped one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (19, 13), (9, 99, 199)).save("photo.jpg")
    quick = ComputeOptions(batch_size=1, workers=1)
    encode_folder(Runner(codec, quick), "photo.jpg", Path("latents"), quiet=True)
    exec(snippet.replace('"photo"', f'"{model_file}"'), {})
    with Image.open("back.png") as back:
        assert back.size == (19, 13)
