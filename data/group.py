"""Bring the pairs of each prompt together, of a source of any size: an external sort.

pairs --> one temporary file, in the source's order
      --> keys (hash of the prompt, place in that file) --> sorted runs, in temporary files --> merged
merged keys --> pairs, group by group, read back one at a time
"""

import heapq
import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from hashlib import blake2b
from itertools import chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from inpo.common.errors import StorageError
from inpo.common.pairs.pair import Pair
from inpo.common.space import free_bytes, human_bytes

HASH_BYTES = 16
_KEY = struct.Struct(f">{HASH_BYTES}sQIIIII")
"""Hash of the prompt, offset, bytes of the text, of the two images and of their noise. Big-endian: keys sort as their
bytes do.
"""
_FILES = ("win", "lose", "noise")
_TEXTS = tuple(each.name for each in fields(Pair) if each.name not in _FILES)
KEYS_PER_RUN = 1 << 18
MAX_RUNS = 64
"""Runs become one when there are so many: each is an open file."""


def group_by_prompt(pairs: Iterable[Pair], *, folder: Path, most: int) -> Iterator[tuple[int, Iterator[Pair]]]:
    """(size, pairs) of each group, that is, of the pairs whose prompts are equal, character for character.

    Groups come in the order of their prompts' BLAKE2b hashes, on which neither the source's order nor its shards have
    any influence; a group's pairs come in the source's order, which keeps a chain together. `size` counts up to `most`:
    a larger group has that size. Each group is to be read before the next one is asked for.

    Memory: one pair, KEYS_PER_RUN + `most` keys, and a buffer for each run. Temporary files lie in `folder` without a
    name: the system takes them away however this process ends. Raises StorageError as soon as the disk cannot hold
    what is there a second time, as the groups; OSError when it refuses.
    """
    with TemporaryFile(dir=folder) as store:
        keys = _sorted((_keep(pair, store, folder) for pair in pairs), folder)
        for _, group in groupby(keys, key=lambda key: key[:HASH_BYTES]):
            head = list(islice(group, most))
            yield len(head), (_read_back(key, store) for key in chain(head, group))


def _keep(pair: Pair, store: IO[bytes], folder: Path) -> bytes:
    """Append a pair to the file; returns its key."""
    text = json.dumps({name: getattr(pair, name) for name in _TEXTS}).encode()
    parts = (text, pair.win, pair.lose, *(pair.noise or (b"", b"")))
    sizes = [len(part) for part in parts]
    offset = store.tell()
    needed, free = offset + 2 * sum(sizes), free_bytes(folder)
    if needed > free:
        raise StorageError(
            "The disk is too small to group these pairs: each is there twice for a while, once as it comes and once "
            "in its group.",
            where=folder.parent,
            expected=f"at least {human_bytes(needed)} free, for the pairs that have been read so far",
            got=f"{human_bytes(free)} free",
            fix="free some space, or name a folder on another disk",
        )
    store.writelines(parts)
    return _KEY.pack(blake2b(pair.prompt.encode(), digest_size=HASH_BYTES).digest(), offset, *sizes)


def _read_back(key: bytes, store: IO[bytes]) -> Pair:
    _, offset, text, win, lose, *noise = _KEY.unpack(key)
    store.seek(offset)
    told = json.loads(store.read(text))
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    files = [store.read(size) for size in (win, lose, *noise)]
    return Pair(**told, win=files[0], lose=files[1], noise=(files[2], files[3]) if files[2] else None)


def _sorted(keys: Iterator[bytes], folder: Path) -> Iterator[bytes]:
    """The keys in order; they need not fit into memory."""
    with ExitStack() as files:
        runs: list[IO[bytes]] = []

        def add_run(content: Iterable[bytes]) -> None:
            runs.append(files.enter_context(TemporaryFile(dir=folder)))
            runs[-1].writelines(content)

        while batch := sorted(islice(keys, KEYS_PER_RUN)):
            if len(runs) == MAX_RUNS:
                merged = heapq.merge(*map(_read_run, runs))
                runs.clear()
                add_run(merged)
            add_run(batch)
        yield from heapq.merge(*map(_read_run, runs))


def _read_run(run: IO[bytes]) -> Iterator[bytes]:
    with run:  # its space goes back once it is read
        run.seek(0)
        yield from iter(partial(run.read, _KEY.size), b"")
