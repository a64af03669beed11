"""Refusals before anything is loaded: what the options ask of the installation, and an objective of its caches."""

import math
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from inpo.common.cache import Cache
from inpo.common.cache.identity import same_levels
from inpo.common.cache.labels import SMPO_TEMPERATURE, label_settings
from inpo.common.cache.schema import LevelTables
from inpo.common.denoiser import check_quantiser, is_quantised
from inpo.common.errors import CacheIncomplete, UsageError, command
from inpo.common.models import Model
from inpo.train.index import Index
from inpo.train.objectives import OBJECTIVES, Objective, parameter_of
from inpo.train.optim import rates
from inpo.train.records import Needs
from inpo.train.settings import TrainSettings


def check_installed(settings: TrainSettings) -> None:
    """Raise UsageError for an option whose package is not installed, with the command that installs it."""
    for asked, option, package in (
        (settings.optimizer == "adamw8bit", "--optimizer adamw8bit", "bitsandbytes"),
        (settings.tracker != "none", f"--tracker {settings.tracker}", settings.tracker),
    ):
        if asked and find_spec(package) is None:
            raise UsageError(
                f"{option} needs the package {package}, which is not installed.",
                where=option,
                fix=f"`pip install {package}`, or choose another",
            )


def check_quantised(network_dtype: str, settings: TrainSettings) -> None:
    """Raise UsageError for a cache of a quantised network that is to be trained whole: no weight of it can move."""
    check_quantiser(network_dtype)
    if is_quantised(network_dtype) and not settings.lora_rank:
        raise UsageError(
            "The cache is of a network with quantised weights, which are not trained.",
            where="--lora-rank",
            expected=f"LoRA layers over the network of dtype {network_dtype}",
            got="0: full fine-tuning",
            fix="pass --lora-rank, or precompute with another --dtype",
        )


def check_objective(settings: TrainSettings) -> None:
    """Raise UsageError for an option that the objective has no use for, or a number outside its range."""
    objective = OBJECTIVES[settings.objective]
    parameter_of(settings)
    pairwise = ", ".join(each.name for each in OBJECTIVES.values() if each.pairwise)
    scored = [each.name for each in OBJECTIVES.values() if each.scores or each.labels == "rates"]
    for wrong, option, expected in (
        (settings.sdpo is not None and not objective.pairwise, "--sdpo", f"a pairwise objective: {pairwise}"),
        (
            settings.score_temperature != 1.0 and objective.name not in scored,
            "--score-temperature",
            f"an objective of scores: {', '.join(scored)}",
        ),
        (
            settings.loss_space != "own" and objective.space is not None,
            "--loss-space",
            "own: the weight of its errors is part of this objective",
        ),
    ):
        if wrong:
            raise UsageError(
                f"{option} does not go with objective {objective.name}.",
                where=option,
                expected=expected,
                got=f"--objective {objective.name}",
                fix=f"leave {option} out, or choose another --objective",
            )


def check_schedule(settings: TrainSettings) -> None:
    """Raise UsageError for a polynomial schedule that has nowhere to fall from, since diffusers' ends at a rate of
    1e-7, and for any whose rate is 0 at every step.
    """
    warmup, falls = settings.warmup_steps, settings.schedule == "polynomial"
    for wrong, option, expected, got in (
        (falls and warmup >= settings.steps, "--warmup-steps", f"less than --steps {settings.steps}", warmup),
        (falls and settings.learning_rate <= 1e-7, "--learning-rate", "more than 1e-7", settings.learning_rate),
    ):
        if wrong:
            raise UsageError(
                f"{option} does not go with --schedule {settings.schedule}.",
                where=option,
                expected=expected,
                got=got,
                fix=f"change {option}, or choose another --schedule",
            )
    if not any(rates(settings)):  # nothing else makes one of 0 than a warm-up, whose first step has it
        raise UsageError(
            "The learning rate would be 0 at every step, and nothing would be trained.",
            where="--warmup-steps",
            expected=f"0 with --steps {settings.steps}, or more --steps",
            got=warmup,
            fix="change one of the two: the first step of a warm-up has the rate 0",
        )


def check_origin(origin: Model, reference: Model) -> None:
    """Raise UsageError if --init-from's network predicts something else, or on another schedule, than the reference:
    it would be read, trained and written as what it is not.
    """
    if origin.family is not reference.family:
        expected, got = f"a {reference.family.name} model", origin.family.name
    elif origin.prediction != reference.prediction:
        expected, got = f"prediction_type {reference.prediction}", origin.prediction
    elif not same_levels(LevelTables.of(origin.levels), LevelTables.of(reference.levels)):
        expected, got = f"the noise schedule of {reference.name}", "another table"
    elif differing := _differing_weight(origin, reference):
        expected, got = differing
    else:
        return
    raise UsageError(
        "The model to start from is of another kind than the reference.",
        where=f"--init-from {origin.name}",
        expected=f"{expected}, as {reference.name} has",
        got=got,
        fix="start from a model of the reference's kind, or precompute with that model",
    )


def _differing_weight(origin: Model, reference: Model) -> tuple[str, str] | None:
    """(that of the reference, that of the origin) of the first weight that is not of one shape in both."""
    network = reference.family.network
    mine, theirs = (
        {name: list(each.shape) for name, each in model.shared_component(network).named_parameters()}
        for model in (origin, reference)
    )
    for name in [*theirs, *mine]:
        if mine.get(name) != theirs.get(name):
            return f"{name} of {theirs.get(name, 'no shape')}", str(mine.get(name, "none"))
    return None


