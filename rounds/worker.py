"""The worker of `inpo sample`: a shard worker whose images are made, scored and ranked instead of read.

compute  noise -> the sampler's path -> x0 -> images -> scores, while the next are made -> pairs -> records
write    the pairs' images, then the shard, then the images' name
"""

import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float16, Float32
from PIL import Image
from torch import Tensor

from inpo.common.cache import CacheWriter, Commit, ShardData
from inpo.common.cache.derive import coarse, stored_point
from inpo.common.conditions import EMPTY_PLACE, Condition
from inpo.common.denoiser import DTYPES
from inpo.common.inversion import Inverted, evaluate_points
from inpo.common.models import Model
from inpo.common.pairs import Pair
from inpo.common.pairs.decode import PreparedPair, prepare_pair
from inpo.common.scorer import Scorer, checked_scores, load_scorer
from inpo.precompute.arrange import Arrangement
from inpo.precompute.components import WHOLE, Share, in_words
from inpo.precompute.phases import Phase
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask
from inpo.precompute.worker import PreparedShard, ShardWorker, build_worker, skipped_row
from inpo.rounds.pictures import SampleTars, Tar
from inpo.rounds.prompts import PromptGroup, PromptShard
from inpo.rounds.sampler import sample_path, sampler_grid
from inpo.rounds.settings import SampleSettings


@dataclass(kw_only=True, eq=False)
class Made:
    """One image that was made."""

    x0: Float16[Tensor, "c h w"]
    """As it is stored."""
    target: Float16[Tensor, "record c h w"]
    """Likewise, at the kept timesteps."""
    seed: int
    file: bytes = b""
    """The image decoded from x0."""
    score: float = float("nan")


@dataclass(kw_only=True, eq=False)
class SampledShard(PreparedShard):
    """A prepared shard, and what is known of its images beside their pixels, by group and file."""

    made: dict[tuple[str, ...], Made] = field(default_factory=dict)
    tar: Tar | None = None
    """None: there is no pair."""


@dataclass(frozen=True, kw_only=True)
class SampledData(ShardData):
    """A shard to be written, with its images."""

    tar: Tar | None


