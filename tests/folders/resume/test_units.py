"""Test units, shares and the places of outputs, which are settled before any work, whatever the names."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.errors import UserError
from latent_codec.folders.resume.names import check_absent, check_outputs, folding
from latent_codec.folders.resume.units import WHOLE, Share, Unit, UnitSizes, units
from latent_codec.images.sources import Source
from tests.support.errors import refused
from tests.support.folder import ignore_case

NAMES = st.text("abcdef0123456789/.", min_size=1, max_size=12)
SIZES = st.integers(0, 2**26)
SMALL = UnitSizes(mean_images=4, most_images=6, most_bytes=1000)


def sources(sizes: dict[str, int]) -> list[Source]:
    return [Source(name, Path(name), 0, size) for name, size in sorted(sizes.items())]


@given(st.dictionaries(NAMES, st.integers(0, 1500)))
def test_units_are_a_partition_of_the_sources_in_their_order(sizes: dict[str, int]) -> None:
    everything = sources(sizes)
    found = units(everything, SMALL)
    assert [source for unit in found for source in unit.sources] == everything
    assert len({unit.name for unit in found}) == len(found)
    for unit in found:
        assert 1 <= len(unit.sources) <= 6 and sum(source.size for source in unit.sources[:-1]) < 1000


@given(st.dictionaries(NAMES, st.just(1), min_size=1), st.integers(0, 2**26), NAMES)
def test_a_units_name_is_its_first_sources_alone(sizes: dict[str, int], size: int, other: str) -> None:
    named = {unit.sources[0].name: unit.name for unit in units(sources(sizes), SMALL)}
    for first, name in named.items():
        (unit, *_) = units(sources({first: size} | {f"{first}{other}": 1}), SMALL)
        assert unit.name == name


def begins(name: str) -> bool:
    """Return whether a unit begins with this source, whatever is before it."""
    return len(units(sources({"": 1, name: 1}), SMALL)) == 2


@pytest.mark.slow
@given(st.dictionaries(NAMES, st.integers(0, 1500)), NAMES, SIZES)
def test_a_new_file_changes_no_unit_beyond_the_next_sure_beginnings(sizes: dict[str, int], new: str, size: int) -> None:
    sizes.pop(new, None)
    before, after = units(sources(sizes), SMALL), units(sources(sizes | {new: size}), SMALL)
    lower = max((name for name in sizes if name < new and begins(name)), default="")
    upper = min((name for name in sizes if name > new and begins(name)), default="\U0010ffff")

    def beyond(found: list[Unit]) -> list[Unit]:
        return [u for u in found if u.sources[-1].name < lower or u.sources[0].name >= upper]

    assert beyond(before) == beyond(after)


@given(st.integers(1, 6), st.integers(0, 20))
def test_shares_are_disjoint_and_together_the_whole(count: int, size: int) -> None:
    everything = units(sources({f"{i}": 2000 for i in range(size)}), SMALL)
    shares = [Share(index, count, alone=True).of(everything) for index in range(count)]
    assert sorted(unit for share in shares for unit in share) == sorted(everything)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for index, share in enumerate(shares):
        helper = Share(index, count, alone=False).of(everything)
        assert helper[: len(share)] == share and sorted(helper) == sorted(everything)
    assert WHOLE.of(everything) == everything


def test_a_share_is_one_of_n_counted_from_0() -> None:
    for index, count in ((0, 1), (0, 4), (3, 4), (11, 12)):
        assert Share.parse(f"{index}/{count}") == Share(index, count, alone=True)
    for text in ("", "/", "1", "1/", "/2", "0/0", "2/2", "-1/2", "0/-2", "a/b", "0 / 2", "1/2/3", "0.5/2", "0x0/2"):
        refused(f"--shard {text}: give i/n with i from 0", Share.parse, text)


def test_a_launchers_ranks_are_shares_that_help_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Share.of_launcher() == Share(0, 1, alone=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert Share.of_launcher() == Share(2, 3, alone=False)
    for rank in ("3", "-1", "", "x"):
        monkeypatch.setenv("RANK", rank)
        refused("makes no sense", Share.of_launcher)


def relative(name: str) -> bool:
    """Return whether a name stays below its folder, by other means than the program's."""
    return bool(name) and not set(name) & {"\\", "\0"} and not {"", ".", ".."} & set(name.split("/"))


@given(st.text("ab./\\\0é", max_size=8) | st.text(max_size=4))
def test_outputs_never_leave_their_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    for good in (name, os.fsdecode(b"caf\xe9.png"))[not relative(name) :]:
        check_outputs([good], folder)
        assert Path(os.path.normpath(folder / good)).is_relative_to(folder)
    for bad in (name, "\ud800.png")[relative(name) :]:  # no file can have the second
        refused(r"unsafe name .*; rename it", check_outputs, [bad], folder)


def test_links_out_of_the_folder_and_two_names_for_one_place_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for i, target in enumerate(("../..", "/", "../../folder-beside", "../nowhere/../../x", "out4")):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "sub" / f"out{i}").symlink_to(target)
        check_outputs(["sub/a.png", f"out{i}/a.png"], folder)
        with pytest.raises(UserError, match=r"sub/out\d is a link that leads out of .*; remove it or give another"):
            check_outputs(["sub/a.png", f"sub/out{i}/deep/a.png"], folder)
    (tmp_path / "link").symlink_to(folder)  # to the folder itself there may be one
    check_outputs(["sub/a.png"], tmp_path / "link")
    (folder / "a").symlink_to("sub")
    check_outputs(["a/x.png", "sub/y.png"], folder)
    refused(r"a/x\.png and sub/x\.png are one name", check_outputs, ["a/x.png", "sub/x.png"], folder)


@given(st.sets(st.text("ab/", min_size=1, max_size=6).filter(relative)))
def test_no_output_is_a_file_where_a_folder_is_due(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    clashes = any(other.startswith(f"{name}/") for name in names for other in names)
    with pytest.raises(UserError, match="both a file and a folder") if clashes else contextlib.nullcontext():
        check_outputs(sorted(names), tmp_path_factory.getbasetemp())


PAIRS = [(name, "sub/a.png") for name in ("sub/A.png", "Sub/a.png")]
PAIRS += [("caf\u00e9.png", name) for name in ("cafe\u0301.png", "CAFE\u0301.png")]


def test_names_that_the_file_system_takes_for_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clash = ["a.png", "A.PNG/b.png"]
    for names in (*PAIRS, clash):
        check_outputs(names, tmp_path)
    assert folding(tmp_path) is None  # this one tells them apart
    ignore_case(monkeypatch)
    fold = folding(tmp_path)
    assert fold is not None and list(tmp_path.iterdir()) == []
    check_outputs(["a.png", "b.png"], tmp_path, fold)
    for one, other in PAIRS:
        with pytest.raises(UserError, match=f"{one} and {other} are one name to the file system .*1 such pairs"):
            check_outputs([one, other, "other.png"], tmp_path, fold)
    refused(r"a\.png would be both a file and a folder", check_outputs, clash, tmp_path, fold)


def test_what_exists_is_counted_links_to_nowhere_too(tmp_path: Path) -> None:
    names = ["a", "b", "c", "x" * 300]
    check_absent(tmp_path / name for name in names)
    (tmp_path / "b").write_text("mine")
    (tmp_path / "c").symlink_to("nowhere")
    refused(r"exists already: .*/b and 1 more; .*--overwrite", check_absent, (tmp_path / name for name in names))
