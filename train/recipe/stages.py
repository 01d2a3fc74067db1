"""Run the recipe's stages in order, and record which are done in RUN/recipe.json."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import PartialState

from latent_codec.errors import UserError
from latent_codec.export import export
from latent_codec.folders.encode_latents import encode_latents
from latent_codec.images.sources import find_images
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.latents.format import INDEX
from latent_codec.metrics.bjontegaard import check_extra
from latent_codec.model.codec import Codec
from latent_codec.noise import text_key
from latent_codec.program import say
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.json_config import to_json
from latent_codec.storage.removal import remove
from latent_codec.storage.run_folder import PRIOR_RUN_MODEL
from train import prior, vae
from train.config.common import flat
from train.config.prior import PriorConfig
from train.config.vae import TrainConfig
from train.loop.accelerate_state import accelerate_as
from train.loop.run_setup import Run
from train.recipe.comparison import compare
from train.recipe.config import Recipe, codec_config, gpu_batch, preset_of

_EXPORT_IMAGES = 256
_GPU_BATCH = 256  # of the prior
_LEAST_MINUTES = 1e-5  # a run of no time at all still takes one step


class Clock:
    """Tell how many minutes of this call are left."""

    def __init__(self, started: float, minutes: float) -> None:
        """`started` is `time.monotonic()` at the start of the process."""
        self._end = started + 60 * minutes

    @property
    def left(self) -> float:
        """Minutes until the call has to end; negative afterwards."""
        return (self._end - time.monotonic()) / 60


class TrainingPlan(NamedTuple):
    """Fix the number of steps of one network's training, from a speed measured once."""

    steps: int
    batch_size: int
    images_per_s: float

    def every(self, minutes: float) -> int:
        """Return the number of steps that take so many minutes, at least 1."""
        return max(1, round(minutes * 60 * self.images_per_s / self.batch_size))


class EndOfCallError(Exception):
    """Ends this call with the exit code `code`; the same command continues from there."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class State:
    """Keep RUN/recipe.json: the flags that fix the plans, the plans, and the stages that are done."""

    def __init__(self, recipe: Recipe, start_id: str) -> None:
        """Read the file if there is one; raises `UserError` if it was written with other flags."""
        fields = "total_minutes prior_share objective latent_channels batch_size crop learning_rate lpips_weight"
        flags = {"start_from": start_id} | {name: getattr(recipe, name) for name in fields.split()}
        flags |= flat(to_json(recipe.prior), "prior")
        self.path, self.plans, self.done = recipe.out / "recipe.json", dict[str, TrainingPlan](), list[str]()
        self._flags = json.loads(json.dumps(flags))
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            before = {"lpips_weight": 0.0} | found["flags"]  # the first recipes had no LPIPS
            if changed := [k for k in self._flags if before.get(k) != self._flags[k]]:
                raise UserError(
                    f"{recipe.out} was planned with other flags ({', '.join(changed)}); give its own, or another --out"
                )
            self.plans = {name: TrainingPlan(**plan) for name, plan in found["plans"].items()}
            self.done = found["done"]

    def finish(self, stage: str) -> None:
        """Record that a stage is done."""
        if stage not in self.done:
            self.done.append(stage)
        self.write()

    def write(self) -> None:
        """Write the file."""
        plans = {name: plan._asdict() for name, plan in self.plans.items()}
        write_text(self.path, json.dumps({"flags": self._flags, "plans": plans, "done": self.done}, indent=1))


def advance(recipe: Recipe, clock: Clock) -> int:
    """Continue a recipe until it is done or the call's minutes are over, and return the exit code.

    The code is 0 for both, 128 + the number of a signal that ended the call, and 1 if a whole call is too short to
    measure the speed. Raises `UserError` as the training programs do, and for more than one process.
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
    state = State(recipe, start.model_id)
    stages = Stages(recipe, clock, state, preset_of(start.config, recipe.objective, recipe.latent_channels), device)
    work_of: dict[str, Callable[[], None]] = {
        "train the codec": stages.train_codec,
        "measure the quantiser": stages.measure_quantizer,
        "encode the images": stages.encode_images,
        "train the prior": stages.train_prior,
        "write the model": stages.write_model,
        "draw the figure": stages.compare_models,
    }
    for name, work in work_of.items():
        if name in state.done and not (work == stages.encode_images and stages.lacks_latents):
            continue
        try:
            stages.need(recipe.finish_minutes)
            say(f"{name}: {clock.left:.1f} minutes left of this call")
            work()
        except EndOfCallError as end:
            say(f"{name}: {end}; the same command goes on from here")
            return end.code
        state.finish(name)
    say(f"done: {stages.model}")
    return 0


