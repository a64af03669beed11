"""Interrupted and resumed runs end at the same weights, bit for bit."""

import itertools
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import inpo.train.run
from inpo.common import durable
from inpo.common.errors import UsageError
from inpo.train import checkpoint
from inpo.train.loop import Trainer
from inpo.train.optim import prepare_network
from inpo.train.records import Batch
from inpo.train.settings import TrainSettings
from tests.engines.runs import until
from tests.launching import Zygote

STEPS = 9
OPTIONS: dict[str, Any] = {"steps": STEPS, "save_every": 2, "accumulate": 2, "ema": 0.9, "warmup_steps": 5}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return dict(UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict())


def trained(output: Path) -> dict[str, torch.Tensor]:
    """The raw weights of the last checkpoint; the pipeline holds the moving average."""
    return load_file(checkpoint.list_checkpoints(output / "checkpoints")[-1] / "model.safetensors")


def steps_of(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Of another process: its kernels may sum in another order. A step too many or another record moves the weights by
    the rate times gradients above Adam's epsilon of 1e-2: by more than a hundred times this."""
    return left.keys() == right.keys() and all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*_: Any) -> None:
    raise Killed


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, str], None]:
    """kill_at(step, "optimise" or "save"): the run dies in the middle of that step, or of the save after it, which
    leaves what it had written."""
    optimise, save = Trainer._optimise, checkpoint.save
    stages = itertools.cycle([(checkpoint, "write_state"), (checkpoint, "sealed"), (durable, "flush")])

    def arm(step: int | None, where: str = "optimise") -> None:
        def dying(self: Trainer, batches: Iterator[Batch]) -> int:
            if where == "optimise" and self.step == step:
                raise Killed
            return optimise(self, batches)

        def dying_save(parts: checkpoint.Resumable, folder: Path, *, step: int, **rest: Any) -> Path:
            if where != "save" or step != victim:
                return save(parts, folder, step=step, **rest)
            with monkeypatch.context() as patch:
                patch.setattr(*next(stages), die)
                patch.setattr(durable, "remove", lambda path: None)
                return save(parts, folder, step=step, **rest)

        victim = step
        monkeypatch.setattr(Trainer, "_optimise", dying)
        monkeypatch.setattr(checkpoint, "save", dying_save)

    return arm


def test_ten_kills_leave_no_trace(run: Callable[..., Path], kill_at: Callable[..., None], tmp_path: Path) -> None:
    """Runs killed at ten random places, in a step or in a save, against one that was left alone."""
    whole = run(output=tmp_path / "whole", **OPTIONS)
    places = random.Random(0)
    kills = 0
    for attempt in range(3):
        output = tmp_path / f"killed-{attempt}"
        # Places in ascending order within an attempt: later ones are met only after the earlier ones.
        for step in sorted(places.sample(range(1, STEPS), 3 if attempt else 4)):
            where = places.choice(["optimise", "save"]) if step % 2 == 0 else "optimise"
            kill_at(step, where)
            with pytest.raises(Killed):
                run(output=output, **OPTIONS)
            kills += 1
        kill_at(None)
        run(output=output, **OPTIONS)
        assert equal(trained(whole), trained(output))
        assert equal(weights(whole), weights(output))
        assert steps_of(output) == steps_of(whole)
        assert all(entry.name.startswith("step-") for entry in (output / "checkpoints").iterdir())
    assert kills == 10


