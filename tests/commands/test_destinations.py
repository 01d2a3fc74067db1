"""Test that a command replaces what it made itself, so that it can be repeated, and nothing else."""

import shutil
from pathlib import Path

import pytest

from latent_codec.diffusion.model import Diffusion
from latent_codec.model.codec import Codec
from latent_codec.storage.removal import check_replaceable, holding, made_now, named, remove
from tests.conftest import Draw, files_of
from tests.diffusion.test_diffusion import make as make_diffusion
from tests.support import kl
from tests.support.errors import refused
from tests.test_cli import Do, Run, refuse
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run

EVALUATE = "evaluate tiny photos --lpips-net none --device cpu"
SAMPLE = "sample drawer drawn --model tiny --count 1 --steps 1"

WRITERS: dict[str, tuple[str, ...]] = {
    "export tiny m.safetensors": ("m.safetensors",),
    f"{EVALUATE} --out out": ("out/results.json", "out/decoded/a.jpg.png"),
    f"{EVALUATE} --rd --steps 1 --out out": ("out/rd.json", "out/rd.png"),
    f"{SAMPLE}": ("drawn/a/00000.png",),
    f"{SAMPLE} --grid grid.png": ("grid.png",),
}
"""Files that each command writes, without a record in `.latent_codec`."""


@pytest.fixture
def drawer(codec: Codec, tmp_path: Path) -> Diffusion:
    """Save a diffusion model beside the photos."""
    model = make_diffusion(codec)
    model.save(tmp_path / "drawer")
    return model


@pytest.mark.parametrize("line", WRITERS)
def test_a_repeated_command_replaces_its_own_files_and_no_others(line: str, do: Do, drawer: Diffusion) -> None:
    for name in WRITERS[line]:
        shutil.rmtree(name.split("/")[0], ignore_errors=True)
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        before = files_of(Path())
        refuse(do(line), name.split("/")[-2] if name.startswith("out/decoded") else name)
        assert files_of(Path()) == before
        path.unlink()
    for _ in range(2):
        result = do(line)
        assert result.code == 0, result.err


def test_only_a_model_file_makes_room_for_one(codec: Codec, do: Do, drawer: Diffusion, tmp_path: Path) -> None:
    assert do("encode photos latents --format safetensors").code == 0
    shard = next(Path("latents").glob("*.safetensors"))
    for mine in (Path("drawer"), shard, Path("photos/a.png")):
        before = mine.read_bytes()
        refuse(do(f"export tiny {mine}"), f"{mine}: exists already and is not a model file of latent-codec")
        assert mine.read_bytes() == before
    Path("link.safetensors").symlink_to(tmp_path / "nowhere")
    refuse(do("export tiny link.safetensors"), "exists already")
    Path("hub").mkdir()
    shutil.copy("drawer", "hub/model.safetensors")
    refused(r"hub/model\.safetensors: exists already", codec.save_pretrained, "hub")
    codec.save_pretrained("new")
    codec.save_pretrained("new")


@pytest.mark.slow
def test_exports_and_imports_are_repeated_and_strangers_stay(run: Run, tmp_path: Path, draw: Draw) -> None:
    model, vae, back = (tmp_path / name for name in ("model.safetensors", "vae", "back.safetensors"))
    kl.codec().save(model)
    for _ in range(2):
        assert run("export", model, vae, "--to", "diffusers").code == run("import", vae, back).code == 0
    back.write_bytes(b"mine")
    (vae / "notes.txt").write_text("mine")
    before = files_of(tmp_path)
    refuse(run("import", vae, back), "exists already and is not a model file")
    refuse(run("export", model, vae, "--to", "diffusers"), "holds files that are no export of latent-codec")
    assert files_of(tmp_path) == before


def test_what_is_not_ours_is_neither_removed_nor_replaced(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / "000.png").write_text("x")
    link.symlink_to(folder)
    for denied in (named("other"), holding(r"\d{3}\.jpg"), lambda _: False):
        assert not remove(folder, denied) and (folder / "000.png").exists()
        refused("exists already and is not a thing of latent-codec", check_replaceable, folder, denied, "a thing")
    assert not holding(r"\d{3}\.png")(folder / "000.png")
    check_replaceable(folder / "none", lambda _: False, "a thing")
    assert remove(link, made_now) and folder.is_dir() and not link.exists()
    assert remove(folder, holding(r"\d{3}\.png")) and not folder.exists()
    assert remove(folder, named("folder"))
