"""Numbers from a stable hash: equal everywhere, for ever, and evenly spread."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from inpo.common.seeding import generator, library_seed, normal, stable_hash, uniform


def test_the_hash_is_what_it_always_was():
    # blake2b(b"0\x1fpair\x1foffset", digest_size=8), little endian; caches made elsewhere depend on it.
    import hashlib

    expected = hashlib.blake2b(b"0\x1fpair\x1foffset", digest_size=8).digest()
    assert stable_hash(0, "pair", "offset") == int.from_bytes(expected, "little") == 11200765089214566443


def test_a_seed_of_a_library_is_the_seed_where_it_can_be():
    known = [0, 1, 2**31 - 1]
    assert [library_seed(seed) for seed in known] == known
    others = [library_seed(seed) for seed in (-(2**63), -1, 2**31, 2**32 - 1, 2**63 - 1)]
    assert len({*others}) == 5
    assert all(0 <= each < 2**31 for each in others)


def test_it_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from inpo.common.seeding import *; print(stable_hash(3, 'ä'), uniform(3, 'ä'), normal((2,), 3, 'ä').tolist(), "
        "generator(3, 'ä').integers(1 << 40, size=3).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "PATH": ""},
    )
    here = (
        f"{stable_hash(3, 'ä')} {uniform(3, 'ä')} {normal((2,), 3, 'ä').tolist()} "
        f"{generator(3, 'ä').integers(1 << 40, size=3).tolist()}\n"
    )
    assert done.stdout == here


def test_parts_are_kept_apart():
    assert len({stable_hash("ab", "c"), stable_hash("a", "bc"), stable_hash("abc"), stable_hash("a", "b", "c")}) == 4


def test_uniform_is_uniform_below_one():
    drawn = np.array([uniform(0, f"pair {index}", "offset") for index in range(5000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 0.001
    # An index of a thousand-step grid plus u stays below the next index.
    assert 999 + float((2**32 - 1) / 2**32) < 1000


def test_normal_is_normal_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn = normal((20000,), 0, "pair", "noise")
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.dtype == torch.float32
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.001
    assert torch.equal(normal((20000,), 0, "pair", "noise"), drawn)
    assert not torch.equal(normal((20000,), 1, "pair", "noise"), drawn)
