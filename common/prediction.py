"""Whether a network's weights predict what its configuration says they do.

The scheduler's configuration names the prediction type, the weights do not, and a wrong name gives finite latents and a
worthless cache. At the last label x_t is almost pure noise: a trained network that predicts noise gives its input back,
one that predicts v or the sample gives something else.
"""

import sys
from functools import cache
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from common.denoiser import Condition, Denoiser
from common.errors import ModelError
from common.schedule import NoiseSchedule

_LATENTS = 4
_TOKENS = 77
_ALIKE = 0.9
"""With eps = (x - a x0) / s and a = 0.07, as in Stable Diffusion, even latents twice as strong as the noise leave a cosine of 0.99;
what the networks of x0 and v give back is a picture."""


def check_prediction(unet: UNet2DConditionModel, schedule: NoiseSchedule, *, where: str, guessed_from: str | None) -> None:
    """Compare one network call with the configured prediction type.

    Raises ModelError if the network returns the noise it is given although v or the sample is configured, and if it does not
    although noise is configured by `guessed_from`, a hub model that the file merely looks like. Where the user has named the
    configuration, the latter is a note: weights that are not trained look the same.
    """
    likeness = noise_likeness(unet, schedule)
    configured = schedule.prediction_type
    if configured != "epsilon" and likeness > _ALIKE:
        raise ModelError(
            f"The configuration says {configured}, and the weights predict noise.", where=where,
            expected="at the last timestep, an output unlike the noisy input",
            got=f"a cosine of {likeness:.2f} between the two" + _guess(guessed_from), fix=_fix(guessed_from, "epsilon"),
        )
    if configured == "epsilon" and not likeness > _ALIKE:
        if guessed_from is not None:
            raise ModelError(
                "The configuration says epsilon, and the weights do not predict noise.", where=where,
                expected="at the last timestep, the noisy input given back",
                got=f"a cosine of {likeness:.2f} between the two" + _guess(guessed_from),
                fix=_fix(guessed_from, "v_prediction"),
            )
        _note(
            f"note: {where} is configured to predict noise, but does not give noise back at the last timestep (cosine "
            f"{likeness:.2f}): it is untrained, or prediction_type in scheduler_config.json is wrong"
        )


@cache
def _note(text: str) -> None:
    """Once in a process, however often the network is loaded."""
    print(text, file=sys.stderr)


def _guess(guessed_from: str | None) -> str:
    return "" if guessed_from is None else f"; configured as {guessed_from}, which its weights look like"


def _fix(guessed_from: str | None, prediction_type: str) -> str:
    if guessed_from is None:
        return f"set prediction_type in scheduler/scheduler_config.json, to {prediction_type} for this model as it seems"
    base = " (Stable Diffusion 2 base has one)" if prediction_type == "epsilon" else ""
    return f"--model-config DIR, with a scheduler whose prediction_type is {prediction_type}{base}"


@torch.no_grad()
def noise_likeness(unet: UNet2DConditionModel, schedule: NoiseSchedule) -> float:
    """The cosine between standard normal latents and the network's own output for them at the last label, no text.

    The latents are as small as the network takes them twice over: 16 x 16 for Stable Diffusion.
    """
    config = unet.config
    size = 2 ** len(config.block_out_channels)
    generator = torch.Generator().manual_seed(0)
    x: Float[Tensor, "batch c h w"] = torch.randn(_LATENTS, config.in_channels, size, size, generator=generator)
    pooled = time_ids = None
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled = torch.zeros(_LATENTS, width)
        time_ids = torch.tensor([[8.0 * size, 8.0 * size, 0.0, 0.0, 8.0 * size, 8.0 * size]]).repeat(_LATENTS, 1)
    condition = Condition(
        embedding=torch.zeros(_LATENTS, _TOKENS, config.cross_attention_dim), pooled=pooled, time_ids=time_ids
    )
    last = torch.full((_LATENTS,), schedule.num_train_timesteps - 1)
    output = Denoiser(cast(nn.Module, unet), schedule).predict(x, last, condition)
    return float(torch.nn.functional.cosine_similarity(output.flatten(), x.flatten(), dim=0))
