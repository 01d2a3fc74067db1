"""Name shards, files that the images of a unit share, and remove those that no record names.

The name tells unit, images and settings: a shard is never changed, and what names it stays true.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from latent_codec.folders.resume.ledger import Ledger, Record, digest
from latent_codec.folders.resume.units import Unit

_NAME = re.compile(r"[a-z]+-([0-9a-f]{16})-[0-9a-f]{8}[-.].*")


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


def remove_needless(shards: Iterable[Path], ledger: Ledger, units: Sequence[Unit]) -> None:
    """Remove the shards that no record names, but neither strangers' files nor those of units that others work on."""
    of_name = {unit.name: unit for unit in units}
    for path in shards:
        if not (found := _NAME.fullmatch(path.name)):
            continue
        unit = of_name.get(found[1])
        if unit is None:
            path.unlink(missing_ok=True)
            continue
        with ledger.idle(unit.name) as idle:
            if idle and path.name not in {record.output for record in ledger.records(unit)}:
                path.unlink(missing_ok=True)
