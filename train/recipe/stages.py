"""The recipe's stages, each a call of a program that stands by itself, and what of them is done."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import PartialState

from latent_codec.errors import UserError
from latent_codec.export import export
from latent_codec.folders.encode_latents import encode_folder
from latent_codec.folders.jobs import Resume
from latent_codec.folders.resume.units import WHOLE
from latent_codec.images.sources import find_images
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.latents.format import INDEX
from latent_codec.metrics.bjontegaard import check_extra
from latent_codec.model.codec import Codec
from latent_codec.noise import text_key
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.json_config import to_json
from latent_codec.storage.run_folder import PRIOR_RUN_MODEL
from train import prior, vae
from train.config.common import flat
from train.config.prior import PriorConfig
from train.config.vae import TrainConfig
from train.loop.accelerate_state import accelerate_as
from train.loop.run_setup import Run
from train.recipe.comparison import draw_figure
from train.recipe.config import Recipe, codec_config, preset_of

_EXPORT_IMAGES = 256
_GPU_BATCH, _SMALL_GPU_BATCH, _LARGE_GPU = 256, 64, 16 * 2**30


class Clock:
    """Minutes of this call."""

    def __init__(self, started: float, minutes: float) -> None:
        """`started`: what `time.monotonic` said when the process began."""
        self._end = started + 60 * minutes

    @property
    def left(self) -> float:
        return (self._end - time.monotonic()) / 60


class Plan(NamedTuple):
    """What was settled once for training one network."""

    steps: int
    batch_size: int
    images_per_s: float
    """As it was measured."""

    def every(self, minutes: float) -> int:
        """Steps that take so long."""
        return max(1, round(minutes * 60 * self.images_per_s / self.batch_size))


class EndOfCallError(Exception):
    """This call does no more; `code` is the process' exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class State:
    """RUN/recipe.json: the flags that the plan follows from, the plan, and which stages are done."""

    def __init__(self, recipe: Recipe, start_id: str) -> None:
        """Raises `UserError` if the folder is a recipe with other flags."""
        fields = "total_minutes prior_share objective latent_channels batch_size crop learning_rate lpips_weight"
        flags = {"start_from": start_id} | {name: getattr(recipe, name) for name in fields.split()}
        flags |= flat(to_json(recipe.prior), "prior")
        self.path, self.plans, self.done = recipe.out / "recipe.json", dict[str, Plan](), list[str]()
        self._flags = json.loads(json.dumps(flags))
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before = {"lpips_weight": 0.0} | found["flags"]  # the first recipes had none
            if changed := [k for k in self._flags if before.get(k) != self._flags[k]]:
                raise UserError(
                    f"{recipe.out} was planned with other flags ({', '.join(changed)}); give its own, or another --out"
                )
            self.plans = {name: Plan(**plan) for name, plan in found["plans"].items()}
            self.done = found["done"]

    def write(self) -> None:
        plans = {name: plan._asdict() for name, plan in self.plans.items()}
        write_text(self.path, json.dumps({"flags": self._flags, "plans": plans, "done": self.done}, indent=1))


def advance(recipe: Recipe, started: float) -> int:
    """Go on with a recipe until it is done or the call's minutes are over; the exit code, 0 for both.

    It is 128 + a signal's number after one, and 1 if a whole call is too short to measure a speed. `started` is what
    `time.monotonic` said when the process began. Raises `UserError` as the programs do, and if there are several
    processes.
    """
    if recipe.figure_images:
        check_extra()
    with accelerate_as("no"):
        place = PartialState()
        device, processes = torch.device(place.device or "cpu"), place.num_processes
    if processes > 1:
        raise UserError(f"the recipe is for one process, not {processes}: start train.vae and train.prior on several")
    make_folder(recipe.out)
    start = Codec.load(recipe.start_from)
    stages = _Stages(recipe, Clock(started, recipe.minutes), State(recipe, start.model_id), start, device)
    work_of: dict[str, Callable[[], None]] = {
        "train the codec": stages.train_codec,
        "measure the quantiser": stages.measure_quantizer,
        "encode the images": stages.encode_images,
        "train the prior": stages.train_prior,
        "write the model": stages.write_model,
        "draw the figure": stages.draw_figure,
    }
    for name, work in work_of.items():
        if name in stages.state.done and not (work == stages.encode_images and stages.lacks_latents):
            continue
        try:
            stages.need(recipe.finish_minutes)
            print(f"{name}: {stages.clock.left:.1f} minutes left of this call", flush=True)
            work()
        except EndOfCallError as end:
            print(f"{name}: {end}; the same command goes on from here", flush=True)
            return end.code
        stages.state.done = [*stages.state.done, *([] if name in stages.state.done else [name])]
        stages.state.write()
        stages.advanced = True
    print(f"done: {stages.model}")
    return 0


