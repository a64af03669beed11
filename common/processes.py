"""What the libraries would take from the environment: which process this is, and how exactly a device computes.

accelerate, torch and transformers read environment variables (`accelerate launch` sets many, from a file in the home
folder too) that would change numbers behind a run's own settings. Here they are overruled, or refused.
"""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from inpo.common.errors import UsageError
from inpo.common.log import note

_OTHER_TRAINERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_CHANGE_NUMBERS = {
    "NVIDIA_TF32_OVERRIDE": "would round float32 to TF32 or forbid it everywhere",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "would round float32 products to TF32",
    "HIPBLASLT_ALLOW_TF32": "would round float32 products to TF32",
    "ONEDNN_DEFAULT_FPMATH_MODE": "would round float32 on the CPU",
    "DNNL_DEFAULT_FPMATH_MODE": "would round float32 on the CPU",
    # transformers then reads no weights but in the first process; accelerate is to fill the others, which only a
    # sharded network meets.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "would leave the text encoders of all processes but the first without weights",
}
LONGEST_WAIT = timedelta(hours=6)
"""Of processes for one another: torch's ten minutes on GPUs are less than one of them may have more to draw or score,
or the first to write and send. Where one fails, its launcher ends the others at once; one that hangs is found by this.
"""


def settle_numbers() -> None:
    """float32 is float32: no TF32, torch's default dtype. Variables that say otherwise are removed, with a note."""
    for name, effect in _CHANGE_NUMBERS.items():
        value = os.environ.pop(name, None)
        if value is not None and value.lower() not in ("", "false", "strict"):
            note(f"the environment's {name}={value} is not followed: it {effect}")
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def check_launcher() -> None:
    """Raise UsageError if the processes were launched for a way of training that is not ours."""
    for name, way in _OTHER_TRAINERS.items():
        if parse_flag_from_env(name):
            raise UsageError(
                f"Launched with {way}, which is not supported.",
                where=f"the environment, {name}",
                expected="one process, --multi_gpu (DDP) or --use_fsdp",
                got=os.environ[name],
                fix="launch with `accelerate launch --multi_gpu ...`, or choose so in `accelerate config`",
            )


def on_cpu() -> bool:
    """Whether accelerate has to be told that the CPU is meant.

    Processes launched on CPUs would else be a run of their own each, and all of them would do all the work. MPS is not
    used: levels and stored points are computed in float64, which it has not.
    """
    launched = "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    asked, has_mps = parse_flag_from_env("ACCELERATE_USE_CPU"), torch.backends.mps.is_available()
    return asked or has_mps or (launched and not torch.accelerator.is_available())


def processes() -> PartialState:
    """Which process of how many this is, and its device: one, or as many as `accelerate launch` or `torchrun` started.

    The first call decides for the whole process.
    """
    check_launcher()
    return PartialState(cpu=on_cpu(), timeout=LONGEST_WAIT)


def leave(code: int) -> int:
    """Leave the group of processes, at the end of a command that has gone well: a sweep's next run and a round's next
    stage still meet in it. Returns the exit code."""
    processes().destroy_process_group()
    return code
