"""Images of a model for a list of prompts: the same noise for every model, whatever the batch or number of processes.

Each image has its own seed, a hash of (seed, prompt, number), and its own generator on the CPU; so a base model and a
trained one start from equal noise, and a folder can be made by any number of processes, stopped, and completed.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from inpo.common import fingerprint
from inpo.common.batch_size import memory_in_words
from inpo.common.compiled import compile_network
from inpo.common.decoded import watch_decoder
from inpo.common.denoiser import DTYPES, default_dtype
from inpo.common.device import say_device
from inpo.common.durable import entries, write_file
from inpo.common.errors import TrainingError, UsageError
from inpo.common.families import Family
from inpo.common.models import Model
from inpo.common.printable import shown
from inpo.common.processes import processes
from inpo.common.progress import ProgressReport
from inpo.common.seeding import stable_hash
from inpo.common.sizes import check_sides
from inpo.evaluation.image_folder import SETTINGS, ImageEntry, read_settings, write_listing
from inpo.evaluation.lora import load_lora, lora_file
from inpo.evaluation.settings import EvaluateSettings
from inpo.evaluation.transfer import Transfer, open_transfer

_BATCH_PIXELS = 8 * 512 * 512
_MAX_BATCH = 32
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True, kw_only=True)
class GenerateReport:
    """What a run did."""

    num_images: int
    """Images in the folder now."""
    num_new: int
    """Made by this process."""
    num_cut: int
    """Prompts that are longer than the text encoder reads; their ends are cut off. 0 if nothing was made."""


def image_seed(seed: int, prompt: str, number: int) -> int:
    """The seed of one image, 32 bits: depends on nothing but the run's seed, the prompt, and the image's number."""
    return stable_hash("image", seed, prompt, number) >> 32


def plan_images(prompts: Sequence[str], settings: EvaluateSettings) -> list[ImageEntry]:
    """Every image of a folder, by prompt and then by number; `--limit` is the caller's."""
    return [
        ImageEntry(
            prompt=prompt, seed=image_seed(settings.seed, prompt, number), file=f"images/{index:05d}-{number}.png"
        )
        for index, prompt in enumerate(prompts)
        for number in range(settings.images_per_prompt)
    ]


