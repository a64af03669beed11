"""What a slip of the hand asks for, refused in words before anything is trained or overwritten."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inpo.common.cache import open_cache
from inpo.common.errors import StorageError, TrainingError, UsageError
from inpo.train.export import export_single_file
from inpo.train.output import claim_output


def test_an_output_that_cannot_be_a_folder(run: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "below"):
        with pytest.raises(StorageError, match="Could not write the run") as caught:
            run(output=output)
        assert str(file) in str(caught.value)
    assert file.read_text() == "mine"


def test_the_cache_is_no_output(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    location = world.cache(tmp_path / "c", shards=(3,))
    before = sorted((tmp_path / "c").rglob("*"))
    with pytest.raises(UsageError, match="The output folder is a cache"):
        run(caches=[location], output=tmp_path / "c")
    assert sorted((tmp_path / "c").rglob("*")) == before


def test_a_folder_of_other_things_is_no_output(world: Any, run: Callable[..., Path], tmp_path: Path) -> None:
    """What a run writes takes the place of what bears its names."""
    mine = tmp_path / "mine"
    shutil.copytree(world.model.folder, mine / "pipeline")
    (mine / "recipe.toml").write_text("# mine")
    before = {file: file.read_bytes() for file in mine.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match="holds something that is no run"):
        run(steps=1, output=mine)
    (mine / "log.txt").write_text("as that of a run whose checkpoints were removed")
    before[mine / "log.txt"] = (mine / "log.txt").read_bytes()
    for flags in ({"model": str(mine / "pipeline")}, {"init_from": str(mine / "pipeline")}):
        with pytest.raises(UsageError, match="take the place of the model"):
            run(steps=1, output=mine, **flags)
    after = {file: file.read_bytes() for file in mine.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_a_folder_that_another_run_writes_to(run: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    with claim_output(output):
        with pytest.raises(UsageError, match="Another run is writing here"):
            run(steps=1)
        assert [each.name for each in output.iterdir()] == [".lock"]
        assert run(steps=1, output=output / "below").is_dir()  # as the runs of a sweep are
    shutil.rmtree(output / "below")
    assert (run(steps=1) / "pipeline").is_dir()


def test_a_folder_where_nothing_can_be_locked(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    assert (run(steps=1) / "pipeline").is_dir()


def test_a_cache_given_twice(run: Callable[..., Path], cache: str, tmp_path: Path) -> None:
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(cache)
    shutil.copytree(cache, copy)
    for again in (f"{cache}/", f"{cache}/../{Path(cache).name}", f"file://{cache}", str(link), str(copy)):
        with pytest.raises(UsageError, match="count twice"):
            run(caches=[cache, again])
    folder = tmp_path / "buckets"
    shutil.copytree(cache, folder / "16x16")
    (folder / "buckets.json").write_text('{"buckets": ["16x16"]}')
    with pytest.raises(UsageError, match="count twice"):
        run(caches=[str(folder), str(folder / "16x16")])


@pytest.mark.parametrize("option", ["only", "except"])
def test_a_list_with_ids_that_no_cache_has(
    run: Callable[..., Path], cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    known = [str(pair_id) for shard in open_cache(cache) for pair_id in shard.read("pair/id")]
    listed = tmp_path / "list"
    listed.write_text("\n".join([*known[:4], "# a comment", "nobody"]))
    run(steps=1, **{option: listed})
    assert f"1 of 5 ids in --{option} {listed} are in no cache, 'nobody' first" in capsys.readouterr().err
    listed.write_text("nobody\n")
    with pytest.raises(UsageError, match="No pair of the list is in the caches") as caught:
        run(output=tmp_path / "other", **{option: listed})
    assert repr(known[0]) in str(caught.value)


def test_a_list_that_is_no_text(run: Callable[..., Path], tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_bytes(b"\xff\xfe\x00")
    for path, advice in ((listed, "save the file as UTF-8"), (tmp_path / "none", "inpo inspect filter")):
        with pytest.raises(UsageError, match="The list of pair ids cannot be read") as caught:
            run(only=path)
        assert advice in str(caught.value)


@pytest.mark.parametrize("flags", [{"learning_rate": float("inf")}, {"beta": float("nan")}, {"clip": float("inf")}])
def test_numbers_that_are_none(run: Callable[..., Path], flags: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="finite number"):
        run(**flags)


def test_weights_that_the_last_update_spoilt_are_not_written(run: Callable[..., Path], tmp_path: Path) -> None:
    """The loss was finite, and nothing is computed after the last update."""
    with pytest.raises(TrainingError, match="The trained weights are not finite"):
        run(steps=1, learning_rate=1e39)
    assert not (tmp_path / "run/pipeline").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_fewer_steps_than_a_run_has_made(run: Callable[..., Path]) -> None:
    output = run(steps=4)
    recipe = (output / "recipe.toml").read_text()
    with pytest.raises(UsageError, match="more steps already") as caught:
        run(steps=2)
    assert "at least 4" in str(caught.value)
    assert (output / "recipe.toml").read_text() == recipe


def test_what_is_written_can_be_read_by_whom_the_mask_lets(run: Callable[..., Path], tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        output = run(steps=1)
        single = export_single_file(output, tmp_path / "one.safetensors", dtype="float32")
    finally:
        os.umask(mask)
    files = [single, *(file for file in (output / "pipeline").rglob("*") if file.is_file())]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_single_file_that_cannot_be_written(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="Could not write the single file"):
        export_single_file(run(steps=1), tmp_path / "file" / "one.safetensors", dtype="float32")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("recipe.toml", {}),
        ("metrics.jsonl", {}),
        ("step-00000001", {}),
        ("step-00000001.png", {"sample_every": 1, "sample_steps": 1}),
        ("pipeline", {}),
        ("lora", {"lora_rank": 2}),
    ],
)
def test_a_full_disk_is_one_message_wherever_it_is_met(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flags: dict[str, Any]
) -> None:
    """Nothing half written stays, and with room the same command ends the run."""
    replace, open_ = os.replace, Path.open

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        return open_(Path("/dev/full") if self.name == name == "metrics.jsonl" else self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(Path, "open", opened)
        with pytest.raises(StorageError, match=r"Could not write.*: No space left on device"):
            run(steps=1, **flags)
    assert not [each for each in (tmp_path / "run").rglob("*") if each.name == name or ".partial-" in each.name]
    run(steps=1, **flags)
    assert list((tmp_path / "run").rglob(name))