@dataclass(kw_only=True, eq=False)
class SampleWorker(ShardWorker):
    """Makes shards of the model's own samples."""

    settings: SampleSettings
    scorer: Scorer
    pictures: SampleTars

    def read(self, task: ShardTask) -> PreparedShard:
        """The prompts are all there is; those that the text encoder gave no numbers for are skipped."""
        return PreparedShard(task=task, pairs=[], skipped=[], fingerprint=task.input_shard.fingerprint(), seconds=0.0)

    def compute(self, prepared: PreparedShard) -> SampledData:
        clock = time.perf_counter()
        with in_words(self.pairs_per_batch):
            sampled = self._sampled(prepared)
        seconds = {"sample": time.perf_counter() - clock}
        data = super().compute(sampled)
        if sampled.tar is not None:
            source = data.source.model_copy(
                update={"location": self.pictures.store.location, "fingerprint": sampled.tar.fingerprint}
            )
            data = replace(data, source=source)
        return SampledData(**vars(replace(data, seconds=seconds | dict(data.seconds))), tar=sampled.tar)

    def write(self, task: ShardTask, data: ShardData) -> Commit | None:
        tar = cast(SampledData, data).tar
        if tar is not None and data.num_pairs:
            self.pictures.stage(task.name, tar)
        commit = super().write(task, data)
        if tar is not None and data.num_pairs:
            committed = commit or self.writer.commit(task.name)
            if committed is not None:
                self.pictures.settle(task.name, committed.source.fingerprint)
        return commit

    def latents(self, prepared: PreparedShard, everything: Arrangement) -> Float16[Tensor, "image c h w"]:
        made = cast(SampledShard, prepared).made
        return torch.stack([made[each].x0 for each in everything.keys])

    def records(
        self,
        prepared: PreparedShard,
        everything: Arrangement,
        x0: Float16[Tensor, "image c h w"],
        caption: Condition,
        empty: Condition,
    ) -> Inverted:
        made = cast(SampledShard, prepared).made
        grids = [sampler_grid(self.manifest, self.components.denoiser.levels, each.id) for each in everything.groups]
        return evaluate_points(
            self.components.denoiser,
            x0,
            torch.stack([made[each].target for each in everything.keys]),
            torch.from_numpy(np.stack([each.timestep for each in grids]).astype(np.int16)),
            group_of=everything.group_of,
            caption=caption,
            images_per_batch=2 * self.pairs_per_batch,
        )

    def _sampled(self, prepared: PreparedShard) -> SampledShard:
        """Make every image of the shard, and pairs of those whose scores differ."""
        shard = cast(PromptShard, prepared.task.input_shard)
        told = [self.table.is_finite(group.prompt) and self.table.is_finite("") for group in shard.groups]
        made = iter(self._made([group for group, fine in zip(shard.groups, told, strict=True) if fine]))
        sampled = SampledShard(**vars(prepared))
        pairs: list[Pair] = []
        for number, (group, fine) in enumerate(zip(shard.groups, told, strict=True)):
            images = next(made) if fine else []
            for row, found in enumerate(self._rows(group, images), number * self.settings.pairs_per_prompt):
                if isinstance(found, str):
                    reason, _, detail = found.partition(": ")
                    sampled.skipped.append(skipped_row(f"{group.list}-{row}", reason, detail, row))
                    continue
                pair = self._pair(group, images, *found, row=row)
                ready = prepare_pair(pair, False, resolution=self.manifest.resolution)
                assert isinstance(ready, PreparedPair), "an image that was just made"
                pairs.append(pair)
                sampled.pairs.append(ready)
                for name, each in zip(ready.ids, found, strict=True):
                    sampled.made[group.id, name] = images[each]
        if pairs:
            sampled.tar = Tar(pairs)
        return sampled

    def _rows(self, group: PromptGroup, images: Sequence[Made]) -> list[tuple[int, int] | str]:
        """Of the images of a prompt, those that are to be compared: numbers of win and lose, or why they are no
        pair."""
        count = self.settings.pairs_per_prompt
        if not images:
            return ["not_finite: the text embedding is NaN or infinite"] * count
        if not all(image.file for image in images):
            return ["not_finite: an image is NaN or infinite"] * count
        order = sorted(range(len(images)), key=lambda each: (-images[each].score, each))
        chosen = {
            "all": list(combinations(order, 2)),
            "adjacent": list(pairwise(order)),
            "best-worst": [(order[0], order[-1])],
        }[self.settings.pairs_from]
        rows: list[tuple[int, int] | str] = []
        for win, lose in chosen:
            best, worst = images[win], images[lose]
            differ = best.score - worst.score > self.settings.gap and best.file != worst.file
            tie = f"tie: images {win} and {lose} of {group.prompt[:80]!r} score {best.score:.6g} and {worst.score:.6g}"
            rows.append((win, lose) if differ else tie)
        return rows

    def _pair(self, group: PromptGroup, images: Sequence[Made], win: int, lose: int, *, row: int) -> Pair:
        best, worst = images[win], images[lose]
        return Pair(
            pair_id=f"{group.list}-{win}-{lose}",
            prompt=group.prompt,
            win=best.file,
            lose=worst.file,
            label=1.0,
            row=row,
            list=group.list,
            scores=(best.score, worst.score),
            seeds=(best.seed, worst.seed),
        )

    def _made(self, groups: Sequence[PromptGroup]) -> list[list[Made]]:
        """Every image of some prompts, with its score; without a file where it is not finite."""
        per_prompt, batch = self.settings.per_prompt, 2 * self.pairs_per_batch
        wanted = [(group, number) for group in groups for number in range(per_prompt)]
        made: list[Made] = []
        with ThreadPoolExecutor(1, thread_name_prefix="score") as beside:
            scoring = []
            for first in range(0, len(wanted), batch):
                images = self._batch(wanted[first : first + batch])
                made += images
                whole = [(image, group.prompt) for image, (group, _) in zip(images, wanted[first:], strict=False)]
                scoring.append(beside.submit(self._score, [each for each in whole if each[0].file]))
            for each in scoring:
                each.result()
        return [made[first : first + per_prompt] for first in range(0, len(made), per_prompt)]

    def _score(self, images: Sequence[tuple[Made, str]]) -> None:
        if not images:
            return
        opened = [Image.open(io.BytesIO(image.file)).convert("RGB") for image, _ in images]
        prompts = [prompt for _, prompt in images]
        names = [f"the image of {prompt[:80]!r} with seed {image.seed}" for image, prompt in images]
        for (image, _), score in zip(images, checked_scores(self.scorer, opened, prompts, names), strict=True):
            image.score = score

    def _batch(self, wanted: Sequence[tuple[PromptGroup, int]]) -> list[Made]:
        """Some images of a batch, not scored yet."""
        manifest, levels = self.manifest, self.components.denoiser.levels
        groups = [group for group, _ in wanted]
        seeds = [group.image_seed(manifest.seed, number) for group, number in wanted]
        grids = [sampler_grid(manifest, levels, group.id) for group in groups]
        latent, resolution = manifest.latent_shape, manifest.resolution
        told = self.components.family.of_image(resolution, (0, 0), resolution)
        own = {name: torch.tensor([values] * len(wanted)) for name, values in told.items()}
        rows = range(len(wanted))
        path, kept = sample_path(
            self.components.denoiser,
            torch.cat([torch.randn((1, *latent), generator=torch.Generator().manual_seed(seed)) for seed in seeds]),
            grids,
            caption=self.condition([self.table.place(each.prompt) or EMPTY_PLACE for each in groups], rows, own),
            empty=self.condition([EMPTY_PLACE] * len(groups), rows, own),
            guidance=manifest.inverter.guidance,
        )
        compact = manifest.profile == "compact"
        x0 = coarse(path) if compact else path.half()
        a, s = levels.mixture(np.stack([each.timestep for each in grids]))
        shape = (*a.shape, 1, 1, 1)
        target, _ = stored_point(
            x0[:, None].expand(kept.shape),
            kept,
            torch.from_numpy(a).reshape(shape),
            torch.from_numpy(s).reshape(shape),
            compact=compact,
        )
        return [
            Made(x0=each, target=points, seed=seed, file=file)
            for each, points, seed, file in zip(x0, target, seeds, self._files(x0), strict=True)
        ]

    @torch.inference_mode()
    def _files(self, x0: Float16[Tensor, "image c h w"]) -> list[bytes]:
        """The images of latents, PNG; none where a pixel is not finite."""
        images = self.components.images
        shift, factor = images.family.vae_scale(images.vae)
        dtype = images.vae_dtype
        files = []
        for each in x0.split(1):
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != DTYPES["float32"]):
                pixels = images.family.decoded(images.vae, each.float().to(images.device) / factor + shift)
            levels: Float32[Tensor, "c h w"] = (pixels[0].float().cpu() / 2 + 0.5) * 255
            if not bool(levels.isfinite().all()):
                files.append(b"")
                continue
            stream = io.BytesIO()
            picture = levels.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(picture).save(stream, format="PNG")
            files.append(stream.getvalue())
        return files


def build_sample_worker(
    model: Model, writer: CacheWriter, settings: PrecomputeSettings, device: torch.device, share: Share = WHOLE
) -> SampleWorker:
    """As build_worker."""
    chosen = cast(SampleSettings, settings)
    base = build_worker(model, writer, settings, device, share)
    parts: Mapping[str, Any] = vars(base)
    return SampleWorker(
        **parts, settings=chosen, scorer=load_scorer(chosen.scorer or ""), pictures=SampleTars(writer.store)
    )


SAMPLES = Phase(name="samples", kind=Commit, load=build_sample_worker)
