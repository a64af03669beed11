"""accelerate as a run uses it: every argument given, so that neither the environment nor its own file decides."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    parse_flag_from_env,
)
from torch.nn.parallel import DistributedDataParallel

from inpo.common.denoiser import compute_dtype
from inpo.common.log import note
from inpo.common.processes import LONGEST_WAIT, on_cpu, processes
from inpo.train.settings import TrainSettings

_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def build_accelerator(settings: TrainSettings, network_dtype: str) -> Accelerator:
    """The run's accelerator; a note for everything that the environment asks otherwise, which is not followed.

    Raises UsageError for a launcher's way of training that is not ours.
    """
    processes()  # first: it decides how long they wait for one another
    precision = _PRECISION[compute_dtype(network_dtype)]
    for name, ours, option in (
        ("ACCELERATE_MIXED_PRECISION", precision, f"the network's dtype is {network_dtype} (the cache's)"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(settings.accumulate), "--accumulate decides"),
        ("ACCELERATE_DYNAMO_BACKEND", "no", "--compile decides"),
    ):
        # What `accelerate launch` sets when nobody chose anything is no wish.
        asked = os.environ.get(name, "").lower()
        if asked not in ("", "no", "auto", ours):
            note(f"the environment's {name}={os.environ[name]} is not followed: {option}")
    accelerator = Accelerator(
        mixed_precision=precision,
        # As a number it would give way to the environment's.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        # Gradients lie once in memory, where they are exchanged.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        cpu=on_cpu(),
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        # accelerate has FSDP cast weights, inputs (a flow's times too) and outputs. The reference's errors are those of
        # autocast, which leaves norms and times alone: here too it casts, and nothing else.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        note("the environment's ACCELERATE_USE_FSDP is not followed: weights are split over processes with GPUs only")
    return accelerator


def prepare(
    accelerator: Accelerator, network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Network and optimiser as the run's processes share them."""
    wrapped, optimizer = accelerator.prepare(network, optimizer)
    if isinstance(wrapped, DistributedDataParallel):
        # No network changes its buffers. Sending them would make every call of the network one that all processes must
        # make, and one that is out of memory makes none.
        wrapped.broadcast_buffers = False
    return wrapped, optimizer


def control_group(accelerator: Accelerator) -> torch.distributed.ProcessGroup | None:
    """Through which processes agree on the CPU, so that no GPU has to be waited for; None: there is one process."""
    if accelerator.num_processes == 1:
        return None
    group: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return group
