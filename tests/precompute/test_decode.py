"""Images are decoded in other processes: the same results in the same order, and their deaths cost no pair and no shard."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.pairs import Pair, Skipped
from precompute.decode import DecodePool, PreparedPair, measure_pair, prepare_pair


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


def flip_odd(pair: Pair) -> tuple[bool]:
    return (pair.row % 2 == 1,)


def test_processes_give_what_the_calling_thread_gives_in_the_same_order(pool: DecodePool) -> None:
    given = rows(40)
    work = partial(prepare_pair, resolution=8)
    here = list(DecodePool(0).map(work, given, flip_odd))
    there = list(pool.map(work, given, flip_odd))
    assert [row for row, _ in there] == [row for row, _ in here] == given
    for (_, left), (_, right) in zip(here, there, strict=True):
        if isinstance(left, PreparedPair):
            assert isinstance(right, PreparedPair)
            assert (left.pair_id, left.prompt, left.label, left.row) == (
                right.pair_id, right.prompt, right.label, right.row,
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

    results = pool.map(measure_pair, source())
    for taken in range(1, 20):
        next(results)
        assert pulled <= taken + 8
    results.close()  # type: ignore[attr-defined]


def workers() -> list[int]:
    """Process ids of this process's decode workers, which the fork server has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                grandparent = int((Path("/proc") / str(parent) / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            if b"forkserver" in command and grandparent == os.getpid():
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_a_worker_that_is_killed_costs_nothing(pool: DecodePool) -> None:
    given = rows(60)
    results = pool.map(measure_pair, given)
    found = [next(results) for _ in range(3)]
    alive = workers()
    assert len(alive) == 2
    os.kill(alive[0], signal.SIGKILL)
    found.extend(results)
    assert found == list(DecodePool(0).map(measure_pair, given))


def test_images_that_kill_their_worker_are_named_and_the_pool_goes_on(pool: DecodePool) -> None:
    given = rows(12)
    given[5] = Pair(pair_id="deadly", prompt="", win=Deadly(b"x"), lose=png(1), label=1.0, row=5)
    results = pool.map(measure_pair, given)
    with pytest.raises(DataError, match="pair deadly") as caught:
        list(results)
    assert "--decode-workers" in str(caught.value)
    del given[5]
    assert list(pool.map(measure_pair, given)) == list(DecodePool(0).map(measure_pair, given))


_KILLED = """
import os, time
from common.pairs import Pair
from precompute.decode import DecodePool

def process(pair):
    time.sleep(0.01)
    return os.getpid()

if __name__ == "__main__":
    pairs = [Pair(pair_id=str(row), prompt="", win=b"", lose=b"", label=1.0, row=row) for row in range(40)]
    results = DecodePool(2).map(process, pairs)
    print(*{next(results)[1] for _ in range(30)}, flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_main_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
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


def test_a_closed_pool_starts_nothing(pool: DecodePool) -> None:
    results = pool.map(measure_pair, rows(40))
    next(results)
    pool.close()
    with pytest.raises((RuntimeError, CancelledError)):
        list(results)
    with pytest.raises(RuntimeError, match="closed"):
        next(pool.map(measure_pair, rows(1)))


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    """Without the guard every worker would run the script again; Python refuses."""
    script = tmp_path / "script.py"
    script.write_text(
        "from precompute.decode import DecodePool, measure_pair\n"
        "from common.pairs import Pair\n"
        "pair = Pair(pair_id='a', prompt='', win=b'', lose=b'', label=1.0, row=0)\n"
        "list(DecodePool(1).map(measure_pair, [pair]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode != 0
    assert "cannot start" in done.stderr
    assert "__main__" in done.stderr
