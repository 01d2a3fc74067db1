"""Test that a folder's records survive what cuts them short, and that no two processes work on one unit."""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import filelock
import hypothesis
import pytest
from hypothesis import strategies as st

from latent_codec.folders.resume import ledger
from latent_codec.folders.resume.journal import Journal, lines
from latent_codec.folders.resume.ledger import FAILURES, Claim, Ledger, Record, mtime_ns
from latent_codec.folders.resume.locks import try_lock
from latent_codec.folders.resume.units import Unit, UnitSizes, units
from latent_codec.images.sources import Source, list_files
from latent_codec.storage.files import DiskError, sha256, temporary_of
from tests.support.errors import refused
from tests.support.folder import hold, start, wait_for

SETTINGS = {"step": 1.0}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Return a folder of files a to e, which make units of two, two and one."""
    (tmp_path / "src").mkdir()
    for name in "abcde":
        (tmp_path / "src" / f"{name}.png").write_text(name)
    return tmp_path / "src"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "folder"


def plans(src: Path) -> list[Unit]:
    return units(list_files(src, ".png").sources, UnitSizes(mean_images=2**63, most_images=2))


def record(folder: Path, claim: Claim, source: Source) -> Record:
    """Put an output in place that is the source's bytes, and return its record."""
    data, output = source.read_bytes(), f"{source.name}.out"
    (folder / output).write_bytes(data)
    of_source = {"path": source.name, "size": source.size, "mtime_ns": mtime_ns(source), "sha256": sha256(data)}
    of_output: Any = {"output": output, "bytes_out": len(data), "sha256_out": sha256(data), "shape": (1,)}
    return Record(settings=claim.settings, **of_source, **of_output)


def claims(ledger: Ledger, everything: list[Unit]) -> Iterator[Claim]:
    return itertools.chain.from_iterable(ledger.rounds(everything))


def make(folder: Path, src: Path, settings: dict[str, Any] = SETTINGS, bad: str = "") -> list[str]:
    """Do what is left, and return the names of what had to be made."""
    made: list[str] = []
    with Ledger(folder, "streams", settings) as ledger:
        for claim in claims(ledger, plans(src)):
            for source in claim.unit.sources:
                if source.name == bad:
                    claim.fail(source.name, "it is bad")
                elif not claim.is_up_to_date(source, None, "hash", Source.read_bytes):
                    claim.add(record(folder, claim, source))
                    made.append(source.name)
                claim.settle()
        ledger.write_failures(plans(src), list_files(src, ".png"))
    return made


@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data())
def test_a_journal_cut_off_keeps_whole_lines(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.dictionaries(st.text(), st.integers() | st.text()), min_size=1, max_size=5))
    path = tmp_path_factory.getbasetemp() / "j.jsonl"
    path.unlink(missing_ok=True)
    with contextlib.closing(Journal(path)) as journal:
        journal.write(*values)
    text = path.read_bytes()
    cut = data.draw(st.integers(0, len(text)))
    path.write_bytes(text[:cut] + data.draw(st.sampled_from([b"", b"\0" * 9, b"\xff{", b'"'])))
    whole = text[:cut].count(b"\n")
    for i in range(2):
        with contextlib.closing(Journal(path)) as journal:
            journal.write({"more": i})
        found = [line.value for line in lines(path)]
        assert found[-1 - i :] == [{"more": j} for j in range(i + 1)]
        assert found[: -1 - i] in (values[:whole], values[: whole + 1])
        assert all(path.read_bytes()[line.offset :].startswith(b"{") for line in lines(path))


def test_lines_of_others_are_passed_over(folder: Path, src: Path) -> None:
    assert make(folder, src) == [f"{name}.png" for name in "abcde"]
    strange = b'[]\n7\nnull\n{}\n{"path": 7}\n{"reason": []}\n{"settled": 1}\n'
    for path in (folder / ".latent_codec" / "streams").glob("*.jsonl"):
        path.write_bytes(strange + path.read_bytes() + strange)
    assert make(folder, src) == []