@pytest.mark.parametrize("options", [{}, {"optimizer": "adafactor"}], ids=["adamw", "adafactor"])
def test_a_network_in_another_memory_order(
    options: dict[str, Any], run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels last, as on a GPU. A fused kernel goes through weights and state as they lie in memory."""
    prepare = inpo.train.run.prepare_network

    def reordered(network: torch.nn.Module, *arguments: Any, **told: Any) -> Any:
        network.to(memory_format=torch.channels_last)
        return prepare(network, *arguments, **told)

    monkeypatch.setattr(inpo.train.run, "prepare_network", reordered)
    told = OPTIONS | {"steps": 4, "accumulate": 1, "warmup_steps": 0} | options
    whole, parts = run(output=tmp_path / "whole", **told), tmp_path / "parts"
    run(output=parts, **told | {"steps": 2})
    run(output=parts, **told)
    assert equal(trained(whole), trained(parts))


def test_weights_that_will_be_split_stay_in_plain_order(world: Any) -> None:
    """FSDP takes no others; elsewhere a GPU's convolutions are faster with channels last."""
    for sharded in (False, True):
        network, model = world.model.load_network(), world.model
        prepare_network(
            network,
            model.family,
            TrainSettings(),
            network_dtype="bfloat16",
            device=torch.device("cuda"),
            sharded=sharded,
        )
        assert all(each.is_contiguous() for each in network.parameters()) == sharded


def test_a_finished_run_takes_no_step_and_can_be_prolonged(run: Callable[..., Path], tmp_path: Path) -> None:
    longer = run(steps=4, output=tmp_path / "longer")
    output = run(steps=2)
    before = weights(output)
    assert equal(before, weights(run(steps=2)))
    assert equal(weights(longer), weights(run(steps=4)))
    assert steps_of(output) == [0, 2, 4]


def test_the_last_checkpoints_are_kept(run: Callable[..., Path]) -> None:
    output = run(steps=5, save_every=1, keep_last=2)
    names = sorted(entry.name for entry in (output / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]


def test_an_old_checkpoint_that_is_a_link_is_unlinked(run: Callable[..., Path], tmp_path: Path) -> None:
    options = {"save_every": 1, "keep_last": 2}
    place = run(steps=2, **options) / "checkpoints"
    (place / "step-00000001").rename(tmp_path / "elsewhere")
    (place / "step-00000001").symlink_to(tmp_path / "elsewhere")
    run(steps=4, **options)
    assert sorted(entry.name for entry in place.iterdir()) == ["step-00000003", "step-00000004"]
    assert (tmp_path / "elsewhere/run.json").is_file()


def test_resume_from_a_path(run: Callable[..., Path], tmp_path: Path) -> None:
    whole = run(steps=4, save_every=2, keep_last=3, output=tmp_path / "whole")
    other = run(steps=4, resume=str(whole / "checkpoints" / "step-00000002"), output=tmp_path / "other")
    assert equal(weights(whole), weights(other))
    with pytest.raises(UsageError, match="no checkpoint here"):
        run(resume=str(tmp_path), output=tmp_path / "third")
    run(steps=2, resume=str(whole / "checkpoints" / "step-00000002"), output=other)  # the same run's


def test_a_path_of_another_run_does_not_touch_a_run(run: Callable[..., Path], tmp_path: Path) -> None:
    """Its later checkpoints would go at the first save, and its metrics would go on with another loss."""
    output, other = run(steps=3, save_every=1, keep_last=9), run(steps=1, objective="hinge", output=tmp_path / "other")
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and file.name != "log.txt"}
    path = str(other / "checkpoints/step-00000001")
    with pytest.raises(UsageError, match="holds a run already"):
        run(steps=4, resume=path, objective="hinge")
    assert {file: file.read_bytes() for file in before} == before
    assert len(checkpoint.list_checkpoints(output / "checkpoints")) == 3
    run(steps=2, resume=path, objective="hinge", output=tmp_path / "empty")


def test_never_resume_does_not_touch_a_run(run: Callable[..., Path]) -> None:
    output = run(steps=2)
    before = (output / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="holds a run already"):
        run(steps=2, resume="never")
    assert (output / "metrics.jsonl").read_text() == before


def test_what_an_earlier_step_goes_on_from_has_no_later_pictures(run: Callable[..., Path]) -> None:
    options = {"save_every": 1, "keep_last": 9, "sample_every": 1, "sample_steps": 1}
    output = run(steps=3, **options)
    assert len(list((output / "samples").iterdir())) == 4
    run(steps=2, resume=str(output / "checkpoints/step-00000001"), **options)
    assert sorted(file.name for file in (output / "samples").iterdir()) == [f"step-{n:08d}.png" for n in range(3)]
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()][-1] == 2


SHOWN = {"save_every": 2, "keep_last": 9, "log_every": 1, "sample_every": 1, "sample_steps": 1}


def shown(output: Path) -> dict[str, bytes]:
    """What shows how a run went."""
    files = [output / "recipe.toml", output / "metrics.jsonl", *(output / "samples").iterdir()]
    return {file.name: file.read_bytes() for file in files}


def curve(output: Path) -> list[int]:
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars("loss")]


def test_the_model_of_an_earlier_step_costs_nothing_of_what_shows_the_run(run: Callable[..., Path]) -> None:
    options = SHOWN | {"tracker": "tensorboard"}
    output = run(steps=4, **options)
    before, last = shown(output), weights(output)
    run(steps=2, resume=str(output / "checkpoints/step-00000002"), **options)
    assert not equal(weights(output), last)
    assert shown(output) == before
    assert curve(output) == [0, 1, 2, 3, 4]


