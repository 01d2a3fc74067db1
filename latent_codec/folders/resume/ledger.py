"""Record what a folder's files were made from, so that the same command run again does what is left, and only that.

FOLDER/.latent_codec/KIND/UNIT.jsonl has a line for each image that came to an end: its source, the digest of the
settings, what was written. A line follows its output's rename, so an output without a line is at most made once more.
UNIT.lock beside it is held by the process that works on the unit; the system lets go of it when the process dies.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from filelock import FileLock

from latent_codec.errors import UserError
from latent_codec.folders.resume.journal import Journal, last_line, lines
from latent_codec.folders.resume.locks import lock, locked, try_lock
from latent_codec.folders.resume.names import check_absent
from latent_codec.folders.resume.units import Unit
from latent_codec.images.sources import OWN, Listing, Source
from latent_codec.storage import files
from latent_codec.storage.json_config import from_json, loads, to_json
from latent_codec.storage.removal import made_now, named, remove

NAME = OWN
FAILURES = "failures.jsonl"
"""File in the folder itself with path and reason of each image that failed."""
LEFT_OUT = "left_out.jsonl"
"""File beside it with the reason, the count and some paths of what was found and not taken."""

_COMPARED = 3
"""Images by whose bytes a set is recognised that was moved."""

Kind = Literal["streams", "streams.tar", "latents", "images", "images.tar"]
"""Kind of output; commands that make different kinds in one folder do not see each other's records."""
SourceCheck = Literal["hash", "mtime"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Describe one output and the source that it was made from."""

    path: str
    """The source's name."""
    output: str
    """The file that holds the output, relative to the folder."""
    settings: str
    """Digest of all that the output depends on beside its source."""
    size: int
    """Size of the source in bytes."""
    mtime_ns: int
    """Time when the file that holds the source was last changed."""
    sha256: str
    """Hash of the source."""
    shape: tuple[int, ...]
    """Shape that the inputs of its batch had in common."""
    bytes_out: int
    """Size of the file `output`."""
    sha256_out: str
    """Hash of the file `output`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Say why a source has no output."""

    path: str
    reason: str


def digest(value: Any) -> str:
    """Return the first 32 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Ledger:
    """Keep the records of one kind of output in a folder, under one set of settings.

    As a context manager it removes on entry what killed processes left half written, and lets go of all units on exit.
    Everything raises `UserError` if the folder cannot be written into or its files cannot be locked.
    """

    def __init__(self, folder: Path, kind: Kind, settings: dict[str, Any], units: Sequence[Unit] = ()) -> None:
        """`units` are those of the whole command, where a folder holds the outputs of one set of images alone."""
        self.folder, self.settings, self._plan = folder, digest(settings), sorted(unit.name for unit in units)
        self.root, self._units, self._processes = (folder / NAME / name for name in ("", kind, "processes"))
        self._alive, self._running = self._processes / files.process_name(), self.root / "running"
        self.held: set[Claim] = set()
        self.replaces_all = False
        """True if the command may replace what others have made in the folder."""
        self.sizes: dict[str, int] = {}
        """Bytes that each journal had when this process entered the ledger."""

    @staticmethod
    def exists(folder: Path, kind: Kind | None = None) -> bool:
        """Return whether a folder has a ledger, of that kind if one is given."""
        return (folder / NAME / (kind or "")).is_dir()

    def __enter__(self) -> Self:
        for folder in (self.folder, self._units, self._processes):
            files.make_folder(folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._alive))
            with files.disk_errors(self.folder):
                self._remove_stale()
                self._announce()
                self.sizes = {file.name: file.stat().st_size for file in os.scandir(self._units)}
            self._on_exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._on_exit, contextlib.suppress(OSError):
            self.let_go()
            remove(self._running / f"{self._alive.name}.json", made_now)
            remove(self._alive, made_now)

    def let_go(self) -> None:
        """Release all units that are still claimed, as after an interruption."""
        for claim in list(self.held):
            claim.release()

    def reserve(self, outputs: Sequence[str], *, overwrite: bool) -> None:
        """Take names for this folder's own; raises `UserError` if a new one is that of a file, unless `overwrite`."""
        path, self.replaces_all = self.root / "names.jsonl", overwrite
        with self.gathering():
            known = {line.value for line in lines(path) if isinstance(line.value, str)}
            new = [name for name in outputs if name not in known]
            if not overwrite:
                check_absent(self.folder / name for name in new)
            if new:
                with contextlib.closing(Journal(path)) as journal:
                    journal.write(*new)
                    journal.sync()

    def check_other_sets(self, units: Sequence[Unit], load: Callable[[Source], bytes], *, together: bool) -> None:
        """Raise `UserError` if these units' files would replace files that hold images of another set, too.

        A set is another one if it lay elsewhere and images of equal names, of which some are compared, differ. With
        `together` all files of the folder are replaced together, not those of one unit.
        """
        sources, places = {s.name: s for unit in units for s in unit.sources}, {unit.place for unit in units}
        found: dict[str, list[Record]] = {}
        for path in self._units.glob("*.jsonl"):
            place = (last_line(path, b'"place"') or {}).get("place")  # journals of older versions have none
            if place is not None and place not in places:
                there = [record for record in _read(path).records.values() if (self.folder / record.output).is_file()]
                found.setdefault("" if together else path.name, []).extend(there)
        for there in found.values():
            common = [record for record in there if record.path in sources]
            others = [record.path for record in there if record.path not in sources]
            if common and others and not any(_is_of(r, sources[r.path], load) for r in common[:_COMPARED]):
                raise UserError(
                    f"{self.folder}: holds {min(others)} of another set of images together with "
                    f"{common[0].path}, which is in both; give another folder, or --overwrite to replace them"
                )

    def gathering(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock for what is made of all units' records: the last process to hold it has seen everything."""
        return locked(self.root / "gathering.lock")

    @contextlib.contextmanager
    def idle(self, unit: str) -> Iterator[bool]:
        """Yield whether no process works on a unit; then none begins to before the context ends."""
        held = try_lock(self._units / f"{unit}.lock")
        try:
            yield held is not None
        finally:
            if held is not None:
                held.release()

    def records(self, unit: Unit) -> list[Record]:
        """Return the records of a unit under these settings."""
        names = {source.name for source in unit.sources}
        records = _read(self.journal(unit)).records.values()
        return [r for r in records if r.settings == self.settings and r.path in names]

    def recorded(self, unit: str) -> list[Record]:
        """Return all records of a unit by its name, under whatever settings."""
        return list(_read(self._units / f"{unit}.jsonl").records.values())

    def write_failures(self, units: Sequence[Unit], listing: Listing) -> None:
        """Write `FAILURES` over these units, whichever process did them, and `LEFT_OUT`; remove those without lines."""
        failures = [Failure(path=path, reason=reason) for path, reason in listing.failures.items()]
        for unit in units:
            names = {source.name for source in unit.sources}
            found = _read(self.journal(unit), only=b'"reason"').failures.values()
            failures += [f for f in found if f.path in names]
        self._write_lines(FAILURES, [to_json(f) for f in sorted(failures, key=lambda f: f.path)])
        reasons, paths = sorted(listing.left_out.counts.items()), listing.left_out.examples
        self._write_lines(LEFT_OUT, [{"reason": r, "count": count, "paths": paths[r]} for r, count in reasons])

    def _write_lines(self, name: str, values: Sequence[dict[str, Any]]) -> None:
        path = self.folder / name
        with files.disk_errors(path):
            if values:
                files.write_text(path, "".join(f"{json.dumps(value, sort_keys=True)}\n" for value in values))
            else:
                remove(path, named(FAILURES, LEFT_OUT))

    def rounds(self, units: Sequence[Unit]) -> Iterator[Iterator["Claim"]]:
        """Yield claims of all units in rounds; a round has to be finished before the next one is asked for.

        The first round has, in order, the units that no other process works on. Then come, one by one, those that
        others had, each as soon as it is let go, finished or not: two processes that waited with units of their own in
        hand could wait for each other for ever. Units that another process has finished meanwhile are `settled`.
        """
        busy: list[Unit] = []
        yield self._free(units, busy)
        for unit in busy:
            yield iter([self._claim(unit, lock(self._units / f"{unit.name}.lock"))])

    def _free(self, units: Sequence[Unit], busy: list[Unit]) -> Iterator["Claim"]:
        for unit in units:
            if (held := try_lock(self._units / f"{unit.name}.lock")) is None:
                busy.append(unit)
            else:
                yield self._claim(unit, held)

    def _claim(self, unit: Unit, held: FileLock) -> "Claim":
        try:
            claim = Claim(self, unit, held)
        except BaseException:
            held.release()
            raise
        self.held.add(claim)
        return claim

    def journal(self, unit: Unit) -> Path:
        """Return the file of a unit's records."""
        return self._units / f"{unit.name}.jsonl"

    def _announce(self) -> None:
        """Write what this process does; raises `UserError` if a living one makes the same kind by other settings.

        The same holds for other images, where a folder has those of one set alone.
        """
        own = {"kind": self._units.name, "settings": self.settings, "units": self._plan}
        with self.gathering():
            for path in self._running.glob("*.json"):
                found = loads(path.read_bytes())
                units = found.get("units", [])
                other = "settings" if found["settings"] != self.settings else "images"
                if found["kind"] == own["kind"] and (other == "settings" or are_of_other_images(self._plan, units)):
                    raise UserError(
                        f"{self.folder}: another process is at work there with other {other}; wait for its end, or "
                        "give another folder"
                    )
            files.write_text(self._running / f"{self._alive.name}.json", json.dumps(own))

    def _remove_stale(self) -> None:
        """Remove temporary files of processes that were killed; those of programs that use no ledger stay."""
        processes = [path for path in self._processes.iterdir() if path != self._alive]
        dead = {path: held for path in processes if (held := try_lock(path)) is not None}
        names = {path.name for path in dead}
        for top, folders, others in os.walk(self.folder) if dead else ():
            for path in (Path(top, name) for name in folders + others if files.temporary_of(name) in names):
                with contextlib.suppress(OSError):
                    remove(path, lambda path: files.temporary_of(path.name) in names)
        for path, held in dead.items():
            remove(self._running / f"{path.name}.json", made_now)
            remove(path, named(*names))
            held.release()


def are_of_other_images(units: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two plans, by the names of their units, have none in common."""
    return bool(units and others) and not set(units) & set(others)


class Claim:
    """Hold one unit, with its records, for this process alone."""

    def __init__(self, ledger: Ledger, unit: Unit, held: FileLock) -> None:
        self.unit, self.settings, self._ledger, self._held = unit, ledger.settings, ledger, held
        journal = ledger.journal(unit)
        state = _read(journal)
        self.records = {path: record for path, record in state.records.items() if record.settings == self.settings}
        self.failures = state.failures.keys()
        """Paths that failed when they were last tried."""
        self.settled = (
            state.settled == self.settings
            and state.settled_at >= ledger.sizes.get(journal.name, 0)
            and all(s.name in state.failures or self._is_unchanged(s) for s in unit.sources)
        )
        """True if another process has done all there is to do since this one started."""
        self._digest = functools.cache(lambda output: files.sha256_of(ledger.folder / output))
        self._left = len(unit.sources)
        self._journal = Journal(journal)

    def is_up_to_date(
        self, source: Source, output: str | None, check: SourceCheck, load: Callable[[Source], bytes]
    ) -> bool:
        """Return whether a source's output is there, in the file `output` if given, by bytes or by size and time."""
        record = self.records.get(source.name)
        if record is None or record.size != source.size or output not in (None, record.output):
            return False
        try:
            if (self._ledger.folder / record.output).stat().st_size != record.bytes_out:
                return False
            if check == "mtime":
                return self._is_unchanged(source)
            return files.sha256(load(source)) == record.sha256 and self._digest(record.output) == record.sha256_out
        except (OSError, UserError):
            return False

    def _is_unchanged(self, source: Source) -> bool:
        record = self.records.get(source.name)
        try:
            return record is not None and (record.size, record.mtime_ns) == (source.size, mtime_ns(source))
        except OSError:
            return False

    def add(self, record: Record) -> None:
        """Record an output that is in place."""
        self._journal.write(to_json(record))
        self.records[record.path] = record

    def fail(self, path: str, reason: str) -> None:
        """Record that a source has no output."""
        self._journal.write(to_json(Failure(path=path, reason=reason)))

    def settle(self) -> None:
        """Count one more image as finished; after the last one, release the unit."""
        self._left -= 1
        if self._left == 0:
            if not self.settled:
                self._journal.write({"settled": self.settings, "place": self.unit.place})
            self.release()

    def release(self) -> None:
        """Let go of the unit, finished or not."""
        self._journal.close()
        self._held.release()
        self._ledger.held.discard(self)


def mtime_ns(source: Source) -> int:
    """Return when the file that holds a source was last changed."""
    return source.path.stat().st_mtime_ns


def _is_of(record: Record, source: Source, load: Callable[[Source], bytes]) -> bool:
    try:
        return record.size == source.size and files.sha256(load(source)) == record.sha256
    except (OSError, UserError):
        return False


class _State(NamedTuple):
    """Hold the last line on each image, and on the unit."""

    records: dict[str, Record]
    failures: dict[str, Failure]
    settled: str = ""
    settled_at: int = 0


def _read(path: Path, only: bytes = b"") -> _State:
    """Read a journal; lines that are none of ours are passed over."""
    state = _State({}, {})
    for offset, value in lines(path, only):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if "settled" in value:
                state = state._replace(settled=str(value["settled"]), settled_at=offset)
            elif "reason" in value:
                failure = from_json(Failure, value)
                state.failures[failure.path] = failure
                state.records.pop(failure.path, None)
            else:
                record = from_json(Record, value)
                state.records[record.path] = record
                state.failures.pop(record.path, None)
    return state
