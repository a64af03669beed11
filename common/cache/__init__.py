"""The cache between the stages: schema, store, writer, reader, and what can be derived from what is stored."""

from typing import TYPE_CHECKING

from inpo.common.cache.commits import Commit, ShardSource, TextCommit
from inpo.common.cache.reader import Cache, Shard, Texts, TextShard, open_cache
from inpo.common.cache.schema import SCHEMA_VERSION, InverterIdentity, Manifest
from inpo.common.cache.specs import ARRAYS
from inpo.common.cache.writer import CacheWriter, ShardData, TextData
from inpo.common.errors import UsageError

if TYPE_CHECKING:
    import xarray

__all__ = [
    "ARRAYS",
    "SCHEMA_VERSION",
    "Cache",
    "CacheWriter",
    "Commit",
    "InverterIdentity",
    "Manifest",
    "Shard",
    "ShardData",
    "ShardSource",
    "TextCommit",
    "TextData",
    "TextShard",
    "Texts",
    "open_cache",
    "to_xarray",
]


def to_xarray(location: str) -> "xarray.Dataset":
    """All committed shards as one dataset: dimensions image, record, group, pair, C, H, W; pair/win as `pair_win`, and
    rows counted over all shards. Ids, captions and timesteps are coordinates, what an array means is its `long_name`.

    Latents ([image, record, C, H, W]) are read when they are used, and checked as by any reader. Raises CacheError, and
    UsageError without xarray.
    """
    try:
        from inpo.common.cache.dataset import dataset
    except ImportError as error:
        raise UsageError(
            "xarray is not installed.", where="to_xarray", got=str(error), fix="pip install 'inpo-cache[tables]'"
        ) from None
    return dataset(open_cache(location))
