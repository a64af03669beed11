"""The cache between the stages: schema, store, writer, reader, and what can be derived from what is stored."""

from inpo.common.cache.commits import Commit, ShardSource, TextCommit
from inpo.common.cache.reader import Cache, Shard, Texts, TextShard, open_cache
from inpo.common.cache.schema import SCHEMA_VERSION, InverterIdentity, Manifest
from inpo.common.cache.specs import ARRAYS
from inpo.common.cache.writer import CacheWriter, ShardData, TextData

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
]
