"""What a run is: the settings that a checkpoint must share with whoever goes on from it."""

import json
from typing import Any

from inpo.common.cache import Cache
from inpo.common.models import Model
from inpo.train.index import Index
from inpo.train.loss_space import predicted
from inpo.train.objectives import beta_of, parameter_of
from inpo.train.settings import TrainSettings

_UNSEEN = {
    *("output", "log_every", "save_every", "keep_last", "tracker", "project", "run_name", "push_to_hub"),
    *("push_private", "sample_every", "sample_prompts", "sample_steps", "sample_guidance"),
    *("compile", "gradient_checkpointing", "check_finite"),
}
"""Settings that change nothing of the network."""
_STOPPING = ("overfitting", "evaluate_every", "held_out_records")
"""Settings that change no more than where a run ends, and that only where it may stop by itself."""
_TOLD_OTHERWISE = ("dtype", "caches", "only", "except_", "labels", "timestep_range", "init_from")
"""Places and choices, whose content the index, the caches' and the origin's fingerprints have."""


def result_identity(settings: TrainSettings, origin: Model) -> dict[str, Any]:
    """Of the settings, those that change the network that a run ends with, by what they mean and not by how they are
    spelled. `origin`: the model that training starts from."""
    settings = settings.effective()
    values = settings.model_dump(mode="json", exclude=_UNSEEN)
    if settings.overfitting != "stop":
        values = {name: value for name, value in values.items() if name not in _STOPPING}
    return values | _meant(settings, origin) | {"beta": beta_of(settings), "parameter": parameter_of(settings)}


def run_identity(
    settings: TrainSettings, origin: Model, caches: list[Cache], index: Index, network_dtype: str, world_size: int
) -> dict[str, Any]:
    """Settings that a checkpoint must share to be resumed: all that change the trajectory. `origin`: the model that
    training starts from, whose weights a checkpoint of LoRA layers has not.
    """
    has_end = settings.schedule not in ("constant", "constant_with_warmup")
    free = {*_STOPPING, *_TOLD_OTHERWISE, *(() if has_end else ("steps",))}
    values = {name: value for name, value in result_identity(settings, origin).items() if name not in free}
    values |= {
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