def generate(model: Model, prompts: Sequence[str], settings: EvaluateSettings, out: Path) -> GenerateReport:
    """Make the images of `prompts` that `out` does not hold yet; this process's share, if there are several. Without
    prompts those of the given images.

    Raises UsageError, showing every difference, if `out` was begun with other settings, ModelError for LoRA weights
    that do not fit the model, and DataError for given images that cannot be used.
    """
    state = processes()
    dtype = DTYPES[settings.dtype or default_dtype(state.device.type)]
    if settings.resolution is not None:  # pipelines round, or fail at the end
        family, config = model.family, model.config
        check_sides(settings.resolution, family.pixel_step(config), family.longest_side(config))
    model.family.check_tokens(settings.max_tokens)
    transfer = open_transfer(settings, model.family)
    if not prompts and transfer is not None:
        prompts = transfer.prompts
    identity = _identity(model, prompts, settings, dtype, transfer)
    _check_folder(out, identity)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    planned = plan_images(prompts, settings)
    entries = planned[: settings.limit and settings.limit * settings.images_per_prompt]
    mine = entries[state.process_index :: state.num_processes]
    left = [entry for entry in mine if not _is_done(out / entry.file)]
    num_cut = 0
    pipeline = load_pipeline(model, settings, transfer).to(state.device) if left else None
    size = settings.size or ((0, 0) if pipeline is None else model.family.drawn_size(pipeline))
    if pipeline is not None and transfer is not None:
        transfer.check_masks(prompts, size, int(pipeline.vae_scale_factor))
    # Claimed only now: a mask, model or LoRA that cannot be used leaves no folder behind that the right one is refused.
    with state.main_process_first():
        _claim(out, identity)
    if pipeline is not None:
        if state.is_main_process:
            say_device(state.device, str(dtype).removeprefix("torch."), num_processes=state.num_processes)
        if dtype != torch.float32:
            pipeline = pipeline.to(dtype)
        family, most = model.family, settings.max_tokens
        num_cut = len({entry.prompt for entry in entries if family.is_cut(pipeline, entry.prompt, most)})
        pixels = math.prod(size)
        per_batch = settings.batch_size or max(1, min(_MAX_BATCH, _BATCH_PIXELS // pixels))
        quiet = not state.is_main_process
        batches = [left[start : start + per_batch] for start in range(0, len(left), per_batch)]
        drawn: list[list[Image.Image]] = []

        def first() -> None:
            drawn[:] = [_draw(pipeline, batches[0], settings, size, family, transfer)]

        is_compiled = compile_network(
            model.family.network_of(pipeline).requires_grad_(False),
            settings.compile,
            first,
            blocks=model.family.blocks,
            varying=model.family.varying,
            device=state.device,
            ahead=len(batches) - 1,
        )
        with ProgressReport("generate", total=len(mine), unit="images", done=len(mine) - len(left), quiet=quiet) as bar:
            for batch in batches:
                # A compiled network gets batches of one size: the last one's last image is made again, for nobody.
                missing = len(batches[0]) - len(batch) if is_compiled else 0
                made = (
                    drawn.pop()
                    if drawn
                    else _draw(pipeline, [*batch, *batch[-1:] * missing], settings, size, family, transfer)
                )
                for entry, image in zip(batch, made[: len(batch)], strict=True):
                    buffer = io.BytesIO()
                    image.save(buffer, format="PNG")
                    write_file(out / entry.file, buffer.getvalue())
                bar.advance(len(batch))
    state.wait_for_everyone()
    state.wait_for_everyone()
    done = [entry for entry in planned if _is_done(out / entry.file)]  # more than was asked for, after a longer run
    if state.is_main_process:
        write_listing(out, done)
    state.wait_for_everyone()
    return GenerateReport(num_images=len(done), num_new=len(left), num_cut=num_cut)


def load_pipeline(model: Model, settings: EvaluateSettings, transfer: Transfer | None = None) -> DiffusionPipeline:
    """The whole pipeline on the CPU in float32, with the chosen scheduler, LoRA weights, and what `transfer` takes.

    Raises UsageError for a number of steps that the scheduler does not take, ModelError for LoRA weights, or a
    ControlNet, that do not fit.
    """
    pipeline = model.load_pipeline()
    if settings.scheduler == "ddim":
        pipeline.scheduler = model.family.sampler(pipeline.scheduler)
    model.family.check_steps(pipeline.scheduler, settings.inference_steps, where="--inference-steps")
    if settings.lora is not None:
        load_lora(pipeline, lora_file(settings.lora), model)
    if transfer is not None:
        pipeline = transfer.pipeline(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(
    pipeline: DiffusionPipeline,
    batch: Sequence[ImageEntry],
    settings: EvaluateSettings,
    size: tuple[int, int],
    family: Family,
    transfer: Transfer | None,
) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(entry.seed) for entry in batch]
    prompts = [entry.prompt for entry in batch]
    given = {} if transfer is None else transfer.arguments(prompts, size)
    stays = "what is done stays"
    otherwise = f"take a lower --resolution, or --dtype bfloat16; {stays}"
    with (
        watch_decoder(pipeline) as finite,
        memory_in_words(len(batch), auto=False, smaller=stays, otherwise=otherwise),
        torch.inference_mode(),
    ):
        pixels = pipeline(
            num_inference_steps=settings.inference_steps,
            generator=generators,
            output_type="np",
            height=size[0],
            width=size[1],
            **family.drawing(prompts, settings.guidance, settings.max_tokens),
            **given,
        ).images
    if not all(finite):
        # Turned into a picture it would be black or white, and be scored as if the model had drawn it so.
        entry = batch[finite.index(False) % len(batch)]
        raise TrainingError(
            "The model gave an image that is not finite.",
            where=f"prompt {entry.prompt[:80]!r}, seed {entry.seed}",
            expected="finite pixels",
            got="NaN or infinity",
            fix="try --dtype float32, or more --inference-steps; if it stays, the model's weights are broken",
        )
    images: list[Image.Image] = pipeline.image_processor.numpy_to_pil(pixels)
    return images


def _identity(
    model: Model, prompts: Sequence[str], settings: EvaluateSettings, dtype: torch.dtype, transfer: Transfer | None
) -> dict[str, Any]:
    """What an image depends on, and the names for people."""
    digest = hashlib.blake2b("\0".join(prompts).encode(), digest_size=16).hexdigest()
    lora = None
    if settings.lora is not None:
        file = lora_file(settings.lora)
        lora = fingerprint.of_weights([file], config=model.family.lora_settings(file) or None)
    return {
        "fingerprints": dict(model.fingerprints),
        "lora": lora,
        "prompts": digest,
        "num_prompts": len(prompts),
        "seed": settings.seed,
        "images_per_prompt": settings.images_per_prompt,
        "inference_steps": settings.inference_steps,
        "guidance": settings.guidance,
        "resolution": settings.resolution,
        "max_tokens": settings.max_tokens,
        "scheduler": settings.scheduler,
        "dtype": str(dtype).removeprefix("torch."),
        "transfer": transfer and transfer.identity(prompts),
        "names": {
            "model": model.name,
            "lora": settings.lora and shown(settings.lora),
            "prompts": settings.prompts and shown(settings.prompts),
            "controlnet": settings.controlnet and shown(settings.controlnet),
            "given_images": (given := settings.control_images or settings.inpaint) and shown(given),
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make `out` this run's folder, or check again that it is one of the same settings."""
    _check_folder(out, identity)
    if not (out / SETTINGS).is_file():
        write_file(out / SETTINGS, (json.dumps(identity, indent=1, ensure_ascii=False) + "\n").encode())


def _check_folder(out: Path, identity: dict[str, Any]) -> None:
    """Raise UsageError if `out` is neither free nor a folder of the same settings."""
    file = out / SETTINGS
    if out.exists() and not out.is_dir():
        raise UsageError("The output folder is a file.", where=out, expected="a folder", fix="choose another --out")
    if not file.is_file():
        other = entries(out)
        if other:
            raise UsageError(
                "The output folder holds something else.",
                where=out,
                expected="a new folder, or one of generate's own",
                got=", ".join(other[:5]),
                fix="choose another --out",
            )
        return
    existing = read_settings(file)
    names = [name for name in identity if name != "names" and existing.get(name) != identity[name]]
    if names:
        raise UsageError(
            f"The output folder holds images of other settings ({', '.join(names)}).",
            where=out,
            expected="; ".join(f"{name} = {existing.get(name)}" for name in names) + " (in the folder)",
            got="; ".join(f"{name} = {identity[name]}" for name in names) + " (this run)",
            fix="give this run its own --out, or repeat the folder's settings",
        )


def _is_done(file: Path) -> bool:
    """Whether the PNG is there to its end: a machine that lost its power may leave an empty or a cut file."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - len(_PNG_END)))
        return stream.read() == _PNG_END
