"""What a run is: the settings that a checkpoint must share with whoever goes on from it."""

import json
from typing import Any

from inpo.common.cache import Cache
from inpo.common.models import Model
from inpo.train.index import Index
from inpo.train.loss_space import predicted
from inpo.train.objectives import beta_of, parameter_of
from inpo.train.settings import TrainSettings


def run_identity(
    settings: TrainSettings, origin: Model, caches: list[Cache], index: Index, network_dtype: str, world_size: int
) -> dict[str, Any]:
    """Settings that a checkpoint must share to be resumed: all that change the trajectory, by what they mean and not by
    how they are spelled. `origin`: the model that training starts from, whose weights a checkpoint of LoRA layers has
    not.
    """
    free = {
        "output",
        "steps",
        "log_every",
        "save_every",
        "keep_last",
        "evaluate_every",
        "tracker",
        "project",
        "run_name",
        "push_to_hub",
        "push_private",
        "sample_every",
        "sample_prompts",
        "sample_steps",
        "sample_guidance",
        "held_out_records",
        "compile",
        "only",
        "except_",
        "gradient_checkpointing",
        "check_finite",
        "overfitting",
        "dtype",
        "caches",
        # Places and choices, whose content the index and the origin's fingerprint have.
        "labels",
        "timestep_range",
        "init_from",
    }
    settings = settings.effective()
    values = {name: value for name, value in settings.model_dump(mode="json").items() if name not in free}
    if settings.schedule not in ("constant", "constant_with_warmup"):
        values["steps"] = settings.steps
    values |= _meant(settings, origin)
    values |= {
        "beta": beta_of(settings),
        "parameter": parameter_of(settings),
        "network_dtype": network_dtype,
        "world_size": world_size,
        "index": index.fingerprint,
        "caches": [cache.manifest.fingerprints for cache in caches],
    }
    if origin.fingerprints["network"] != caches[0].manifest.fingerprints["network"]:
        values["init_from_network"] = origin.fingerprints["network"]
    normalised: dict[str, Any] = json.loads(json.dumps(values))
    return normalised


def _meant(settings: TrainSettings, origin: Model) -> dict[str, Any]:
    """Settings that can be spelled in several ways: as their default is where they mean the same."""
    own, spelled = origin.prediction, settings.lora_targets
    targets = set() if {*spelled} == {*origin.family.lora_targets} else {*spelled}
    return {
        "loss_space": "own" if predicted(origin.levels, own, settings.loss_space) == own else settings.loss_space,
        "schedule": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "lora_alpha": None if settings.lora_alpha == settings.lora_rank else settings.lora_alpha,
        "lora_targets": sorted(targets),
    }
