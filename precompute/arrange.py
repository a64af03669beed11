"""From the pairs of a shard to its groups, images and pairs: which rows there are, and who stands on which."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inpo.common.choices import GroupName
from inpo.common.inversion import Group
from inpo.common.pairs.decode import PreparedPair
from inpo.common.pairs.images import PreparedImage
from inpo.common.seeding import stable_hash

_Key = tuple[str, ...]


def group_id(by: GroupName, *, pair_id: str, prompt: str, of_list: str | None) -> str:
    """The id of the group that a pair belongs to: its own, or a digest of its list or of its prompt."""
    if by == "pair" or (by == "list" and of_list is None):
        return pair_id
    key = (prompt,) if by == "prompt" else (of_list, prompt)  # a group has one prompt
    return f"{stable_hash(*key, bits=128):032x}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrangement:
    """Rows of a shard: groups in order of their first pair, images group after group, pairs as they came.

    Of plain pairs win is image 2i and lose 2i + 1.
    """

    pairs: tuple[PreparedPair, ...]
    groups: tuple[Group, ...]
    prompts: tuple[str, ...]
    """The caption of each group."""
    images: tuple[PreparedImage, ...]
    ids: tuple[str, ...]
    """Of each image: the digest of its file."""
    scores: tuple[float, ...]
    """Of each image: the source's own score; NaN where it has none, or its group none that can be compared."""
    group_of: tuple[int, ...]
    """The group of each image."""
    sides: tuple[tuple[int, int], ...]
    """Rows of the images of each pair: win, lose."""
    keys: tuple[_Key, ...]
    """What tells an image from the others."""

    def rows_of(self, fewer: "Arrangement") -> tuple[list[int], list[int]]:
        """(images, groups): the rows here of what an arrangement of some of these pairs has."""
        images = {key: row for row, key in enumerate(self.keys)}
        groups = {group.id: row for row, group in enumerate(self.groups)}
        return [images[key] for key in fewer.keys], [groups[group.id] for group in fewer.groups]


def arrange(pairs: Sequence[PreparedPair], by: GroupName) -> Arrangement:
    """Put pairs into groups. By list or prompt, an image that occurs in several pairs of a group (the same file) is one
    row.

    A group whose scores are of several rankings, or give an image two values, has none: they are no one scale.
    """
    members: dict[str, dict[_Key, PreparedImage]] = {}
    scores: dict[_Key, float] = {}
    scales: dict[str, str | None] = {}
    without: set[str] = set()
    prompts: dict[str, str] = {}
    keys: list[tuple[_Key, _Key]] = []
    win: _Key
    lose: _Key
    for pair in pairs:
        name = group_id(by, pair_id=pair.pair_id, prompt=pair.prompt, of_list=pair.list)
        win, lose = ((name, each) for each in pair.ids)
        if win == lose:  # a file against itself: two images all the same
            lose = (*lose, pair.pair_id)
        prompts[name] = pair.prompt
        group = members.setdefault(name, {})
        group.setdefault(win, pair.win)
        group.setdefault(lose, pair.lose)
        keys.append((win, lose))
        if pair.scores is not None:
            known = [scores.setdefault(key, score) for key, score in zip((win, lose), pair.scores, strict=True)]
            if (*known, scales.setdefault(name, pair.scores_of)) != (*pair.scores, pair.scores_of):
                without.add(name)
    rows = {key: row for row, key in enumerate(key for group in members.values() for key in group)}
    return Arrangement(
        pairs=tuple(pairs),
        groups=tuple(Group(id=name, num_images=len(group)) for name, group in members.items()),
        prompts=tuple(prompts.values()),
        images=tuple(image for group in members.values() for image in group.values()),
        ids=tuple(key[1] for key in rows),
        scores=tuple(math.nan if key[0] in without else scores.get(key, math.nan) for key in rows),
        group_of=tuple(number for number, group in enumerate(members.values()) for _ in group),
        sides=tuple((rows[win], rows[lose]) for win, lose in keys),
        keys=tuple(rows),
    )
