"""A training run from resolved settings to the written pipeline."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from common.cache import Cache, open_cache
from common.denoiser import Denoiser, dtype_name
from common.errors import CacheIncomplete, UsageError
from common.models import open_model
from common.recipe import DataSection, ModelSection, read_recipe, resolve, to_toml
from train import checkpoint
from train.index import Index, build_index
from train.loop import Sampler, Trainer
from train.metrics import MetricsWriter
from train.objectives import OBJECTIVES, Objective
from train.optim import build_optimizer, build_schedule, prepare_unet
from train.output import model_card, write_output
from train.proof import check_fingerprints, refuse, run_proof
from train.records import Needs
from train.samples import sample_images
from train.settings import TrainSettings
from train.stream import RecordStream, held_out_batches

_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def run_train(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    caches: list[str] | None,
    flags: Mapping[str, Any],
    *,
    resume: str,
) -> int:
    """Train; returns the exit code (0 also after SIGTERM, which leaves a checkpoint)."""
    sections = read_recipe(recipe)
    model_section = resolve(ModelSection, "model", sections, model_flags)
    data = resolve(DataSection, "data", sections, {"cache": caches[0]} if caches else {})
    settings = resolve(TrainSettings, "train", sections, flags)
    if settings.output is None:
        raise UsageError("No output given.", where="--output", fix="pass --output, or set output in [train]")
    model = model_section.open()
    opened = [open_cache(location) for location in caches or [data.need("cache")]]
    objective = OBJECTIVES[settings.objective]
    needs = check_needs(opened, settings, objective)
    for cache in opened:
        check_fingerprints(cache, model)
    network_dtype = dtype_name(settings.dtype or opened[0].manifest.network_dtype)
    accelerator = Accelerator(
        mixed_precision=_PRECISION[network_dtype], gradient_accumulation_steps=settings.accumulate
    )
    say = accelerator.print
    set_seed(settings.seed, device_specific=True)
    index = build_index(
        opened, soft=objective.labels == "soft", held_out=settings.held_out, seed=settings.seed, labels=settings.labels,
        only=settings.only, excluded=settings.except_,
    )
    refuse_hard_labels(index, settings, objective)
    configuration = to_toml({"model": model_section, "data": data, "train": settings})
    say(configuration)

    unet = (open_model(settings.init_from) if settings.init_from else model).load_unet()
    prepare_unet(unet, settings, accelerator.device)
    optimizer = build_optimizer(unet, settings)
    schedule = build_schedule(optimizer, settings)
    ema = EMAModel(unet.parameters(), decay=settings.ema) if settings.ema else None
    wrapped, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(schedule)
    if ema is not None:
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    called = torch.compile(wrapped) if settings.compile else wrapped
    denoiser = Denoiser(called, model.schedule, network_dtype=network_dtype)

    stream = RecordStream(
        index, needs, batch_size=settings.batch_size, window_shards=settings.window_shards, seed=settings.seed,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
        pin=accelerator.device.type == "cuda",
    )
    chosen = checkpoint.choose(resume, settings.output / "checkpoints")
    identity = run_identity(settings, opened, index, network_dtype, accelerator.num_processes)
    step = checkpoint.read_state(chosen, identity)["step"] if chosen else 0
    metrics = None
    if accelerator.is_main_process:
        settings.output.mkdir(parents=True, exist_ok=True)
        (settings.output / "recipe.toml").write_text(configuration)
        metrics = MetricsWriter(
            settings.output, tracker=settings.tracker, resumed_step=step, config=settings.model_dump(mode="json")
        )
    trainer = Trainer(
        settings=settings, output=settings.output, objective=objective, accelerator=accelerator, unet=wrapped,
        denoiser=denoiser, optimizer=optimizer, schedule=schedule, ema=ema, stream=stream,
        held_out=held_out_batches(
            index, needs, batch_size=settings.batch_size, most_records=settings.held_out_records, seed=settings.seed
        ),
        identity=identity, metrics=metrics,
    )
    if settings.sample_every:
        draw = partial(
            sample_images, accelerator.unwrap_model(wrapped), model, settings.sample_prompts or ("",),
            steps=settings.sample_steps, guidance=settings.sample_guidance, seed=settings.seed,
            resolution=opened[0].manifest.resolution,
        )
        trainer.sample = Sampler(draw, metrics, settings.output / "samples")
    _say_effective(say, settings, objective, index, accelerator.num_processes, network_dtype)
    if chosen is not None:
        trainer.load(chosen)
        say(f"resumed from {chosen} at step {trainer.step}")
    elif settings.init_from:
        say(
            f"starting from {settings.init_from}, not from the cache's reference: the reference errors still belong "
            f"to {model.name}, so the loss pulls towards that model; the zero-step proof does not apply"
        )
    else:
        unet.eval()
        for cache in opened:
            part = build_index([cache], soft=True, held_out=0.0, seed=settings.seed)
            proof = run_proof(denoiser, part)
            if not proof.holds:
                raise refuse(proof, cache, denoiser)
            say(
                f"zero-step proof holds: E_theta {proof.error:.6g}, E_ref {proof.reference_error:.6g}, logit off by "
                f"{proof.logit_error:.2g} (at most {proof.tolerance}) on {proof.num_records} records"
            )
        unet.train()
    if trainer.step == 0:
        first = RecordStream(
            index, needs, batch_size=settings.batch_size, window_shards=settings.window_shards, seed=settings.seed
        )
        start = trainer.write_start(next(iter(first)))
        first.close()
        at_reference = " (ln 2 = 0.693147 at the reference)" if objective.logistic and not settings.init_from else ""
        say(f"before the first update: loss {start['loss']:.6f}{at_reference}")
    finished = trainer.run()
    if not finished:
        say(f"stopped at step {trainer.step}; run the same command again to go on")
        return 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(unet.parameters())
        card = model_card(
            model, opened, configuration=configuration, step=trainer.step, lora=bool(settings.lora_rank)
        )
        trained = accelerator.unwrap_model(wrapped)
        written = write_output(trained, model, settings.output, card=card, lora=bool(settings.lora_rank))
        say(f"wrote {written}")
    if metrics is not None:
        metrics.close()
    accelerator.end_training()
    return 0


def check_needs(caches: list[Cache], settings: TrainSettings, objective: Objective) -> Needs:
    """What to read, or CacheIncomplete naming the tensor that a cache lacks and the command that makes it."""
    needs = Needs(aim=objective.target, eps_ref=objective.target != "target")
    for cache in caches:
        shard = next(iter(cache))
        lacking = [name for name in (needs.aim, *(("eps_ref",) if needs.eps_ref else ())) if name not in shard]
        if lacking:
            raise CacheIncomplete(
                f"Objective {settings.objective} needs {' and '.join(lacking)}, which this cache does not hold.",
                where=cache.location, got=f"profile {cache.manifest.profile}, extra {list(cache.manifest.extra)}",
                fix="precompute another cache with " + " ".join(f"--extra {name}" for name in lacking),
            )
        if objective.noise_cache and cache.manifest.inverter.name != "noise":
            raise CacheIncomplete(
                "Objective dpo (Diffusion-DPO) trains on noised latents, and this cache holds inverted ones.",
                where=cache.location, expected="inverter noise", got=f"inverter {cache.manifest.inverter.name}",
                fix="precompute a cache with --inverter noise, or use --objective inpo",
            )
    return needs


def refuse_hard_labels(index: Index, settings: TrainSettings, objective: Objective) -> None:
    """A soft objective on hard labels is another objective; refuse it."""
    if objective.labels == "soft" and all((shard.label == 1.0).all() for shard in index.training):
        raise CacheIncomplete(
            f"Objective {settings.objective} needs soft labels, and every label is 1.",
            where=index.training[0].shard.cache.location,
            fix="make some with `inpo relabel CACHE --pairs SRC --scorer pickscore --set NAME`, "
            "then train with --labels NAME",
        )


def run_identity(
    settings: TrainSettings, caches: list[Cache], index: Index, network_dtype: str, world_size: int
) -> dict[str, Any]:
    """Settings that a checkpoint must share to be resumed: all that change the trajectory."""
    free = {
        "output", "steps", "log_every", "save_every", "keep_last", "evaluate_every", "tracker", "sample_every",
        "sample_prompts", "sample_steps", "sample_guidance", "held_out_records", "compile", "only", "except_",
        "gradient_checkpointing", "reference_guard", "dtype",
    }
    values = {name: value for name, value in settings.model_dump(mode="json").items() if name not in free}
    if settings.schedule not in ("constant", "constant_with_warmup"):
        values["steps"] = settings.steps
    values |= {
        "beta": settings.resolved_beta, "network_dtype": network_dtype, "world_size": world_size,
        "index": index.fingerprint,
        "caches": [{name: cache.manifest.fingerprints[name] for name in ("unet", "scheduler")} for cache in caches],
    }
    normalised: dict[str, Any] = json.loads(json.dumps(values))
    return normalised


def _say_effective(
    say: Any, settings: TrainSettings, objective: Objective, index: Index, processes: int, network_dtype: str
) -> None:
    batch = settings.batch_size * settings.accumulate * processes
    say(
        f"objective {settings.objective}, beta {settings.resolved_beta:g}; effective batch {batch} records "
        f"({settings.batch_size} x {settings.accumulate} accumulated x {processes} processes); effective learning rate "
        f"{settings.learning_rate:g}, {settings.schedule}, {settings.warmup_steps} warm-up steps; {network_dtype}"
    )
    say(
        f"{index.num_pairs} pairs, {index.num_records} records to train on, "
        f"{sum(len(shard.rows) for shard in index.held_out)} pairs held out; "
        f"{settings.steps * batch / index.num_records:.2f} epochs in {settings.steps} steps"
    )