def check_distribution(fsdp: int, settings: TrainSettings) -> None:
    """Raise UsageError for what does not work where FSDP splits the weights. `fsdp`: its version; 0: it does not."""
    if fsdp not in (0, 2):
        raise UsageError(
            "Only version 2 of FSDP is supported.",
            where="accelerate's configuration, fsdp_version",
            expected="2",
            got=fsdp,
            fix="launch with the configuration in recipes/, or set fsdp_version: 2 in your own file",
        )
    for option, used, works in (
        ("--ema", settings.ema, 0),
        ("--lora-rank", settings.lora_rank, 0),
        ("--sample-every", settings.sample_every, 0),
        ("--optimizer", settings.optimizer, "adamw"),
    ):
        if fsdp and used != works:
            raise UsageError(
                f"{option} {used} does not work under FSDP: no process has whole weights.",
                where=option,
                expected=f"{works} under FSDP",
                got=used,
                fix=f"pass {option} {works}, or launch with DDP: `accelerate launch --multi_gpu -m inpo train ...`",
            )


def check_needs(caches: Sequence[Cache], objective: Objective) -> Needs:
    """What to read, or CacheIncomplete naming the tensor that a cache lacks and the command that makes it."""
    needs = Needs(target=objective.target, eps_ref=objective.target != "target")
    for cache in caches:
        manifest = cache.manifest
        shard = next(iter(cache))
        wanted = [needs.target, *(["eps_ref"] if needs.eps_ref else [])]
        lacking = [name for name in wanted if name not in shard]
        if lacking:
            options = [word for name in lacking for word in ("--extra", name)]
            raise CacheIncomplete(
                f"Objective {objective.name} needs {' and '.join(lacking)}, which this cache does not hold.",
                where=cache.location,
                expected=", ".join(wanted),
                got=f"profile {manifest.profile}, extra {', '.join(manifest.extra) or 'none'}",
                fix=f"make another cache: `{command('precompute', *options, '--cache', 'OTHER', '...')}`",
            )
        if objective.noise_cache and manifest.inverter.name != "noise" and manifest.inverter.noised_start < 1:
            raise CacheIncomplete(
                f"Objective {objective.name} (Diffusion-DPO) trains on noised latents; this cache holds inverted ones.",
                where=cache.location,
                expected="inverter noise",
                got=f"inverter {manifest.inverter.name}",
                fix="make another cache: `inpo precompute --inverter noise --cache OTHER ...`, or use --objective inpo",
            )
        if objective.reverses_dropped and not manifest.inverter.caption_dropout:
            raise CacheIncomplete(
                f"Objective {objective.name} reverses the preference where captions were dropped, and none was here.",
                where=cache.location,
                expected="caption_dropout above 0, say 0.1",
                got="caption_dropout 0",
                fix="make another cache: `inpo precompute --caption-dropout 0.1 --cache OTHER ...`, or use --objective "
                "bdpo",
            )
    return needs


def temperature_notes(caches: Sequence[Cache], settings: TrainSettings, objective: Objective) -> list[str]:
    """A line for each label set whose temperature makes a soft objective another strength than the released one's."""
    notes = []
    for cache in caches if objective.name == "smpo" and settings.labels else ():
        scorer, temperature = label_settings(cache, settings.labels or "") or ("", SMPO_TEMPERATURE)
        if scorer == "pickscore" and math.isclose(temperature, SMPO_TEMPERATURE, rel_tol=1e-3):
            continue
        notes.append(
            f"label set {settings.labels} of {cache.location} has scorer {scorer} at temperature {temperature:g}; "
            f"released SmPO is pickscore at {SMPO_TEMPERATURE:.5f}"
            + (
                f": where scores are close, this run pulls {SMPO_TEMPERATURE / temperature:.3g} times as hard "
                f"(`inpo relabel --scorer pickscore --temperature {SMPO_TEMPERATURE:.5f} --set OTHER` makes its labels)"
                if scorer == "pickscore"
                else ", and other scores have another unit: choose --beta on held-out prompts"
            )
        )
    return notes


def refuse_hard_labels(index: Index, given: Sequence[Sequence[Cache]], objective: Objective) -> None:
    """Raise CacheIncomplete if a soft objective meets a cache whose labels are all hard: of its records it would be
    another objective. `given`: each --cache, its buckets together, since a small one may have hard labels by chance.
    """
    for caches in given if objective.labels != "hard" else ():
        parts = [index.of(cache) for cache in caches]
        held_out = [shard for part in parts for shard in part.held_out]
        shards = [shard for part in parts for shard in part.training] or held_out
        if not shards or not all(np.isin(shard.used_labels, (0.0, 1.0)).all() for shard in shards):
            continue
        location = shards[0].shard.cache.location
        smpo = ("--smpo",) if objective.name == "smpo" else ()
        labelling = ("--pairs", "SRC", "--scorer", "pickscore", *smpo)
        raise CacheIncomplete(
            f"Objective {objective.name} needs soft labels, and every label here is 0 or 1.",
            where=location,
            expected="P(win preferred) between 0 and 1, from a scorer",
            fix=f"`{command('relabel', location, *labelling, '--set', 'N')}` makes some; then train with --labels N",
        )
