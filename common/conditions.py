"""What a pair's images were inverted under, and are to be trained under, read back from a shard."""

import numpy as np
import torch
from jaxtyping import Int

from inpo.common.cache.reader import Shard
from inpo.common.denoiser import Condition


def pair_condition(shard: Shard, pairs: Int[np.ndarray, "pair"]) -> Condition:
    """The training condition of some pairs, one row per image: win, lose, win, lose, ...

    A dropped caption is the empty prompt, row 0; SDXL's pooled embedding and time ids come along.
    """
    row = np.where(shard.read("caption_dropped", pairs), 0, shard.read("prompt_index", pairs))
    per_image = torch.from_numpy(np.repeat(row.astype(np.int64), 2))
    embedding = torch.from_numpy(shard.read("prompt/embedding"))[per_image]
    if "prompt/pooled" not in shard:
        return Condition(embedding=embedding.float())
    return Condition(
        embedding=embedding.float(),
        pooled=torch.from_numpy(shard.read("prompt/pooled"))[per_image].float(),
        time_ids=torch.from_numpy(shard.read("time_ids", pairs)).reshape(-1, 6),
    )
