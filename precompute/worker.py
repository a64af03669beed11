"""The shard worker: the one function behind every engine.

read (CPU workers)  rows of an input shard -> decoded, resized pixels, bad pairs set aside with their reason
compute (device)    pixels -> x0, committed texts -> conditions, inversion -> the shard's arrays
write               attempt folder, fsync, commit
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int
from torch import Tensor

from inpo.common.cache import CacheWriter, Commit, Manifest, ShardData, ShardSource
from inpo.common.cache.derive import coarse, split
from inpo.common.cache.schema import EMPTY_PROMPT
from inpo.common.conditions import EMPTY_PLACE, Condition, Place, read_prompts
from inpo.common.errors import DataError
from inpo.common.inversion import Inverted, invert
from inpo.common.models import Model
from inpo.common.pairs import Pair, Skipped, mark_duplicates
from inpo.common.pairs.decode import DecodePool, PreparedPair, prepare_pair
from inpo.common.pairs.images import PreparedImage
from inpo.common.seeding import uniform
from inpo.common.spread import measure_spread
from inpo.precompute.arrange import Arrangement, arrange, group_id
from inpo.precompute.components import WHOLE, Components, Share, fit, in_words, load_components
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask
from inpo.precompute.texts import TextTable

OF_IMAGES = ("x_t", "delta", "x0_t", "target", "reference_error", "inversion_error")
"""What an inversion makes of every image, beside extra arrays and the residual."""


@dataclass(kw_only=True, eq=False)
class PreparedShard:
    """What reading a task gave."""

    task: ShardTask
    pairs: list[PreparedPair]
    skipped: list[dict[str, Any]]
    fingerprint: str
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Result:
    """What the inversion of a shard gave; nothing if no pair was left."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    texts: Sequence[str] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    spread: float | None = None


