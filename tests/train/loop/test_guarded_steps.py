"""Test that steps with numbers that are not finite change no weight, moment or count."""

import math

import pytest
import torch
from accelerate import Accelerator

from train.loop.accelerate_state import accelerate_as
from train.loop.guarded_steps import GuardedSteps
from train.loop.interrupts import HEAR_EVERY, is_heard


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_that_are_not_finite_count_and_change_nothing(kind: type[torch.optim.Adam]) -> None:
    bad = [False, True, True, False, True, False]
    found = []
    for numbers in (bad, [b for b in bad if not b]):
        with accelerate_as("no", cpu=True):
            accelerator = Accelerator()
            weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            optimizer = kind([weight], lr=0.1, fused=True)
            steps = GuardedSteps(accelerator, accelerator.prepare(optimizer), (5, 2))
            counts = []
            for is_bad in numbers:
                loss = weight.square().sum() * (math.nan if is_bad else 1.0)
                loss.backward()
                assert bool(steps.take(loss.detach())) is not is_bad and weight.grad is None
                counts.append(steps.counts())
            found.append((weight.detach().clone(), dict(optimizer.state[weight])))
        if numbers is bad:
            assert counts == [(5, 0), (6, 1), (7, 2), (7, 0), (8, 1), (8, 0)] and int(steps.skipped) == 8
    (one, first), (other, second) = found
    assert torch.equal(one, other) and all(torch.equal(first[key], second[key]) for key in first | second)


def test_a_gpu_is_heard_now_and_then_and_a_cpu_always() -> None:
    assert [is_heard(torch.device("cpu"), step) for step in range(1, 4)] == [True] * 3
    heard = [step for step in range(1, 3 * HEAR_EVERY + 1) if is_heard(torch.device("cuda"), step)]
    assert heard == [HEAR_EVERY, 2 * HEAR_EVERY, 3 * HEAR_EVERY]