def test_the_last_word_on_an_image_counts(folder: Path, src: Path) -> None:
    make(folder, src, bad="b.png")
    assert json.loads((folder / FAILURES).read_text()) == {"path": "b.png", "reason": "it is bad"}
    assert make(folder, src) == ["b.png"] and not (folder / FAILURES).exists()
    make(folder, src, bad="b.png")
    with Ledger(folder, "streams", SETTINGS) as ledger:
        assert [r.path for r in ledger.records(plans(src)[0])] == ["a.png"]


def test_names_that_are_no_utf_8_are_remembered(folder: Path, src: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (src / name).write_text("x")
    assert name in make(folder, src) and make(folder, src, bad=name) == []
    assert json.loads((folder / FAILURES).read_text())["path"] == name


def other_process() -> Any:
    """Name this process as another; its locks are its own all the same."""
    return mock.patch.object(ledger.files, "process_name", lambda: "0123456789abcdef")


@pytest.mark.parametrize("change", ["none", "new source", "edited source"])
def test_a_unit_that_another_process_finished_stays_unless_changed(folder: Path, src: Path, change: str) -> None:
    def settled(ledger: Ledger) -> list[bool]:
        found: list[bool] = []
        for claim in claims(ledger, plans(src)):
            found.append(claim.settled)
            claim.release()
        return found

    with Ledger(folder, "streams", SETTINGS) as early:
        with other_process():
            make(folder, src, bad="c.png")
        if change == "new source":
            (src / "aa.png").write_text("x")
        if change == "edited source":
            os.utime(src / "a.png", ns=(7, 7))
        assert settled(early)[0] == (change == "none")
    with Ledger(folder, "streams", SETTINGS) as late:
        assert not any(settled(late))


def test_a_process_with_other_settings_is_refused_while_another_is_at_work(folder: Path, src: Path) -> None:
    """The outputs of both would be mixed; those of another kind have a ledger of their own."""
    with Ledger(folder, "streams", SETTINGS), other_process():
        refused("at work there with other settings", make, folder, src, {"step": 3.0})
        for kind, settings in (("streams", SETTINGS), ("latents", {"step": 3.0})):
            with Ledger(folder, kind, settings):  # pyright: ignore[reportArgumentType]
                pass
    assert make(folder, src, {"step": 3.0})


def test_a_process_with_other_images_is_refused_where_one_index_names_them(folder: Path, src: Path) -> None:
    mine = plans(src)
    others = [unit._replace(name=f"{i:016x}") for i, unit in enumerate(mine)]
    with Ledger(folder, "latents", SETTINGS, mine), other_process():
        refused("at work there with other images", Ledger(folder, "latents", SETTINGS, others).__enter__)
        for units in (mine, [mine[0], *others], ()):
            with Ledger(folder, "latents", SETTINGS, units):
                pass
    with Ledger(folder, "latents", SETTINGS, others):
        pass


def test_a_claim_keeps_other_processes_out_until_its_unit_is_done(folder: Path, src: Path) -> None:
    everything = plans(src)
    with Ledger(folder, "streams", SETTINGS) as one:
        mine = next(next(one.rounds(everything)))
        with other_process(), Ledger(folder, "streams", SETTINGS) as other:
            rounds = other.rounds(everything)
            assert [claim.unit for claim in next(rounds)] == everything[1:]
            with one.idle(everything[0].name) as idle:
                assert not idle
            for source in mine.unit.sources:
                mine.add(record(folder, mine, source))
                mine.settle()
            with one.idle(everything[0].name) as idle:
                assert idle
            (late,) = next(rounds)
            assert late.unit == everything[0] and late.settled
            assert list(rounds) == []


@pytest.mark.slow
def test_a_live_process_keeps_its_files_and_a_killed_one_loses_both(folder: Path, src: Path) -> None:
    others = [folder / name for name in ("deep/.x.0123456789abcdef-01234567.tmp", ".mine.tmp", "x.tmp", ".step-1.tmp")]
    child = start(hold, folder, plans(src), folder / "deep" / "a.out")
    wait_for(lambda: (folder / "held").exists() and (folder / "held").read_text() == "3")
    for path in others:
        path.write_text("of a program that has no ledger")
    (begun,) = (path for path in (folder / "deep").iterdir() if path not in others)
    try:
        assert temporary_of(begun.name)
        with Ledger(folder, "streams", {}) as ledger:
            rounds = ledger.rounds(plans(src))
            assert list(next(rounds)) == [] and begun.exists()
            os.kill(child.pid, signal.SIGKILL)  # only now can these be had
            assert [claim.unit for some in rounds for claim in some] == plans(src)
    finally:
        child.kill()
        child.join()
    assert begun.exists()
    of_library = begun.with_name(begun.name.replace("a.out", "b.out"))  # a folder for a library's own temporary files
    of_library.mkdir()
    (of_library / ".tmpAbCdEf").write_text("half of a shard")
    with Ledger(folder, "streams", {}):
        assert not begun.exists() and not of_library.exists()
    assert all(path.exists() for path in others)
    assert list((folder / ".latent_codec" / "processes").iterdir()) == []


def test_a_name_is_checked_to_be_free_once(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").write_text("x")
    with Ledger(folder, "streams", {}) as ledger:
        refused(r"exists already: .*mine; ", ledger.reserve, ["a", "mine", "b"], overwrite=False)
        ledger.reserve(["a", "b"], overwrite=False)
        for name in "ac":
            (folder / name).write_text("x")
        ledger.reserve(["a", "b"], overwrite=False)
        refused(r"exists already: .*c; ", ledger.reserve, ["a", "b", "c"], overwrite=False)
        ledger.reserve(["c", "mine"], overwrite=True)
    with Ledger(folder, "images", {}) as ledger:
        ledger.reserve(["a", "b", "c", "mine"], overwrite=False)


def test_a_folder_where_nothing_can_be_locked_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
        with monkeypatch.context() as patch:  # some libraries would take a lock that outlives its holder instead
            patch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(code, "no flock")))
            refused(
                "files there cannot be locked .*; give a folder on another", Ledger(folder, "streams", {}).__enter__
            )
            refused("files there cannot be locked", try_lock, folder / "run.lock")
            assert not list(folder.glob("run.lock?*"))  # nor is a marker left
    unlocked = NotImplementedError("no flock here"), OSError(errno.ENOLCK, "no locks")
    reasons = dict.fromkeys(unlocked, "files there cannot be locked .*; give a folder on another file system")
    for error, told in (reasons | {OSError(errno.EROFS, "read-only"): "cannot be written: read-only; solve"}).items():
        monkeypatch.setattr(filelock.FileLock, "acquire", mock.Mock(side_effect=error))
        refused(told, Ledger(folder, "streams", {}).__enter__)


