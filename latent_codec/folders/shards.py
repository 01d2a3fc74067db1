"""Files that many images share: what they are called, and when they may go.

A shard holds what was made of one unit's images, and its name says of which and with which settings. So a shard is
never changed: other contents have another name, and what names a shard stays true until it is written anew.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from latent_codec.folders.resume.ledger import Ledger, Record, digest
from latent_codec.folders.resume.units import Unit

_NAME = re.compile(r"[a-z]+-([0-9a-f]{16})-[0-9a-f]{8}[-.].*")


def shard_name(unit: str, settings: str, images: Iterable[tuple[str, str]]) -> str:
    """`UNIT-DIGEST`, by the (path, SHA-256) of all the images in it; what kind of shard it is goes before that."""
    return f"{unit}-{digest([settings, sorted(images)])[:8]}"


def are_whole(records: Sequence[Record]) -> bool:
    """Whether the shards of these images of a unit hold all of them and no others."""
    if not records:
        return True
    kind, unit, *_ = records[0].output.split("-")
    name = shard_name(unit, records[0].settings, [(record.path, record.sha256) for record in records])
    return all(record.output.startswith(f"{kind}-{name}.") for record in records)


def remove_needless(shards: Iterable[Path], ledger: Ledger, units: Sequence[Unit]) -> None:
    """Those that no record names; what another process works on it may be about to record. Others' files stay."""
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
