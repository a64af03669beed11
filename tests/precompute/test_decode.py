"""Images are decoded in other processes: the same results in the same order, and their deaths cost no pair and no
shard.
"""

import contextlib
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from inpo.common.pairs import Pair, Skipped
from inpo.common.pairs.decode import DecodePool, PreparedPair, measure_pair, prepare_pair


class Deadly(bytes):
    """What ends the process that takes it out of a pickle, as a crashing decoder would."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os._exit, (139,))


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + value, 16), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(number: int) -> list[Pair | Skipped]:
    """Every fifth a row without a pair, every seventh a pair with a damaged image."""
    made: list[Pair | Skipped] = []
    for row in range(number):
        if row % 5 == 4:
            made.append(Skipped(pair_id=f"p{row}", reason="tie", detail="", row=row))
        else:
            lose = b"nothing" if row % 7 == 6 else png(row + 1)
            made.append(Pair(pair_id=f"p{row}", prompt=f"{row}", win=png(row), lose=lose, label=1.0, row=row))
    return made


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    made = DecodePool(2)
    yield made
    made.close()


def decoders() -> set[int]:
    """Ids of the processes that decode for this one."""
    children = psutil.Process().children()
    return {child.pid for child in children if any("pairs.decode" in word for word in child.cmdline())}


def crashed(pair: Pair) -> Skipped:
    return Skipped(pair_id=pair.pair_id, reason="unreadable", detail="crashed", row=pair.row)


def flip_odd(pair: Pair) -> tuple[bool]:
    return (pair.row % 2 == 1,)


def test_processes_may_be_started_before_there_is_work(pool: DecodePool) -> None:
    pool.start()
    begun = decoders()
    assert len(begun) == 2
    given = rows(4)
    assert list(pool.map(measure_pair, given, on_crash=crashed)) == list(
        DecodePool(0).map(measure_pair, given, on_crash=crashed)
    )
    assert decoders() == begun
    DecodePool(0).start()


def test_they_start_while_the_models_are_loaded(pipelines: Callable, tars: Callable, run: Any, tmp_path: Path) -> None:
    seen: list[bool] = []

    def loaded(components: Any) -> None:
        """Called before the loading has ended."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not seen:
            seen.extend(True for _ in decoders())
            time.sleep(0.05)

    run.prepare = loaded
    assert run(tars(2, 2), pipelines(), tmp_path / "cache", decode_workers=1) == 0
    assert seen


def test_processes_give_what_the_calling_thread_gives_in_the_same_order(pool: DecodePool) -> None:
    given = rows(40)
    work = partial(prepare_pair, resolution=(8, 8))
    here = list(DecodePool(0).map(work, given, arguments=flip_odd, on_crash=crashed))
    there = list(pool.map(work, given, arguments=flip_odd, on_crash=crashed))
    assert [row for row, _ in there] == [row for row, _ in here] == given
    for (_, left), (_, right) in zip(here, there, strict=True):
        if isinstance(left, PreparedPair):
            assert isinstance(right, PreparedPair)
            assert (left.pair_id, left.prompt, left.label, left.row) == (
                right.pair_id,
                right.prompt,
                right.label,
                right.row,
            )
            for one, other in ((left.win, right.win), (left.lose, right.lose)):
                np.testing.assert_array_equal(one.levels, other.levels)
                assert (one.original_size, one.crop_top_left) == (other.original_size, other.crop_top_left)
        else:
            assert left == right
    assert {getattr(result, "reason", "") for _, result in there} == {"", "tie", "unreadable"}


def test_rows_are_pulled_a_bounded_number_ahead(pool: DecodePool) -> None:
    pulled = 0

    def source() -> Iterator[Pair | Skipped]:
        nonlocal pulled
        for row in rows(100):
            pulled += 1
            yield row

    results = pool.map(measure_pair, source(), on_crash=crashed)
    for taken in range(1, 20):
        next(results)
        assert pulled <= taken + 8
    results.close()  # type: ignore[attr-defined]


def process_of(pair: Pair) -> int:
    time.sleep(0.01)
    return os.getpid()


def half_an_answer(pair: Pair, mark: str) -> list[int] | Skipped:
    """Dies while its answer is half written, as a worker does that is killed; the second time it lives."""
    if pair.row == 5 and not Path(mark).exists():
        Path(mark).touch()
        for number in range(3, 64):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    os.write(number, struct.pack("!i", 1_000_000) + b"begun")
        os.kill(os.getpid(), signal.SIGKILL)
    return measure_pair(pair)


