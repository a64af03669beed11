"""The training loop: one network call per micro-batch, no synchronisation with the device between logging intervals."""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from inpo.common.cache.derive import mean_square
from inpo.common.compiled import compile_network, uses_graphs
from inpo.common.denoiser import Denoiser
from inpo.common.errors import TrainingError
from inpo.common.families import Family
from inpo.common.judge import Evaluation, Judge
from inpo.common.log import note
from inpo.common.progress import ProgressReport
from inpo.train import checkpoint
from inpo.train.accelerator import control_group
from inpo.train.loss_space import error_weights
from inpo.train.losses import preserve_win
from inpo.train.metrics import Accumulator, MetricsWriter
from inpo.train.objectives import Objective, ObjectiveResult, beta_of, parameter_of
from inpo.train.proof import record_errors, residuals
from inpo.train.records import Batch
from inpo.train.settings import TrainSettings
from inpo.train.stream import RecordStream


@dataclass(kw_only=True, eq=False, repr=False)  # putting a signal's handler back writes out its object, all weights
class Trainer:
    """Holds what a run consists of and advances it. Built by train/run.py."""

    settings: TrainSettings
    output: Path
    objective: Objective
    accelerator: Accelerator
    network: torch.nn.Module
    trained: list[torch.nn.Parameter]
    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    stream: RecordStream
    held_out: list[Batch]
    identity: dict[str, Any]
    metrics: MetricsWriter | None
    sample: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        self.beta = beta_of(self.settings)
        self.parameter = parameter_of(self.settings)
        self.step = 0
        self.judge = Judge()
        self._warned = False
        self._stopping = False
        self._graphs = False
        self._sums = self._new_sums()
        self._gradient_norm = torch.zeros((), device=self.accelerator.device)
        self._bad = torch.zeros((), device=self.accelerator.device)
        self.weights = _weights(self.objective, self.denoiser, self.settings).float().to(self.accelerator.device)
        """Of both errors in the loss, by timestep."""
        self._control = control_group(self.accelerator)

    def losses(self, batch: Batch, *, alone: bool = False) -> ObjectiveResult:
        """The objective on a micro-batch that lies on the device.

        What an objective averages over images is averaged over all processes' micro-batches, so that all of them must
        call this together; with `alone` over this one.
        """
        residual = residuals(self.denoiser, batch, self.objective.space)
        weight = self.weights[batch.record_timestep, None]
        error = batch.by_side(mean_square(residual)) * weight
        if self.settings.sdpo is not None:
            win, lose = residual.detach()[batch.sides].unbind(dim=1)
            product = (win * lose).mean(dim=(-3, -2, -1)) * weight[:, 0]
            error = preserve_win(error, product, batch.label, self.settings.sdpo)
        return self.objective.function(
            error,
            batch.by_side(batch.reference_error) * weight,
            batch.lists or batch.label,
            self.beta,
            torch.mean if alone else self._mean_over_processes,
            parameter=self.parameter,
            num_values=batch.x_t[0].numel(),
        )

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(values.detach().mean(), reduction="mean")  # all hold equally many
        return mean

    def compile(self, family: Family) -> None:
        """Compile the network, if the settings ask for it, on the first micro-batch, which is used again, at each shape
        of latents: without gradients, as evaluations call it, and with them. `family`: the network's.
        """
        accelerator, settings = self.accelerator, self.settings
        sharded, shapes = accelerator.distributed_type == DistributedType.FSDP, self.stream.latent_shapes

        def first() -> None:
            peeked = self.stream.peek().to(accelerator.device)
            for batch in map(peeked.at_shape, shapes):
                with torch.no_grad():
                    record_errors(self.denoiser, batch, self.objective.space)
                # Of DDP's processes one may fail alone: none may wait for its gradients. FSDP's wait in the network.
                with nullcontext() if sharded else accelerator.no_sync(self.network):
                    record_errors(self.denoiser, batch, self.objective.space).mean().backward()

        def agree(fine: bool) -> bool:
            return float(self._reduce(torch.tensor(float(not fine), device=accelerator.device))) == 0

        bare = accelerator.unwrap_model(self.network)
        # FSDP's processes meet in every call of the network: none may need a second one for images beyond the slots.
        widest = self.stream.index.widest * settings.batch_size
        self.denoiser.rows = widest if sharded else self.stream.num_slots
        alone = accelerator.num_processes == 1 and not sharded  # DDP and FSDP move gradients while they are made
        self._graphs = alone and uses_graphs(settings.compile, accelerator.device, self.denoiser.rows)
        for each in self.trained if self._graphs else ():  # which a graph's own gradients are added to
            each.grad = torch.zeros_like(each)
        if not compile_network(
            bare,
            settings.compile,
            first,
            blocks=family.blocks,
            varying=family.varying,
            device=accelerator.device,
            graphs=self._graphs,
            shapes=len(shapes),
            ahead=(settings.steps - self.step) * settings.accumulate // len(shapes),
            agree=agree,
            meeting=sharded,
        ):
            self.denoiser.rows, self._graphs = None, False
        self.network.zero_grad(set_to_none=not self._graphs)

    def write_start(self) -> dict[str, Any]:
        """The first line of metrics.jsonl, before any update, on the first micro-batch, which is used again; and the
        first samples, which show what training begins with."""
        sums = self._new_sums()
        batch = self.stream.peek().to(self.accelerator.device)
        with torch.no_grad():
            result = self.losses(batch)
            sums.add(result, batch.record_timestep)
            at_reference = self.accelerator.reduce(result.at_reference.mean(), reduction="mean")
        values = sums.result(self._reduce)
        self._write(values | {"pairs_per_second": 0.0, "gradient_norm": 0.0, "epoch": self.stream.epoch})
        if self.sample is not None:
            self.sample(0)
        return values | {"at_reference": float(at_reference)}

    def run(self) -> bool:
        """Train to `settings.steps`. Returns False if SIGTERM or Ctrl-C ended it early (a checkpoint was written)."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        settings, quiet = self.settings, not self.accelerator.is_main_process
        batches = iter(self.stream)
        if self.accelerator.device.type == "cuda":  # what was tried before is no part of what training takes
            torch.cuda.reset_peak_memory_stats()
        started, records = time.perf_counter(), 0
        # Reading makes thousands of short-lived objects a second; the collector need not walk all modules each time. A
        # caller who has frozen them keeps that.
        freezes = gc.get_freeze_count() == 0
        if freezes:
            gc.collect()
            gc.freeze()
        try:
            with ProgressReport("train", total=settings.steps, unit="steps", done=self.step, quiet=quiet) as progress:
                while self.step < settings.steps and not self.overfitted:
                    records += self._optimise(batches)
                    self.step += 1
                    last, stopping = self.step == settings.steps, self._stop_requested()
                    note, before = None, time.perf_counter()
                    evaluate = last or self.step % settings.evaluate_every == 0
                    if self.step % settings.log_every == 0 or evaluate or stopping:
                        note = self._log(records, started, evaluate=evaluate)
                        started, records = before, 0
                        last = last or self.overfitted
                    if self.sample is not None and self.step % settings.sample_every == 0:
                        self.sample(self.step)
                    if self.step % settings.save_every == 0 or last or stopping:
                        self._guard()
                        self._guard_weights()
                        self.save()
                    self._warn()
                    started += time.perf_counter() - before  # what logs, samples and checkpoints took is no training
                    progress.advance(note=note)
                    if stopping and not last:
                        return False
            return True
        finally:
            if freezes:
                gc.unfreeze()
            self.stream.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def overfitted(self) -> bool:
        """True: the held-out accuracy has turned, and the run is to stop then."""
        return self.settings.overfitting == "stop" and self.judge.turned

    def _optimise(self, batches: Iterator[Batch]) -> int:
        """One optimiser step over `accumulate` micro-batches. Returns the records this process used."""
        records = 0
        for _ in range(self.settings.accumulate):
            batch = next(batches).to(self.accelerator.device)
            records += batch.num_records
            with self.accelerator.accumulate(self.network):
                result = self.losses(batch)
                self.accelerator.backward(result.loss.mean())
                loss = result.loss.detach()
                self._sums.add(result._replace(loss=loss), batch.record_timestep)
                self._bad = self._bad + (~loss.isfinite()).any()
                if self.accelerator.sync_gradients:
                    self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=not self._graphs)
        # float16's scaler skips an update whose gradients overflow: the weights are as they were, and so is the rate.
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.trained)
        return records

    def _clip(self) -> None:
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip or float("inf"))
        if norm is None:
            return
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm.detach()
        if self.accelerator.scaler is None:  # float16's scaler meets infinite gradients by design, and skips the step
            self._bad = self._bad + (~self._gradient_norm.isfinite())

    def _log(self, records: int, started: float, *, evaluate: bool) -> str:
        """Write a line of metrics; the one place where the device is waited for. Returns a note for the progress."""
        self._guard()
        values = self._sums.result(self._reduce)
        elapsed = time.perf_counter() - started
        values |= {
            "pairs_per_second": records * self.accelerator.num_processes / elapsed,
            "epoch": self.stream.epoch,
            "gradient_norm": float(self._gradient_norm),
        }
        if self.accelerator.scaler is not None:
            values["skipped_updates"] = self.skipped_updates
        if self.accelerator.device.type == "cuda":
            values["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if evaluate:
            values |= self._evaluate()
            self._judge(values)
        self._write(values)
        return f"loss {values['loss']:.4f}, accuracy {values['implicit_accuracy']:.3f}"

    @property
    def _parts(self) -> checkpoint.Resumable:
        return checkpoint.Resumable(
            accelerator=self.accelerator,
            network=self.network,
            optimizer=self.optimizer,
            schedule=self.schedule,
            ema=self.ema,
        )

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        saved = checkpoint.save(
            self._parts,
            self.output / "checkpoints",
            step=self.step,
            stream=self.stream.state_dict(),
            identity=self.identity,
            held_out=self.judge.evaluations,
            keep_last=self.settings.keep_last,
        )
        if self.metrics is not None:
            self.metrics.saved()
        return saved

    def load(self, chosen: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.stream.load_state_dict(chosen.document.stream)
        self._parts.read(chosen)
        self.judge.evaluations = [Evaluation(*each) for each in chosen.document.held_out]
        self.step = chosen.step

    @property
    def skipped_updates(self) -> int:
        """Steps whose update float16's scaler left out, since the run began."""
        return self.step - self.schedule.last_epoch

    def _evaluate(self) -> dict[str, Any]:
        """The same metrics on held-out records, each process its share."""
        if not self.held_out:
            return {}
        sums, processes = self._new_sums(), self.accelerator.num_processes
        with torch.no_grad():
            for first in range(0, len(self.held_out), processes):
                number = first + self.accelerator.process_index
                # All make equally many calls, which FSDP's processes make together: one without a batch repeats one.
                here = self.held_out[min(number, len(self.held_out) - 1)].to(self.accelerator.device)
                result = self.losses(here, alone=True)
                if number < len(self.held_out):
                    sums.add(result, here.record_timestep)
        values = sums.result(self._reduce)
        if not math.isfinite(values["loss"]):
            if self.settings.check_finite:
                raise TrainingError(
                    "The held-out loss is not finite.",
                    where=f"at step {self.step}",
                    got="NaN or infinity",
                    fix=f"{self._last_good()}; lower --learning-rate or --beta, or train with a float32 cache",
                )
            note(f"the held-out loss at step {self.step} is not finite")
        return {f"held_out_{name}": value for name, value in values.items()}

    def _judge(self, values: dict[str, Any]) -> None:
        """Note an evaluation."""
        found = Evaluation.of({"step": self.step} | values)
        if found is not None:
            self.judge.evaluations.append(found)

    def _warn(self) -> None:
        """Say once that the held-out accuracy has turned; after a save, which may remove the best step's checkpoint."""
        if self.judge.turned and not self._warned and self.settings.overfitting != "ignore":
            self._warned = True
            best, now = self.judge.best, self.judge.evaluations[-1]
            saved = self.output / "checkpoints" / f"step-{best.step:08d}"
            note(
                f"the held-out accuracy has turned: {best.accuracy:.3f} at step {best.step}, {now.accuracy:.3f} "
                f"now, at step {now.step}"
                + (f"; `--resume {saved} --steps {best.step}` writes the model of then" if saved.is_dir() else "")
            )

    def _guard(self) -> None:
        """Stop before numbers that are not finite reach a checkpoint."""
        if self.settings.check_finite and float(self._reduce(self._bad)) > 0:
            raise TrainingError(
                "The loss or the gradient is not finite.",
                where=f"at step {self.step} or up to {self.settings.log_every} before it",
                got="NaN or infinity",
                fix=f"{self._last_good()}; lower --learning-rate or --beta, or train with a float32 cache",
            )

    def _guard_weights(self) -> None:
        """Stop before weights that are not finite are written: the last update's are in no loss yet."""
        here = [each.to_local() if isinstance(each, DTensor) else each for each in self.trained]
        bad = torch.stack([~each.detach().isfinite().all() for each in here]).any()
        if float(self._reduce(bad.float())) > 0:
            raise TrainingError(
                "The trained weights are not finite, and were not written.",
                where=f"at step {self.step}",
                got="NaN or infinity",
                fix=f"{self._last_good()}; lower --learning-rate",
            )

    def _last_good(self) -> str:
        found = checkpoint.list_checkpoints(self.output / "checkpoints")
        kept = [each for each in found if int(each.name.removeprefix("step-")) <= self.step]
        return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"

    def _new_sums(self) -> Accumulator:
        return Accumulator(device=self.accelerator.device, num_train_timesteps=self.denoiser.levels.num_train_timesteps)

    def _reduce(self, value: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(value, reduction="sum")
        return reduced

    def _write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            rate = float(self.schedule.get_last_lr()[0])
            self.metrics.write({"step": self.step, "learning_rate": rate} | values)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    def _stop_requested(self) -> bool:
        """True once any process has had SIGTERM or Ctrl-C: all of them must leave at the same step."""
        if self._control is None:
            return self._stopping
        flag = torch.tensor(float(self._stopping))
        torch.distributed.all_reduce(flag, group=self._control)
        return bool(flag > 0)


def _weights(objective: Objective, denoiser: Denoiser, settings: TrainSettings) -> Float[Tensor, " timestep"]:
    """What an error is multiplied by in the loss: 1 / abar_t where the target is the previous delta."""
    levels = denoiser.levels
    if objective.space is not None:
        return levels.signal**-2
    return error_weights(levels, denoiser.prediction, settings.loss_space, levels.space)
