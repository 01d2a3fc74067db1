"""Make each kind of output once, for tests that damage copies of it and resume."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.conftest import files_of
from tests.support.folder import KINDS, SOURCES, Kind, Task

SIZES = {"a.png": (24, 16), "b.png": (24, 16), "c.jpg": (24, 16), "sub/d.png": (9, 17), "sub/é.png": (24, 16)}
"""Images in units of three and two; zbad.png, which is no image, is in the second unit."""


class Place(NamedTuple):
    """Hold a task, the folder where it was done, and the files that it made there."""

    task: Task
    folder: Path
    files: dict[str, bytes]


Places = dict[Kind, Place]
Copy = Callable[[Kind], Place]


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Places:
    """Return a place for each kind; none is to be changed."""
    root = tmp_path_factory.mktemp("places")
    for i, (name, (width, height)) in enumerate(SIZES.items()):
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(path)
    (root / "photos" / "zbad.png").write_text("no image")
    found: Places = {}
    for kind in KINDS:
        task = Task(kind, model_file, root / SOURCES.get(kind, "photos"))
        assert task.do(root / kind).done == 5
        found[kind] = Place(task, root / kind, files_of(root / kind))
    return found


@pytest.fixture
def made(places: Places, tmp_path: Path) -> Copy:
    """Return made(kind), which gives a place whose folder is a copy, to change."""

    def copy(kind: Kind) -> Place:
        shutil.copytree(places[kind].folder, tmp_path / kind)
        return places[kind]._replace(folder=tmp_path / kind)

    return copy


@pytest.fixture
def own(made: Copy, tmp_path: Path) -> Copy:
    """Return own(kind), which gives a place whose folder and sources are copies, to change."""

    def copy(kind: Kind) -> Place:
        place = made(kind)
        shutil.copytree(place.task.src, tmp_path / "src")
        return place._replace(task=place.task._replace(src=tmp_path / "src"))

    return copy
