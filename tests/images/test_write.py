"""Check that written images are read as they were, and that a failed write leaves the file that was there."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage
from PIL import JpegImagePlugin

from latent_codec.images.geometry import Geometry
from latent_codec.images.read import read_image
from latent_codec.images.write import to_pil, write_image
from tests.support.errors import refused, rejected


def geometry_of(x: torch.Tensor, mode: str = "RGB") -> Geometry:
    return Geometry(width=x.shape[-1], height=x.shape[-2], orientation=1, mode=mode, background=None)  # pyright: ignore[reportArgumentType]


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_to_pil_rounds_the_mean_of_unequal_planes_and_undoes_the_repeat_of_grey(planes: tuple[int, int, int]):
    for values in (planes, planes[:1] * 3):
        x = torch.tensor(values, dtype=torch.uint8).reshape(3, 1, 1)
        assert to_pil(x, geometry_of(x, "L")).getpixel((0, 0)) == round(sum(values) / 3)


def test_to_pil_refuses_what_is_not_the_geometrys_image():
    for x in (torch.zeros(3, 2, 2), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        rejected("expected uint8", to_pil, x, Geometry(width=2, height=2, orientation=1, mode="RGB", background=None))


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossless_formats_give_back_what_was_written(tmp_path: Path, image_format: str, mode: str):
    x = torch.arange(3 * 9 * 6).view(3, 9, 6).to(torch.uint8)
    x = x if mode == "RGB" else x[:1].expand(3, -1, -1)
    for path in (tmp_path / "new" / "a", str(tmp_path / "new" / "b")):
        write_image(path, x, geometry_of(x, mode), image_format)  # pyright: ignore[reportArgumentType]
        assert torch.equal(read_image(path).pixels, x)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_keeps_the_mode_and_all_of_its_chroma(tmp_path: Path, mode: str):
    x = torch.zeros(3, 16, 16, dtype=torch.uint8)
    x[0 if mode == "RGB" else slice(None), :, ::2] = 255  # columns one pixel wide: subsampling would blend them
    write_image(tmp_path / "a.jpg", x, geometry_of(x, mode), "jpg")
    with PilImage.open(tmp_path / "a.jpg") as pil:
        assert (pil.format, pil.mode) == ("JPEG", mode) and isinstance(pil, JpegImagePlugin.JpegImageFile)
        assert mode == "L" or JpegImagePlugin.get_sampling(pil) == 0  # 4:4:4
    assert (read_image(tmp_path / "a.jpg").pixels.int() - x.int()).abs().max() < 20


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path):
    path = tmp_path / "a.webp"
    path.write_bytes(b"before")
    x = torch.zeros(3, 1, 17_000, dtype=torch.uint8)  # WebP ends at 16383 pixels a side
    refused("webp", write_image, path, x, geometry_of(x), "webp")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