def test_a_disk_that_takes_half_a_line_says_why_not_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = mock.Mock(**{"tell.return_value": 0, "write.side_effect": [9, OSError(errno.ENOSPC, "No space left")]})
    monkeypatch.setattr(Path, "open", lambda *_, **__: full)
    journal = Journal(tmp_path / "j.jsonl")
    with pytest.raises(DiskError, match=r"j\.jsonl cannot be written: No space left"):
        journal.write({"a": "long line"})


def test_records_are_compared_by_all_their_fields(folder: Path, src: Path) -> None:
    make(folder, src)
    source = plans(src)[0].sources[0]
    with Ledger(folder, "streams", SETTINGS) as ledger:
        claim = next(claims(ledger, plans(src)))
        good = claim.records[source.name]
        changes = {"output": "none", "size": 9, "sha256": "0", "bytes_out": 9, "sha256_out": "0"}
        for name, value in changes.items():
            claim.records[source.name] = dataclasses.replace(good, **{name: value})
            assert not claim.is_up_to_date(source, None, "hash", Source.read_bytes)
        claim.records[source.name] = dataclasses.replace(good, mtime_ns=0)
        assert claim.is_up_to_date(source, good.output, "hash", Source.read_bytes)
        assert not claim.is_up_to_date(source, good.output, "mtime", Source.read_bytes)
        assert not claim.is_up_to_date(source, "other", "hash", Source.read_bytes)
