"""A file or folder is there whole, with its old content, or not at all, whatever ends the write."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inpo.common.durable import entries, new_file, new_folder, remove, write_file
from inpo.common.errors import DataError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def put_file(path: Path, text: str) -> None:
    write_file(path, text)


def put_new_file(path: Path, text: str) -> None:
    with new_file(path) as staged:
        staged.write_text(text)


def put_folder(path: Path, text: str) -> None:
    with new_folder(path, replace=True) as staged:
        (staged / "below").mkdir()
        (staged / "below/content").write_text(text)


def content(path: Path) -> str:
    return ((path / "below/content") if path.is_dir() else path).read_text()


WRITERS = [put_file, put_new_file, put_folder]


@pytest.mark.parametrize("put", WRITERS)
def test_the_new_takes_the_place_of_the_old(put: Callable[[Path, str], None], tmp_path: Path) -> None:
    target = tmp_path / "a/b/target"
    put(target, "old")
    put(target, "new")
    assert content(target) == "new"
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("put", WRITERS)
def test_a_disk_that_refuses_is_one_message_and_leaves_the_old(
    put: Callable[[Path, str], None], call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    put(target, "old")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StorageError, match=f"Could not write: {os.strerror(code)}") as caught:
            put(target, "new")
    assert caught.value.where == target
    assert content(target) == "old"
    assert names(tmp_path) == ["target"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files above 64 KiB, as a quota would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, previous)


def test_the_kernel_refuses_in_the_middle(tmp_path: Path, small_files: None) -> None:
    """Python's own writing, and safetensors', which wraps the system's number in an error of its own."""
    with pytest.raises(StorageError, match="Could not write: File too large"):
        write_file(tmp_path / "file", bytes(1 << 17))
    with (
        pytest.raises(StorageError, match="Could not write the weights: File too large"),
        new_folder(tmp_path / "folder", action="write the weights") as staged,
    ):
        save_file({"w": torch.zeros(1 << 17)}, staged / "w.safetensors")
    assert names(tmp_path) == []


def test_no_folder_can_be_made_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for put in WRITERS:
        with pytest.raises(StorageError, match="Could not write: "):
            put(tmp_path / "file/below", "x")
    with pytest.raises(StorageError, match="a folder has that name"):
        write_file(tmp_path, "x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine"), DataError("mine", fix="none")])
def test_what_the_block_raises_passes_and_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    for new in (new_file, new_folder):
        with pytest.raises(type(error)), new(tmp_path / "target"):
            raise error
    assert names(tmp_path) == []


def test_a_folder_with_something_in_it_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with new_folder(target) as staged:  # an empty folder is as good as none
        (staged / "first").touch()
    with pytest.raises(StorageError), new_folder(target) as staged:
        (staged / "second").touch()
    assert names(target) == ["first"]
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127])
def test_any_name_that_the_system_takes_is_written(name: str, tmp_path: Path) -> None:
    for put in WRITERS[:2]:
        put(tmp_path / name, "x")
        assert names(tmp_path) == [name]


def test_links_are_followed_and_pipes_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    ends = os.pipe()
    write_file(Path(f"/dev/fd/{ends[1]}"), "through")
    assert os.read(ends[0], 100) == b"through"


KILLED = """
import os, signal, sys
from pathlib import Path
from inpo.common import durable
target, stage = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if stage != "inside":
    setattr(durable if stage == "flush" else os, stage, die)
with durable.new_folder(target, replace=True) as staged:
    (staged / "half").write_text("half")
    if stage == "inside":
        die()
"""


@pytest.mark.parametrize("stage", ["inside", "flush", "replace"])
def test_a_killed_writer_leaves_the_old_and_the_next_one_cleans_up(stage: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    put_folder(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), stage], check=False)
    assert done.returncode == -signal.SIGKILL
    assert content(target) == "old"
    assert len(names(tmp_path)) == 2
    assert entries(tmp_path) == ["target"]
    assert names(tmp_path) == ["target"]
    put_folder(tmp_path / "another", "x")
    assert entries(tmp_path) == names(tmp_path) == ["another", "target"]


@pytest.mark.parametrize("call", ["os.open", "fcntl.flock"])
@pytest.mark.parametrize("put", WRITERS)
def test_a_sweep_before_the_lock_is_there_costs_the_writer_nothing(
    put: Callable[[Path, str], None], call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes what looks like a dead writer's, once before it is opened to be locked and once after."""
    put(tmp_path / "target", "old")
    real: Callable[..., int] = os.open if call == "os.open" else fcntl.flock
    swept: list[Path] = []

    def late(*arguments: Any, **options: Any) -> int:
        staged = list(tmp_path.glob(".target.partial-*"))
        if staged and not swept:
            swept.extend(staged)
            remove(staged[0])
        return real(*arguments, **options)

    monkeypatch.setattr(call, late)
    put(tmp_path / "target", "new")
    assert len(swept) == 1
    assert content(tmp_path / "target") == "new"
    assert names(tmp_path) == ["target"]


def test_a_sweep_leaves_the_old_folder_alone_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_folder(tmp_path / "target", "old")
    real, kept = os.replace, []

    def sweep(source: Path, target: Path) -> None:
        seen = entries(tmp_path)  # which sweeps
        kept.append([name for name in names(tmp_path) if name not in seen])
        real(source, target)

    monkeypatch.setattr(os, "replace", sweep)
    put_folder(tmp_path / "target", "new")
    assert [len(each) for each in kept] == [1, 2]  # the new one, then the old one too
    assert content(tmp_path / "target") == "new"
    assert names(tmp_path) == ["target"]


def test_what_a_living_writer_has_staged_stays(tmp_path: Path) -> None:
    (tmp_path / ".theirs.partial").write_text("not ours")
    with new_folder(tmp_path / "first") as staged:
        (staged / "content").write_text("x")
        assert entries(tmp_path) == [".theirs.partial"]
        put_new_file(tmp_path / "second", "y")
    assert names(tmp_path) == [".theirs.partial", "first", "second"]
    assert (tmp_path / "first/content").read_text() == "x"
