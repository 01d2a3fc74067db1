"""Check that every kind of image file is read as its upright sRGB pixels, or refused with the reason."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, ImageCms, ImageFile
from PIL import Image as PilImage

from latent_codec.errors import UserError
from latent_codec.images.colour import in_8_bits
from latent_codec.images.geometry import Geometry
from latent_codec.images.read import DEFAULT_MAX_PIXELS, EXTENSIONS, FORMATS, ReadOptions, read_image
from latent_codec.images.write import to_pil
from tests.support.errors import refused

LOSSLESS = [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})]
ANIMATED = [f for f in ("GIF", "PNG", "WEBP", "TIFF", "AVIF") if f in FORMATS]


def random_rgb(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(h, w, 3) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: PilImage.Image | np.ndarray, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (PilImage.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, image_format, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Make a PNG that Pillow reads but cannot write; rows begin with their filter byte, 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in parts
    )


def pixels_of(source: bytes, **options: Any) -> np.ndarray:
    """(h, w, 3) uint8"""
    return read_image(source, ReadOptions(**options)).pixels.permute(1, 2, 0).numpy()


# What is refused


def refusal(source: Path | bytes, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_image(source, ReadOptions(**options), name="some.img" if isinstance(source, bytes) else None)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{source}: " if isinstance(source, Path) else "some.img: ")
    return message


def test_files_that_are_no_image_are_refused_by_name(tmp_path: Path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("this is no picture, however it is called")
    reasons = {"none.png": "No such file", ".": "directory", "empty.png": "empty", "text.jpg": "not a readable image"}
    assert all(reason in refusal(tmp_path / name) for name, reason in reasons.items())


@pytest.mark.parametrize(
    ("image_format", "values", "reason"),
    [
        *((rare, np.zeros((16, 16), np.uint8), "not a readable image") for rare in ("PCX", "ICO", "TGA")),
        ("TIFF", np.ones((2, 2), np.float32), "floating-point"),
        ("TIFF", np.array([[0, -1]], np.int32), "16 bits"),
        ("TIFF", np.array([[0, 65_536]], np.int32), "16 bits"),
    ],
)
def test_rare_formats_and_pixels_beyond_16_bits_are_refused(image_format: str, values: np.ndarray, reason: str):
    assert reason in refusal(encoded(values, image_format))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_cut_off_anywhere_is_refused(image_format: str):
    whole = encoded(random_rgb(50, 70), image_format)
    for share in (0.1, 0.5, 0.9):
        refusal(whole[: int(len(whole) * share)])


def test_a_process_that_allows_truncated_images_gets_no_silent_damage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(random_rgb(50, 70), "JPEG")
    assert "LOAD_TRUNCATED_IMAGES" in refusal(whole[: len(whole) // 2])


@pytest.mark.parametrize("image_format", ANIMATED)
def test_more_than_one_frame_is_refused(image_format: str):
    first, second = (PilImage.fromarray(random_rgb(8, 8, seed)) for seed in (0, 1))
    assert "frame" in refusal(encoded(first, image_format, save_all=True, append_images=[second]))


def test_the_main_picture_of_a_multi_picture_jpeg_is_read():
    main, extra = (PilImage.fromarray(random_rgb(16, 16, seed)) for seed in (0, 1))
    both = encoded(main, "MPO", save_all=True, append_images=[extra], quality=95)
    assert np.array_equal(pixels_of(both), pixels_of(encoded(main, "JPEG", quality=95)))


def test_a_decompression_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    for name in ("load", "load_prepare"):
        monkeypatch.setattr(ImageFile.ImageFile, name, lambda self, name=name: calls.append(name))
    message = refusal(png(50_000, 50_000, 8, 2, b""))
    assert "50000x50000" in message and str(DEFAULT_MAX_PIXELS) in message and calls == []


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "PPM"])
@pytest.mark.parametrize("pillows_limit", [600_000, 300_000])  # 700 000 pixels: warned of, refused
def test_max_pixels_overrules_pillows_limit_without_a_warning(
    image_format: str, pillows_limit: int, monkeypatch: pytest.MonkeyPatch
):
    source = encoded(PilImage.new("RGB", (1000, 700)), image_format)
    monkeypatch.setattr(PilImage, "MAX_IMAGE_PIXELS", pillows_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(source).pixels.shape == (3, 700, 1000)
    assert pillows_limit == PilImage.MAX_IMAGE_PIXELS  # still


def test_max_pixels_alone_decides_in_formats_that_check_pillows_limit_themselves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PilImage, "MAX_IMAGE_PIXELS", 10)
    for image_format in ("TIFF", "GIF", "WEBP", "PNG"):
        source = encoded(random_rgb(8, 8), image_format)
        assert pixels_of(source, max_pixels=64).shape[:2] == (8, 8)
        assert "raise --max-pixels" in refusal(source, max_pixels=63)
    assert PilImage.MAX_IMAGE_PIXELS == 10


def test_impossible_options_are_refused():
    for background in ("white", "#fff", "#gggggg", "#ffffff "):
        with pytest.raises(UserError, match="#rrggbb"):
            ReadOptions(background=background)
    refused("at least 1", ReadOptions, max_pixels=0)


# Sources


def test_path_bytes_and_streams_give_the_same_image(tmp_path: Path):
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, offset: int, whence: int = 0) -> int:
            raise io.UnsupportedOperation

    source = encoded(random_rgb(5, 7), "PNG")
    (tmp_path / "a").write_bytes(source)
    stream = io.BytesIO(source)
    stream.seek(10)
    expected = read_image(source).pixels
    for other in (tmp_path / "a", stream, Pipe(source)):
        assert torch.equal(read_image(other).pixels, expected)
    assert not stream.closed


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_is_read_at_its_size_and_the_pixel_limit_is_inclusive(image_format: str):
    source = encoded(PilImage.new("RGB", (9, 6), "#808080"), image_format)
    assert "limit of 53" in refusal(source, max_pixels=53)
    image = read_image(source, ReadOptions(max_pixels=54))
    assert image.pixels.shape == (3, 6, 9) and image.pixels.dtype == torch.uint8 and image.pixels.is_contiguous()
    assert (image.geometry.width, image.geometry.height) == (9, 6)
    assert (image.pixels.int() - 128).abs().max() <= 2  # lossy formats


def test_every_listed_suffix_is_one_that_pillow_gives_to_an_allowed_format():
    assert EXTENSIONS and {PilImage.registered_extensions()[suffix] for suffix in EXTENSIONS} == set(FORMATS)


# Colour modes


@pytest.mark.parametrize(
    ("image_format", "options", "height", "width"),
    [*((*one, 9, 7) for one in LOSSLESS), *(("BMP", {}, height, 2**16) for height in (1, 3, 4, 5, 9))],
)
def test_rgb_is_read_unchanged(image_format: str, options: dict[str, object], height: int, width: int):
    """Pixels are moved in strips of 4 rows where a row has 2**16."""
    rgb = random_rgb(height, width)
    image = read_image(encoded(rgb, image_format, **options))
    assert np.array_equal(image.pixels.numpy(), rgb.transpose(2, 0, 1))
    assert image.geometry == Geometry(width=width, height=height, orientation=1, mode="RGB", background=None)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_grey_stays_grey_and_one_bit_becomes_black_and_white(image_format: str):
    """A GIF has a palette of greys."""
    grey = random_rgb(5, 7)[..., 0]
    image = read_image(encoded(grey, image_format))
    assert image.geometry.mode == "L" and np.array_equal(image.pixels.numpy(), np.stack([grey] * 3))
    assert np.array_equal(np.asarray(to_pil(*image)), grey)
    image = read_image(encoded(np.array([[True, False, True]]), image_format))
    assert image.geometry.mode == "L" and image.pixels.tolist() == [[[255, 0, 255]]] * 3


@pytest.mark.parametrize("backdrop", [0, 1, 127, 254, 255])
def test_alpha_is_composited_in_one_rounding(backdrop: int):
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    pil = PilImage.fromarray(np.stack([colour, alpha], axis=-1).astype(np.uint8), "LA")
    image = read_image(encoded(pil, "PNG"), ReadOptions(background="#" + 3 * f"{backdrop:02x}"))
    exact = 2 * (colour * alpha + backdrop * (255 - alpha))  # over 510
    assert np.array_equal(image.pixels[0].numpy(), (exact + 255) // 510) and image.geometry.mode == "L"


@pytest.mark.parametrize(("image_format", "options"), LOSSLESS)
def test_rgba_is_composited_on_the_recorded_background(image_format: str, options: dict[str, object]):
    rgb, alpha = random_rgb(5, 7), random_rgb(5, 7, seed=1)[..., 0]
    pil = PilImage.fromarray(np.dstack([rgb, alpha]))
    image = read_image(
        encoded(pil, image_format, **options, **({"exact": True} if image_format == "WEBP" else {})),
        ReadOptions(background="#10fF80"),
    )
    share = alpha[..., None] / 255
    expected = np.rint(rgb * share + np.array([0x10, 0xFF, 0x80]) * (1 - share))
    assert np.array_equal(image.pixels.permute(1, 2, 0).numpy(), expected)
    assert (image.geometry.mode, image.geometry.background) == ("RGB", "#10ff80")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
"""A profile of sRGB with the names of its red and green primaries exchanged."""
PALETTE = PilImage.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
PALETTE.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
PALETTE_ALPHA = PilImage.frombytes("PA", (2, 1), bytes([0, 51, 1, 255]))
PALETTE_ALPHA.putpalette([0, 0, 200, 9, 8, 7])
DEEP = np.array([[65_535, 32_768, 257]])  # 16 bits


def big_endian_tiff() -> bytes:
    # width, height, bits, compression, photometric, strip offset, samples, rows per strip, strip bytes
    tags = {256: 3, 257: 1, 258: 16, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 6}
    stored = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    tiff = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + stored + bytes(4)
    return tiff + bytes(200 - len(tiff)) + struct.pack(">3H", *DEEP[0])


def zero_is_white_tiff() -> bytes:
    source = encoded(np.array([[0, 65_535, 257]], np.uint16), "TIFF")
    photometric = source.index(struct.pack("<HHI", 262, 3, 1)) + 8
    return source[:photometric] + b"\0\0" + source[photometric + 2 :]


HALF = [5, 10, 115]
CLEAR, LONG = PilImage.new("RGBA", (1, 1), (9, 9, 9, 0)), b"\xff\xff\1\2\3\4"
INDEXED = [[200, 0, 0], [10, 20, 30], [0, 0, 200]]
EXACT: dict[str, tuple[bytes, str, list[Any]]] = {  # file, background, and grey values or RGB triples of its row
    "palette": (encoded(PALETTE, "PNG"), "#ffffff", [[200, 0, 0], [0, 200, 0], [0, 0, 200]]),
    "palette with transparency, PNG": (encoded(PALETTE, "PNG", transparency=1), "#0a141e", INDEXED),
    "palette with transparency, GIF": (encoded(PALETTE, "GIF", transparency=1), "#0a141e", INDEXED),
    "palette with alphas": (encoded(PALETTE, "PNG", transparency=b"\xff\0\x80"), "#0a141e", [*INDEXED[:2], HALF]),
    "palette with an alpha channel": (encoded(PALETTE_ALPHA, "TIFF"), "#ff0000", [[204, 0, 40], [9, 8, 7]]),
    "grey with alpha on colour": (encoded(PilImage.new("LA", (1, 1), (90, 0)), "PNG"), "#010203", [[1, 2, 3]]),
    "transparent grey": (png(2, 1, 8, 0, b"\0\x09\x0a", (b"tRNS", b"\0\x09")), "#070707", [7, 10]),
    "transparent 2-bit grey": (png(4, 1, 2, 0, b"\0\x1b", (b"tRNS", b"\0\x01")), "#070707", [0, 7, 170, 255]),
    "transparent bit": (png(2, 1, 1, 0, b"\0\x40", (b"tRNS", b"\0\x01")), "#070707", [0, 7]),
    "transparent 16-bit grey": (png(2, 1, 16, 0, b"\0\x01\x2c\x01\x2d", (b"tRNS", b"\x01\x2c")), "#070707", [7, 1]),
    "transparent colour": (png(2, 1, 8, 2, b"\0\5\5\5\5\5\6", (b"tRNS", b"\0\5" * 3)), "#070707", [[7] * 3, [5, 5, 6]]),
    "transparent 16-bit colour": (png(1, 1, 16, 2, b"\0" + LONG, (b"tRNS", LONG)), "#070707", [[7] * 3]),
    "background beside a profile": (encoded(CLEAR, "PNG", icc_profile=SWAPPED), "#c80a3c", [[200, 10, 60]]),
    "big-endian 16-bit grey": (big_endian_tiff(), "#ffffff", [255, 128, 1]),
    "16-bit grey whose zero is white": (zero_is_white_tiff(), "#ffffff", [255, 0, 254]),
    "32-bit integers": (encoded(DEEP.astype(np.int32), "TIFF"), "#ffffff", [255, 128, 1]),
    "16-bit colour": (png(1, 1, 16, 2, b"\0" + struct.pack(">3H", *DEEP[0])), "#ffffff", [[255, 128, 1]]),
    "16-bit grey with alpha": (png(1, 1, 16, 4, b"\0" + struct.pack(">2H", *DEEP[0, :2])), "#000000", [128]),
}


@pytest.mark.parametrize(("source", "background", "row"), EXACT.values(), ids=EXACT)
def test_transparency_palettes_and_16_bits_are_read_exactly(source: bytes, background: str, row: list[Any]):
    image = read_image(source, ReadOptions(background=background))
    grey = isinstance(row[0], int)
    assert image.geometry.mode == ("L" if grey else "RGB")
    assert image.pixels[:, 0].T.tolist() == [[value] * 3 if grey else value for value in row]
    assert image.geometry.background == (None if background == "#ffffff" else background)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_rounded_to_8_bits(image_format: str):
    values = np.arange(65_536).reshape(256, 256)
    image = read_image(encoded(values.astype(np.uint16), image_format))
    assert image.geometry.mode == "L" and np.array_equal(image.pixels[0].numpy(), np.rint(values / 257))


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_ink_darkens(image_format: str):
    ink = np.zeros((8, 32, 4), np.uint8)
    for i in range(4):
        ink[:, 8 * i : 8 * i + 8, i] = 255
    found = pixels_of(encoded(PilImage.fromarray(ink, "CMYK"), image_format, quality=100))[4, 4::8].astype(int)
    assert np.abs(found - [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]).max() <= 3


def test_lab_becomes_rgb_and_its_a_is_no_alpha():
    pil = PilImage.frombytes("LAB", (3, 1), bytes([0, 0, 0, 255, 0, 0, 136, 0, 0]))  # 136: L* = 53.3
    image = read_image(encoded(pil, "TIFF"))
    assert np.abs(image.pixels[:, 0].numpy().astype(int) - [0, 255, 127]).max() <= 1
    assert image.geometry.background is None


@pytest.mark.parametrize(("mode", "red"), [("HSV", (0, 255, 255)), ("YCbCr", (76, 85, 255)), ("RGBX", (255, 0, 0, 9))])
def test_other_colour_spaces_become_rgb(mode: str, red: tuple[int, ...]):
    # No listed format stores HSV, and only a rare kind of TIFF YCbCr.
    rgb = in_8_bits(PilImage.new(mode, (1, 1), red), "", "some.img")
    assert rgb.mode == "RGB" and np.abs(np.asarray(rgb)[0, 0].astype(int) - [255, 0, 0]).max() <= 1


# Colour profiles


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """Make a version 2 ICC profile of an output device (ICC.1:2001-04, sections 6.1 and 6.2)."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)} | tags  # D50
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4xI4s4s4s12x4s", 132 + 12 * len(tags) + len(data), 0x02400000, b"prtr", space, connection, b"acsp"
    )
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + data


