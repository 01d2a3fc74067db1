"""Test that `decode` finds the model that made each file, among those shipped and those of a folder."""

from pathlib import Path

import pytest
import torch

from latent_codec.model import shipped
from latent_codec.model.codec import Codec
from tests.conftest import files_of
from tests.test_cli import LATENTS, Do, Run
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run


@pytest.fixture
def models(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ship the model tiny as photo-2 beside another one as photo-1; return a folder of a third and of other files."""
    shipping, folder = tmp_path / "shipping", tmp_path / "models"
    for path in (shipping / "photo-2", shipping / "photo-1", folder / "third"):
        path.parent.mkdir(exist_ok=True)
        codec.save(path.with_suffix(".safetensors"))
        with torch.no_grad():
            next(codec.parameters()).add_(0.01)
    (folder / "broken.safetensors").write_bytes(b"no model")
    monkeypatch.setattr(shipped, "FOLDERS", [shipping])
    return folder


@pytest.mark.parametrize("options", ["", LATENTS])
@pytest.mark.parametrize("model", ["photo-2", "photo-1", "models/third.safetensors"])
def test_a_model_is_found_by_what_its_files_say(do: Do, run: Run, models: Path, model: str, options: str) -> None:
    assert do(f"encode photos made --model {model} {options}").code == 0
    assert do(f"decode made wanted --model {model}").code == 0
    assert run("decode", "made", "found", "--models", models).code == 0
    assert files_of(Path("found")) == files_of(Path("wanted")) and len(files_of(Path("found"))) == 3
    if "third" in model:
        refused = run("decode", "made", "missed")
        assert refused.code in (1, 2) and "made by" in refused.err and "Traceback" not in refused.err


@pytest.mark.usefixtures("models")
def test_one_folder_may_hold_files_of_several_models(do: Do, run: Run) -> None:
    for model in ("photo-2", "photo-1", "models/third.safetensors"):
        name = Path(model).stem
        assert do(f"encode photos made/{name} --model {model}").code == 0
        assert do(f"decode made/{name} wanted/{name} --model {model}").code == 0
    assert run("decode", "made", "found", "--models", "models").code == 0
    assert files_of(Path("found")) == {n: d for n, d in files_of(Path("wanted")).items() if n.endswith(".png")}
    again = run("decode", "made", "found", "--models", "models")
    assert again.code == 0 and "decoded 0 of 9" in again.out
    (Path("made") / "photo-1" / "a.png.lc").write_bytes(b"damaged")
    damaged = run("decode", "made", "found", "--models", "models")
    assert damaged.code == 1 and "photo-1/a.png.lc" in damaged.err


@pytest.mark.usefixtures("models")
def test_a_model_and_a_folder_of_models_exclude_each_other(run: Run, do: Do) -> None:
    assert do("encode photos made").code == 0
    for argv, message in (
        (("--model", "photo", "--models", "models"), "leave out --models models"),
        (("--models", "nowhere"), "--models nowhere: not a folder"),
    ):
        refused = run("decode", "made", "out", *argv)
        assert refused.code == 2 and message in refused.err


def test_a_name_without_a_number_is_that_of_the_newest(models: Path, tmp_path: Path) -> None:
    assert shipped.resolve("photo").stem == shipped.newest("photo") == "photo-2"
    folder = tmp_path / "shipping"
    for name in ("photo-10", "photo-x", "photograph-11"):
        (folder / f"{name}.safetensors").touch()
    assert shipped.resolve("photo").stem == "photo-10" and shipped.newest("phot") is None
    (folder / "photo.safetensors").touch()
    assert shipped.resolve("photo").stem == "photo"
