"""[train]: every setting of the second stage."""

from typing import Literal

from pydantic import Field, field_validator

from inpo.common.recipe import LocalPath, Location, Section
from inpo.train.objectives import OBJECTIVES


class TrainSettings(Section):
    """What is optimised, how, and what is written."""

    output: LocalPath | None = None
    caches: tuple[Location, ...] = ()
    """Caches to train on together; unset: the one of [data]."""
    objective: str = "inpo"
    beta: float | None = Field(None, gt=0)
    """Strength of the reference; unset: the objective's own default."""
    learning_rate: float = Field(1e-5, gt=0)
    steps: int = Field(400, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(8, ge=1)
    """Records (pairs at one timestep) per micro-batch and process."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step."""
    optimizer: Literal["adamw", "adafactor", "adamw8bit"] = "adamw"
    weight_decay: float = Field(1e-2, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    schedule: str = "constant_with_warmup"
    """diffusers' name: constant, constant_with_warmup, linear, cosine, ..."""
    warmup_steps: int = Field(0, ge=0)
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Largest decay of the weights' moving average, which is then what is written; 0: none. At step s it is at most
    s / (9 + s), as in diffusers, so that short runs do not average in their start."""
    dtype: str | None = None
    """Network dtype; unset: the cache's, which the stored reference errors belong to."""
    gradient_checkpointing: bool = False
    compile: bool = False
    lora_rank: int = Field(0, ge=0)
    """0: full fine-tuning."""
    lora_alpha: float | None = Field(None, gt=0)
    """Scale of the LoRA layers is alpha / rank; unset: the rank."""
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers; unset: the projections of the attention."""
    init_from: Location | None = None
    """Start from another model's network than the cache's reference."""
    labels: str | None = None
    """A label set made by `inpo relabel`."""
    only: LocalPath | None = None
    except_: LocalPath | None = Field(None, alias="except")
    held_out: float = Field(0.02, ge=0, lt=1)
    """Share of the prompts whose pairs are never trained on."""
    held_out_records: int = Field(256, ge=1)
    """Most held-out records per evaluation."""
    evaluate_every: int = Field(50, ge=1)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(100, ge=1)
    keep_last: int = Field(2, ge=1)
    window_shards: int = Field(4, ge=1)
    """Shards whose records are shuffled together; two windows are in memory."""
    reference_guard: bool = True
    """Stop when the loss or the gradient is not finite; the last good checkpoint stays."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    sample_every: int = Field(0, ge=0)
    """Sample images every N steps; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    """unset: the first four of the cache."""
    sample_steps: int = Field(20, ge=1)
    sample_guidance: float = Field(7.5, ge=0)
    seed: int = 0

    @field_validator("objective")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in OBJECTIVES:
            raise ValueError(f"unknown objective {value!r}; there are {', '.join(OBJECTIVES)}")
        return value

    @property
    def resolved_beta(self) -> float:
        return self.beta if self.beta is not None else OBJECTIVES[self.objective].beta
