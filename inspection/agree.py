"""Consensus: in which pairs so many of a cache's label sets prefer the same side."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from inpo.common.cache import Cache
from inpo.common.cache.labels import is_combined, read_labels, sets_by_scorer
from inpo.common.errors import UsageError
from inpo.inspection.pair_table import PairTable


def agreeing(cache: Cache, table: PairTable, agree: str, sets: Sequence[str]) -> Bool[np.ndarray, " pair"]:
    """True where at least N of M label sets prefer the same side, `agree` being N/M; a tie prefers none.

    `sets` names them; none: all that one scorer made. Raises UsageError unless there are M of them, of as many scorers,
    and CacheIncomplete for a set that is not complete.
    """
    found = re.fullmatch(r"([1-9]\d{0,2})/([1-9]\d{0,2})", agree)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(
            "--agree is a share of the label sets.",
            where="--agree",
            expected="N/M, N of M label sets, for instance 4/5",
            got=agree,
            fix="give how many of them are to agree, and how many there are",
        )
    need, count = map(int, found.groups())
    made = sets_by_scorer(cache)
    names = list(dict.fromkeys(sets)) or list(made)
    scorers = [made.get(name, name) for name in names]
    combined = {name for name in names if name not in made and is_combined(cache, name)}
    if len(names) != count or len(set(scorers)) < len(scorers) or combined:
        raise UsageError(
            "The label sets are not as many scorers as --agree says.",
            where=f"--agree {agree}",
            expected=f"{count} label sets, each of another scorer",
            got=", ".join(
                f"{name} ({made.get(name, 'combined')})" if name in made or name in combined else name for name in names
            )
            or "no label set",
            fix="name the sets with --labels, or make them: `inpo relabel CACHE --pairs SRC --scorer A --scorer B "
            "--combine vote --set NAME`",
        )
    votes = np.zeros((len(table), 2), np.int64)
    for name in names:
        labels = read_labels(cache, name)
        rows = zip(table.shard.tolist(), table.pair_id.tolist(), strict=True)
        label = np.array([labels[table.shard_names[shard]][str(pair_id)] for shard, pair_id in rows])
        votes += np.stack([label > 0.5, label < 0.5], axis=1).reshape(-1, 2)
    agreed: np.ndarray = votes.max(axis=1) >= need
    return agreed