@dataclass(kw_only=True, eq=False)
class ShardWorker:
    """Makes shards. `read` may run in another thread than `compute`, and `write` in a third."""

    components: Components
    writer: CacheWriter
    table: TextTable
    pairs_per_batch: int
    decode: DecodePool

    @property
    def manifest(self) -> Manifest:
        return self.writer.manifest

    def read(self, task: ShardTask) -> PreparedShard:
        """Decode and resize every pair of a task. Raises DataError if the input shard cannot be read."""
        start = time.perf_counter()
        fingerprint = task.input_shard.fingerprint()
        rows = mark_duplicates(task.input_shard.rows(task.start, task.stop), set())
        pairs: list[PreparedPair] = []
        skipped: list[dict[str, Any]] = []
        prepare = partial(prepare_pair, resolution=self.manifest.resolution)
        rows = _with_shard(rows, task)
        for _, item in self.decode.map(prepare, rows, arguments=self._flip, on_crash=partial(_crashed, task)):
            if isinstance(item, PreparedPair):
                if self._has_noise(item, skipped) and self._has_texts(item, task, skipped):
                    pairs.append(item)
            else:
                skipped.append(skipped_row(item.pair_id, item.reason, item.detail, item.row))
        return PreparedShard(
            task=task, pairs=pairs, skipped=skipped, fingerprint=fingerprint, seconds=time.perf_counter() - start
        )

    def _flip(self, pair: Pair) -> tuple[bool]:
        """One draw for both sides: a flip that differs between them would change what the pair compares."""
        group = group_id(self.manifest.group, pair_id=pair.pair_id, prompt=pair.prompt, of_list=pair.list)
        return (self.manifest.flip and uniform(self.manifest.seed, group, "flip") < 0.5,)

    def compute(self, prepared: PreparedShard) -> ShardData:
        """Encode and invert; pairs with any number that is not finite are quarantined with the reason. Raises
        OutOfMemory."""
        with in_words(self.pairs_per_batch):
            return self._compute(prepared)

    def _compute(self, prepared: PreparedShard) -> ShardData:
        task, manifest = prepared.task, self.manifest
        seconds = {"read": prepared.seconds}
        skipped = list(prepared.skipped)
        clock = time.perf_counter()
        result = _Result()
        if prepared.pairs:
            everything = arrange(prepared.pairs, manifest.group)
            x0 = self.latents(prepared, everything)
            kept = arrange(
                _finite_pairs(everything, x0.isfinite().flatten(1).all(1), "a VAE latent", skipped), manifest.group
            )
            x0 = x0[everything.rows_of(kept)[0]]
            seconds["encode"] = time.perf_counter() - clock
            clock = time.perf_counter()
            if kept.pairs:
                result = self._invert(prepared, kept, x0, skipped)
                seconds["invert"] = time.perf_counter() - clock
        return ShardData(
            arrays=result.arrays,
            texts=result.texts,
            source=ShardSource(
                location=task.location,
                input_shard=task.input_shard.name,
                rows=(task.start, task.stop),
                fingerprint=prepared.fingerprint,
            ),
            skipped=sorted(skipped, key=lambda row: int(row["row"])),
            counts={name: count for name, count in result.counts.items() if count},
            spread=result.spread,
            seconds=seconds,
        )

    def _has_noise(self, pair: PreparedPair, skipped: list[dict[str, Any]]) -> bool:
        """Whether the noise of both images is known, if it is asked for; if not, the pair is added to `skipped`."""
        if self.manifest.inverter.name != "tracked":
            return True
        sizes = {pair.win.original_size, pair.lose.original_size}
        shapes = {each.shape for each in pair.noise or ()}
        if pair.seeds is None and pair.noise is None:
            detail = "the row has no noise, and no seeds"
        elif shapes - {self.manifest.latent_shape}:
            wrong = ", ".join(str(list(shape)) for shape in sorted(shapes))
            detail = f"noise of {wrong}, and the latent is {list(self.manifest.latent_shape)}"
        elif sizes != {self.manifest.resolution}:
            detail = f"an image of {' and '.join(f'{h} x {w}' for h, w in sorted(sizes))} is resized"
        else:
            return True
        skipped.append(skipped_row(pair.pair_id, "missing_noise", detail, pair.row))
        return False

    def _has_texts(self, pair: PreparedPair, task: ShardTask, skipped: list[dict[str, Any]]) -> bool:
        """Whether the pair's prompt, and the empty one, have numbers; if not, it is added to `skipped`."""
        for prompt, what in (("", "the empty prompt's embedding"), (pair.prompt, "the text embedding")):
            if not self.table.is_finite(prompt):
                skipped.append(_not_finite(pair, what))
                return False
            if self.table.place(prompt) is None:
                raise DataError(
                    "A prompt was not there when the prompts were read.",
                    where=f"{task.location}: {task.input_shard.name}, pair {pair.pair_id}",
                    expected="a source that stays as it is while it is read",
                    got=ascii(prompt)[:200],
                    fix="run the same command again",
                )
        return True

    def latents(self, prepared: PreparedShard, everything: Arrangement) -> Float16[Tensor, "image c h w"]:
        """x0 of every image as it is stored, on the CPU; not finite where the VAE overflows."""
        with in_words(None):
            x0 = self.components.images([each.levels for each in everything.images], everything.ids).cpu()
        return coarse(x0) if self.manifest.profile == "compact" else x0

    def records(
        self,
        prepared: PreparedShard,
        everything: Arrangement,
        x0: Float16[Tensor, "image c h w"],
        caption: Condition,
        empty: Condition,
    ) -> Inverted:
        """What is stored of every image; x0 is as it is stored, `caption` what each is trained under."""
        manifest = self.manifest
        return invert(
            self.components.denoiser,
            x0,
            everything.groups,
            identity=manifest.inverter,
            seed=manifest.seed,
            timesteps_per_pair=manifest.timesteps_per_pair,
            caption=caption,
            empty=empty,
            measure_inversion=manifest.measure_inversion,
            extra=manifest.extra,
            compact=manifest.profile == "compact",
            own_noise=self._own_noise(everything) if manifest.inverter.name == "tracked" else None,
            images_per_batch=2 * self.pairs_per_batch,
        )

    def _invert(
        self, prepared: PreparedShard, everything: Arrangement, x0: Float16[Tensor, "image c h w"], skipped: list[Any]
    ) -> "_Result":
        manifest = self.manifest
        own = [self.table.place(prompt) or EMPTY_PLACE for prompt in everything.prompts]
        share = manifest.inverter.caption_dropout
        dropped = np.array([uniform(manifest.seed, each.id, "dropout") < share for each in everything.groups])
        training = [EMPTY_PLACE if gone else place for place, gone in zip(own, dropped, strict=True)]
        images = self._image_conditions(everything.images)
        caption = self.condition(training, everything.group_of, images)
        empty = self.condition([EMPTY_PLACE] * len(training), everything.group_of, images)
        inverted = self.records(prepared, everything, x0, caption, empty)
        kept = arrange(
            _finite_pairs(everything, inverted.finite, "a stored tensor of the inversion", skipped), manifest.group
        )
        if not kept.pairs:
            return _Result()
        rows, groups = everything.rows_of(kept)
        texts = [EMPTY_PROMPT, *sorted({own[group][0] for group in groups} - {EMPTY_PROMPT})]
        numbers: dict[str, np.ndarray] = {
            name: getattr(inverted, name).numpy()[rows]
            for name in (*OF_IMAGES, *manifest.extra, *(["residual"] if inverted.residual is not None else []))
        }
        arrays = numbers | {
            "x0": x0.numpy()[rows],
            "timestep": inverted.timestep.numpy()[groups],
            "image/id": np.array(kept.ids, dtype=object),
            "image/group": np.array(kept.group_of, dtype=np.int32),
            "image/score": np.array(kept.scores, dtype=np.float32),
            "group/id": np.array([group.id for group in kept.groups], dtype=object),
            "group/prompt": np.array([(texts.index(own[each][0]), own[each][1]) for each in groups], dtype=np.int32),
            "group/caption_dropped": dropped[groups],
            "pair/id": np.array([pair.pair_id for pair in kept.pairs], dtype=object),
            "pair/win": np.array([win for win, _ in kept.sides], dtype=np.int32),
            "pair/lose": np.array([lose for _, lose in kept.sides], dtype=np.int32),
            "pair/label": np.array([pair.label for pair in kept.pairs], dtype=np.float32),
        }
        arrays |= {f"image/{name}": tensor.numpy()[rows] for name, tensor in images.items()}
        for name in ("x0", "target") if manifest.profile == "compact" else ():
            arrays[name], arrays[f"{name}_scale"] = split(arrays[name])
        counts = {
            "cut_prompt": sum(self.table.is_cut(self.table.place(each.prompt) or EMPTY_PLACE) for each in kept.pairs)
        }
        if inverted.residual is not None:
            counts["fixed_point_not_converged"] = num_unsettled(manifest, numbers["residual"], np.array(kept.sides))
        return _Result(
            arrays={path: arrays[path] for path in manifest.specs},
            texts=texts,
            counts=counts,
            spread=measure_spread(
                self.components.denoiser,
                inverted,
                rows,
                group_of=everything.group_of,
                caption=caption,
                images_per_batch=2 * self.pairs_per_batch,
            ),
        )

    def condition(self, places: Sequence[Place], group_of: Sequence[int], images: Mapping[str, Tensor]) -> Condition:
        """One row per image, from the committed texts: what a trainer will see, not what the encoder said.

        Args:
            places: of each group.
            group_of: the group of each image.
            images: what images own.
        """
        distinct = {place: row for row, place in enumerate(sorted(set(places)))}
        prompts = read_prompts(self.table.texts, list(distinct))
        rows = torch.tensor([distinct[places[group]] for group in group_of])
        return Condition.build({name: torch.from_numpy(each) for name, each in prompts.items()}, rows, images)

    def _own_noise(self, everything: Arrangement) -> Float32[Tensor, "image c h w"]:
        """The source's; else as a diffusers pipeline draws it in float32 from a generator of the image's own on the
        CPU.
        """
        found: dict[int, Tensor] = {}
        for pair, sides in zip(everything.pairs, everything.sides, strict=True):
            for which, image in enumerate(sides):
                if image in found:
                    continue
                if pair.noise is not None:
                    found[image] = torch.from_numpy(pair.noise[which])
                else:
                    assert pair.seeds is not None, "of such a pair there is no noise"
                    generator = torch.Generator().manual_seed(pair.seeds[which])
                    found[image] = torch.randn(self.manifest.latent_shape, generator=generator)
        return torch.stack([found[image] for image in sorted(found)])

    def _image_conditions(self, images: Sequence[PreparedImage]) -> dict[str, Tensor]:
        """{name: [image, ...]} of what the network is told of each image."""
        size = self.manifest.resolution
        told = [self.components.family.of_image(each.original_size, each.crop_top_left, size) for each in images]
        return {name: torch.tensor([each[name] for each in told]) for name in told[0]}

    def is_committed(self, task: ShardTask) -> bool:
        return self.writer.is_committed(task.name)

    def write(self, task: ShardTask, data: ShardData) -> Commit | None:
        """Write and commit; None if another writer committed the shard first."""
        return self.writer.write(task.name, data)

    def close(self) -> None:
        self.decode.close()


