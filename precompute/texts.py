"""The text phase: every distinct prompt of the pairs, encoded and committed before the network is loaded.

    rows without images -> distinct prompts, window by window -> text shards (TextTask) -> TextWorker -> commits

A text shard's name is the digest of its prompts: whoever needs the same texts makes the same file, once.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from inpo.common.batch_size import memory_in_words
from inpo.common.cache import CacheWriter, TextCommit, TextData, Texts, TextShard
from inpo.common.cache.document import MAX_PROMPTS_PER_SHARD
from inpo.common.cache.schema import EMPTY_PROMPT
from inpo.common.cache.specs import TEXT
from inpo.common.cache.store import PARALLEL_READS, digest
from inpo.common.conditions import Place
from inpo.precompute.encode import TextEncoder
from inpo.precompute.tasks import ShardTask

texts_in_words = partial(
    memory_in_words, None, otherwise="take a device with more memory, or a lower --max-tokens where the model has that"
)
"""Around what the text encoders do."""
WINDOW = 16
"""Shards whose prompts share text shards: a shard's prompts then lie in few of them."""


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """One text shard to be made. Picklable; sent to workers as it is."""

    prompts: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        return len(self.prompts)

    @property
    def name(self) -> str:
        """`empty`, or the digest of the prompts."""
        return EMPTY_PROMPT if self.prompts == ("",) else digest(json.dumps(self.prompts).encode())

    @property
    def number(self) -> int:
        """Decides which process makes it: of the name alone, so that each finds the same one, whenever it looks."""
        return 0 if self.name == EMPTY_PROMPT else int(self.name[:15], 16)


class TextTable:
    """Where each committed prompt of a cache stands."""

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self.texts = Texts(writer.store, writer.manifest, {})
        self.names: set[str] = set()
        """The committed text shards."""
        self._places: dict[bytes, Place] = {}
        self._not_finite: set[bytes] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take in what has been committed since. Prompts themselves are not kept."""
        fresh = sorted(self._writer.committed(TextCommit) - self.names)
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            for first in range(0, len(fresh), PARALLEL_READS):
                for shard, keys in pool.map(self._read, fresh[first : first + PARALLEL_READS]):
                    if shard is not None:
                        self._take(shard, keys)

    def _read(self, name: str) -> tuple[TextShard | None, list[bytes]]:
        """A text shard, if it has not been moved aside in between, and its prompts' keys."""
        shard = self.texts.get(name)
        return shard, [] if shard is None else [_key(str(text)) for text in shard.read_stored(TEXT.path)]

    def _take(self, shard: TextShard, keys: list[bytes]) -> None:
        self.names.add(shard.name)
        for row, key in enumerate(keys):
            if row in shard.commit.not_finite:
                self._not_finite.add(key)
            else:
                self._places.setdefault(key, (shard.name, row))

    def place(self, prompt: str) -> Place | None:
        """Where a prompt stands; None if it is not committed, or not finite."""
        return self._places.get(_key(prompt))

    def is_known(self, prompt: str) -> bool:
        """Whether a prompt has been encoded, with whatever outcome."""
        return _key(prompt) in self._places or _key(prompt) in self._not_finite

    def is_finite(self, prompt: str) -> bool:
        """False for a prompt for which the encoder gave NaN or infinity."""
        return _key(prompt) not in self._not_finite

    def is_cut(self, place: Place) -> bool:
        """Whether the model sees only the beginning of the prompt."""
        name, row = place
        return row in self.texts.need(name).commit.cut


def _key(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=16).digest()


