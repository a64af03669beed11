"""A checkpoint is used whole or not at all: damage falls back to the one before, by name; nothing in it is code."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from inpo.common.cache.document import sealed
from inpo.common.errors import StorageError, TrainingError, UsageError
from inpo.train import checkpoint
from inpo.train.checkpoint import Checkpoint, choose, list_checkpoints

OPTIONS: dict[str, Any] = {"steps": 6, "save_every": 2, "keep_last": 3, "ema": 0.9}
LAST = "step-00000006"


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 2, 4 and 6 of a run, read only."""
    from accelerate.state import AcceleratorState

    from inpo.train.run import run_train

    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("finished") / "run"
    flags = {"output": output, "batch_size": 2, "log_every": 2, "held_out": 0.0, "tracker": "none"} | OPTIONS
    model = request.getfixturevalue("world").model.folder
    cache = request.getfixturevalue("cache")
    assert run_train(None, {"model": str(model)}, [cache], flags | {"learning_rate": 1e-4}, resume="auto") == 0
    return output


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run's output that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def said(resume: str, folder: Path) -> tuple[Checkpoint | None, list[str]]:
    lines: list[str] = []
    return choose(resume, folder, say=lines.append), lines


def reseal(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / checkpoint.STATE).read_text())
    (folder / checkpoint.STATE).write_bytes(sealed(document | changes))


def files_of(finished: Path) -> list[str]:
    return sorted(file.name for file in (finished / "checkpoints" / LAST).iterdir())


def test_no_file_of_a_checkpoint_is_a_pickle(finished: Path) -> None:
    kinds = {Path(name).suffix for name in files_of(finished)}
    assert kinds == {".json", ".safetensors"}
    for file in (finished / "checkpoints" / LAST).iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            load_file(file)


def test_the_seal_covers_every_file_and_says_where_the_run_stands(finished: Path) -> None:
    folder = finished / "checkpoints" / LAST
    document = json.loads((folder / checkpoint.STATE).read_text())
    assert sorted([*document["files"], checkpoint.STATE]) == files_of(finished)
    assert {name: seal["bytes"] for name, seal in document["files"].items()} == {
        name: (folder / name).stat().st_size for name in document["files"]
    }
    assert (document["step"], document["stream"]["consumed"], document["identity"]["batch_size"]) == (6, 6, 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


def zero(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(bytes(len(data)))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def extend(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def of_another_step(file: Path) -> None:
    shutil.copy(file.parent.parent / "step-00000004" / file.name, file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("how", [flip, zero, cut, extend, empty, of_another_step, Path.unlink, a_folder])
def test_damage_to_any_file_falls_back_to_the_one_before(copied: Path, how: Callable[[Path], None]) -> None:
    folder = copied / "checkpoints"
    kept = shutil.copytree(folder / LAST, copied / "kept")
    for name in files_of(copied):
        if how is of_another_step and (folder / "step-00000004" / name).read_bytes() == (kept / name).read_bytes():
            continue  # the same bytes in both
        how(folder / LAST / name)
        found, lines = said("auto", folder)
        assert found is not None, name
        assert found.path.name == "step-00000004", name
        (line,) = lines
        assert LAST in line, line
        assert "step-00000004" in line, line
        assert how is of_another_step or name in line, line
        with pytest.raises((TrainingError, UsageError), match=r"not whole|no checkpoint here"):
            said(str(folder / LAST), folder)
        shutil.rmtree(folder / LAST)
        shutil.copytree(kept, folder / LAST)
    assert said("auto", folder)[1] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 7},
        {"step": -3},
        {"step": 4},
        {"step": "6"},
        {"step": 6.0},
        {"step": None},
        {"stream": []},
        {"stream": {"consumed": 4}},
        {"stream": {"consumed": "6"}},
        {"identity": 3},
        {"identity": {}},
        {"identity": {}, "stream": {}},
        {"step": 10**15, "identity": {"accumulate": "1"}},
        {"files": {"../model.safetensors": {"bytes": 1, "digest": "0" * 32}}},
        {"files": {"model.safetensors": {"bytes": -1, "digest": "0" * 32}}},
        {"more": 1},
    ],
)
def test_a_forged_document_falls_back(copied: Path, changes: dict[str, Any]) -> None:
    """Also where its checksum was made anew."""
    folder = copied / "checkpoints"
    reseal(folder / LAST, **changes)
    found, lines = said("auto", folder)
    assert found is not None
    assert found.path.name == "step-00000004"
    assert len(lines) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000])
