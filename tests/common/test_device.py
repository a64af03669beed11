"""What a run says of its device, and of a GPU that it does not use."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState

from inpo.common.device import say_device, why_no_gpu
from inpo.common.processes import on_cpu, processes

CPU_BUILD = {"cuda": None, "hip": None}
CUDA_BUILD = {"cuda": "12.8", "hip": None}
ROCM_BUILD = {"cuda": None, "hip": "6.2"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(build, *files, usable=, warns=, **environment): where `why_no_gpu` looks."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(build: dict[str, Any], *files: str, usable: bool = False, warns: str = "", **environment: str) -> Path:
        def is_available() -> bool:
            if warns:
                warnings.warn(warns, UserWarning, stacklevel=1)
            return usable

        monkeypatch.setattr(torch, "version", SimpleNamespace(**build))
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return tmp_path

    return make


def test_mps_is_not_used_and_that_is_said(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(CPU_BUILD)
    assert not on_cpu()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert on_cpu()
    assert "Apple's GPU is not used: MPS has no float64" in str(why_no_gpu(root))


@pytest.mark.parametrize(
    ("build", "file", "more", "said"),
    [
        (CPU_BUILD, None, {}, None),
        (CPU_BUILD, "dev/nvidia0", {}, "an NVIDIA GPU is there, and torch .* is made for CPUs alone"),
        (CPU_BUILD, "proc/driver/nvidia/version", {}, "an NVIDIA GPU is there, and torch .* is made for CPUs alone"),
        (CPU_BUILD, "dev/dxg", {}, "an NVIDIA GPU"),
        (CPU_BUILD, "dev/kfd", {}, "an AMD GPU is there, and torch .* is made for CPUs alone"),
        (CUDA_BUILD, "dev/kfd", {}, "an AMD GPU is there, and torch .* is made for CUDA 12.8"),
        (ROCM_BUILD, "dev/nvidia0", {}, "an NVIDIA GPU is there, and torch .* is made for ROCm 6.2"),
        (
            CUDA_BUILD,
            "dev/nvidia0",
            {"warns": "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"},
            "made for CUDA 12.8, cannot use it: The NVIDIA driver on your system is too old .found version 11040.[.]$",
        ),
        (CUDA_BUILD, "dev/nvidia0", {}, "made for CUDA 12.8, cannot use it: "),
        (CUDA_BUILD, None, {}, "torch is made for CUDA 12.8, and no GPU is to be seen here"),
        (ROCM_BUILD, None, {}, "torch is made for ROCm 6.2, and no GPU is to be seen here"),
        (CUDA_BUILD, "dev/nvidia0", {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES hides them all"),
        (CUDA_BUILD, "dev/nvidia0", {"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES hides them all"),
        (CUDA_BUILD, None, {"CUDA_VISIBLE_DEVICES": ""}, None),
        (CUDA_BUILD, "dev/nvidia0", {"usable": True}, None),
        (CUDA_BUILD, "dev/nvidia0", {"usable": True, "ACCELERATE_USE_CPU": "true"}, "a GPU is there and not used"),
    ],
)
def test_why_no_gpu(machine: Any, build: Any, file: str | None, more: dict[str, Any], said: str | None) -> None:
    found = why_no_gpu(machine(build, *([file] if file else []), **more))
    assert (found is None) == (said is None), found
    if said is not None:
        assert found is not None
        assert re.search(said, found), found


def test_the_line(machine: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(CUDA_BUILD)
    say_device(torch.device("cpu"), "float32", num_processes=2)
    said = capsys.readouterr().err
    assert f"device: 2 processes, the first on cpu ({torch.get_num_threads()} threads), computing in float32" in said
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 2**30, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    say_device(torch.device("cuda:1"), "bfloat16")
    said = capsys.readouterr().err
    assert said.startswith("device: cuda:1 (NVIDIA H200, 150 GiB), computing in bfloat16, torch ")
    assert "note" not in said
    gpu.major = 7  # a T4, on which torch takes bfloat16 and emulates it
    say_device(torch.device("cuda:0"), "float16")
    assert "note" not in capsys.readouterr().err
    say_device(torch.device("cuda:0"), "bfloat16-int8")
    assert "note: this GPU has no bfloat16" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    say_device(torch.device("cpu"), "float32", num_processes=2)
    assert capsys.readouterr().err == ""


def test_processes_wait_for_one_another_longer_than_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default on GPUs, which one process more to draw than the others would pass."""
    asked = {}

    def init(**told: Any) -> None:
        asked.update(told)
        raise ConnectionError

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError):
        processes()
    assert asked["timeout"].total_seconds() >= 3600
