"""Test what an image file's container may lack or say: broken metadata, damage in the middle, colour beside ICC."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PilImage
from PIL import ImageCms

from latent_codec.images.primaries import ColourTags, by_chromaticities, by_code_points
from latent_codec.images.read import FORMATS, read_image
from tests.images.test_read import encoded, pixels_of, refusal

P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return (np.stack([x * 255 / width, y * 255 / height, 128 + 0 * x], -1) + noise).clip(0, 255).astype(np.uint8)


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    found = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", found)


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Put chunks behind a PNG's header."""
    return png[:33] + b"".join(chunks) + png[33:]


METADATA = {
    "a text of 2 MB": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21))),
    "an international text of 2 MB": chunk(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    "a text's wrong checksum": chunk(b"tEXt", b"Comment\0text", 1),
    "a short gAMA": chunk(b"gAMA", b"\0\0"),
    "a short cHRM": chunk(b"cHRM", b"\0" * 8),
    "a profile that is no zlib": chunk(b"iCCP", b"name\0\0rubbish"),
    "a profile that unpacks for ever": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**25))),
    "impossible colours": chunk(b"gAMA", struct.pack(">I", 0)) + chunk(b"cHRM", bytes(32)),
}


@pytest.mark.parametrize("kind", METADATA)
def test_broken_metadata_are_no_reason_to_lose_a_picture(kind: str) -> None:
    source = encoded(smooth(), "PNG")
    np.testing.assert_array_equal(pixels_of(with_chunks(source, METADATA[kind])), pixels_of(source))


@pytest.mark.parametrize("segment", [b"\xff\xe0\0\4JF", b"\xff\xee\0\7Adobe", b"\xff\xe0\0\2", b"\xff\xee\0\2"])
def test_short_segments_of_a_jpeg_are_passed_over(segment: bytes) -> None:
    source = encoded(smooth(), "JPEG", quality=90)
    np.testing.assert_array_equal(pixels_of(source[:2] + segment + source[2:]), pixels_of(source))


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "4:4:4": {"subsampling": 0},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_with_damage_inside_is_refused(kind: str) -> None:
    source = encoded(smooth(240, 320), "JPEG", quality=90, **JPEGS[kind])
    middle = len(source) // 2
    hole = source[:middle] + bytes(500) + source[middle + 500 :]
    for damaged in (hole, source[:middle] + b"\xff\xd9", source[:middle] + source[middle + 500 :]):
        assert "may be damaged" in refusal(damaged)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_is_read_whatever_surrounds_its_data(kind: str, mode: str) -> None:
    options = JPEGS[kind] if mode == "RGB" else {name: v for name, v in JPEGS[kind].items() if name != "subsampling"}
    source = encoded(PilImage.fromarray(smooth()).convert(mode), "JPEG", quality=90, **options)
    thumbnail = encoded(smooth(8, 8), "JPEG")
    exif = b"\xff\xe1" + struct.pack(">H", 8 + len(thumbnail)) + b"Thumb\0" + thumbnail
    for sound in (
        source + bytes(99),
        source + thumbnail,
        source[:2] + exif + source[2:],
        source[:2] + b"\xff\xff" + source[2:],
    ):
        np.testing.assert_array_equal(pixels_of(sound), pixels_of(source))


def test_a_wrong_checksum_of_pixels_is_refused() -> None:
    source = bytearray(encoded(smooth(), "PNG"))
    place = source.index(b"IDAT") + 4
    length = int.from_bytes(source[place - 8 : place - 4], "big")
    source[place + length] ^= 1
    assert "wrong checksum of pixels" in refusal(bytes(source))


def in_p3(pixels: np.ndarray) -> np.ndarray:
    """Return the Display P3 values of sRGB pixels, by an independent computation of the primaries' matrices."""
    matrix = np.array([[0.8224622, 0.1775380, 0.0], [0.0331941, 0.9668058, 0.0], [0.0170827, 0.0723974, 0.9105199]])
    linear = np.where(pixels / 255 <= 0.04045, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4) @ matrix.T
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * curve).round().astype(np.uint8)


