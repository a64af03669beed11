"""Which device a run computes on, said at its start; and why it is not the GPU that its user may think it is."""

import os
import warnings
from pathlib import Path

import torch

from inpo.common.log import note, say
from inpo.common.processes import on_cpu

_DRIVERS = {
    "NVIDIA": ("/dev/nvidia0", "/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg"),
    "AMD": ("/dev/kfd",),
}
"""{maker: files that its driver makes}; a container shows them only if it was given the GPU."""


def say_device(device: torch.device, dtype: str, *, num_processes: int = 1) -> None:
    """A line on standard error: the device, and the dtype that the network, or the scorer, computes in there. Then a
    note if this machine has a GPU that torch cannot use, torch is made for GPUs and sees none, or the GPU is older than
    the dtype."""
    name, why = str(device), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name += f" ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
        if torch.version.cuda and properties.major < 8 and dtype.startswith("bfloat16"):
            why = "this GPU has no bfloat16, and goes the long way round: --dtype float16 is faster, from precompute on"
    elif device.type == "cpu":
        name += f" ({torch.get_num_threads()} threads)"
        why = why_no_gpu()
    each = f"{num_processes} processes, the first on " if num_processes > 1 else ""
    say(f"device: {each}{name}, computing in {dtype}, torch {torch.__version__}")
    if why:
        note(why)


def why_no_gpu(root: Path = Path("/")) -> str | None:
    """What is to be said where a run computes on the CPU; None if nobody would expect a GPU.

    `root`: where the drivers' files are looked for.
    """
    if torch.backends.mps.is_available():
        return "Apple's GPU is not used: MPS has no float64, which the levels and the cache's stored points need"
    maker = next(
        (maker for maker, files in _DRIVERS.items() if any((root / file[1:]).exists() for file in files)), None
    )
    hidden = next((name for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if _hides(name)), None)
    if hidden is not None:
        return f"no GPU is used, because the environment's {hidden} hides them all" if maker else None
    with warnings.catch_warnings(record=True) as caught:  # what is wrong with the driver, torch says in a warning
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        return "a GPU is there and not used: the launcher's configuration asks for the CPU" if on_cpu() else None
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    made_for = "NVIDIA" if torch.version.cuda else "AMD" if torch.version.hip else None
    if maker is None:
        return f"torch is made for {built_for}, and no GPU is to be seen here" if made_for else None
    if made_for is None:
        fix = "https://pytorch.org has the command that installs the other"
        return f"an {maker} GPU is there, and torch {torch.__version__} is made for CPUs alone: {fix}"
    if made_for != maker:
        return f"an {maker} GPU is there, and torch {torch.__version__} is made for {built_for}"
    said = str(caught[-1].message).splitlines()[0][:200] if caught else "the driver may be older than that"
    return f"an {maker} GPU is there, and torch, made for {built_for}, cannot use it: {said}"


def _hides(variable: str) -> bool:
    return os.environ.get(variable, "0").strip() in ("", "-1")
