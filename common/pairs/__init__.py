"""Where preference pairs come from: webdataset tars, Pick-a-Pic v2 parquet, or a folder with a list of pairs.

source = open_source("pairs-{0000..0003}.tar")
for shard in source.shards:
    for item in shard.rows(0, shard.num_rows):   # Pair or Skipped
        ...
"""

from inpo.common.pairs.images import ImageError, PreparedImage, decode_image, prepare_image
from inpo.common.pairs.pair import SKIP_REASONS, InputShard, Pair, PairSource, Skipped, SkipReason, mark_duplicates
from inpo.common.pairs.recognise import open_source

__all__ = [
    "SKIP_REASONS",
    "ImageError",
    "InputShard",
    "Pair",
    "PairSource",
    "PreparedImage",
    "SkipReason",
    "Skipped",
    "decode_image",
    "mark_duplicates",
    "open_source",
    "prepare_image",
]
