"""The processes of a run: one, or as many as `accelerate launch` or `torchrun` started."""

import os

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process's rank, their number and its device.

    Without a GPU, accelerate joins several processes only when told that the CPU is meant; otherwise each would take
    itself for the only one and do all the work.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    has_accelerator = torch.accelerator.is_available()
    return PartialState(cpu=True) if several and not has_accelerator else PartialState()
