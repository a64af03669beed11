"""Prompts as a pair source: a row is one of a prompt's pairs, which are counted before there is an image."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inpo.common.cache.document import MAX_PAIRS_PER_SHARD
from inpo.common.cache.store import digest
from inpo.common.pairs import Pair, PairSource, Skipped
from inpo.common.pairs.columns import USUAL, Reading
from inpo.common.seeding import stable_hash
from inpo.precompute.arrange import group_id

MAX_IMAGES_PER_SHARD = 512


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """A prompt whose images are one group."""

    prompt: str

    @property
    def list(self) -> str:
        """The name of the list that its images are."""
        return f"{stable_hash('sample', self.prompt):016x}"

    @property
    def id(self) -> str:
        """As precompute gives it to the pairs of the list."""
        return group_id("list", pair_id="", prompt=self.prompt, of_list=self.list)

    def image_seed(self, seed: int, number: int) -> int:
        """Of the noise that an image is made from; 63 bits."""
        return stable_hash("noise", seed, self.id, number) >> 1


@dataclass(frozen=True, kw_only=True)
class PromptShard:
    """The prompts of one shard."""

    name: str
    groups: tuple[PromptGroup, ...]
    per_prompt: int
    """Images of each."""
    pairs_per_prompt: int
    reading: Reading = USUAL
    not_read: Mapping[str, int] = field(default_factory=dict)
    has_lists: bool = True

    @property
    def num_rows(self) -> int:
        return len(self.groups) * self.pairs_per_prompt

    def fingerprint(self) -> str:
        return digest("\0".join(group.prompt for group in self.groups).encode())

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        return np.full(len(self.groups), self.per_prompt)

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """None: the images are yet to be made."""
        return iter(())

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        return (group.prompt for group in self.groups)

    def head(self, count: int) -> list[dict[str, Any]]:
        return [{"prompt": group.prompt} for group in self.groups[:count]]


def prompt_source(
    location: str, prompts: Sequence[str], *, per_prompt: int, pairs_per_prompt: int, limit: int | None
) -> PairSource:
    """Prompts cut into shards; `limit` counts prompts and is rounded up to whole shards."""
    together = max(1, min(MAX_PAIRS_PER_SHARD // pairs_per_prompt, MAX_IMAGES_PER_SHARD // per_prompt))
    stop = len(prompts) if limit is None else min(limit, len(prompts))
    shards = [
        PromptShard(
            name=f"samples-{start:08d}",
            groups=tuple(PromptGroup(prompt=prompt) for prompt in prompts[start : start + together]),
            per_prompt=per_prompt,
            pairs_per_prompt=pairs_per_prompt,
        )
        for start in range(0, stop, together)
    ]
    return PairSource(location=location, shards=tuple(shards), kind="prompts")
