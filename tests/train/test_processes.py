"""Two processes by accelerate: the weights of one process with twice the accumulation."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from inpo.cli import main
from inpo.common.processes import LONGEST_WAIT
from inpo.train.accelerator import control_group
from tests.launching import Zygote, launch, ranks

SETTINGS = """
[model]
model = "{model}"
[data]
cache = "{cache}"
[train]
output = "{output}"
steps = {steps}
batch_size = 2
accumulate = {accumulate}
log_every = 2
held_out = 0.4
evaluate_every = 2
tracker = "none"
learning_rate = 1e-4
adam_eps = 1e-2
"""


def launched(recipe: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = launch("train", "--recipe", str(recipe))
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def test_two_processes_equal_one_with_twice_the_accumulation(
    zygote: Zygote, world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        SETTINGS.format(model=world.model.folder, cache=cache, output=tmp_path / "two", steps=4, accumulate=1)
    )
    both = [zygote.start(["train", "--recipe", str(recipe)], environment) for environment in ranks(2)]
    assert [process.wait() for process in both] == [0, 0], [process.text()[-3000:] for process in both]
    assert "2 x 1 accumulated x 2 processes" in both[0].text()
    one = run(output=tmp_path / "one", accumulate=2, adam_eps=1e-2, held_out=0.4, evaluate_every=2)
    left, right = (
        UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict()
        for output in (tmp_path / "two", one)
    )
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-6
    assert any(not torch.equal(left[name], value) for name, value in world.model.load_network().state_dict().items())
    mine, theirs = (
        [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]
        for output in (one, tmp_path / "two")
    )
    assert [line["step"] for line in theirs] == [2, 4]
    # Not the accuracy: the first update's margins are 0 but for rounding, and their signs are the kernels' own.
    for name in ("loss", "margin", "win_advantage", "held_out_loss", "epoch"):
        for here, there in zip(mine, theirs, strict=True):
            assert there[name] == pytest.approx(here[name], rel=1e-4, abs=1e-4), name


def test_processes_wait_for_one_another_as_long_everywhere() -> None:
    """Groups have timeouts of their own, of half an hour."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert control_group(SimpleNamespace(num_processes=1)) is None
        group = control_group(SimpleNamespace(num_processes=2))
        assert group._get_backend(torch.device("cpu")).options._timeout == LONGEST_WAIT
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_make_a_whole_sweep(zygote: Zygote, world: Any, cache: str, tmp_path: Path) -> None:
    output, recipe, sweep = tmp_path / "sweep", tmp_path / "two.toml", tmp_path / "runs.toml"
    recipe.write_text(SETTINGS.format(model=world.model.folder, cache=cache, output=output, steps=2, accumulate=1))
    sweep.write_text('[[run]]\nobjective = ["inpo", "ipo"]\n')
    asked = ["train", "--recipe", str(recipe), "--sweep", str(sweep)]
    both = [zygote.start(asked, environment) for environment in ranks(2)]
    assert [process.wait() for process in both] == [0, 0], [process.text()[-3000:] for process in both]
    assert {row["name"] for row in json.loads((output / "sweep.json").read_text())} == {"inpo", "ipo"}
    assert all((output / name / "pipeline").is_dir() for name in ("inpo", "ipo"))


@pytest.mark.slow
def test_another_number_of_processes_is_refused_on_resume(
    world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    output = run(held_out=0.4, adam_eps=1e-2)
    recipe = tmp_path / "two.toml"
    recipe.write_text(SETTINGS.format(model=world.model.folder, cache=cache, output=output, steps=8, accumulate=1))
    done = launched(recipe)
    assert done.returncode != 0
    assert "world_size" in done.stderr


def test_torchs_launcher_ends_with_our_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shows last is what a process left in the file it named, read by its own code."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(sys, "argv", ["inpo", "train", "--cache", str(tmp_path / "none"), "--output", str(tmp_path)])
    for stream in ("stdout", "stderr"):  # `main` puts others in their place
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit):
        main()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    shown = ChildFailedError("inpo", {0: failure}).format_msg()
    assert "traceback : There is no cache here." in shown
    assert str(tmp_path / "none") in shown
