"""The fuzz tool damages streams reproducibly, and reports what decodes, dies or stands still but should not."""

from pathlib import Path

import pytest

from latent_codec.model.codec import Codec
from tools.stress import fuzz
from tools.stress.fuzz import GOLDEN, FuzzOptions
from tools.stress.mutants import Mutant, mutate, sealed


@pytest.mark.slow
@pytest.mark.parametrize("golden", [GOLDEN, GOLDEN.parent / "4"], ids=["centred", "nested"])
def test_mutants_are_refused_or_are_exactly_what_an_encoder_writes(golden: Path) -> None:
    """With checksums left alone nothing decodes but the streams themselves.

    With new checksums a mutant may be sound: another step, orientation, colour or size within the same latents; other
    latents, where a changed bit of the payload is a bit of an escaped value. Encoding what it decodes to must then
    give the mutant's own bytes. All within a limit on memory, and without standing still.
    """
    where = {"model": golden / "tiny.safetensors", "streams": tuple(sorted(golden.glob("*.lc")))}
    report = fuzz.run(FuzzOptions(count=2000, megabytes=256, patience=300, **where))
    assert report.wrong == [] and sum(report.outcomes.values()) == 2000
    for kind in ("bytes", "payload", "header", "both"):
        assert report.outcomes[kind, "refused"] > 100
    assert report.outcomes["header", "decoded"] > 50  # new checksums do let them through to the decoder


def test_a_judge_notices_what_decodes_and_should_not() -> None:
    """Show the tool a stream it was not told of, as if its checksums had not noticed a change."""
    known, other = ((GOLDEN / f"{name}.lc").read_bytes() for name in ("grey", "factorized-mode"))
    finer = sealed(other[:29] + (1025).to_bytes(2, "little") + other[31:43], other[47:-4])
    judge = fuzz.Judge(Codec.load(GOLDEN / "tiny.safetensors"), [known])
    verdicts = judge.judge([Mutant("bytes", known), Mutant("bytes", other), Mutant("header", finer)])
    assert [verdict.outcome for verdict in verdicts] == ["decoded", "WRONG", "decoded"]


@pytest.mark.slow
def test_a_process_that_dies_or_stands_still_is_reported(tmp_path: Path) -> None:
    report = fuzz.run(FuzzOptions(count=10, megabytes=256, patience=0))
    assert "stands still" in report.wrong[0][2]
    report = fuzz.run(FuzzOptions(count=10, model=tmp_path / "none", megabytes=256, patience=300))
    assert "died with code 1" in report.wrong[0][2]


def test_mutants_are_a_function_of_their_seed_and_number() -> None:
    originals = [path.read_bytes() for path in sorted(GOLDEN.glob("*.lc"))]
    first, again, others = ([mutate(originals, seed, n) for n in range(50)] for seed in (3, 3, 4))
    assert first == again != others and len({m.data for m in first}) > 45
