"""Compare the speed of a training step with that of its convolutions and products timed alone."""

import dataclasses
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from tools.benchmark.record import machine, now, report
from train import vae
from train.config.vae import JointConfig
from train.loop.accelerate_state import accelerate_as
from train.loop.run_setup import Run
from train.recipe.config import Objective, preset_of

_IN_A_ROW = 10

LEAST_SHARE = 0.5
"""Share of the attainable rate that a training step should reach."""


class Shape(NamedTuple):
    """Stand for a tensor of a recorded product."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: str) -> torch.Tensor:
        """Return such a tensor of random numbers."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device).normal_()


class Product(NamedTuple):
    """Hold one kind of convolution, matrix product or gradient of one, as autograd and autocast call it."""

    name: str
    sizes: tuple[tuple[int, ...], ...]
    dtype: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: int


class Recorder(TorchDispatchMode):
    """Record and count every kind of product whose operations PyTorch counts."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[str, Product] = {}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            shapes = tree_map(_shape_of, args)
            key = f"{func}{shapes}"
            self.counts[key] += 1
            if key not in self.products:
                flops = counted(*args, **(kwargs or {}), out_val=out)
                found = [t for t in shapes if isinstance(t, Shape)]
                name = str(func._overloadpacket).removeprefix("aten.")
                sizes, dtype = tuple(t.size for t in found), str(found[0].dtype).removeprefix("torch.")
                self.products[key] = Product(name, sizes, dtype, func, shapes, flops)
        return out


def _shape_of(value: Any) -> Any:
    return Shape(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """Measure operations per second of a step of train.vae, of its products each timed alone, and of one product."""

    model: str = "photo"
    objective: Objective = "joint"
    """Objective of train.recipe."""
    batch: int = 256
    crop: int = 128
    steps: int = 100
    """Steps of a run, of which the last half counts."""
    rounds: int = 5
    """Times that each product is timed, in turn; medians count."""
    matmul: int = 8192
    """Side of the matrices whose product is the peak."""
    device: Literal["cpu", "cuda"] = "cuda"
    precision: Literal["no", "bf16"] = "bf16"
    compile: bool = True
    out: Path | None = None
    """JSON file for the results and, in it alone, a row for each kind of product, the slowest first."""

    def run(self) -> None:
        """Measure all three and report their shares."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is none; give --device cpu, with a small --batch and --matmul")
        if min(self.batch, self.rounds, self.matmul) < 1 or self.steps < 2:
            raise UserError(f"--steps {self.steps} must be at least 2, and --batch, --rounds and --matmul at least 1")
        model = Codec.load(self.model)
        preset = preset_of(model.config, self.objective)
        if isinstance(preset.objective, JointConfig) and model.priors is not None and model.priors.context is not None:
            shape = model.priors.context.config
            own = {"prior_groups": shape.groups[:-1], "prior_levels": shape.levels, "prior_width": shape.width}
            preset = dataclasses.replace(preset, objective=dataclasses.replace(preset.objective, **own))
        own = {"steps": self.steps, "batch_size": self.batch, "crop": self.crop, "compile": self.compile}
        own |= {"log_every": self.steps // 2, "eval_every": self.steps, "save_every": self.steps, "closed_form": False}
        config = dataclasses.replace(preset, eval_crop=self.crop, **own)
        with tempfile.TemporaryDirectory() as name:
            images, out = Path(name, "images"), Path(name, "run")
            run = Run(data=(images,), out=out, val_images=2, start_from=self.model, config=config)
            step, recorder = self._step_seconds(run), self._record(run)
        rows = self._time(recorder)
        flops = sum(recorder.counts[key] * product.flops for key, product in recorder.products.items())
        alone = sum(row["seconds_in_all"] for row in rows)
        peak = self._peak()
        results = {
            "step": {"seconds": step, "tflop": flops / 1e12, "tflops": flops / step / 1e12},
            "products_alone": {"seconds": alone, "tflops": flops / alone / 1e12},
            "matmul": {"tflops": peak / 1e12},
            "shares": {
                "step_of_products_alone": alone / step,
                "step_of_matmul": flops / step / peak,
                "products_alone_of_matmul": flops / alone / peak,
                "least_step_of_products_alone": LEAST_SHARE,
            },
        }
        fields = ("objective", "batch", "crop", "steps", "rounds", "matmul", "precision", "compile")
        about = {"model": self.model} | {name: getattr(self, name) for name in fields}
        report(results, about | machine(self.device), self.out, products=rows)

    def _step_seconds(self, run: Run) -> float:
        """Return the seconds of a step of `train.vae` on images of noise, from its log."""
        random, side = np.random.default_rng(0), max(256, self.crop)
        run.data[0].mkdir()
        for i in range(16):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(run.data[0] / f"{i:02d}.png")
        with accelerate_as(self.precision, cpu=self.device == "cpu"):
            if vae.train(run):
                raise UserError("the run was interrupted before its speed was known")
        lines = map(json.loads, (run.out / "log.jsonl").read_text(encoding="utf-8").splitlines())
        return self.batch / [line["images_per_s"] for line in lines if line["kind"] == "train"][-1]

    def _record(self, run: Run) -> Recorder:
        """Record the products of forward and backward of one batch, not compiled."""
        codec = Codec(run.config.codec)
        objective = vae.make_objective(run, codec).to(self.device).to(memory_format=torch.channels_last)
        pixels = torch.randint(0, 256, (self.batch, codec.config.image_channels, self.crop, self.crop))
        labels = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        keys, beta = torch.arange(self.batch, device=self.device), torch.ones((), device=self.device)
        with Recorder() as recorder:
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                losses = objective(pixels.to(self.device, torch.uint8), keys, labels, beta, False)
            losses.loss.backward()
        return recorder

    def _time(self, recorder: Recorder) -> list[dict[str, Any]]:
        """Return a row for each kind of product, the slowest first."""
        taken: dict[str, list[float]] = {key: [] for key in recorder.products}
        for round_ in range(self.rounds + 1):
            for key, product in recorder.products.items():
                arguments = tree_map(
                    lambda value: value.make(self.device) if isinstance(value, Shape) else value,
                    product.arguments,
                    is_leaf=lambda value: isinstance(value, Shape),
                )
                seconds = self._seconds(lambda call=product.call, given=arguments: call(*given))
                if round_:
                    taken[key].append(seconds)
        rows = []
        for key, product in recorder.products.items():
            seconds, count = statistics.median(taken[key]), recorder.counts[key]
            row = {"product": product.name, "sizes": product.sizes, "dtype": product.dtype, "count": count}
            rows.append(row | {"seconds_in_all": seconds * count, "tflops": product.flops / seconds / 1e12})
        return sorted(rows, key=lambda row: -row["seconds_in_all"])

    def _peak(self) -> float:
        """Return the operations per second of one matrix product, the fastest of the rounds."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        a, b = (torch.randn(self.matmul, self.matmul, device=self.device, dtype=dtype) for _ in range(2))
        self._seconds(lambda: a @ b)
        return 2 * self.matmul**3 / min(self._seconds(lambda: a @ b) for _ in range(self.rounds))

    def _seconds(self, call: Callable[[], Any]) -> float:
        """Return the seconds of one call; on a GPU ten calls in a row hide the time of launching them."""
        if self.device == "cpu":
            started = now()
            call()
            return now() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        begin.record()
        for _ in range(_IN_A_ROW):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / _IN_A_ROW
