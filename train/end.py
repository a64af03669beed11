"""What the end of a run needs, tried at its start: the parts of the pipeline, the sampler, and the space."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from inpo.common.completeness import check_complete
from inpo.common.errors import StorageError
from inpo.common.models import Model
from inpo.common.space import free_bytes, human_bytes
from inpo.train.checkpoint import list_checkpoints
from inpo.train.settings import TrainSettings

_FLOAT = 4
_STATES = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.01}
"""An optimiser's numbers per trained weight."""


def check_parts(model: Model, settings: TrainSettings) -> None:
    """Raise ModelError if the pipeline, of which the run trains one part, cannot be put together, and UsageError if its
    schedule does not take the samples' steps. A LoRA run without samples needs no other part.
    """
    if settings.lora_rank and not settings.sample_every:
        return
    check_complete(model)
    if settings.sample_every:
        model.family.check_steps(model.family.sampler(model.scheduler), settings.sample_steps, where="--sample-steps")


def check_space(
    model: Model, settings: TrainSettings, output: Path, *, trained: Sequence[nn.Parameter], step: int
) -> None:
    """Raise StorageError if checkpoints and output will not fit where `output` lies. `step`: already made."""
    weights = _FLOAT * sum(parameter.numel() for parameter in trained)
    checkpoint = weights * (1 + _STATES[settings.optimizer] + (1 if settings.ema else 0))
    there = len(list_checkpoints(output / "checkpoints"))
    # The oldest goes once the newest is there.
    most = min(settings.keep_last + 1, there + math.ceil((settings.steps - step) / settings.save_every))
    result = weights
    if not settings.lora_rank:
        parts = [model.shared_component(name) for name in model.networks if name != model.family.network]
        result += _FLOAT * sum(parameter.numel() for part in parts for parameter in part.parameters())
    needed, free = round(max(0, most - there) * checkpoint + result), free_bytes(output)
    if needed > free:
        raise StorageError(
            "The disk is too small for this run.",
            where=output,
            expected=f"{human_bytes(needed)} free ({max(0, most - there)} checkpoints of "
            f"{human_bytes(round(checkpoint))} at once, {human_bytes(result)} of output)",
            got=f"{human_bytes(free)} free",
            fix="use a smaller --keep-last, a larger --save-every, --lora-rank, or another --output",
        )