def test_a_document_that_is_none_falls_back(copied: Path, text: str) -> None:
    (copied / "checkpoints" / LAST / checkpoint.STATE).write_bytes(text.encode("latin-1"))
    found, lines = said("auto", copied / "checkpoints")
    assert found is not None
    assert found.step == 4
    assert f"{LAST} is damaged" in lines[0]


def test_one_that_could_not_be_looked_at_is_not_passed_over(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be removed once newer ones are there."""

    def refuse(file: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(checkpoint, "_seal", refuse)
    with pytest.raises(StorageError, match=rf"(?s)Permission denied.*{LAST}.*--resume PATH"):
        said("auto", copied / "checkpoints")


def test_none_whole_is_an_error_that_names_them(copied: Path, run: Callable[..., Path]) -> None:
    folder = copied / "checkpoints"
    for each in list_checkpoints(folder):
        cut(each / "model.safetensors")
    with pytest.raises(TrainingError, match="No checkpoint of this run is whole") as caught:
        run(output=copied, **OPTIONS | {"steps": 8})
    for name in ("step-00000002", "step-00000004", LAST, "model.safetensors", "--resume"):
        assert name in str(caught.value)


def test_a_run_goes_on_from_the_one_before_and_leaves_the_damaged_one_behind(
    copied: Path, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 4, with the weights of a run that nothing happened to."""
    whole = run(output=tmp_path / "whole", **OPTIONS | {"steps": 8})
    zero(copied / "checkpoints" / LAST / "optimizer-00000.safetensors")
    capsys.readouterr()
    run(output=copied, **OPTIONS | {"steps": 8, "save_every": 5, "keep_last": 2})
    out = capsys.readouterr().err
    assert f"note: {LAST} is damaged (optimizer-00000.safetensors is not as written)" in out
    assert "step-00000004 at step 4" in out
    left, right = (load_file(each / "pipeline/unet/diffusion_pytorch_model.safetensors") for each in (whole, copied))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [each.name for each in list_checkpoints(copied / "checkpoints")] == ["step-00000005", "step-00000008"]


def test_code_in_a_checkpoint_does_not_run(copied: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = copied / "checkpoints" / LAST
    names = ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin", "schedule.pkl"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Code()))
    run(output=copied, **OPTIONS | {"steps": 7})
    for file in (copied / "checkpoints").glob("*/*"):
        file.write_bytes(pickle.dumps(Code()))
    with pytest.raises(TrainingError, match="No checkpoint of this run is whole"):
        run(output=copied, **OPTIONS | {"steps": 8})
    assert not (tmp_path / "ran").exists()


def test_a_whole_checkpoint_of_another_network_is_refused(copied: Path, run: Callable[..., Path]) -> None:
    """Sealed anew over weights of other names."""
    folder = copied / "checkpoints" / LAST
    weights = load_file(folder / "model.safetensors")
    first = next(iter(weights))
    save_file({f"x.{name}" if name == first else name: each for name, each in weights.items()}, folder / "m")
    os.replace(folder / "m", folder / "model.safetensors")
    files = json.loads((folder / checkpoint.STATE).read_text())["files"]
    reseal(folder, files=files | {"model.safetensors": checkpoint._seal(folder / "model.safetensors").model_dump()})
    with pytest.raises(TrainingError, match="not one of such a run"):
        run(output=copied, **OPTIONS | {"steps": 8})


def test_a_full_disk_is_one_message_and_keeps_the_checkpoint_before(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second save; with room, the run ends as if nothing had been."""
    whole = run(output=tmp_path / "whole", steps=4, save_every=2)
    write = checkpoint.write_state

    def full(folder: Path, name: str, state: Any) -> None:
        if "step-00000004" in str(folder) and name == "optimizer":
            (folder / "half").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(folder, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", full)
        with pytest.raises(StorageError, match="Could not write the checkpoint: No space left on device"):
            run(output=tmp_path / "full", steps=4, save_every=2)
    assert [entry.name for entry in (tmp_path / "full/checkpoints").iterdir()] == ["step-00000002"]
    run(output=tmp_path / "full", steps=4, save_every=2)
    left, right = (
        UNet2DConditionModel.from_pretrained(output / "pipeline", subfolder="unet").state_dict()
        for output in (whole, tmp_path / "full")
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_every_optimiser_resumes_bit_for_bit(optimizer: str, run: Callable[..., Path], tmp_path: Path) -> None:
    options = {"steps": 4, "save_every": 2, "optimizer": optimizer, "keep_last": 3, "schedule": "cosine"}
    whole = run(output=tmp_path / "whole", **options)
    run(output=tmp_path / "other", resume=str(whole / "checkpoints/step-00000002"), **options)
    left, right = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "checkpoints/step-00000004").iterdir()}
        for name in ("whole", "other")
    )
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []
