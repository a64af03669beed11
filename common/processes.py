"""The processes of a run: one, or as many as `accelerate launch` or `torchrun` started."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpus() -> bool:
    """True if accelerate has to be told that the CPU is meant: otherwise it takes processes launched on CPUs for
    independent ones, each of which would do everything."""
    launched = "LOCAL_RANK" in os.environ
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.accelerator.is_available())


def processes() -> PartialState:
    """This process's rank, their number and its device. The first call decides for the whole process."""
    return PartialState(cpu=on_cpus())