def num_unsettled(
    manifest: Manifest, residual: Float32[np.ndarray, "image record"], sides: Int[np.ndarray, "pair side"]
) -> int:
    """Pairs with a grid point at which fixed_point's iteration was ended by its maximum."""
    missed = np.any(residual > (manifest.inverter.tolerance or 0.0), axis=1)
    return int(missed[sides].any(axis=1).sum())


def build_worker(
    model: Model, writer: CacheWriter, settings: PrecomputeSettings, device: torch.device, share: Share = WHOLE
) -> ShardWorker:
    """A worker for `device`. The processes that decode images start while the models are loaded and compiled.

    Raises ModelError for a model that cannot be loaded, InpoError if those processes cannot start, OutOfMemory.
    """
    decode = DecodePool(settings.decode_workers)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="start-decode") as beside:
            started = beside.submit(decode.start)
            with in_words(None):
                components = load_components(model, writer.manifest, device)
            pairs = fit(components.denoiser, model, writer.manifest, settings, share)
        started.result()
    except BaseException:
        decode.close()
        raise
    return ShardWorker(
        components=components, writer=writer, table=TextTable(writer), pairs_per_batch=pairs, decode=decode
    )


def _with_shard(rows: Iterator[Pair | Skipped], task: ShardTask) -> Iterator[Pair | Skipped]:
    """Any failure of the reading library becomes a DataError that names the input shard."""
    try:
        yield from rows
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise DataError(
            "The input shard cannot be read.",
            where=f"{task.location}: {task.input_shard.name}",
            got=f"{type(error).__name__}: {error}",
            fix="restore the file, then run the same command again",
        ) from error


