"""Test that the benchmark of training counts what a step computes, and times it beside its parts."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latent_codec.model.codec import Codec
from tests.support.errors import refused
from tools.benchmark.training import Recorder, TrainingSpeed

SMALL = {"batch": 2, "crop": 32, "rounds": 1, "matmul": 32, "device": "cpu", "precision": "no", "compile": False}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["joint", "elbo"])
def test_the_command_sets_a_step_beside_its_products(objective: str, model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    TrainingSpeed(model=str(model_file), objective=objective, steps=4, out=out, **SMALL).run()  # pyright: ignore[reportArgumentType]
    found = json.loads(out.read_text())
    results, products = found["results"], found["products"]
    assert results["shares"]["step_of_products_alone"] > 0
    assert results["products_alone"]["seconds"] == pytest.approx(sum(row["seconds_in_all"] for row in products))
    assert {row["product"] for row in products} >= {"convolution", "convolution_backward"}
    refused("--steps 1", TrainingSpeed(model=str(model_file), steps=1, device="cpu").run)


def test_recorded_operations_are_those_that_torch_counts(codec: Codec) -> None:
    pixels = torch.rand(2, 3, 16, 24)

    def work() -> None:
        posterior = codec.encode(pixels)
        codec.decode(posterior.mean).square().sum().backward()

    with Recorder() as recorder:
        work()
    with FlopCounterMode(display=False) as counter:
        work()
    found = sum(recorder.counts[key] * product.flops for key, product in recorder.products.items())
    assert found == counter.get_total_flops() > 0
    for product in recorder.products.values():  # and each can be called again, on numbers of its own
        arguments = [a.make("cpu") if hasattr(a, "make") else a for a in product.arguments]
        product.call(*arguments)
