"""FLUX.1: a transformer on packed latents under a pooled CLIP state and T5, without a mask; dev is told a guidance."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn

from inpo.common.choices import EMBEDDED_GUIDANCE
from inpo.common.conditions import Condition, NetworkCall
from inpo.common.families.base import EMBEDDING, POOLED, Config
from inpo.common.families.flow import FlowFamily, packed, unpacked
from inpo.common.families.lora import originals

_DOUBLE, _SINGLE = "transformer_blocks.#.", "single_transformer_blocks.#."
_ORIGINALS = originals(
    {
        "double_blocks.#.img_attn.qkv": tuple(f"{_DOUBLE}attn.to_{part}" for part in "qkv"),
        "double_blocks.#.img_attn.proj": (f"{_DOUBLE}attn.to_out.0",),
        "double_blocks.#.img_mlp.0": (f"{_DOUBLE}ff.net.0.proj",),
        "double_blocks.#.img_mlp.2": (f"{_DOUBLE}ff.net.2",),
        "double_blocks.#.img_mod.lin": (f"{_DOUBLE}norm1.linear",),
        "double_blocks.#.txt_attn.qkv": tuple(f"{_DOUBLE}attn.add_{part}_proj" for part in "qkv"),
        "double_blocks.#.txt_attn.proj": (f"{_DOUBLE}attn.to_add_out",),
        "double_blocks.#.txt_mlp.0": (f"{_DOUBLE}ff_context.net.0.proj",),
        "double_blocks.#.txt_mlp.2": (f"{_DOUBLE}ff_context.net.2",),
        "double_blocks.#.txt_mod.lin": (f"{_DOUBLE}norm1_context.linear",),
        "single_blocks.#.linear1": (*(f"{_SINGLE}attn.to_{part}" for part in "qkv"), f"{_SINGLE}proj_mlp"),
        "single_blocks.#.linear2": (f"{_SINGLE}proj_out",),
        "single_blocks.#.modulation.lin": (f"{_SINGLE}norm.linear",),
    },
    wide={f"{_SINGLE}proj_mlp": 4},
)


class Flux(FlowFamily):
    """FLUX.1 dev and schnell."""

    name = "flux"
    title = "FLUX.1"
    tag = "flux"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    pipeline = FluxPipeline
    unneeded = {"image_encoder": None, "feature_extractor": None}
    network_class = FluxTransformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    conditions = {"embedding": EMBEDDING, "pooled": POOLED}
    max_tokens = most_tokens = 512
    patch = 4
    originals = _ORIGINALS
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def told(self, times: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
        return times

    def exact(self, network_dtype: str) -> Float[Tensor, " time"] | None:
        """The transformer rounds the time to its dtype, multiplies by 1000 and rounds again: multiples of 8 stay."""
        return None if network_dtype.startswith("float32") else torch.arange(1, 125, dtype=torch.float64) / 125

    def static(self, config: Callable[[str], Config]) -> dict[str, float]:
        """At 1 a network with guidance distilled into it is nearest to the mean that the errors assume."""
        return {EMBEDDED_GUIDANCE: 1.0} if config("transformer").get("guidance_embeds", False) else {}

    def bound(self, static: Mapping[str, float]) -> NetworkCall:
        return partial(self.call, guidance=static.get(EMBEDDED_GUIDANCE))

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        transformer = config("transformer")
        return {
            "embedding": (max_tokens or self.max_tokens, int(transformer["joint_attention_dim"])),
            "pooled": (int(transformer["pooled_projection_dim"]),),
        }

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        embedding, pooled, _ = pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=device, max_sequence_length=max_tokens or self.max_tokens
        )
        return {"embedding": embedding, "pooled": pooled}

    def is_cut(self, pipeline: Any, prompt: str, max_tokens: int | None = None) -> bool:
        """By T5, which reads on where CLIP ends."""
        tokens = pipeline.tokenizer_2(prompt, truncation=False, verbose=False)["input_ids"]
        return len(tokens) > (max_tokens or self.max_tokens)

    def call(
        self,
        network: nn.Module,
        x: Float[Tensor, "batch c h w"],
        label: Float[Tensor, " batch"],
        condition: Condition,
        guidance: float | None = None,
    ) -> Float[Tensor, "batch c h w"]:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        places = torch.zeros(rows, columns, 3, device=x.device)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)
        embedding = condition["embedding"].float()
        output: Tensor = network(
            hidden_states=packed(x),
            timestep=label,
            guidance=None if guidance is None else torch.full_like(label, guidance),
            encoder_hidden_states=embedding,
            pooled_projections=condition["pooled"].float(),
            txt_ids=torch.zeros(embedding.shape[1], 3, device=x.device),
            img_ids=places.reshape(-1, 3),
            return_dict=False,
        )[0]
        return unpacked(output, x.shape)

    def architecture(self, config: Callable[[str], Config], prediction: str) -> str:
        return f"flux-1-{'dev' if config('transformer').get('guidance_embeds', False) else 'schnell'}"

    def base_version(self, config: Callable[[str], Config], prediction: str) -> dict[str, str]:
        return {"ss_base_model_version": "flux1"}


FAMILIES = (Flux(),)
