"""One stage of training: seeded, resumable, with its loss kept.

One process on a GPU where there is one, else two data-parallel ones on the CPU: on two cores they beat one process with
two threads.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inpo.common.durable import new_file
from inpo.common.seeding import stable_hash

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORLD_SIZE = 1 if DEVICE.type == "cuda" else 2
CHECKPOINT_EVERY = 100
LOG_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How one network is trained."""

    steps: int
    batch_size: int
    """Pictures per step, over all processes."""
    learning_rate: float
    """Of AdamW."""
    matrix_rate: float | None = None
    """Learning rate of Muon, which trains weights of two dimensions and more where it is given."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0


@dataclass(kw_only=True)
class StageReport:
    """What a stage cost and how its loss fell."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Processor time of all processes."""
    loss: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss of all processes since the last entry)."""


def learning_rate_factor(step: int, settings: StageSettings) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps)
    return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


class Optimizers:
    """AdamW, and beside it Muon where the settings have a rate for it, with the learning rate's course.

    Muon takes matrices only: a convolution's weight is given to it as one row per channel that comes out, in a view.
    """

    def __init__(self, module: nn.Module, settings: StageSettings) -> None:
        embeddings = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
        by_muon = [
            weight
            for weight in module.parameters()
            if settings.matrix_rate is not None and weight.ndim > 1 and id(weight) not in embeddings
        ]
        self._matrices = [(weight, nn.Parameter(_rows(weight.detach(), weight))) for weight in by_muon]
        taken = {id(weight) for weight in by_muon}
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [weight for weight in module.parameters() if id(weight) not in taken],
                lr=settings.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=settings.weight_decay,
                fused=True,
            )
        ]
        if settings.matrix_rate is not None:
            rows = [matrix for _, matrix in self._matrices]
            optimizers.append(torch.optim.Muon(rows, lr=settings.matrix_rate, weight_decay=settings.weight_decay))
        factor = partial(learning_rate_factor, settings=settings)
        self._all = [(each, torch.optim.lr_scheduler.LambdaLR(each, factor)) for each in optimizers]

    def step(self) -> None:
        """One step from the gradients of the module's weights."""
        for weight, matrix in self._matrices:
            assert weight.grad is not None
            matrix.grad = _rows(weight.grad, weight)
        for optimizer, rates in self._all:
            optimizer.step()
            rates.step()

    def state_dict(self) -> list[Any]:
        """What `load_state_dict` goes on from."""
        return [(optimizer.state_dict(), rates.state_dict()) for optimizer, rates in self._all]

    def load_state_dict(self, states: list[Any]) -> None:
        """Goes on from what `state_dict` gave."""
        for (optimizer, rates), (optimizer_state, rates_state) in zip(self._all, states, strict=True):
            optimizer.load_state_dict(optimizer_state)
            rates.load_state_dict(rates_state)


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    """One row per channel that comes out of `weight`, in the order in which its numbers lie in memory."""
    return (values if weight.is_contiguous() else values.permute(0, 2, 3, 1)).flatten(1)


def train_stage(
    name: str,
    module: nn.Module,
    draw_batch: Callable[[torch.Generator, int], tuple[torch.Tensor, ...]],
    settings: StageSettings,
    *,
    seed: int,
    folder: Path,
) -> StageReport:
    """Trains `module`, whose forward returns the loss of a batch, and leaves the final weights in it.

    `draw_batch(generator, count)` draws this process's share of a step; the generator depends on (seed, stage, step,
    rank) alone, so a stage stopped and resumed from its checkpoint sees the same batches.
    """
    rank = dist.get_rank()
    module.to(DEVICE)
    replica = DistributedDataParallel(module)
    optimizers = Optimizers(module, settings)
    checkpoint, report, first_step = folder / f"{name}.pt", StageReport(), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        module.load_state_dict(state["module"])
        optimizers.load_state_dict(state["optimizers"])
        first_step, report = state["step"], StageReport(**json.loads(state["report"]))
    dist.barrier()

    wall_start, cpu_start = (
        time.monotonic() - report.wall_seconds,
        time.process_time() - report.cpu_seconds / WORLD_SIZE,
    )
    module.train()
    loss_sum = torch.zeros((), device=DEVICE)
    for step in range(first_step, settings.steps):
        generator = torch.Generator().manual_seed(stable_hash(seed, name, step, rank) >> 1)
        batch = draw_batch(generator, settings.batch_size // WORLD_SIZE)
        # Noise inside the networks (the VAE's sample) follows the same rule.
        torch.manual_seed(stable_hash(seed, name, step, rank, "inside") >> 1)
        loss = replica(*(tensor.to(DEVICE) for tensor in batch))
        module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), settings.max_gradient_norm)
        optimizers.step()
        loss_sum += loss.detach()
        done = step + 1
        if done % LOG_EVERY == 0 or done == settings.steps:
            entries = (done - 1) % LOG_EVERY + 1
            figures = torch.tensor([float(loss_sum) / entries / WORLD_SIZE, time.process_time() - cpu_start])
            dist.all_reduce(figures)
            report.loss.append((done, round(float(figures[0]), 5)))
            report.wall_seconds, report.cpu_seconds = time.monotonic() - wall_start, float(figures[1])
            loss_sum.zero_()
            if rank == 0:
                print(
                    f"{name} {done}/{settings.steps} loss {report.loss[-1][1]} {report.wall_seconds:.0f} s", flush=True
                )
        if rank == 0 and (done % CHECKPOINT_EVERY == 0 or done == settings.steps):
            state = {
                "module": module.state_dict(),
                "optimizers": optimizers.state_dict(),
                "step": done,
                "report": json.dumps(vars(report)),
            }
            with new_file(checkpoint) as staged:
                torch.save(state, staged)
    dist.barrier()
    module.eval()
    return report