def test_what_goes_on_from_an_earlier_step_replaces_the_later_ones_at_its_first_save(
    run: Callable[..., Path], kill_at: Callable[..., None]
) -> None:
    """Killed before that, the run is as it was, whatever its samples were to be of, and goes on from its last
    checkpoint."""
    options = SHOWN | {"tracker": "tensorboard"}
    output = run(steps=6, **options)
    before, earlier = shown(output), str(output / "checkpoints/step-00000002")
    for step, where in ((3, "optimise"), (4, "save")):
        kill_at(step, where)
        with pytest.raises(Killed):
            run(steps=6, resume=earlier, **options | {"sample_prompts": ["another"]})
        assert shown(output) == before
        assert curve(output) == [0, 1, 2, 3, 4, 5, 6]
    kill_at(5)
    with pytest.raises(Killed):
        run(steps=6, resume=earlier, **options | {"keep_last": 8})
    assert b"keep_last = 8" in shown(output)["recipe.toml"]
    assert steps_of(output) == [0, 1, 2, 3, 4, 5]
    assert sorted(file.name for file in (output / "samples").iterdir()) == [f"step-{n:08d}.png" for n in range(6)]
    kill_at(None)
    run(steps=6, **options)
    assert steps_of(output) == curve(output) == [0, 1, 2, 3, 4, 5, 6]


def test_lora_checkpoints_hold_the_trained_layers_only(
    run: Callable[..., Path], kill_at: Callable[..., None], tmp_path: Path
) -> None:
    options = {"steps": 4, "save_every": 2, "lora_rank": 2, "learning_rate": 1e-3}
    whole = run(output=tmp_path / "whole", **options)
    kill_at(3)
    with pytest.raises(Killed):
        run(output=tmp_path / "killed", **options)
    kill_at(None)
    resumed = run(output=tmp_path / "killed", **options)
    (folder,) = checkpoint.list_checkpoints(whole / "checkpoints")[-1:]
    assert not (folder / "model.safetensors").exists()
    assert all("lora" in name for name in load_file(folder / checkpoint.TRAINED))
    left, right = (load_file(output / "lora" / "pytorch_lora_weights.safetensors") for output in (whole, resumed))
    assert equal(left, right)


def arguments(model: Path, cache: str, output: Path, steps: int) -> list[str]:
    flags = {"model": model, "cache": cache, "output": output, "steps": steps, "batch-size": 2, "held-out": 0}
    flags |= {"tracker": "none", "log-every": 1, "save-every": 2, "learning-rate": 1e-4, "adam-eps": 1e-2}
    return ["train", *(f"--{name}={value}" for name, value in flags.items())]


def until_its_third_step(output: Path) -> None:
    until(lambda: (output / "metrics.jsonl").exists() and len(steps_of(output)) >= 4)


def test_sigterm_saves_and_ends_with_zero(
    zygote: Zygote, world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    """A real process, far too many steps, SIGTERM in the middle; resumed here to the step after it."""
    output = tmp_path / "terminated"
    process = zygote.start(arguments(world.model.folder, cache, output, 100_000))
    until_its_third_step(output)
    process.terminate()
    assert process.wait() == 0, process.text()
    assert "run the same command again to go on" in process.text()
    (last,) = checkpoint.list_checkpoints(output / "checkpoints")[-1:]
    step = int(last.name.removeprefix("step-"))
    assert step >= 3
    options = {"steps": step + 1, "log_every": 1, "save_every": 2, "adam_eps": 1e-2}
    assert close(weights(run(output=output, **options)), weights(run(output=tmp_path / "whole", **options)))


def test_ctrl_c_saves_and_ends_with_zero(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the third step, which is finished first."""
    output, optimise = tmp_path / "stopped", Trainer._optimise

    def interrupted(self: Trainer, batches: Iterator[Batch]) -> int:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return optimise(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimise", interrupted)
        run(output=output, steps=100)
    assert "stopped at step 3; run the same command again to go on" in capsys.readouterr().err
    assert [each.name for each in checkpoint.list_checkpoints(output / "checkpoints")] == ["step-00000003"]
    assert not (output / "pipeline").exists()
    assert equal(weights(run(output=output, steps=4)), weights(run(output=tmp_path / "whole", steps=4)))
    said = (output / "log.txt").read_text()  # of both runs, in their order
    told = ("zero-step proof holds", "stopped at step 3", "resumed from", f"wrote {output / 'pipeline'}")
    places = [said.index(each) for each in told]
    assert places == sorted(places)
    assert f"next: inpo inspect run {output}\n" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_in_a_real_process(
    zygote: Zygote, world: Any, cache: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    for _ in range(2):
        process = zygote.start(arguments(world.model.folder, cache, output, 40))
        until_its_third_step(output)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
    options = {"steps": 40, "log_every": 1, "save_every": 2, "adam_eps": 1e-2}
    resumed = run(output=output, **options)
    assert close(weights(resumed), weights(run(output=tmp_path / "whole", **options)))
