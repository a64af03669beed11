"""What rectified flows share: x_t = (1 - t) x0 + t noise, and a network that gives noise - x0."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

from inpo.common.errors import ModelError, UsageError
from inpo.common.families.base import Config, Family
from inpo.common.families.lora import converted_names
from inpo.common.levels import Levels, TimeSettings

_TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class FlowFamily(Family):
    """A transformer of image and text tokens."""

    space = "velocity"
    network = "transformer"
    predictions = ("flow_prediction",)
    tokenizer_files = ("tokenizer.json", "vocab.json", "spiece.model")
    lora_targets = (*Family.lora_targets, *_TEXT_STREAM)
    prefixes = {"transformer": ("",)}  # a file may be the transformer alone; the rest is the pipeline's

    def prediction(self, scheduler: object) -> str:
        """noise - x0, whatever the scheduler calls it."""
        return "flow_prediction"

    # Levels

    def told(self, times: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
        """What the transformer is given as `timestep`: linear in the time."""
        return 1000 * times

    def exact(self, network_dtype: str) -> Float[Tensor, " time"] | None:
        """The times that the network sees unrounded in this dtype, ascending; None: all."""
        return None

    def levels(self, scheduler: object, times: TimeSettings | None = None) -> Levels:
        times = times or TimeSettings()
        config: Config = getattr(scheduler, "config", {})
        self._check_scheduler(scheduler, config)
        shift = {"auto": lambda: self._own_shift(config, times), "none": lambda: 1.0}.get(
            times.shift, lambda: float(times.shift)
        )()
        return Levels.from_density(
            times.density,
            shift,
            int(config["num_train_timesteps"]),
            label=self.told,
            exact=self.exact(times.network_dtype),
        )

    def _check_scheduler(self, scheduler: object, config: Config) -> None:
        is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas", False)
        if not is_flow or config.get("invert_sigmas", False):
            raise ModelError(
                "The scheduler is not that of a rectified flow.",
                where=type(scheduler).__name__,
                expected="FlowMatchEulerDiscreteScheduler, or use_flow_sigmas; invert_sigmas false",
                got=", ".join(
                    f"{name} {config.get(name)}" for name in ("prediction_type", "use_flow_sigmas", "invert_sigmas")
                ),
                fix=f"use the scheduler that the model came with; supported: {self.title}",
            )

    def _own_shift(self, config: Config, times: TimeSettings) -> float:
        """The scheduler's shift; where it hangs on the image's size, that of these latents."""
        if not config.get("use_dynamic_shifting", False):
            return _fixed_shift(config)
        named = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        if lacking := [name for name in named if name not in config]:
            raise ModelError(
                "The scheduler does not say how its shift hangs on the image's size.",
                where="scheduler/scheduler_config.json, use_dynamic_shifting",
                expected=", ".join(named),
                got=f"no {', '.join(lacking)}",
                fix="use the scheduler that the model came with, or pass --shift with a number",
            )
        low, high = float(config["base_image_seq_len"]), float(config["max_image_seq_len"])
        tokens = low if times.latent_shape is None else self.image_tokens(times.latent_shape)
        slope = (config["max_shift"] - config["base_shift"]) / (high - low)
        mu = float(config["base_shift"] + slope * (tokens - low))
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    def image_tokens(self, latent_shape: tuple[int, int, int]) -> int:
        """Tokens of an image, in patches of 2."""
        return latent_shape[1] * latent_shape[2] // 4

    # LoRA and pipelines

    def lora_names(self, pipeline: Any, file: Path) -> set[str]:
        return converted_names(file, pipeline.lora_state_dict)

    def sample_size(self, pipeline: Any) -> Any:
        return pipeline.default_sample_size

    def sampler(self, scheduler: Any) -> Any:
        """Euler in t, deterministic, at the shift of the levels."""
        own = {"shift": _fixed_shift(scheduler.config), "stochastic_sampling": False}
        return FlowMatchEulerDiscreteScheduler.from_config({**scheduler.config, **own})

    def check_steps(self, scheduler: Any, steps: int, *, where: str) -> None:
        most = int(scheduler.config.num_train_timesteps)
        if steps > most:
            raise UsageError(
                "The scheduler does not take this number of steps.",
                where=where,
                expected=f"at most {most} (the model's timesteps)",
                got=steps,
                fix="take fewer, 28 or 50 for instance",
            )

    def pixel_step(self, config: Callable[[str], Config]) -> int:
        return self.vae_factor(config) * 2

    def probe_side(self, network: Config) -> int:
        return 8


def _fixed_shift(config: Config) -> float:
    """Solvers of more kinds have another name for it."""
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def packed(x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch token packed"]:
    """Patches of 2 x 2 as tokens, row by row; channels first within a token."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, 4 * channels)


def unpacked(tokens: Float[Tensor, "batch token packed"], shape: torch.Size) -> Float[Tensor, "batch c h w"]:
    """Latents of this shape from the tokens of `packed`."""
    batch, channels, height, width = shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)
