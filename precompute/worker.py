"""The shard worker: the one function behind every engine.

read (CPU workers)  rows of an input shard -> decoded, resized pixels, bad pairs set aside with their reason
compute (device)    pixels -> x0, prompts -> embeddings, inversion -> the shard's arrays
write               attempt folder, fsync, commit
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Int
from torch import Tensor

from inpo.common.cache import CacheWriter, Commit, Manifest, ShardData, ShardSource
from inpo.common.compiled import compile_network
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.errors import DataError
from inpo.common.inversion import Inverted, invert
from inpo.common.models import Model
from inpo.common.pairs import Pair, Skipped, mark_duplicates
from inpo.common.pairs.decode import DecodePool, PreparedPair, prepare_pair
from inpo.common.seeding import uniform
from inpo.precompute.encode import ImageEncoder, PromptTable, TextEncoder
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask


@dataclass(kw_only=True, eq=False)
class PreparedShard:
    """What reading a task gave."""

    task: ShardTask
    pairs: list[PreparedPair]
    skipped: list[dict[str, Any]]
    fingerprint: str
    seconds: float


@dataclass(kw_only=True, eq=False)
class Components:
    """The models of one device, loaded once."""

    denoiser: Denoiser
    images: ImageEncoder
    text: TextEncoder


def load_components(model: Model, manifest: Manifest, device: torch.device) -> Components:
    """Load the network, the VAE and the text encoders onto `device`."""
    network = model.load_network()
    prepare_for_inference(network, network_dtype=manifest.network_dtype, device=device)
    return Components(
        denoiser=model.denoiser(network, manifest.levels.levels(), network_dtype=manifest.network_dtype),
        images=ImageEncoder(
            model.load_vae(),
            vae_dtype=manifest.vae_dtype,
            sample=manifest.vae_latent == "sample",
            seed=manifest.seed,
            device=device,
        ),
        text=TextEncoder(model.load_text_pipeline(), model.family, device=device),
    )


def compile_components(components: Components, model: Model, manifest: Manifest, settings: PrecomputeSettings) -> None:
    """Compile the network for batches of the settings' size, if they ask for it."""
    denoiser, family, images = components.denoiser, model.family, 2 * settings.batch_size
    device = denoiser.device

    @torch.inference_mode()
    def first() -> None:
        x = torch.zeros(images, *manifest.latent_shape, device=device)
        timestep = torch.zeros(images, dtype=torch.int64, device=device)
        denoiser.predict(x, timestep, family.blank(model.config, images, manifest.resolution).to(device))

    if compile_network(denoiser.network, settings.compile, first, blocks=family.blocks, device=device):
        denoiser.rows = images


@dataclass(kw_only=True, eq=False)
class ShardWorker:
    """Makes shards. `read` may run in another thread than `compute`, and `write` in a third."""

    components: Components
    writer: CacheWriter
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
                pairs.append(item)
            else:
                skipped.append(_skipped(item.pair_id, item.reason, item.detail, item.row))
        return PreparedShard(
            task=task, pairs=pairs, skipped=skipped, fingerprint=fingerprint, seconds=time.perf_counter() - start
        )

    def _flip(self, pair: Pair) -> tuple[bool]:
        """One draw for both sides: a flip that differs between them would change what the pair compares."""
        return (self.manifest.flip and uniform(self.manifest.seed, pair.pair_id, "flip") < 0.5,)

    def compute(self, prepared: PreparedShard) -> ShardData:
        """Encode and invert; pairs with any number that is not finite are quarantined with the reason."""
        manifest, components = self.manifest, self.components
        seconds = {"read": prepared.seconds}
        pairs, skipped = list(prepared.pairs), list(prepared.skipped)
        clock = time.perf_counter()
        arrays: dict[str, np.ndarray] = {}
        counts: dict[str, int] = {}
        if pairs:
            prompts = components.text([each.prompt for each in pairs])
            x0 = components.images(
                [torch.from_numpy(np.stack([each.win.levels, each.lose.levels])) for each in pairs],
                [each.pair_id for each in pairs],
            ).cpu()
            keep = _finite_inputs(pairs, x0, prompts, skipped)
            pairs, x0 = [pairs[index] for index in keep], x0[keep]
            prompts = prompts.only({each.prompt for each in pairs})
            seconds["encode"] = time.perf_counter() - clock
            clock = time.perf_counter()
        if pairs:
            dropped = [
                uniform(manifest.seed, each.pair_id, "dropout") < manifest.inverter.caption_dropout for each in pairs
            ]
            images = self._image_conditions(pairs)
            rows = torch.tensor([prompts.row(each.prompt) for each in pairs])
            training = rows.masked_fill(torch.tensor(dropped), 0)
            inverted = invert(
                components.denoiser,
                x0,
                [each.pair_id for each in pairs],
                identity=manifest.inverter,
                seed=manifest.seed,
                timesteps_per_pair=manifest.timesteps_per_pair,
                caption=_condition(prompts, training, images),
                empty=_condition(prompts, torch.zeros_like(rows), images),
                measure_inversion=manifest.measure_inversion,
                extra=manifest.extra,
                pairs_per_batch=self.pairs_per_batch,
            )
            everything = _arrays(pairs, x0, inverted, prompts, rows, dropped, images)
            for index in (~inverted.finite).nonzero().flatten().tolist():
                skipped.append(_not_finite(pairs[index], "a stored tensor of the inversion"))
            finite = inverted.finite.numpy()
            arrays = {
                path: everything[path][finite] if spec.axes[0] == "pair" else everything[path]
                for path, spec in manifest.specs.items()
            }
            if not finite.any():
                arrays = {}
            counts["cut_prompt"] = sum(
                each.prompt in prompts.cut for each, fine in zip(pairs, finite, strict=True) if fine
            )
            if inverted.residual is not None:
                missed = (inverted.residual > (manifest.inverter.tolerance or 0.0)).flatten(1).any(1)
                counts["fixed_point_not_converged"] = int((missed & inverted.finite).sum())
            seconds["invert"] = time.perf_counter() - clock
        task = prepared.task
        return ShardData(
            arrays=arrays,
            source=ShardSource(
                location=task.location,
                input_shard=task.input_shard.name,
                rows=(task.start, task.stop),
                fingerprint=prepared.fingerprint,
            ),
            skipped=sorted(skipped, key=lambda row: int(row["row"])),
            counts={name: count for name, count in counts.items() if count},
            seconds=seconds,
        )

    def _image_conditions(self, pairs: list[PreparedPair]) -> dict[str, Tensor]:
        """{name: [pair, side, ...]} of what the network is told of each image."""
        family, side = self.components.text.family, self.manifest.resolution
        told = [
            family.of_image(image.original_size, image.crop_top_left, (side, side))
            for each in pairs
            for image in (each.win, each.lose)
        ]
        return {name: torch.tensor([each[name] for each in told]).unflatten(0, (-1, 2)) for name in told[0]}

    def write(self, name: str, data: ShardData) -> Commit | None:
        """Write and commit; None if another writer committed the shard first."""
        return self.writer.write(name, data)

    def close(self) -> None:
        self.decode.close()


