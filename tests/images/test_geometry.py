"""Check that geometries survive JSON, and that cropping undoes padding."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.images.geometry import Geometry, crop, pad
from latent_codec.storage.json_config import from_json, to_json


@given(
    st.builds(
        Geometry,
        width=st.integers(1, 2**31),
        height=st.integers(1, 2**31),
        orientation=st.integers(1, 8),
        mode=st.sampled_from(["L", "RGB"]),
        background=st.none() | st.integers(0, 2**24 - 1).map("#{:06x}".format),
    )
)
def test_geometry_survives_json(geometry: Geometry):
    assert from_json(Geometry, json.loads(json.dumps(to_json(geometry)))) == geometry


def test_an_impossible_geometry_is_refused():
    good = {"width": 1, "height": 1, "orientation": 1, "mode": "L", "background": None}
    assert from_json(Geometry, good)
    for field, value in [("width", 0), ("height", -1), ("orientation", 9), ("mode", "CMYK"), ("background", "red")]:
        with pytest.raises(ValueError):
            from_json(Geometry, good | {field: value})


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    leading=st.lists(st.integers(1, 3), max_size=3),
    factor=st.integers(1, 17),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_pad_repeats_the_edge_in_any_dtype(size: tuple[int, int], leading: list[int], factor: int, dtype: torch.dtype):
    """Cropping undoes it."""
    x = torch.randint(0, 256, (*leading, *size), generator=torch.Generator().manual_seed(0)).to(dtype)
    padded = pad(x, factor)
    rows, columns = (torch.arange(n).clamp(max=m - 1) for n, m in zip(padded.shape[-2:], size, strict=True))
    assert padded.dtype == dtype
    assert all(n % factor == 0 and n - m < factor for n, m in zip(padded.shape[-2:], size, strict=True))
    assert torch.equal(padded, x[..., rows, :][..., columns])
    geometry = Geometry(width=size[1], height=size[0], orientation=1, mode="RGB", background=None)
    assert torch.equal(crop(padded, geometry), x)