TAGS = {
    "cICP": chunk(b"cICP", bytes([12, 13, 0, 1])),
    "cHRM": chunk(b"cHRM", struct.pack(">8I", *(round(1e5 * v) for v in (*P3[6:], *P3[:6])))),
    "cHRM and gAMA": chunk(b"gAMA", struct.pack(">I", 45455))
    + chunk(b"cHRM", struct.pack(">8I", *(round(1e5 * v) for v in (*P3[6:], *P3[:6])))),
}


@pytest.mark.parametrize("kind", TAGS)
def test_a_pngs_colour_is_followed_where_it_is_told(kind: str) -> None:
    expected = smooth()
    found = pixels_of(with_chunks(encoded(in_p3(expected), "PNG"), TAGS[kind]))
    error = np.abs(found.astype(int) - expected)
    assert error.mean() < 0.6 and error.max() <= 9  # the darkest values of 8 bits lie far apart
    srgb = with_chunks(encoded(expected, "PNG"), chunk(b"sRGB", b"\0"), TAGS[kind])
    if kind != "cICP":  # which comes before all others
        np.testing.assert_array_equal(pixels_of(srgb), expected)


def test_an_exponent_is_followed_for_colour_and_grey() -> None:
    linear = chunk(b"gAMA", struct.pack(">I", 100000))
    for pixels in (np.full((4, 4, 3), 128, np.uint8), np.full((4, 4), 128, np.uint8)):
        assert set(pixels_of(with_chunks(encoded(pixels, "PNG"), linear)).flatten()) == {188}  # 255 sRGB(128 / 255)


def test_high_dynamic_range_and_unknown_code_points_are_refused() -> None:
    for code, reason in ((16, "PQ"), (18, "HLG"), (99, "transfer 99")):
        source = with_chunks(encoded(smooth(), "PNG"), chunk(b"cICP", bytes([9, code, 0, 1])))
        assert reason in refusal(source) and "convert it to sRGB" in refusal(source)
    assert by_code_points(1, 13) is by_code_points(2, 2) is by_code_points(1, 1) is None
    assert by_chromaticities(None, 0.45455) is by_chromaticities(None, None) is None


def test_a_profile_of_primaries_is_that_of_littlecms() -> None:
    ours = ImageCms.ImageCmsProfile(io.BytesIO(ColourTags(P3, None).profile()))
    srgb = ImageCms.createProfile("sRGB")
    ramp = PilImage.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3))
    grey = np.asarray(ImageCms.profileToProfile(ramp, ours, srgb)).astype(int)
    assert np.abs(grey - np.asarray(ramp)).max() <= 1  # white is white, and grey stays grey


@pytest.mark.parametrize("primaries", [1, 12])
def test_an_avifs_nclx_is_followed(primaries: int) -> None:
    pytest.importorskip("PIL.AvifImagePlugin")
    if "AVIF" not in FORMATS:
        pytest.skip("Pillow has no AVIF")
    expected = smooth()
    source = encoded(in_p3(expected) if primaries == 12 else expected, "AVIF", quality=100, subsampling="4:4:4")
    place = source.index(b"colrnclx") + 8
    tagged = source[:place] + struct.pack(">HH", primaries, 13) + source[place + 4 :]
    assert np.abs(pixels_of(tagged).astype(int) - expected).mean() < 2


@pytest.mark.parametrize(("plugin", "image_format"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")])
def test_plugins_of_pillow_are_used_where_they_are_installed(plugin: str, image_format: str) -> None:
    pytest.importorskip(plugin)
    pixels = np.full((16, 24, 3), (200, 30, 60), np.uint8)
    image = read_image(encoded(pixels, image_format, quality=95))
    assert image.pixels.shape == (3, 16, 24)
    assert np.abs(image.pixels.numpy().transpose(1, 2, 0).astype(int) - pixels).max() <= 4
