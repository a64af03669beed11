"""The caches that one command makes: one, or one for each bucket of image shapes."""

from dataclasses import dataclass, replace

from inpo.common.errors import DataError
from inpo.common.models import Model
from inpo.common.pairs import PairSource
from inpo.common.pairs.buckets import sort_pairs
from inpo.precompute.buckets import bucket_sizes, claim_buckets
from inpo.precompute.configuration import Configuration
from inpo.precompute.inputs import grouped, list_work
from inpo.precompute.tasks import ShardTask, list_tasks


@dataclass(frozen=True, kw_only=True)
class Work:
    """One cache to be made."""

    resolved: Configuration
    source: PairSource
    tasks: list[ShardTask]
    levels_size: tuple[int, int] | None = None
    """The size of image that a flow's levels are made for, where it is another than the cache's."""
    title: str = ""


def list_works(resolved: Configuration, model: Model, *, is_real: bool) -> tuple[list[Work], list[DataError]]:
    """The caches to be made, and an error for each input shard that cannot be read.

    With buckets the headers of all images are read here, also beyond a limit within an input shard: what a bucket's
    shard holds does not hang on the limit, which counts in each bucket. All buckets have the levels of the square that
    they are made around, so that they can be trained on together. Raises DataError if there is nothing to do.
    `is_real`: the list of buckets is written.
    """
    settings = resolved.settings
    source, tasks, unreadable = list_work(resolved.data, limit=settings.limit)
    settings = grouped(settings, tasks)
    if settings.buckets is None:
        return [Work(resolved=replace(resolved, settings=settings), source=source, tasks=tasks)], unreadable
    sizes = bucket_sizes(settings.buckets, settings.size, model.family.pixel_step(model.config))
    cache = resolved.data.need("cache").rstrip("/")
    if is_real:
        claim_buckets(cache, sizes)
    found, failures = sort_pairs(source, {task.input_shard.name: task.input_shard for task in tasks}.values(), sizes)
    if not found:
        raise failures[0]
    works = []
    for (height, width), bucket in found.items():
        chosen = settings.model_copy(update={"resolution": f"{height}x{width}", "buckets": None})
        if height == width:
            chosen = chosen.model_copy(update={"resolution": str(height)})
        data = resolved.data.model_copy(update={"cache": f"{cache}/{height}x{width}"})
        of_bucket, _ = list_tasks(bucket, limit=settings.limit)
        rows = sum(task.num_rows for task in of_bucket)
        works.append(
            Work(
                resolved=replace(resolved, settings=chosen, data=data),
                source=bucket,
                tasks=of_bucket,
                levels_size=settings.size,
                title=f"bucket {height}x{width}: {rows:,} rows",
            )
        )
    return works, [*unreadable, *failures]
