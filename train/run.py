"""A training run from resolved settings to the written pipeline."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel

from inpo.common.batch_size import memory_in_words
from inpo.common.choices import AUTO
from inpo.common.device import say_device
from inpo.common.durable import write_file
from inpo.common.errors import TrainingError, UsageError, command
from inpo.common.log import log_file, note, say
from inpo.common.models import Model, open_model
from inpo.common.recipe import to_toml
from inpo.common.seeding import library_seed
from inpo.train import checkpoint
from inpo.train.accelerator import build_accelerator, prepare
from inpo.train.card import model_card
from inpo.train.configuration import Resolved, resolve_run
from inpo.train.end import check_parts, check_space
from inpo.train.identity import run_identity
from inpo.train.index import Index, build_index
from inpo.train.loop import Trainer
from inpo.train.memory import NO_SMALLER, SMALLER, fitting_batch, recorded_batch
from inpo.train.metrics import METRICS, MetricsWriter
from inpo.train.objectives import OBJECTIVES, Objective, strength_of
from inpo.train.optim import build_optimizer, build_schedule, prepare_network, rates
from inpo.train.output import check_output, claim_output, write_output
from inpo.train.proof import check_dtype, check_fingerprints, refuse, run_proof
from inpo.train.push import claim_repository, push
from inpo.train.records import Needs
from inpo.train.requirements import (
    check_distribution,
    check_origin,
    check_quantised,
    refuse_hard_labels,
    temperature_notes,
)
from inpo.train.samples import Sampler, drawn_with, sample_images, sample_prompts
from inpo.train.settings import TrainSettings
from inpo.train.stream import RecordStream, held_out_batches
from inpo.train.tracker import Tracker


def run_train(
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    caches: list[str] | None,
    flags: Mapping[str, Any],
    *,
    resume: str,
) -> int:
    """Train; returns the exit code (0 also after SIGTERM or Ctrl-C, which leave a checkpoint)."""
    resolved = resolve_run(recipe, model_flags, caches, flags)
    if train(resolved, resume=resume):
        say(f"next: {command('inspect', 'run', resolved.output)}")
    return 0


def train(resolved: Resolved, *, resume: str, on_metrics: Callable[[], object] = lambda: None) -> bool:
    """One run. Returns False if SIGTERM or Ctrl-C ended it early, with a checkpoint. `on_metrics` is called once the
    metrics in the output folder are this run's: before that they may be what another one left there.
    """
    needs = resolved.check()
    origins = [open_model(resolved.settings.init_from)] if resolved.settings.init_from else []
    with claim_output(resolved.output):
        check_output(resolved.output, resolved.model, *origins)
        with log_file(resolved.output):
            return _train(resolved, needs, resume=resume, on_metrics=on_metrics)


def _train(resolved: Resolved, needs: Needs, *, resume: str, on_metrics: Callable[[], object]) -> bool:
    settings, model, opened = resolved.settings, resolved.model, resolved.caches
    objective = OBJECTIVES[settings.objective]
    for cache in opened:
        check_fingerprints(cache, model)
        check_dtype(cache, settings.dtype)
    origin = open_model(settings.init_from) if settings.init_from else model
    if origin is not model:
        check_origin(origin, model)
    network_dtype = opened[0].manifest.network_dtype
    check_quantised(network_dtype, settings)
    index = build_index(
        opened,
        soft=objective.labels != "hard",
        held_out=settings.held_out,
        labels=settings.labels,
        only=settings.only,
        excluded=settings.except_,
        swap=settings.swap_labels,
        reverse_dropped=objective.reverses_dropped,
        timestep_range=settings.timestep_range,
        rates=objective.labels == "rates",
        lists=objective.lists,
        scores=objective.scores,
        score_temperature=settings.score_temperature,
    )
    refuse_hard_labels(index, resolved.given, objective)

    accelerator = build_accelerator(settings, network_dtype)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    check_distribution(accelerator.state.fsdp_plugin.fsdp_version if sharded else 0, settings)
    if accelerator.is_main_process:
        check_parts(model, settings)
        if settings.push_to_hub:
            claim_repository(settings.push_to_hub, private=settings.push_private)
    set_seed(library_seed(settings.seed), device_specific=True)
    chosen = checkpoint.choose(resume, resolved.output / "checkpoints", say=note)
    if settings.batch_size == AUTO:
        resolved = resolved.with_batch_size(recorded_batch(chosen, sharded=sharded))
        settings = resolved.settings
    if chosen is not None:
        identity = run_identity(settings, origin, opened, index, network_dtype, accelerator.num_processes)
        if "steps" in identity and chosen.step == settings.steps:  # a schedule of which no step is left to make
            identity["steps"] = chosen.document.identity.get("steps")
        chosen.check_identity(identity)
        on_metrics()
    step = chosen.step if chosen else 0
    if step > settings.steps:
        raise UsageError(
            "This run has made more steps already.",
            where="--steps",
            expected=f"at least {step}",
            got=settings.steps,
            fix="ask for as many steps or more, or start another run with another --output",
        )
    say(to_toml({**resolved.sections, "train": settings}, differing=True))
    say(f"every other setting is its default; all: {resolved.output / 'recipe.toml'}")
    if accelerator.is_main_process:
        say_device(accelerator.device, network_dtype, num_processes=accelerator.num_processes)
    tracker = _tracker(settings, resolved.output, step) if accelerator.is_main_process else None

    with memory_in_words(None, otherwise=NO_SMALLER):
        network = origin.load_network()
        trained = prepare_network(
            network, model.family, settings, network_dtype=network_dtype, device=accelerator.device, sharded=sharded
        )
    if accelerator.is_main_process:
        check_space(model, settings, resolved.output, trained=trained, step=step)
    optimizer = build_optimizer(trained, settings, network_dtype=network_dtype)
    schedule = build_schedule(optimizer, settings)
    wrapped, optimizer = prepare(accelerator, network, optimizer)
    trained = [each for each in wrapped.parameters() if each.requires_grad]  # FSDP has put its own in their place
    ema = _moving_average(accelerator, trained, settings)
    denoiser = model.denoiser(wrapped, opened[0].manifest, network_dtype=network_dtype)
    if settings.batch_size == AUTO:
        pairs = fitting_batch(accelerator, denoiser, trained, model, index, settings)
        resolved = resolved.with_batch_size(pairs)
        settings = resolved.settings

    stream = RecordStream(
        index,
        needs,
        batch_size=settings.batch_size,
        window_shards=settings.window_shards,
        seed=settings.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin=accelerator.device.type == "cuda",
    )
    metrics = sample = None
    if accelerator.is_main_process:
        recipe = resolved.output / "recipe.toml"

        def begin() -> None:
            write_file(recipe, resolved.toml)
            on_metrics()

        # The folder's weights, numbers and recipe are one run's: what is trained takes the place of all at once.
        if not (recipe.exists() and (resolved.output / METRICS).exists()):
            write_file(recipe, resolved.toml)
        metrics = MetricsWriter(resolved.output, tracker=tracker, resumed_step=step, on_begin=begin)
        if settings.sample_every:
            prompts, bare = sample_prompts(settings, opened), accelerator.unwrap_model(wrapped)
            draw = partial(sample_images, bare, model, prompts, opened[0].manifest, settings)
            sample = Sampler(draw=draw, told=drawn_with(prompts, settings), metrics=metrics)
    trainer = Trainer(
        settings=settings,
        output=resolved.output,
        objective=objective,
        accelerator=accelerator,
        network=wrapped,
        trained=trained,
        denoiser=denoiser,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        stream=stream,
        held_out=held_out_batches(
            index, needs, batch_size=settings.batch_size, most_records=settings.held_out_records, seed=settings.seed
        ),
        identity=run_identity(settings, origin, opened, index, network_dtype, accelerator.num_processes),
        metrics=metrics,
        sample=sample,
    )
    notes = temperature_notes(opened, settings, objective)
    if dropout := model.config(model.family.network).get("dropout"):
        notes.append(f"the network's dropout {dropout:g} is off: the reference errors were measured without it")
    _say_effective(settings, objective, index, accelerator.num_processes, network_dtype, notes)
    try:
        with memory_in_words(settings.batch_size, smaller=SMALLER, otherwise=NO_SMALLER):
            _start(trainer, resolved, index, chosen)
            finished = trainer.run()
        if trainer.overfitted:
            say(f"stopped at step {trainer.step}: the held-out accuracy has turned; what is written is of this step")
        if finished:
            _finish(trainer, resolved, origin)
        else:
            say(f"stopped at step {trainer.step}; run the same command again to go on")
    finally:
        stream.close()
        if metrics is not None:
            metrics.close()
    return finished


def _tracker(settings: TrainSettings, output: Path, step: int) -> Tracker | None:
    if settings.tracker == "none":
        return None
    return Tracker(
        settings.tracker,
        output,
        resumed_step=step,
        config=settings.model_dump(mode="json"),
        project=settings.project,
        run_name=settings.run_name,
    )


def _moving_average(
    accelerator: Accelerator, trained: list[torch.nn.Parameter], settings: TrainSettings
) -> EMAModel | None:
    if not settings.ema:
        return None
    ema = EMAModel(trained, decay=settings.ema)
    ema.to(accelerator.device)
    return ema


def _start(trainer: Trainer, resolved: Resolved, index: Index, chosen: checkpoint.Checkpoint | None) -> None:
    """Resume, or prove that the caches belong to the weights, compiled as they will be trained; then the line before
    the first update.
    """
    settings = resolved.settings
    if chosen is not None:
        trainer.load(chosen)
        say(f"resumed from {chosen.path} at step {trainer.step}")
    trainer.compile(resolved.model.family)
    if chosen is not None:
        return
    if settings.init_from:
        say(
            f"starting from {settings.init_from}, not from the caches' reference {resolved.model.name}: the reference "
            "errors belong to that model, so the loss pulls towards it, and the zero-step proof does not apply"
        )
    else:
        for cache in resolved.caches:
            part = index.of(cache)
            if not part.training and not part.held_out:
                continue
            proof = run_proof(trainer.denoiser, part, batch_size=settings.batch_size, weights=trainer.weights)
            if not proof.holds:
                raise refuse(proof, cache, beta=trainer.beta)
            say(
                f"zero-step proof holds: E_theta {proof.error:.6g}, E_ref {proof.reference_error:.6g} on "
                f"{proof.num_records} records; the logit at beta {trainer.beta:g} off by "
                f"{proof.on_logit(proof.shift, trainer.beta)} ({proof.what}), at most "
                f"{proof.on_logit(proof.limit, trainer.beta)}: {proof.spreads(trainer.beta)}"
            )
    start = trainer.write_start()
    say(f"before the first update: loss {start['loss']:.6f} ({start['at_reference']:.6f} at the reference)")


def _finish(trainer: Trainer, resolved: Resolved, origin: Model) -> None:
    """Write the pipeline or the LoRA weights."""
    accelerator = trainer.accelerator
    if trainer.skipped_updates:
        note(
            f"gradients overflowed float16 in {trainer.skipped_updates} of {trainer.step} steps; those made no "
            "update, and the learning rate's schedule did not advance"
        )
    if not any(islice(rates(resolved.settings), trainer.step - trainer.skipped_updates)):
        raise TrainingError(
            "No update was made: the gradients of every step overflowed float16, or its learning rate was 0.",
            where=f"{trainer.step} steps",
            expected="finite gradients, once the scaler has come down, and a step after the first of a warm-up",
            fix="take more --steps, a lower --beta, or --dtype bfloat16 with a cache of that dtype",
        )
    accelerator.wait_for_everyone()
    bare = accelerator.unwrap_model(trainer.network)
    if accelerator.distributed_type == DistributedType.FSDP:
        weights = accelerator.get_state_dict(trainer.network)  # all processes take part, the first one gets the whole
        if accelerator.is_main_process:
            bare = resolved.model.load_network()
            bare.load_state_dict(weights)
    if accelerator.is_main_process:
        if trainer.ema is not None:
            trainer.ema.copy_to(trainer.trained)
        over = origin if resolved.settings.lora_rank else None
        card = model_card(
            resolved.settings.init_from or resolved.model.name,
            resolved.model,
            resolved.caches,
            sections={**resolved.sections, "train": resolved.settings},
            step=trainer.step,
            lora=over is not None,
        )
        say(f"wrote {write_output(bare, resolved.model, resolved.output, card=card, over=over)}")
        if repository := resolved.settings.push_to_hub:
            private = resolved.settings.push_private
            say(f"pushed {push(resolved.output, repository, private=private, license=None, compare=None)}")
    accelerator.wait_for_everyone()


def _say_effective(
    settings: TrainSettings, objective: Objective, index: Index, processes: int, network_dtype: str, notes: list[str]
) -> None:
    batch = settings.batch_size * settings.accumulate * processes
    say(
        f"objective {settings.objective}, {strength_of(settings)}; effective batch {batch} records "
        f"({settings.batch_size} x {settings.accumulate} accumulated x {processes} processes); effective learning rate "
        f"{settings.learning_rate:g}, {settings.schedule}, {settings.warmup_steps} warm-up steps; {network_dtype}"
    )
    things = "lists" if objective.lists else "pairs"
    say(
        f"{index.num_pairs} {things}, {index.num_records} records to train on, "
        f"{sum(len(shard.rows) for shard in index.held_out)} {things} held out; "
        f"{settings.steps * batch / index.num_records:.2f} epochs in {settings.steps} steps"
    )
    if settings.held_out and not any(len(shard.rows) for shard in index.held_out):
        note(f"of so few {things} none is held out, and there will be no held-out figures: a larger --held-out")
    for line in [*index.unknown, *notes]:
        note(line)
