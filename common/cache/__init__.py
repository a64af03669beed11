"""The cache between the stages: schema, store, writer, reader, and what can be derived from what is stored."""

from inpo.common.cache.reader import Cache, Shard, open_cache
from inpo.common.cache.schema import SCHEMA_VERSION, Commit, InverterIdentity, Manifest, ShardSource
from inpo.common.cache.specs import ARRAYS
from inpo.common.cache.writer import CacheWriter, ShardData

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
    "open_cache",
]
