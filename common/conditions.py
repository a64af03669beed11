"""What the network is told beside the latent: named tensors, each owned by a prompt or by an image.

Which names a model has is its family's (common/families/) and stands in the cache's manifest; nothing here knows one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from inpo.common.cache.reader import Shard, Texts
from inpo.common.cache.schema import EMPTY_PROMPT


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

    def rows(self, rows: Int[Tensor, " row"]) -> "Condition":
        return self.map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> "Condition":
        """Every row `times` times in a row: what the images of one prompt share."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def where(self, chosen: Bool[Tensor, " row"], other: "Condition") -> "Condition":
        """These rows where `chosen`, those of `other` elsewhere."""

        def mixed(name: str) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (self[name].ndim - 1)), self[name], other[name])

        return Condition(**{name: mixed(name) for name in self})

    @classmethod
    def build(
        cls, prompts: Mapping[str, Tensor], prompt: Int[Tensor, " image"], images: Mapping[str, Tensor]
    ) -> "Condition":
        """One row per image: row `prompt` of what prompts own, and what images own as it is."""
        return cls(**{name: tensor[prompt] for name, tensor in prompts.items()}, **images)

    @classmethod
    def of(cls, shard: Shard, images: Int[np.ndarray, " image"]) -> "Condition":
        """What some images were inverted under and are to be trained under. A dropped caption is the empty prompt."""
        groups, index = np.unique(shard.read("image/group", images), return_inverse=True)
        return cls._read(shard, images, training_places(shard, groups), index)

    @classmethod
    def empty(cls, shard: Shard, images: Int[np.ndarray, " image"]) -> "Condition":
        """The same under the empty prompt; what an image owns stays its own."""
        return cls._read(shard, images, [EMPTY_PLACE], np.zeros(len(images), np.int64))

    @classmethod
    def _read(
        cls,
        shard: Shard,
        images: Int[np.ndarray, " image"],
        places: Sequence["Place"],
        index: Int[np.ndarray, " image"],
    ) -> "Condition":
        prompts = {name: torch.from_numpy(each) for name, each in read_prompts(shard.cache.texts, places).items()}
        own = {name: torch.from_numpy(shard.read(path, images)) for name, path in owned(shard, "image").items()}
        return cls.build(prompts, torch.from_numpy(index), own)


NetworkCall = Callable[
    [nn.Module, Float[Tensor, "batch c h w"], Float[Tensor, " batch"], Condition], Float[Tensor, "batch c h w"]
]
"""(network, x, label, condition) -> its output: a family's `call`."""
Place = tuple[str, int]
"""Where a prompt stands: name of a text shard, row there."""
EMPTY_PLACE: Place = (EMPTY_PROMPT, 0)


def training_places(shard: Shard, groups: Int[np.ndarray, " group"]) -> list[Place]:
    """Where the prompts stand that some groups are to be trained under: the empty one where the caption was dropped."""
    texts = shard.commit.texts
    found = zip(shard.read("group/prompt", groups).tolist(), shard.dropped()[groups].tolist(), strict=True)
    return [EMPTY_PLACE if dropped else (texts[text], row) for (text, row), dropped in found]


def read_prompts(texts: Texts, places: Sequence["Place"]) -> dict[str, Shaped[np.ndarray, "place ..."]]:
    """{condition: rows} of prompts, those of a family with a mask padded with zeros to `max_tokens` tokens.

    Raises CacheIncomplete for a text shard that is not committed.
    """
    manifest = texts.manifest
    by_text: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(places):
        by_text.setdefault(name, []).append(number)
    found: dict[str, np.ndarray] = {}
    for text, numbers in by_text.items():
        shard = texts.need(text)
        rows = np.array([places[number][1] for number in numbers], dtype=np.int64)
        for name, spec in manifest.text_conditions.items():
            values = shard.rows(name, rows)
            if "token" in spec.axes and manifest.is_padded:
                axis = spec.axes.index("token") + 1
                missing = (manifest.max_tokens or 0) - values.shape[axis]
                if missing < 0:
                    raise shard.misfit(name, f"{values.shape[axis]} tokens, and at most {manifest.max_tokens} fit")
                values = np.pad(values, [(0, missing if each == axis else 0) for each in range(values.ndim)])
            if name not in found:
                found[name] = np.empty((len(places), *values.shape[1:]), values.dtype)
            if found[name].shape[1:] != values.shape[1:]:
                raise shard.misfit(
                    name, f"{list(values.shape[1:])}, and {list(found[name].shape[1:])} in another shard"
                )
            found[name][numbers] = values
    return found


def owned(shard: Shard, per: Literal["prompt", "image"]) -> dict[str, str]:
    """{name: path of its array} of the conditions that prompts, or images, own in a shard's cache."""
    conditions = shard.cache.manifest.conditions
    return {name: spec.array(name).path for name, spec in conditions.items() if spec.per == per}