@dataclasses.dataclass
class _Stages:
    """A method for each stage; one that has not come to its end raises `EndOfCallError`."""

    recipe: Recipe
    clock: Clock
    state: State
    start: Codec
    device: torch.device
    advanced: bool = False
    """Whether this call has brought a stage to its end."""

    @property
    def model(self) -> Path:
        return self.recipe.out / "photo.safetensors"

    @property
    def quantized(self) -> Path:
        return self.recipe.out / "quantised.safetensors"

    @property
    def preset(self) -> TrainConfig:
        return preset_of(self.start.config, self.recipe.objective, self.recipe.latent_channels)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def need(self, minutes: float) -> None:
        if self.clock.left < minutes:
            raise EndOfCallError(
                0, f"{max(0.0, self.clock.left):.1f} minutes are left of this call, and {minutes:g} are kept"
            )

    def train_codec(self) -> None:
        share = 1 - self.recipe.prior_share
        if "codec" not in self.state.plans:
            self._plan("codec", share, self._batch_size(), self._run_codec)
        plan = self.state.plans["codec"]
        self._run_codec(plan, self.recipe.out / "codec")
        if not (self.recipe.out / "codec" / "checkpoints" / f"step-{plan.steps:08d}").exists():
            raise EndOfCallError(0, "the minutes of this call are over")

    def _run_codec(self, plan: Plan, out: Path) -> None:
        """`train.vae` to its end or the call's."""
        config = codec_config(self.recipe, self.preset, plan.batch_size, plan.steps, self.on_gpu)
        config = dataclasses.replace(
            config,
            log_every=min(100, max(1, plan.steps // 4)),
            save_every=plan.every(self.recipe.save_minutes),
            eval_every=plan.every(2 * self.recipe.save_minutes),
        )
        run = Run(
            data=self.recipe.data,
            val=(self.recipe.val,),
            out=out,
            start_from=self.recipe.start_from,
            max_minutes=self._training_minutes(),
            lpips_backbone=self.recipe.lpips_backbone,
            config=config,
        )
        with accelerate_as("bf16" if self.on_gpu else "no"):
            self._check(vae.train(run))

    def measure_quantizer(self) -> None:
        export(
            self.recipe.out / "codec",
            self.quantized,
            data=(self.recipe.val,),
            images=_EXPORT_IMAGES,
            half=True,
        )

    def encode_images(self) -> None:
        """A folder of latents for each of `data`, and one for `val`."""
        options = ComputeOptions(device=str(self.device), batch_size=64 if self.on_gpu else 8)
        codec, compute = load(str(self.quantized), options)
        for where, folder in [*self._latents(), (self.recipe.val, self.recipe.out / "latents" / "val")]:
            print(encode_folder(codec, where, folder, compute, resume=Resume("hash", False, WHOLE)), flush=True)

    @property
    def lacks_latents(self) -> bool:
        """They are large, and may stay behind when a recipe moves to another machine; a trained prior needs none."""
        folders = [self.recipe.out / "latents" / "val", *(folder for _, folder in self._latents())]
        return "train the prior" not in self.state.done and not all((f / INDEX).exists() for f in folders)

    def _latents(self) -> Iterator[tuple[Path, Path]]:
        for i, where in enumerate(self.recipe.data):
            yield where, self.recipe.out / "latents" / f"{i}-{where.stem}"

    def train_prior(self) -> None:
        if "prior" not in self.state.plans:
            batch_size = self.recipe.prior.batch_size
            if self.on_gpu and batch_size == PriorConfig().batch_size:
                batch_size = _GPU_BATCH
            self._plan("prior", self.recipe.prior_share, batch_size, self._run_prior)
            self.need(self.recipe.finish_minutes)
        self._run_prior(self.state.plans["prior"], self.recipe.out / "prior")
        if not (self.recipe.out / "prior" / PRIOR_RUN_MODEL).exists():
            raise EndOfCallError(0, "the minutes of this call are over")

    def _run_prior(self, plan: Plan, out: Path) -> None:
        """`train.prior` to its end or the call's. It ends early enough to be frozen, which nothing interrupts."""
        measured = out.name == "prior"
        config = dataclasses.replace(
            self.recipe.prior,
            steps=plan.steps,
            batch_size=plan.batch_size,
            lr_warmup_steps=min(self.recipe.prior.lr_warmup_steps, plan.steps // 10),
            count_images=self.recipe.prior.count_images if measured else plan.batch_size,
            log_every=min(100, max(1, plan.steps // 4)),
            save_every=plan.every(self.recipe.save_minutes),
        )
        run = prior.Run(
            model=str(self.quantized),
            latents=tuple(folder for _, folder in self._latents()),
            val=(self.recipe.out / "latents" / "val",) if measured else (),
            start_from=self.recipe.out / "codec" if self.recipe.objective == "joint" else None,
            out=out,
            max_minutes=max(1e-3, self.clock.left - self.recipe.finish_minutes),
            config=config,
        )
        with accelerate_as("no"):  # in float32: its integers are to follow
            self._check(prior.train(run))

    def write_model(self) -> None:
        codec = export(self.recipe.out / "prior", self.model, data=(), images=1, half=True)
        print(f"wrote {self.model} ({self.model.stat().st_size / 1e6:.2f} MB), model {codec.model_id}", flush=True)

    def draw_figure(self) -> None:
        sources = sorted(find_images(self.recipe.val), key=lambda s: text_key(s.name))[: self.recipe.figure_images]
        if sources:
            models = {"trained": str(self.model), "start": self.recipe.start_from}
            draw_figure(sources, models, self.recipe.out / "figure", str(self.device))

    def _plan(self, name: str, share: float, batch_size: int, run: Callable[[Plan, Path], None]) -> None:
        """Measure the speed with a throwaway run, and let the plan's steps follow from it."""
        folder, steps = self.recipe.out / f"{name}-speed", self.recipe.probe_steps
        shutil.rmtree(folder, ignore_errors=True)
        run(Plan(steps, batch_size, 1e6 * batch_size), folder)  # with no save before its end
        log = folder / "log.jsonl"  # none was written if the first window was not reached
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else [])
        speeds = [line["images_per_s"] for line in lines if line["kind"] == "train" and line["step"] > steps // 2]
        if not speeds:
            raise EndOfCallError(
                1, f"{steps} steps to measure the speed did not fit into this call; give more --minutes"
            )
        shutil.rmtree(folder)
        seconds = 60 * self.recipe.total_minutes * share
        plan = Plan(max(1, round(seconds * speeds[-1] / batch_size)), batch_size, speeds[-1])
        self.state.plans[name] = plan
        self.state.write()
        print(
            f"{name}: {plan.images_per_s:.1f} images/s in batches of {batch_size}, so {plan.steps} steps in "
            f"{seconds / 60:.1f} minutes",
            flush=True,
        )

    def _batch_size(self) -> int:
        if self.recipe.batch_size is not None:
            return self.recipe.batch_size
        if not self.on_gpu:
            return self.preset.batch_size
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return _GPU_BATCH if memory >= _LARGE_GPU else _SMALL_GPU_BATCH

    def _training_minutes(self) -> float:
        return max(1e-3, self.clock.left - self.recipe.margin_minutes)

    def _check(self, code: int) -> None:
        if code:
            raise EndOfCallError(code, "interrupted")
