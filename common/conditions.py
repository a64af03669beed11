"""What the network is told beside the latent: named tensors, each owned by a prompt or by an image.

Which names a model has is its family's (common/families/) and stands in the cache's manifest; nothing here knows one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from inpo.common.cache.reader import Shard


class Condition(Mapping[str, Tensor]):
    """Named tensors with one row per latent of the batch."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """`function` of every tensor."""
        return Condition(**{name: function(tensor) for name, tensor in self.items()})

    def to(self, device: torch.device) -> "Condition":
        return self.map(lambda tensor: tensor.to(device))

    def rows(self, rows: Int[Tensor, "row"]) -> "Condition":
        return self.map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> "Condition":
        """Every row `times` times in a row: what the images of one prompt share."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def where(self, chosen: Bool[Tensor, "row"], other: "Condition") -> "Condition":
        """These rows where `chosen`, those of `other` elsewhere."""

        def mixed(name: str) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (self[name].ndim - 1)), self[name], other[name])

        return Condition(**{name: mixed(name) for name in self})

    @classmethod
    def build(
        cls, prompts: Mapping[str, Tensor], prompt: Int[Tensor, "image"], images: Mapping[str, Tensor]
    ) -> "Condition":
        """One row per image: row `prompt` of what prompts own, and what images own as it is."""
        return cls(**{name: tensor[prompt] for name, tensor in prompts.items()}, **images)

    @classmethod
    def of(cls, shard: Shard, pairs: Int[np.ndarray, "pair"]) -> "Condition":
        """What some pairs were inverted under and are to be trained under: win, lose, win, lose, ...

        A dropped caption is the empty prompt, row 0.
        """
        row = np.where(shard.read("caption_dropped", pairs), 0, shard.read("prompt_index", pairs))
        return cls._read(shard, row.astype(np.int64), pairs)

    @classmethod
    def empty(cls, shard: Shard, pairs: Int[np.ndarray, "pair"]) -> "Condition":
        """The same under the empty prompt; what an image owns stays its own."""
        return cls._read(shard, np.zeros(len(pairs), np.int64), pairs)

    @classmethod
    def _read(cls, shard: Shard, row: Int[np.ndarray, "pair"], pairs: Int[np.ndarray, "pair"]) -> "Condition":
        prompts = {name: torch.from_numpy(shard.read(path)) for name, path in owned(shard, "prompt").items()}
        images = {name: torch.from_numpy(shard.read(path, pairs)) for name, path in owned(shard, "image").items()}
        return cls.build(
            prompts,
            torch.from_numpy(row).repeat_interleave(2),
            {name: tensor.flatten(0, 1) for name, tensor in images.items()},
        )


def owned(shard: Shard, per: Literal["prompt", "image"]) -> dict[str, str]:
    """{name: path of its array} of the conditions that prompts, or images, own in a shard's cache."""
    conditions = shard.cache.manifest.conditions
    return {name: spec.array(name).path for name, spec in conditions.items() if spec.per == per}
