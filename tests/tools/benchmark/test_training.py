"""The benchmark of training counts what a step computes, and times it beside its parts."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from tools.benchmark.training import Recorder, TrainingSpeed
from train.recipe.config import Objective


@pytest.mark.parametrize("objective", ["joint", "elbo"])
def test_the_command_sets_a_step_beside_its_products(objective: Objective, model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    TrainingSpeed(
        model=str(model_file),
        objective=objective,
        batch=2,
        crop=32,
        steps=4,
        rounds=1,
        matmul=32,
        device="cpu",
        precision="no",
        compile=False,
        out=out,
    ).run()
    found = json.loads(out.read_text())
    results, products = found["results"], found["products"]
    step, alone = results["step"], results["products_alone"]
    assert results["shares"]["step_of_products_alone"] == alone["seconds"] / step["seconds"] > 0
    assert alone["seconds"] == pytest.approx(sum(row["seconds_in_all"] for row in products))
    assert {row["product"] for row in products} >= {"convolution", "convolution_backward"}
    assert step["tflops"] == pytest.approx(step["tflop"] / step["seconds"])


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


def test_what_cannot_be_timed_is_refused(model_file: Path) -> None:
    with pytest.raises(UserError, match="--steps 1"):
        TrainingSpeed(model=str(model_file), steps=1, device="cpu").run()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cpu"):
            TrainingSpeed(model=str(model_file)).run()
