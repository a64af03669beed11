"""The caches that one command makes: one, or one for each bucket of image shapes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inpo.common.cache import CacheWriter, Manifest
from inpo.common.cache.store import digest
from inpo.common.errors import DataError, InpoError, command
from inpo.common.log import note
from inpo.common.models import Model
from inpo.common.pairs import PairSource
from inpo.common.sizes import size_text
from inpo.precompute.buckets import bucket_sizes, sort_into_buckets
from inpo.precompute.configuration import Configuration, build_manifest, device_type
from inpo.precompute.engines.waiting_room import WaitingRoom
from inpo.precompute.inputs import foreign_inputs, grouped, input_warnings, list_work, names_in_cache
from inpo.precompute.phases import IMAGES, TEXTS, Phase
from inpo.precompute.pipeline import Task
from inpo.precompute.plan import Plan, make_plan
from inpo.precompute.settings import RayOptions
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
    texts: Phase = TEXTS
    images: Phase = IMAGES
    text_tasks: Mapping[int, Task] | None = None
    """What the phase of texts makes; None: the prompts of the tasks."""
    calls_per_image: float | None = None
    """Network calls of each; None: those of inverting it."""

    @property
    def cache(self) -> str:
        return self.resolved.data.need("cache")

    def manifest(self, model: Model, ray_options: RayOptions | None) -> Manifest:
        """The cache's identity. Raises UsageError for what cannot be made."""
        settings = self.resolved.settings
        return build_manifest(
            settings, model, device_type=device_type(settings, ray_options), levels_size=self.levels_size
        )

    def plan(self, committed: set[str], manifest: Manifest, model: Model) -> Plan:
        """What is left of it will cost."""
        return make_plan(self.tasks, committed, manifest, model, cache=self.cache, calls=self.calls_per_image)

    def own(self, committed: set[str]) -> tuple["Work", list[DataError]]:
        """Under the names that the cache has for its inputs; without those whose shards in the cache are of another
        source, or for which that cannot be told, and an error for each of these."""
        names, left_out = names_in_cache(self.cache, self.source, committed)
        tasks = [task for task in self.tasks if task.input_shard.name not in left_out]
        tasks = [
            task.renamed(names[task.input_shard.name]) if task.input_shard.name in names else task for task in tasks
        ]
        work = replace(self, tasks=tasks)
        foreign = work.foreign(committed)
        tasks = [task for task in tasks if task.input_shard.name not in foreign]
        return replace(work, tasks=tasks), [*left_out.values(), *foreign.values()]

    @property
    def why_no_pair(self) -> str:
        """Where to look if no row gave a pair."""
        return f"`{command('data', 'check', self.tasks[0].location)}` counts the reasons"

    def foreign(self, committed: set[str]) -> dict[str, DataError]:
        """{input shard: what is wrong} for those whose shards in the cache are of another source."""
        return foreign_inputs(self.cache, self.tasks, committed)

    def list_digest(self) -> str:
        """Of the shards that are to be made, and of what they are made from."""
        shards = {task.input_shard.name: task.input_shard for task in self.tasks}
        told: list[Any] = [self.title, *((task.name, task.start, task.stop) for task in self.tasks)]
        for name, shard in shards.items():
            try:
                told.append((name, shard.fingerprint()))
            except InpoError:  # the run itself meets and reports it
                continue
        return digest(repr(told).encode())

    def claim(self, writer: CacheWriter, committed: set[str]) -> None:
        """Raise CacheMismatch if the shards that are committed depend on something else beside the manifest."""

    def warnings(self, writer: CacheWriter, committed: set[str]) -> list[str]:
        """What a user should know about the inputs."""
        return input_warnings(writer, self.tasks, committed)


def check_agreed(work: Work, unreadable: Sequence[DataError], room: WaitingRoom) -> None:
    """Raise DataError in every process of a run if they have found different lists of shards: each makes those of its
    own list whose turn it is, and between two lists some would be made by nobody. `unreadable`: what each left out."""
    rows = sum(task.num_rows for task in work.tasks)
    found = f"{len(work.tasks)} shards of {rows} rows"
    if unreadable:
        found += f", without {len(unreadable)} input shards ({unreadable[0].where} first)"
    lists: dict[str, tuple[list[int], str]] = {}
    for rank, (digest_of_list, words) in enumerate(room.gathered((work.list_digest(), found))):
        lists.setdefault(digest_of_list, ([], words))[0].append(rank)
    if len(lists) > 1:
        raise DataError(
            "The processes of this run have found different pairs.",
            where=work.source.place,
            expected="one list of shards, of the same content, in all of them",
            got="; ".join(f"process {', '.join(map(str, ranks[:8]))}: {words}" for ranks, words in lists.values()),
            fix="wait until no file comes, goes or changes, see that every machine can read all of them, give all the "
            "same options, then run the same command again: what is committed stays",
        )


def list_works(resolved: Configuration, model: Model, *, is_real: bool) -> tuple[list[Work], list[DataError]]:
    """The caches to be made, and an error for each input shard that cannot be read.

    With buckets the headers of all images are read here, also beyond a limit within an input shard: what a bucket's
    shard holds does not hang on the limit, which counts in each bucket. All buckets have the levels of the square that
    they are made around, so that they can be trained on together. Raises DataError if there is nothing to do.
    `is_real`: the list of buckets is written, and which row goes where.
    """
    settings = resolved.settings
    source, tasks, unreadable = list_work(resolved.data, settings)
    settings = grouped(settings, source)
    _note_foreign_size(settings.size, model)
    if settings.buckets is None:
        return [Work(resolved=replace(resolved, settings=settings), source=source, tasks=tasks)], unreadable
    sizes = bucket_sizes(settings.buckets, settings.size, model.family.pixel_step(model.config))
    cache = resolved.data.need("cache").rstrip("/")
    shards = {task.input_shard.name: task.input_shard for task in tasks}
    found, failures = sort_into_buckets(cache, source, shards.values(), sizes, is_real=is_real)
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


def _note_foreign_size(size: tuple[int, int], model: Model) -> None:
    """Say so where images have four times the pixels, or a quarter, that the network was made for: the default suits
    one of them."""
    side = model.config(model.family.network).get("sample_size")
    if not isinstance(side, int):  # some networks name none
        return
    own, pixels = side * model.family.vae_factor(model.config), math.prod(size)
    if not own**2 / 4 < pixels < own**2 * 4:
        note(
            f"images are inverted at {size_text(*size)} pixels, and the model was made for {own}: unless that is "
            f"meant, add --resolution {own}"
        )
