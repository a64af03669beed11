"""The training loop: one network call per micro-batch, no synchronisation between logging intervals."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from common.denoiser import Denoiser
from common.errors import TrainingError
from common.progress import ProgressReport
from train import checkpoint
from train.metrics import Accumulator, MetricsWriter
from train.objectives import Objective, ObjectiveResult
from train.proof import record_errors
from train.records import Batch
from train.settings import TrainSettings
from train.stream import RecordStream


class Trainer:
    """Holds what a run consists of and advances it. Built by train/run.py."""

    def __init__(
        self,
        *,
        settings: TrainSettings,
        output: Path,
        objective: Objective,
        accelerator: Accelerator,
        unet: torch.nn.Module,
        denoiser: Denoiser,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        ema: EMAModel | None,
        stream: RecordStream,
        held_out: list[Batch],
        identity: dict[str, Any],
        metrics: MetricsWriter | None,
        sample: "Sampler | None" = None,
    ) -> None:
        self.settings = settings
        self.output = output
        self.objective = objective
        self.beta = settings.resolved_beta
        self.accelerator = accelerator
        self.unet = unet
        self.denoiser = denoiser
        self.optimizer = optimizer
        self.schedule = schedule
        self.ema = ema
        self.stream = stream
        self.held_out = held_out
        self.identity = identity
        self.metrics = metrics
        self.sample = sample
        self.step = 0
        self._stopping = False
        self._seconds = 0.0
        # 1 / abar_t, for the objective that aims at the previous delta.
        self._weights = (1 / denoiser.schedule.a**2).float().to(accelerator.device)

    def losses(self, batch: Batch) -> ObjectiveResult:
        """The objective on a micro-batch that lies on the device."""
        error, reference_error = record_errors(self.denoiser, batch), batch.reference_error
        if self.objective.target == "delta_prev":
            weight = self._weights[batch.timestep, None]
            error, reference_error = error * weight, reference_error * weight
        return self.objective.function(error, reference_error, batch.label, self.beta)

    def accumulator(self) -> Accumulator:
        return Accumulator(
            device=self.accelerator.device, num_train_timesteps=self.denoiser.schedule.num_train_timesteps
        )

    def write_start(self, batch: Batch) -> dict[str, Any]:
        """The first line of metrics.jsonl: before any update, on the records of the zero-step proof's model."""
        sums = self.accumulator()
        with torch.no_grad():
            result = self.losses(batch.to(self.accelerator.device))
        sums.add(result, batch.timestep.to(self.accelerator.device))
        values = sums.result(self._reduce)
        self._write(values | {"pairs_per_second": 0.0, "gradient_norm": 0.0, "epoch": self.stream.epoch})
        return values

    def run(self) -> bool:
        """Train to `settings.steps`. Returns False if SIGTERM ended it early (a checkpoint was written)."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        settings, quiet = self.settings, not self.accelerator.is_main_process
        batches = iter(self.stream)
        sums, since = self.accumulator(), time.perf_counter()
        gradient_norm: Tensor | None = None
        bad = torch.zeros((), device=self.accelerator.device)
        records = 0
        try:
            with ProgressReport("train", total=settings.steps, unit="steps", done=self.step, quiet=quiet) as progress:
                while self.step < settings.steps:
                    for _ in range(settings.accumulate):
                        batch = next(batches).to(self.accelerator.device)
                        with self.accelerator.accumulate(self.unet):
                            result = self.losses(batch)
                            self.accelerator.backward(result.loss.mean())
                            sums.add(result._replace(loss=result.loss.detach()), batch.timestep)
                            bad = bad + (~result.loss.detach().isfinite()).any()
                            records += batch.num_records
                            if self.accelerator.sync_gradients:
                                gradient_norm = self.accelerator.clip_grad_norm_(
                                    self.unet.parameters(), settings.clip or float("inf")
                                )
                                if gradient_norm is not None:
                                    bad = bad + (~gradient_norm.detach().isfinite())
                            self.optimizer.step()
                            if self.accelerator.sync_gradients:
                                self.schedule.step()
                            self.optimizer.zero_grad(set_to_none=True)
                    self.step += 1
                    if self.ema is not None:
                        self.ema.step(self.unet.parameters())
                    last = self.step == settings.steps
                    stopping = self._stop_requested()
                    if self.step % settings.log_every == 0 or last or stopping:
                        self._guard(bad)
                        elapsed, since = time.perf_counter() - since, time.perf_counter()
                        values = sums.result(self._reduce)
                        sums = self.accumulator()
                        rate = records * self.accelerator.num_processes / elapsed
                        values |= {
                            "pairs_per_second": rate, "epoch": self.stream.epoch,
                            "gradient_norm": 0.0 if gradient_norm is None else float(gradient_norm),
                        }
                        if self.accelerator.device.type == "cuda":
                            values["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
                        records = 0
                        if self.step % settings.evaluate_every == 0 or last:
                            values |= self._evaluate()
                        self._write(values)
                        progress.advance(0, f"loss {values['loss']:.4f}, accuracy {values['implicit_accuracy']:.3f}")
                    if self.sample is not None and self.step % settings.sample_every == 0:
                        self.sample(self.step)
                    if self.step % settings.save_every == 0 or last or stopping:
                        self._guard(bad)
                        self.save()
                    progress.advance()
                    if stopping and not last:
                        return False
            return True
        finally:
            self.stream.close()
            signal.signal(signal.SIGTERM, previous)

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        return checkpoint.save(
            self.accelerator, self.output / "checkpoints", step=self.step, stream=self.stream.state_dict(),
            identity=self.identity, keep_last=self.settings.keep_last,
        )

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.read_state(folder, self.identity)
        self.stream.load_state_dict(state["stream"])
        self.accelerator.load_state(str(folder))
        self.step = int(state["step"])

    def _evaluate(self) -> dict[str, Any]:
        """The same metrics on held-out records, each process its share."""
        if not self.held_out:
            return {}
        sums = self.accumulator()
        self.unet.eval()
        with torch.no_grad():
            for batch in self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]:
                here = batch.to(self.accelerator.device)
                sums.add(self.losses(here), here.timestep)
        self.unet.train()
        return {f"held_out_{name}": value for name, value in sums.result(self._reduce).items()}

    def _guard(self, bad: Tensor) -> None:
        """Stop before numbers that are not finite reach a checkpoint."""
        if self.settings.reference_guard and float(self._reduce(bad)) > 0:
            kept = checkpoint.list_checkpoints(self.output / "checkpoints")
            raise TrainingError(
                "The loss or the gradient is not finite.",
                where=f"step {self.step} or up to {self.settings.log_every} before it",
                got="NaN or infinity",
                fix=f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
                "; lower --learning-rate or --beta, or use --dtype float32",
            )

    def _reduce(self, value: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(value, reduction="sum")
        return reduced

    def _write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            rate = float(self.schedule.get_last_lr()[0])
            self.metrics.write({"step": self.step, "learning_rate": rate} | values)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _stop_requested(self) -> bool:
        """True once any process has had SIGTERM: all of them must leave at the same step."""
        if self.accelerator.num_processes == 1:
            return self._stopping
        flag = torch.tensor(float(self._stopping), device=self.accelerator.device)
        return float(self._reduce(flag)) > 0


class Sampler:
    """Draws sample images and hands them to the metrics; the loop calls it with the step."""

    def __init__(self, draw: "Any", metrics: MetricsWriter | None, folder: Path) -> None:
        self._draw = draw
        self._metrics = metrics
        self._folder = folder

    def __call__(self, step: int) -> None:
        if self._metrics is None:
            return
        from PIL import Image

        pixels = self._draw()
        self._folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(self._folder / f"step-{step:08d}.png")
        self._metrics.image("samples", pixels, step)
