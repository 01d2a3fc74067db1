"""Test that the README's commands are two and that its Python example runs."""

from pathlib import Path

import pytest
from PIL import Image

from latent_codec.cli import main
from latent_codec.model.codec import Codec
from tests.support.data import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_with_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_file: Path, codec: Codec
) -> None:
    snippet = README.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (19, 13), (9, 99, 199)).save("photo.jpg")
    with pytest.raises(SystemExit) as end:
        main(["encode", "photo.jpg", "latents", "--model", str(model_file), "--format", "safetensors"])
    assert end.value.code == 0
    exec(snippet.replace('"photo"', f'"{model_file}"'), {})
    with Image.open("back.png") as back:
        assert back.size == (19, 13)