def _crashed(task: ShardTask, pair: Pair) -> Skipped:
    """Not quarantined: memory that ran out would leave pairs out by chance."""
    raise DataError(
        "A process that decodes images died twice over the same pair.",
        where=f"{task.location}: {task.input_shard.name}, pair {pair.pair_id}",
        expected="images, or bytes that are refused",
        got="the end of the process",
        fix="if the machine ran out of memory, take fewer --decode-workers; if not, the images crash the "
        "decoder: remove the pair from the source. The same command then makes this shard",
    )


def skipped_row(pair_id: str, reason: str, detail: str, row: int) -> dict[str, Any]:
    """A row that gives no pair, as the list beside the shard has it."""
    return {"pair_id": pair_id, "reason": reason, "detail": detail, "row": row}


def _not_finite(each: PreparedPair, what: str) -> dict[str, Any]:
    return skipped_row(each.pair_id, "not_finite", f"{what} is NaN or infinite", each.row)


def _finite_pairs(
    arrangement: Arrangement, finite: Bool[Tensor, " image"], what: str, skipped: list[dict[str, Any]]
) -> list[PreparedPair]:
    """The pairs of finite images; the others are added to `skipped`. Never zeroed."""
    kept: list[PreparedPair] = []
    for pair, sides in zip(arrangement.pairs, arrangement.sides, strict=True):
        if bool(finite[list(sides)].all()):
            kept.append(pair)
        else:
            skipped.append(_not_finite(pair, what))
    return kept