def test_an_rgb_profile_is_followed_and_srgb_changes_nothing():
    rgb = random_rgb(9, 9)
    for image_format in ("PNG", "TIFF"):
        assert np.array_equal(pixels_of(encoded(rgb, image_format, icc_profile=SRGB)), rgb)
    for stored in (rgb, np.dstack([rgb, np.full((9, 9), 255, np.uint8)])):
        found = pixels_of(encoded(stored, "PNG", icc_profile=SWAPPED))
        assert np.abs(found.astype(int) - rgb[..., [1, 0, 2]]).max() <= 1
    pil = PilImage.new("P", (2, 2))
    pil.putpalette([200, 10, 60])
    found = pixels_of(encoded(pil, "PNG", icc_profile=SWAPPED))
    assert np.abs(found[0, 0].astype(int) - [10, 200, 60]).max() <= 1


def test_a_grey_profile_is_followed_and_grey_stays_grey():
    linear = profile(b"GRAY", {b"kTRC": b"curv" + bytes(8)})
    values = np.arange(256, dtype=np.uint8)[None]
    image = read_image(encoded(values, "PNG", icc_profile=linear))
    light = values[0] / 255
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert image.geometry.mode == "L" and np.abs(image.pixels[0, 0].numpy() - 255 * srgb).max() <= 1
    assert torch.equal(image.pixels[0], image.pixels[2])