def list_texts(
    tasks: Sequence[ShardTask], named: Mapping[str, Collection[str]], table: TextTable, *, by_length: bool
) -> dict[int, TextTask]:
    """The text shards that are missing for these shards of images, by number.

    What they are does not hang on which texts are committed at this moment, so that a run that was stopped goes on with
    the same ones; only prompts that another selection of pairs has brought in already are left out. What committed
    shards name is made as it was, also where the source ended earlier then. Where none of these is lost, a window
    whose shards are committed is not read again.

    Args:
        named: the text shards that each committed shard of images names.
        by_length: shortest prompts first, so that little is padded.
    """
    wanted = {name for names in named.values() for name in names}
    is_whole = table.names.issuperset(wanted)
    listed = [TextTask(prompts=("",))]
    seen = {_key("")}
    for first in range(0, len(tasks), WINDOW):
        window = tasks[first : first + WINDOW]
        if is_whole and all(task.name in named for task in window):
            continue
        left: list[str] = []
        for task in window:
            fresh = dict.fromkeys(prompt for prompt in _prompts(task) if _key(prompt) not in seen)
            seen.update(map(_key, fresh))
            left += fresh
            again = [each for each in _cut(left, by_length=by_length) if each.name in wanted]
            listed += again
            taken = {prompt for each in again for prompt in each.prompts}
            left = [prompt for prompt in left if prompt not in taken]
        cut = _cut(left, by_length=by_length)
        done = {prompt for task in cut if task.name in table.names for prompt in task.prompts}
        if any(table.is_known(prompt) and prompt not in done for prompt in left):
            cut = _cut([prompt for prompt in left if not table.is_known(prompt)], by_length=by_length)
        listed += cut
    return {task.number: task for task in listed if task.name not in table.names}


def _prompts(task: ShardTask) -> Iterator[str]:
    """The prompts of a shard. An input that cannot be read gives none more; whoever reads its images says why."""
    try:
        yield from task.input_shard.prompts(task.start, task.stop)
    except Exception:  # whatever a damaged file makes a parser raise
        return


def _cut(prompts: Sequence[str], *, by_length: bool) -> list[TextTask]:
    ordered = sorted(prompts, key=lambda prompt: (len(prompt), prompt)) if by_length else prompts
    step = MAX_PROMPTS_PER_SHARD
    return [TextTask(prompts=tuple(ordered[first : first + step])) for first in range(0, len(ordered), step)]


@dataclass(kw_only=True, eq=False)
class TextWorker:
    """Makes text shards; `run_tasks` drives it as it drives a ShardWorker."""

    encoder: TextEncoder
    writer: CacheWriter

    def is_committed(self, task: TextTask) -> bool:
        return self.writer.is_committed(task.name, TextCommit)

    def close(self) -> None:
        """Nothing is held but the encoders."""

    def read(self, task: TextTask) -> TextTask:
        """A task is all there is to read."""
        return task

    def compute(self, task: TextTask) -> TextData:
        """Encode. A prompt with any number that is not finite keeps its row, so that the others keep theirs whenever
        the shard is made again. Raises OutOfMemory."""
        clock = time.perf_counter()
        with texts_in_words():
            tensors = self.encoder(task.prompts)
        finite = torch.stack([each.isfinite().reshape(len(each), -1).all(1) for each in tensors.values()]).all(0)
        trimmed = self._trimmed({name: each.masked_fill(~each.isfinite(), 0) for name, each in tensors.items()})
        texts = {TEXT.path: np.array(task.prompts, dtype=object)}
        return TextData(
            arrays=texts | {name: tensor.numpy() for name, tensor in trimmed.items()},
            cut=[row for row, prompt in enumerate(task.prompts) if self.encoder.is_cut(prompt)],
            not_finite=[row for row, fine in enumerate(finite.tolist()) if not fine],
            seconds={"encode": time.perf_counter() - clock},
        )

    def _trimmed(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without what no prompt of the shard has: tokens behind the longest."""
        if not self.writer.manifest.is_padded:
            return dict(tensors)
        longest = int(tensors["length"].max())
        specs = self.writer.manifest.conditions
        return {
            name: tensor.narrow(1, 0, longest).contiguous() if "token" in specs[name].axes else tensor
            for name, tensor in tensors.items()
        }

    def write(self, task: TextTask, data: TextData) -> TextCommit | None:
        """Write and commit; None if another writer committed the shard first."""
        return self.writer.write_texts(task.name, data)
