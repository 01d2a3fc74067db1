"""Name shards, files that the images of a unit share, and remove those that no record names.

The name tells unit, images and settings: a shard is never changed, and what names it stays true.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path

from latent_codec.folders.resume.ledger import Claim, Ledger, Record, digest
from latent_codec.folders.resume.units import Unit
from latent_codec.storage.removal import remove

_NAME = re.compile(r"(?:streams|images|latents)-([0-9a-f]{16})-[0-9a-f]{8}\.(?:tar|safetensors)")


def shard_name(unit: str, settings: str, images: Iterable[tuple[str, str]]) -> str:
    """Return `UNIT-DIGEST` for the (path, SHA-256) of all images in a shard; its kind goes before that."""
    return f"{unit}-{digest([settings, sorted(images)])[:8]}"


def are_whole(records: Sequence[Record]) -> bool:
    """Return whether the shards of a unit's records hold all of their images and no others."""
    if not records:
        return True
    kind, unit, *_ = records[0].output.split("-")
    name = shard_name(unit, records[0].settings, [(record.path, record.sha256) for record in records])
    return all(record.output.startswith(f"{kind}-{name}.") for record in records)


def remove_needless(shards: Iterable[Path], ledger: Ledger, units: Sequence[Unit], *, others_too: bool = False) -> None:
    """Remove the shards whose images this command has made anew, in other shards.

    Strangers' files stay, and shards of images that fail now and of units that others work on; shards of other images
    stay without `others_too`.
    """
    needless = _Needless(ledger, units, others_too)
    for path in shards:
        if found := _NAME.fullmatch(path.name):
            with ledger.idle(found[1]) as idle:
                if idle:
                    remove(path, partial(needless.is_replaced, unit=found[1]))


def is_shard_of(path: Path, unit: Unit) -> bool:
    """Return whether a file has the exact name of a shard of a unit."""
    found = _NAME.fullmatch(path.name)
    return found is not None and found[1] == unit.name


class _Needless:
    def __init__(self, ledger: Ledger, units: Sequence[Unit], others_too: bool) -> None:
        self._ledger, self._units, self._others_too = ledger, {unit.name: unit for unit in units}, others_too

    def is_replaced(self, path: Path, unit: str) -> bool:
        if planned := self._units.get(unit):
            outputs = {record.output for record in self._ledger.records(planned)}
            return bool(outputs) and path.name not in outputs
        images = {record.path for record in self._ledger.recorded(unit) if record.output == path.name}
        return self._others_too or (bool(images & self._planned) and images & self._planned <= self._made)

    @cached_property
    def _planned(self) -> set[str]:
        return {source.name for unit in self._units.values() for source in unit.sources}

    @cached_property
    def _made(self) -> set[str]:
        return {record.path for unit in self._units.values() for record in self._ledger.records(unit)}


def earlier_shards(claim: Claim, folder: Path) -> list[Path]:
    """Return the shards that hold a unit's images until now."""
    found = sorted({record.output for record in claim.records.values()})
    return [folder / name for name in found if (folder / name).is_file()]
