"""Test that the Python examples of the README and the pages run."""

import re
from pathlib import Path

import pytest
from PIL import Image

from latent_codec.cli import main
from tests.support.data import ROOT


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    """Return a folder with what the examples read: a photograph, and latents of a tiny model."""
    folder = tmp_path_factory.mktemp("examples")
    Image.new("RGB", (19, 13), (9, 99, 199)).save(folder / "photo.jpg")
    with pytest.raises(SystemExit) as end:
        latents = ["encode", f"{folder}/photo.jpg", f"{folder}/latents", "--format", "safetensors"]
        main([*latents, "--model", str(model_file), "--device", "cpu"])
    assert end.value.code == 0
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/latents.md", "docs/diffusers.md"])
def test_the_example_runs(page: str, working_folder: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it with a tiny model in place of the shipped one, and without worker processes."""
    if page == "docs/diffusers.md":
        pytest.importorskip("diffusers")
    example = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[0]
    example = example.replace('"photo"', f'"{model_file}"').replace("num_workers=2, persistent_workers=True", "")
    monkeypatch.chdir(working_folder)
    exec(example, {})
    if page == "README.md":
        with Image.open("back.png") as back:
            assert back.size == (19, 13)
