"""Qwen-Image: a transformer on packed latents under a language model's states and their mask; a VAE of video."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from inpo.common.conditions import Condition
from inpo.common.errors import ModelError
from inpo.common.families.base import EMBEDDING, LENGTH, Config
from inpo.common.families.flow import FlowFamily, packed, unpacked

_OTHER_CONDITIONS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImage(FlowFamily):
    """Qwen-Image."""

    name = "qwen_image"
    title = "Qwen-Image"
    tag = "qwen-image"
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline")
    pipeline = QwenImagePipeline
    unneeded = {}
    network_class = QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    conditions = {"embedding": EMBEDDING, "length": LENGTH}
    max_tokens = 512
    most_tokens = 1024
    patch = 4
    unread = ("attn.to_add_out", "txt_mlp")

    def check_network(self, name: str, network: Config) -> None:
        for key in _OTHER_CONDITIONS:
            if network.get(key):
                raise ModelError(
                    "The transformer takes other conditions than text.",
                    where=f"{name}: transformer/config.json, {key}",
                    expected="false",
                    got=network[key],
                    fix=f"models of editing and of layers are not supported; supported: {self.title}",
                )

    def told(self, times: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
        return times

    def exact(self, network_dtype: str) -> Float[Tensor, " time"] | None:
        """The transformer rounds the time to its dtype and scales it in float32: what has 8 bits stays."""
        return None if network_dtype.startswith("float32") else torch.arange(1, 256, dtype=torch.float64) / 256

    # The VAE, of video: an image is one frame, and each channel has a mean and a deviation of its own.

    def vae_channels(self, vae: Config) -> int:
        return int(vae.get("z_dim", 0))

    def vae_factor(self, config: Callable[[str], Config]) -> int:
        return int(2 ** len(config("vae")["temperal_downsample"]))

    def posterior(self, vae: Any, pixels: Float[Tensor, "image 3 height width"]) -> tuple[Tensor, Tensor]:
        latents = vae.encode(pixels[:, :, None]).latent_dist
        return latents.mean[:, :, 0], latents.std[:, :, 0]

    def decoded(self, vae: Any, latents: Float[Tensor, "image c h w"]) -> Float[Tensor, "image 3 height width"]:
        pixels: Tensor = vae.decode(latents[:, :, None]).sample[:, :, 0]
        return pixels

    def vae_scale(self, vae: Any) -> tuple[Any, Any]:
        mean, deviation = (
            torch.tensor(getattr(vae.config, name), device=vae.device)[:, None, None]
            for name in ("latents_mean", "latents_std")
        )
        return mean, 1 / deviation

    # Conditions

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        width = int(config("transformer")["joint_attention_dim"])
        return {"embedding": (max_tokens or self.max_tokens, width), "length": ()}

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        most = max_tokens or self.max_tokens
        embedding, mask = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=most)
        tokens = embedding.shape[1]
        length = torch.full((len(prompts),), tokens) if mask is None else mask.sum(1)
        return {"embedding": pad(embedding, (0, 0, 0, most - tokens)), "length": length}

    def is_cut(self, pipeline: Any, prompt: str, max_tokens: int | None = None) -> bool:
        """As the pipeline asks: a question around the prompt, of which the beginning does not count."""
        text = pipeline.prompt_template_encode.format(prompt)
        return super().is_cut(
            pipeline, text, (max_tokens or self.max_tokens) + pipeline.prompt_template_encode_start_idx
        )

    def call(
        self, network: nn.Module, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        embedding = condition["embedding"].float()
        tokens = torch.arange(embedding.shape[1], device=embedding.device)
        output: Tensor = network(
            hidden_states=packed(x),
            timestep=label,
            encoder_hidden_states=embedding,
            encoder_hidden_states_mask=tokens < condition["length"][:, None],
            img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(output, x.shape)

    def drawing(self, prompts: Sequence[str], guidance: float, max_tokens: int | None = None) -> dict[str, Any]:
        """Guided away from a space, as the model's authors do it."""
        told = super().drawing(prompts, guidance, max_tokens)
        told["true_cfg_scale"] = max(1.0, told.pop("guidance_scale"))
        return told | ({"negative_prompt": [" "] * len(prompts)} if guidance > 1 else {})


FAMILIES = (QwenImage(),)