def build_worker(model: Model, writer: CacheWriter, settings: PrecomputeSettings, device: torch.device) -> ShardWorker:
    """A worker for `device`. The processes that decode images start while the models are loaded and compiled.

    Raises ModelError for a model that cannot be loaded, InpoError if those processes cannot start.
    """
    decode = DecodePool(settings.decode_workers)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="start-decode") as beside:
            started = beside.submit(decode.start)
            components = load_components(model, writer.manifest, device)
            compile_components(components, model, writer.manifest, settings)
        started.result()
    except BaseException:
        decode.close()
        raise
    return ShardWorker(components=components, writer=writer, pairs_per_batch=settings.batch_size, decode=decode)


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


def _skipped(pair_id: str, reason: str, detail: str, row: int) -> dict[str, Any]:
    return {"pair_id": pair_id, "reason": reason, "detail": detail, "row": row}


def _not_finite(each: PreparedPair, what: str) -> dict[str, Any]:
    return _skipped(each.pair_id, "not_finite", f"{what} is NaN or infinite", each.row)


def _finite_inputs(
    pairs: list[PreparedPair],
    x0: Float16[Tensor, "pair side c h w"],
    prompts: PromptTable,
    skipped: list[dict[str, Any]],
) -> list[int]:
    """Rows whose latents and embeddings are finite; the others are added to `skipped`. Never zeroed."""
    latents, texts = x0.isfinite().flatten(1).all(1), prompts.finite
    keep: list[int] = []
    for index, each in enumerate(pairs):
        if not latents[index]:
            skipped.append(_not_finite(each, "a VAE latent"))
        elif not texts[0]:  # every shard stores it
            skipped.append(_not_finite(each, "the empty prompt's embedding"))
        elif not texts[prompts.row(each.prompt)]:
            skipped.append(_not_finite(each, "the text embedding"))
        else:
            keep.append(index)
    return keep


def _condition(prompts: PromptTable, rows: Int[Tensor, "pair"], images: Mapping[str, Tensor]) -> Condition:
    """From the rounded embeddings: what a trainer will see, not what the encoder said."""
    flat = {name: tensor.flatten(0, 1) for name, tensor in images.items()}
    return Condition.build(prompts.conditions, rows.repeat_interleave(2), flat)


def _arrays(
    pairs: list[PreparedPair],
    x0: Float16[Tensor, "pair side c h w"],
    inverted: Inverted,
    prompts: PromptTable,
    rows: Int[Tensor, "pair"],
    dropped: list[bool],
    images: Mapping[str, Tensor],
) -> dict[str, np.ndarray]:
    """Every array that could be stored, by path; the manifest chooses."""
    arrays: dict[str, np.ndarray] = {
        "x0": x0.numpy(),
        "pair_id": np.array([each.pair_id for each in pairs], dtype=object),
        "prompt_index": rows.numpy().astype(np.int32),
        "caption_dropped": np.array(dropped, dtype=bool),
        "label": np.array([each.label for each in pairs], dtype=np.float32),
        "prompt/text": np.array(prompts.text, dtype=object),
    }
    for name in ("timestep", "x_t", "delta", "x0_t", "target", "reference_error", "inversion_error"):
        arrays[name] = getattr(inverted, name).numpy()
    for name in ("delta_prev", "eps_ref", "residual"):
        values = getattr(inverted, name)
        if values is not None:
            arrays[name] = values.numpy()
    return (
        arrays
        | {f"prompt/{name}": tensor.numpy() for name, tensor in prompts.conditions.items()}
        | {name: tensor.numpy() for name, tensor in images.items()}
    )