def sleep_long(pair: Pair) -> int:
    time.sleep(600)
    return 0


def test_a_worker_that_is_killed_costs_nothing(pool: DecodePool) -> None:
    given = [row for row in rows(60) if isinstance(row, Pair)]
    results = pool.map(process_of, given, on_crash=crashed)
    found = [next(results) for _ in range(6)]
    os.kill(int(found[0][1]), signal.SIGKILL)  # type: ignore[call-overload]
    found.extend(results)
    assert [row for row, _ in found] == given
    assert len({process for _, process in found}) == 3
    assert all(isinstance(process, int) for _, process in found)


def test_a_worker_that_dies_in_the_middle_of_an_answer_costs_nothing(pool: DecodePool, tmp_path: Path) -> None:
    given = rows(20)
    mark = str(tmp_path / "mark")
    found = list(pool.map(half_an_answer, given, arguments=lambda pair: (mark,), on_crash=crashed))
    assert Path(mark).exists()
    assert found == list(DecodePool(0).map(measure_pair, given, on_crash=crashed))


def test_images_that_kill_two_workers_are_told_and_the_others_go_on(pool: DecodePool) -> None:
    given = rows(12)
    expected = list(DecodePool(0).map(measure_pair, given, on_crash=crashed))
    deadly = Pair(pair_id="deadly", prompt="", win=Deadly(b"x"), lose=png(1), label=1.0, row=5)
    given[5] = deadly
    expected[5] = (deadly, crashed(deadly))
    assert list(pool.map(measure_pair, given, on_crash=crashed)) == expected
    del given[5], expected[5]
    assert list(pool.map(measure_pair, given, on_crash=crashed)) == expected


def test_what_the_work_raises_is_raised_here(pool: DecodePool) -> None:
    with pytest.raises(TypeError):
        list(pool.map(half_an_answer, rows(3), on_crash=crashed))  # one argument is missing


def test_closing_ends_workers_that_are_stuck() -> None:
    pool = DecodePool(2)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            list(pool.map(sleep_long, rows(9), on_crash=crashed))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while len(decoders()) < 2:
        time.sleep(0.01)
    pool.close()
    thread.join(30)
    assert not thread.is_alive()
    assert [str(error) for error in failed] == ["the pool is closed"]
    assert not decoders()
    for workers in (pool, DecodePool(0)):
        workers.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(workers.map(measure_pair, rows(1), on_crash=crashed))


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    """From the command line, in a folder whose names are those of our packages."""
    for name in ("common", "precompute"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported from the current folder')\n")
    command = Path(sys.executable).with_name("inpo")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.jsonl").write_text('{"id": "a", "win": "a.png", "lose": "a.png", "prompt": ""}\n')
    (tmp_path / "pairs" / "a.png").write_bytes(png(1))
    done = subprocess.run(
        [str(command), "data", "check", "pairs", "--decode-workers", "2", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, "current folder" in done.stderr) == (0, False), done.stderr
    assert json.loads(done.stdout)["num_pairs"] == 1


_WORK = """
import os, sys, time

def process(pair):
    time.sleep(0.01)
    return os.getpid(), "torch" in sys.modules or hasattr(sys.modules["__main__"], "process")
"""
_KILLED = """
import time
from inpo.common.pairs import Pair
from inpo.common.pairs.decode import DecodePool
from work import process

pairs = [Pair(pair_id=str(row), prompt="", win=b"", lose=b"", label=1.0, row=row) for row in range(40)]
results = DecodePool(2).map(process, pairs, on_crash=None)
found = dict(next(results)[1] for _ in range(30))
assert not any(found.values())
print(*found, flush=True)
time.sleep(60)
"""


def test_workers_leave_the_programs_main_module_alone_and_end_when_it_is_killed(tmp_path: Path) -> None:
    """A script needs no guard, and what it imports is not imported by every worker."""
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
    (tmp_path / "work.py").write_text(_WORK)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    ) as main:
        assert main.stdout is not None
        ids = [int(word) for word in main.stdout.readline().split()]
        assert ids
        main.kill()
    deadline = time.monotonic() + 20
    while any(_alive(number) for number in ids):
        assert time.monotonic() < deadline, "workers outlive their main process"
        time.sleep(0.05)


def _alive(number: int) -> bool:
    """False for a zombie too: who reaps it is not the pool's affair."""
    if Path("/proc/self/stat").exists():
        try:
            return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True
