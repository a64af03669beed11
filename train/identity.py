"""What a run is: the settings that a checkpoint must share with whoever goes on from it."""

import json
from typing import Any

from inpo.common.cache import Cache
from inpo.common.models import Model
from inpo.train.index import Index
from inpo.train.objectives import beta_of, parameter_of
from inpo.train.settings import TrainSettings


def run_identity(
    settings: TrainSettings, origin: Model, caches: list[Cache], index: Index, network_dtype: str, world_size: int
) -> dict[str, Any]:
    """Settings that a checkpoint must share to be resumed: all that change the trajectory. `origin`: the model that
    training starts from, whose weights a checkpoint of LoRA layers has not."""
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
    }
    told = settings.effective().model_dump(mode="json")
    values = {name: value for name, value in told.items() if name not in free}
    if settings.schedule not in ("constant", "constant_with_warmup"):
        values["steps"] = settings.steps
    values |= {
        "beta": beta_of(settings),
        "parameter": parameter_of(settings),
        "network_dtype": network_dtype,
        "world_size": world_size,
        "index": index.fingerprint,
        "caches": [cache.manifest.fingerprints for cache in caches],
    }
    if settings.init_from:
        values["init_from_network"] = origin.fingerprints["network"]
    normalised: dict[str, Any] = json.loads(json.dumps(values))
    return normalised