def test_a_cmyk_profile_is_followed():
    lightness = [0 if corner % 2 else 255 for corner in range(16)]  # of the lattice C, M, Y, K: black ink alone counts
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut += 4 * ramp + b"".join(bytes([value, 128, 128]) for value in lightness) + 3 * ramp
    icc = profile(b"CMYK", {b"A2B0": lut}, connection=b"Lab ")
    ink = np.array([[[255, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    found = pixels_of(encoded(PilImage.fromarray(ink, "CMYK"), "TIFF", icc_profile=icc)).astype(int)
    assert found[0, 0].min() >= 250 and found[0, 1].max() <= 5


def test_a_broken_profile_or_one_for_other_channels_is_ignored():
    rgb = random_rgb(3, 4)
    for icc in (b"no profile", SRGB[:200], SRGB[:16] + b"RGB " + bytes(300), bytes(128)):
        assert np.array_equal(pixels_of(encoded(rgb, "PNG", icc_profile=icc)), rgb)
    image = read_image(encoded(rgb[..., 0], "PNG", icc_profile=SWAPPED))
    assert np.array_equal(image.pixels[0].numpy(), rgb[..., 0])


# Orientation

UPRIGHT = {  # how a viewer turns the stored (h, w, c) array: TIFF 6.0, tag 274
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def exif_of(orientation: int) -> PilImage.Exif:
    exif = PilImage.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("image_format", "options", "width", "alpha"),
    [
        *((*one, 5, False) for one in [*LOSSLESS, ("JPEG", {})] + [("AVIF", {})] * ("AVIF" in FORMATS)),
        ("PNG", {"compress_level": 0}, 2**12, True),  # pixels are moved in two strips
    ],
)
def test_orientation_is_applied(
    image_format: str, options: dict[str, object], width: int, alpha: bool, orientation: int
):
    values = random_rgb(67, width)
    values = np.dstack([values, random_rgb(67, width, 1)[..., 0]]) if alpha else values
    image = read_image(encoded(values, image_format, exif=exif_of(orientation), **options))
    stored = pixels_of(encoded(values, image_format, **options))
    assert np.array_equal(image.pixels.permute(1, 2, 0).numpy(), UPRIGHT[orientation](stored))
    width, height = (67, width) if orientation >= 5 else (width, 67)
    background = "#ffffff" if alpha else None
    assert image.geometry == Geometry(
        width=width, height=height, orientation=orientation, mode="RGB", background=background
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_impossible_orientations_and_broken_exif_do_not_lose_the_picture():
    for orientation in (0, 9):
        source = encoded(PilImage.new("L", (2, 3)), "JPEG", exif=exif_of(orientation))
        assert read_image(source).geometry.orientation == 1
    rgb = random_rgb(3, 4)
    assert np.array_equal(pixels_of(encoded(rgb, "PNG", exif=b"Exif\0\0II*\0garbage")), rgb)
