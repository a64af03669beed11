"""Making a cache again from another one, by another model: what that takes over, and what must be as it was."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inpo.common.cache import CacheWriter, Manifest, Shard, open_cache
from inpo.common.cache.identity import same_levels
from inpo.common.cache.schema import EMPTY_PROMPT
from inpo.common.errors import CacheMismatch, UsageError
from inpo.common.models import Model
from inpo.common.pairs import Pair, PairSource, Skipped
from inpo.common.pairs.columns import USUAL, Reading
from inpo.common.recipe import option_name
from inpo.precompute.configuration import Configuration
from inpo.precompute.refresh import COPIED_TEXTS, REFRESHED, CopyTask
from inpo.precompute.settings import RayOptions
from inpo.precompute.tasks import ShardTask
from inpo.precompute.works import Work, list_works

_STAYS = ("family", "latent_shape", "conditions", "max_tokens", "resolution", "crop", "flip", "vae_latent", "group")
"""What x0, texts and groups are; see `_kept`."""
_INVERTS = ("network", "scheduler")


@dataclass(frozen=True, kw_only=True)
class CachedShard:
    """A shard of a cache, as an input."""

    name: str
    num_rows: int
    content: str
    sizes: tuple[int, ...]
    """Images of each group."""
    reading: Reading = USUAL
    not_read: Mapping[str, int] = field(default_factory=dict)
    has_lists: bool = False

    @classmethod
    def of(cls, shard: Shard) -> "CachedShard":
        source = shard.commit.source
        sizes = tuple(np.bincount(shard.read("image/group")).tolist())
        return cls(name=source.input_shard, num_rows=shard.num_pairs, content=source.fingerprint, sizes=sizes)

    def fingerprint(self) -> str:
        return self.content

    def group_sizes(self, start: int, stop: int) -> np.ndarray:
        return np.array(self.sizes)

    def rows(self, start: int, stop: int) -> Iterator[Pair | Skipped]:
        """None: the images are not needed."""
        return iter(())

    def prompts(self, start: int, stop: int) -> Iterator[str]:
        """None: the texts are there."""
        return iter(())

    def head(self, count: int) -> list[dict[str, Any]]:
        return []


@dataclass(frozen=True, kw_only=True)
class RefreshWork(Work):
    """A cache made from another."""

    origin: Manifest

    def manifest(self, model: Model, ray_options: RayOptions | None) -> Manifest:
        """Raises CacheMismatch for a model that x0 and texts are not of, UsageError for settings that they do not
        allow."""
        settings, made = self.resolved.settings, super().manifest(model, ray_options)
        found, stored = made.fingerprints, self.origin.fingerprints
        other = [name for name in sorted({*found, *stored} - {*_INVERTS}) if found.get(name) != stored.get(name)]
        if other or made.family != self.origin.family:
            names = other or ["family"]
            raise CacheMismatch(
                f"The other cache's x0 and texts are not this model's: its {', '.join(names)} differ.",
                where=f"{settings.like} against {model.name}",
                expected=", ".join(f"{name} {stored.get(name, self.origin.family)}" for name in names),
                got=", ".join(f"{name} {found.get(name, made.family)}" for name in names),
                fix="pass a model that was trained from the cache's, or make the cache from its pairs: --pairs",
            )
        kept, asked = _kept(self.origin), _kept(made) | {"seed": made.seed}
        wrong = [name for name in kept if asked[name] != kept[name]]
        if wrong:
            raise UsageError(
                "x0, texts and groups are those of the other cache, and no option changes them.",
                where=", ".join(option_name(name) for name in wrong),
                expected=", ".join(f"{kept[name]}" for name in wrong),
                got=", ".join(f"{asked[name]}" for name in wrong),
                fix="leave the option out, or make the cache from its pairs: --pairs",
            )
        if made.inverter.name == "tracked" != self.origin.inverter.name:
            raise UsageError(
                "The noise that the images were made from is not in the other cache.",
                where="--inverter",
                expected=f"{self.origin.inverter.name}, or any but tracked",
                got="tracked",
                fix="invert the pairs with their seeds: --pairs, of samples CACHE-images",
            )
        made = _changed(made, vae_dtype=self.origin.vae_dtype)
        if not settings.errors_only:
            return made
        if not same_levels(made.levels, self.origin.levels):
            raise CacheMismatch(
                "The points of the other cache are not on this model's levels.",
                where=f"{settings.like} against {model.name}",
                expected="the scheduler of the model that made it",
                got="other levels",
                fix="leave out --errors-only, so that points are made anew",
            )
        inverter = self.origin.inverter.model_copy(update={"name": "recorded", "iterations": None, "tolerance": None})
        return _changed(
            self.origin,
            fingerprints=made.fingerprints,
            network_dtype=made.network_dtype,
            measure_inversion=0.0,
            inverter=inverter,
            versions=made.versions,
        )

    @property
    def why_no_pair(self) -> str:
        return "the model gives NaN or infinity for every pair: look at its weights, or take another --dtype"

    def warnings(self, writer: CacheWriter, committed: set[str]) -> list[str]:
        """None: the other cache's inputs were looked at when it was made."""
        return []


def _kept(manifest: Manifest) -> dict[str, Any]:
    """What a cache made from this one has in common with it; the seed too, where x0 or groups were drawn with it."""
    dropout = manifest.inverter.caption_dropout
    is_drawn = manifest.flip or manifest.vae_latent == "sample" or dropout > 0
    kept = {name: getattr(manifest, name) for name in _STAYS} | {"caption_dropout": dropout}
    return kept | ({"seed": manifest.seed} if is_drawn else {})


def _changed(manifest: Manifest, **values: Any) -> Manifest:
    """Made anew: a copy would take over what follows from the fields that change."""
    return Manifest(**{name: getattr(manifest, name) for name in Manifest.model_fields} | values)


def all_works(resolved: Configuration, model: Model, *, is_real: bool) -> tuple[list[Work], list[Any]]:
    """As `list_works`; from another cache, if the settings name one."""
    if resolved.settings.like is None:
        return list_works(resolved, model, is_real=is_real)
    return [like_work(resolved)], []


def like_work(resolved: Configuration) -> RefreshWork:
    """All shards of the other cache, or the first that hold `limit` pairs. Raises as `open_cache` does."""
    settings = resolved.settings
    origin = open_cache(settings.like or "")
    tasks: list[ShardTask] = []
    shards: list[CachedShard] = []
    for shard in origin:
        if settings.limit is not None and sum(each.num_rows for each in tasks) >= settings.limit:
            break
        cached = CachedShard.of(shard)
        shards.append(cached)
        tasks.append(
            ShardTask(name=shard.name, location=origin.location, input_shard=cached, start=0, stop=shard.num_pairs)
        )
    names = sorted({EMPTY_PROMPT, *(text for task in tasks for text in origin.commits[task.name].texts)})
    kept = origin.manifest.timesteps_per_pair
    return RefreshWork(
        resolved=resolved,
        source=PairSource(location=origin.location, shards=tuple(shards), kind="cache"),
        tasks=tasks,
        texts=COPIED_TEXTS,
        images=REFRESHED,
        text_tasks={
            number: CopyTask(name=name, num_rows=origin.texts.need(name).num_prompts)
            for number, name in enumerate(names)
        },
        calls_per_image=float(kept) if settings.errors_only else None,
        origin=origin.manifest,
    )
