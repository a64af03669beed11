"""What a training run will hold on a device: a step, counted (common/memory.py); and the batch that a device takes."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator

from inpo.common.batch_size import find_batch_size
from inpo.common.cache import Manifest
from inpo.common.cache.derive import mean_square
from inpo.common.choices import AUTO
from inpo.common.denoiser import Denoiser, compute_name
from inpo.common.errors import UsageError
from inpo.common.memory import META, Need, Peak, bytes_of, checkpoint_counted, counting, line, weights_of
from inpo.common.models import Model
from inpo.common.recipe import read_recipe, resolve
from inpo.train.checkpoint import Checkpoint
from inpo.train.index import Index
from inpo.train.objectives import OBJECTIVES
from inpo.train.optim import build_optimizer, prepare_network
from inpo.train.settings import TrainSettings

SMALLER = (
    "with --accumulate the effective batch stays as it was; --gradient-checkpointing trades time for memory; a run "
    "that has a checkpoint keeps its batch size, and another begins in another --output"
)
NO_SMALLER = (
    "take --gradient-checkpointing, LoRA layers (--lora-rank 16), several GPUs with FSDP, or a device with more "
    "memory: `inpo plan` says how much"
)


def recorded_batch(chosen: Checkpoint | None, *, sharded: bool) -> int:
    """The batch size that was found when the run began; AUTO if it begins now. Raises UsageError under FSDP, where it
    cannot be found."""
    if chosen is not None:
        return int(chosen.document.identity["batch_size"])
    if sharded:
        raise UsageError(
            "With FSDP the batch size is not found by trying: one process that is out of memory would leave the others "
            "waiting.",
            where="--batch-size",
            expected="a number",
            got="auto",
            fix="`inpo plan` says what one process takes; FSDP divides weights, gradients and optimiser",
        )
    return AUTO


def fitting_batch(
    accelerator: Accelerator,
    denoiser: Denoiser,
    trained: list[torch.nn.Parameter],
    model: Model,
    index: Index,
    settings: TrainSettings,
) -> int:
    """The largest batch, of records with as many sides and latents as large as any that are trained on, with which a
    forward and a backward pass fit into every process, beside what the optimiser will hold. Nothing is trained by it.
    Raises OutOfMemory.
    """
    manifests = [shard.shard.cache.manifest for shard in index.training]
    manifest = max(manifests, key=lambda each: math.prod(each.latent_shape))
    sides = max(shard.sides.shape[1] for shard in index.training)
    device, network = denoiser.device, denoiser.network
    empty = [torch.nn.Parameter(torch.empty_like(each, device=META)) for each in trained]
    state = _state_bytes(empty, settings, manifest.network_dtype)

    def trial(pairs: int) -> None:
        images = sides * pairs
        blank = model.family.blank(model.config, images, manifest.resolution, manifest.max_tokens).to(device)
        x = torch.zeros(images, *manifest.latent_shape, device=device)
        reserve = torch.empty(state, dtype=torch.uint8, device=device)
        try:
            with accelerator.no_sync(network):
                denoiser(x, torch.zeros(images, dtype=torch.int64, device=device), blank).square().mean().backward()
        finally:
            network.zero_grad(set_to_none=True)
            del reserve

    def least(pairs: int) -> int:
        return int(accelerator.gather(torch.tensor([pairs], device=device)).min())

    return find_batch_size(trial, least=least, otherwise=NO_SMALLER)


def train_needs(
    recipe: Path | None, model: Model, manifest: Manifest, widest: int, *, num_processes: int = 1
) -> list[Need]:
    """Of a process of a run as the recipe's [train] has it, with gradient checkpointing and without, on a cache whose
    largest group has `widest` images."""
    settings = resolve(TrainSettings, "train", read_recipe(recipe), {})
    own = f"train, LoRA of rank {settings.lora_rank}" if settings.lora_rank else "train"
    sides = widest if OBJECTIVES[settings.objective].lists else 2
    own += f", lists of {sides}" if sides > 2 else ""
    return [
        Need(
            what=f"{own}, --gradient-checkpointing" if checkpointing else own,
            batch_size=settings.batch_size,
            sides=sides,
            peak=train_peak(
                model,
                manifest,
                settings.model_copy(update={"gradient_checkpointing": checkpointing}),
                num_processes=num_processes,
            ),
        )
        for checkpointing in (False, True)
    ]


def train_peak(
    model: Model, manifest: Manifest, settings: TrainSettings, *, device_type: str = "cuda", num_processes: int = 1
) -> Peak:
    """Of one of the processes that train as `settings` say on a cache of `manifest`, nothing compiled. Each holds the
    whole network (DDP)."""
    family, dtype = model.family, manifest.network_dtype
    tokens = manifest.max_tokens or 1
    network = model.empty_component(family.network)
    trained = prepare_network(network, family, settings, network_dtype=compute_name(dtype), device=META)
    if settings.gradient_checkpointing:
        checkpoint_counted(network, dtype, tokens=tokens, device_type=device_type)
    call = family.bound(manifest.static)

    def count(images: int) -> int:
        blank = family.blank(model.config, images, manifest.resolution, manifest.max_tokens).to(META)
        x, target = torch.zeros(2, images, *manifest.latent_shape, device=META)
        label = torch.zeros(images, device=META)
        with counting(dtype, tokens=tokens, device_type=device_type) as watch:
            predicted = call(network, x, label, blank).float()
            torch.autograd.backward(mean_square(target - predicted).mean())
        network.zero_grad(set_to_none=True)
        return watch.peak

    fixed, per_image = line(count)
    return Peak(
        weights=weights_of(network, dtype),
        optimizer=_state_bytes(trained, settings, dtype) + (bytes_of(iter(trained)) if settings.ema else 0),
        gradients=bytes_of(iter(trained)),
        gradients_stay=num_processes > 1,
        fixed=fixed,
        per_image=per_image,
    )


def _state_bytes(trained: list[torch.nn.Parameter], settings: TrainSettings, network_dtype: str) -> int:
    """Of the optimiser, after a step."""
    eight_bits = settings.optimizer == "adamw8bit"  # which is for GPUs alone: a byte where AdamW has four
    told = settings.model_copy(update={"optimizer": "adamw"}) if eight_bits else settings
    optimizer = build_optimizer(trained, told, network_dtype=network_dtype)
    for each in trained:
        each.grad = torch.zeros_like(each)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return bytes_of(iter(state)) // (4 if eight_bits else 1)