class Stages:
    """Run each stage by a method, which raises `EndOfCallError` if it is not done when it returns."""

    def __init__(self, recipe: Recipe, clock: Clock, state: State, preset: TrainConfig, device: torch.device) -> None:
        """`preset` has the parts of the model to start from."""
        self.recipe, self.clock, self.state, self.preset, self.device = recipe, clock, state, preset, device
        self.on_gpu = device.type == "cuda"
        self.model, self.quantized = recipe.out / "photo.safetensors", recipe.out / "quantised.safetensors"
        self.latents = tuple(recipe.out / "latents" / f"{i}-{path.stem}" for i, path in enumerate(recipe.data))
        self.val_latents = recipe.out / "latents" / "val"

    def need(self, minutes: float) -> None:
        """Raise `EndOfCallError` if fewer minutes of this call are left."""
        if self.clock.left < minutes:
            raise EndOfCallError(
                0, f"{max(0.0, self.clock.left):.1f} minutes are left of this call, and {minutes:g} are kept"
            )

    def train_codec(self) -> None:
        """Train the codec with `train.vae`."""
        if "codec" not in self.state.plans:
            batch_size = self.recipe.batch_size
            if batch_size is None:
                batch_size = self._gpu_batch() if self.on_gpu else self.preset.batch_size
            self._plan("codec", 1 - self.recipe.prior_share, batch_size, self._run_codec)
        plan, out = self.state.plans["codec"], self.recipe.out / "codec"
        self._run_codec(plan, out)
        _check_done(out / "checkpoints" / f"step-{plan.steps:08d}")

    def _gpu_batch(self) -> int:
        return gpu_batch(torch.cuda.get_device_properties(self.device).total_memory, self.recipe.crop)

    def _run_codec(self, plan: TrainingPlan, out: Path) -> None:
        config = codec_config(self.recipe, self.preset, plan.batch_size, plan.steps, self.on_gpu)
        config = replace(
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
            max_minutes=max(_LEAST_MINUTES, self.clock.left - self.recipe.margin_minutes),
            lpips_backbone=self.recipe.lpips_backbone,
            config=config,
        )
        with accelerate_as("bf16" if self.on_gpu else "no"):
            _check_code(vae.train(run))

    def measure_quantizer(self) -> None:
        """Export the codec with a quantiser measured on the validation images."""
        export(self.recipe.out / "codec", self.quantized, data=(self.recipe.val,), images=_EXPORT_IMAGES, half=True)

    def encode_images(self) -> None:
        """Encode each of `data` and `val` to a folder of latents."""
        options = ComputeOptions(device=str(self.device), batch_size=64 if self.on_gpu else 8)
        runner = load(str(self.quantized), options)
        folders = zip((*self.recipe.data, self.recipe.val), (*self.latents, self.val_latents), strict=True)
        for images, folder in folders:
            say(encode_latents(runner, images, folder))

    @property
    def lacks_latents(self) -> bool:
        """Tell whether latents are missing that training still needs; they may be left behind on another machine."""
        missing = not all((folder / INDEX).exists() for folder in (*self.latents, self.val_latents))
        return missing and "train the prior" not in self.state.done

    def train_prior(self) -> None:
        """Train the context prior with `train.prior`."""
        if "prior" not in self.state.plans:
            batch_size = self.recipe.prior.batch_size
            if self.on_gpu and batch_size == PriorConfig().batch_size:
                batch_size = _GPU_BATCH
            self._plan("prior", self.recipe.prior_share, batch_size, self._run_prior)
            self.need(self.recipe.finish_minutes)
        self._run_prior(self.state.plans["prior"], self.recipe.out / "prior")
        _check_done(self.recipe.out / "prior" / PRIOR_RUN_MODEL)

    def _run_prior(self, plan: TrainingPlan, out: Path) -> None:
        final = out.name == "prior"
        config = replace(
            self.recipe.prior,
            steps=plan.steps,
            batch_size=plan.batch_size,
            lr_warmup_steps=min(self.recipe.prior.lr_warmup_steps, plan.steps // 10),
            count_images=self.recipe.prior.count_images if final else plan.batch_size,
            log_every=min(100, max(1, plan.steps // 4)),
            save_every=plan.every(self.recipe.save_minutes),
        )
        run = prior.Run(
            model=str(self.quantized),
            latents=self.latents,
            val=(self.val_latents,) if final else (),
            start_from=self.recipe.out / "codec" if self.recipe.objective == "joint" else None,
            out=out,
            # Freezing the prior afterwards cannot be interrupted.
            max_minutes=max(_LEAST_MINUTES, self.clock.left - self.recipe.finish_minutes),
            config=config,
        )
        with accelerate_as("no"):  # float32, because the network becomes one of integers
            _check_code(prior.train(run))

    def write_model(self) -> None:
        """Export the finished model."""
        codec = export(self.recipe.out / "prior", self.model, data=(), images=1, half=True)
        say(f"wrote {self.model} ({self.model.stat().st_size / 1e6:.2f} MB), model {codec.model_id}")

    def compare_models(self) -> None:
        """Compare the finished model with the one it started from."""
        sources = sorted(find_images(self.recipe.val), key=lambda s: text_key(s.name))[: self.recipe.figure_images]
        if sources:
            models = {"trained": str(self.model), "start": self.recipe.start_from}
            compare(sources, models, self.recipe.out / "figure", str(self.device))

    def _plan(self, name: str, share: float, batch_size: int, run: Callable[[TrainingPlan, Path], None]) -> None:
        """Measure the speed with a run that is discarded, and derive the number of steps from it."""
        folder, steps = self.recipe.out / f"{name}-speed", self.recipe.probe_steps
        if folder.exists() and not remove(folder, _is_run):
            raise UserError(f"{folder}: holds files that are no run's; move it away")
        run(TrainingPlan(steps, batch_size, 1e6 * batch_size), folder)  # too fast to save before its end
        log = folder / "log.jsonl"  # missing if the run ended before its first line
        lines = map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else [])
        speeds = [line["images_per_s"] for line in lines if line["kind"] == "train" and line["step"] > steps // 2]
        if not speeds:
            raise EndOfCallError(
                1, f"{steps} steps to measure the speed did not fit into this call; give more --minutes"
            )
        remove(folder, _is_run)
        seconds = 60 * self.recipe.total_minutes * share
        plan = TrainingPlan(max(1, round(seconds * speeds[-1] / batch_size)), batch_size, speeds[-1])
        self.state.plans[name] = plan
        self.state.write()
        say(
            f"{name}: {plan.images_per_s:.1f} images/s in batches of {batch_size}, so {plan.steps} steps in "
            f"{seconds / 60:.1f} minutes"
        )


def _check_done(path: Path) -> None:
    """Raise `EndOfCallError` if the file or folder that a stage ends with is not there yet."""
    if not path.exists():
        raise EndOfCallError(0, "the minutes of this call are over")


def _check_code(code: int) -> None:
    """Raise `EndOfCallError` for the exit code of a training program that a signal ended."""
    if code:
        raise EndOfCallError(code, "interrupted")


def _is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run; one that is missing or empty may become one."""
    return (folder / "config.json").is_file() or not folder.exists() or not any(folder.iterdir())
