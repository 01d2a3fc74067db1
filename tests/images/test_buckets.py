"""Compare the choice of sizes with numbers that the rules of kohya's sd-scripts and of musubi-tuner give."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from latent_codec.images.buckets import BUCKETS, ResizeOptions, bucket_sizes, kohya_crop_ltrb, resize_options
from latent_codec.images.geometry import Resized
from latent_codec.images.read import ReadOptions, read_image
from tests.support.errors import refused

LISTS = {
    "kohya-sdxl": (41, (256, 2048), (320, 2048), (2048, 512)),
    "flux": (41, (256, 2048), (320, 2048), (2048, 512)),
    "kohya-sd": (17, (256, 832), (256, 896), (1024, 256)),
    "musubi": (65, (512, 2048), (528, 1984), (2048, 512)),
    "720": (47, (352, 1472), (368, 1408), (1472, 352)),
}
"""Number of buckets, the first two and the last."""

CHOICES = {
    ("kohya-sdxl", 4000, 3000): ((1195, 896), (21, 0, 1173, 896)),
    ("kohya-sdxl", 3000, 4000): ((896, 1195), (0, 21, 896, 1173)),
    ("kohya-sdxl", 481, 321): ((1247, 832), (15, 0, 1231, 832)),
    ("kohya-sdxl", 1920, 1080): ((1365, 768), (10, 0, 1354, 768)),
    ("kohya-sdxl", 1500, 500): ((1728, 576), (0, 0, 1728, 576)),
    ("kohya-sdxl", 100, 900): ((256, 2304), (0, 128, 256, 2176)),
    ("kohya-sdxl", 1216, 832): ((1216, 832), (0, 0, 1216, 832)),
    ("kohya-sd", 4000, 3000): ((597, 448), (10, 0, 586, 448)),
    ("kohya-sd", 481, 321): ((640, 427), (0, 21, 640, 405)),
    ("kohya-sd", 1500, 500): ((832, 277), (0, 10, 832, 266)),
    ("musubi", 4000, 3000): ((1184, 888), (0, 4, 1184, 884)),
    ("musubi", 481, 321): ((1248, 833), (0, 0, 1248, 832)),
    ("musubi", 1500, 500): ((1776, 592), (8, 0, 1768, 592)),
    ("musubi", 100, 900): ((512, 4608), (0, 1280, 512, 3328)),
}
"""Size after resizing and the box of the bucket in it."""

CROPS = {
    ((4000, 3000), (1152, 896)): (0, 16, 1152, 880),
    ((3000, 4000), (896, 1152)): (16, 0, 880, 1152),
    ((481, 321), (640, 384)): (32, 0, 32 + 384 * 481 / 321, 384),
    ((1024, 1024), (1024, 1024)): (0, 0, 1024, 1024),
}


@pytest.mark.parametrize("name", LISTS)
def test_buckets_are_those_of_the_trainers(name: str) -> None:
    count, first, second, last = LISTS[name]
    found = bucket_sizes(name)
    assert (len(found), *found[:2], found[-1]) == (count, first, second, last)
    assert set(BUCKETS) <= LISTS.keys()


@pytest.mark.parametrize("image", CHOICES, ids=str)
def test_an_image_is_resized_and_cropped_as_its_trainer_does(image: tuple[str, int, int]) -> None:
    name, *size = image
    assert ResizeOptions(buckets=name).placement((size[0], size[1])) == CHOICES[image]


@pytest.mark.parametrize("sizes", CROPS, ids=str)
def test_kohyas_crop_is_the_image_within_its_bucket(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    assert kohya_crop_ltrb(*sizes) == pytest.approx(CROPS[sizes])


@pytest.mark.parametrize(
    ("resize", "crop", "resized", "box"),
    [
        ("32", False, (48, 32), (0, 0, 48, 32)),
        ("32", True, (48, 32), (8, 0, 40, 32)),
        ("20x40", False, (60, 40), (0, 0, 60, 40)),
        ("20x40", True, (60, 40), (20, 0, 40, 40)),
    ],
)
def test_resize_covers_a_size_and_crop_cuts_it_out(
    resize: str, crop: bool, resized: tuple[int, int], box: tuple[int, ...]
) -> None:
    options = resize_options(resize, crop, None)
    assert options is not None and options.placement((96, 64)) == (resized, box)
    assert resize_options(None, False, None) is None


@pytest.mark.parametrize(
    ("resize", "crop", "buckets", "reason"),
    [
        ("0", False, None, "--resize 0x0: both sides must be at least 1"),
        ("1e3", False, None, "--resize 1e3 is no size; give the shorter side, such as 512, or WxH"),
        ("64", False, "musubi", "give one of them"),
        (None, True, "musubi", "leave out --crop"),
        (None, True, None, "give --resize N or WxH too"),
        (None, False, "sdxl", "--buckets sdxl is none of kohya-sdxl, kohya-sd, flux, musubi"),
        (None, False, "63", "--buckets 63 is none of .*, or of the sides 64 to 8192"),
        (None, False, "²", "--buckets ² is none of"),
    ],
)
def test_what_is_no_size_is_refused(resize: str | None, crop: bool, buckets: str | None, reason: str) -> None:
    refused(reason, resize_options, resize, crop, buckets)


def png(image: Image.Image, orientation: int = 1) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_an_image_is_turned_then_enlarged_by_lanczos_and_cropped() -> None:
    stored, options = noise(24, 16), ReadOptions(resize=ResizeOptions(size=(32, 40), crop=True))
    found = read_image(png(stored, orientation=6), options)
    upright = stored.transpose(Image.Transpose.ROTATE_270).resize((32, 48), Image.Resampling.LANCZOS)
    assert (found.pixels.permute(1, 2, 0).numpy() == np.asarray(upright.crop((0, 4, 32, 44)))).all()
    geometry = found.geometry
    assert (geometry.width, geometry.height, geometry.orientation) == (32, 40, 6)
    assert geometry.resized == Resized(original_size=(16, 24), crop_ltrb=(0, 4, 32, 44))
    assert (geometry.original_size, geometry.stored_size) == ((16, 24), (24, 16))


@pytest.mark.parametrize(("parts", "pixels"), [(4, 5), (2, 5)])
def test_an_image_is_shrunk_by_the_filter_nearest_to_the_mean_of_areas(parts: int, pixels: int) -> None:
    """OpenCV's INTER_AREA averages `pixels` parts of pixels, each of which has been divided into `parts`."""
    side = 80 * parts // pixels
    smooth = noise(20, 20).resize((80, 80), Image.Resampling.BICUBIC)
    divided = np.asarray(smooth, np.float64).repeat(parts, 0).repeat(parts, 1)
    means = divided.reshape(side, pixels, side, pixels, 3).mean((1, 3))  # (side, side, 3)
    options = ReadOptions(resize=ResizeOptions(size=(side, side)))
    found = read_image(png(smooth), options).pixels.permute(1, 2, 0).numpy()
    filters = [np.asarray(smooth.resize((side, side), kind)) for kind in Image.Resampling]
    assert np.abs(found - means).mean() == min(np.abs(other - means).mean() for other in filters) < 2
    grey = read_image(png(smooth.convert("L")), options)
    assert grey.geometry.mode == "L" and bool((grey.pixels == grey.pixels[:1]).all())


def test_the_limit_of_pixels_holds_before_and_after_resizing() -> None:
    read = ReadOptions(max_pixels=200, resize=ResizeOptions(size=(2, 2)))
    refused(r"a\.png: 24x16 = 384 pixels exceed the limit of 200", read_image, png(noise(24, 16)), read, name="a.png")
    thin = ReadOptions(max_pixels=2**20, resize=ResizeOptions(buckets="musubi"))
    reason = re.escape("thin.png: 512x2048000 = 1048576000 pixels exceed the limit of 1048576")
    refused(reason, read_image, png(noise(1, 4000)), thin, name="thin.png")
