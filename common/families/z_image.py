"""Z-Image: a transformer of one stream that takes lists, gives x0 - noise, and is told 1 - t."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from inpo.common.conditions import Condition
from inpo.common.errors import ModelError
from inpo.common.families.base import EMBEDDING, LENGTH, Config, Family
from inpo.common.families.flow import FlowFamily


class ZImage(FlowFamily):
    """Z-Image."""

    name = "z_image"
    title = "Z-Image"
    tag = "z-image"
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline")
    pipeline = ZImagePipeline
    unneeded = {}
    network_class = ZImageTransformer2DModel
    conditions = {"embedding": EMBEDDING, "length": LENGTH}
    max_tokens = most_tokens = 512
    varying = True
    lora_targets = Family.lora_targets

    def check_network(self, name: str, network: Config) -> None:
        if network.get("siglip_feat_dim") is not None:
            raise ModelError(
                "The transformer takes other conditions than text.",
                where=f"{name}: transformer/config.json, siglip_feat_dim",
                expected="null",
                got=network["siglip_feat_dim"],
                fix=f"models of editing are not supported; supported: {self.title}",
            )

    def told(self, times: Float[Tensor, " time"]) -> Float[Tensor, " time"]:
        return 1 - times

    def longest_side(self, config: Callable[[str], Config]) -> int | None:
        _, *sides = config("transformer").get("axes_lens", (1024, 512, 512))
        return min(int(each) for each in sides) * self.pixel_step(config)

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        width = int(config("transformer")["cap_feat_dim"])
        return {"embedding": (max_tokens or self.max_tokens, width), "length": ()}

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        most = max_tokens or self.max_tokens
        rows, _ = pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=most
        )
        return {
            "embedding": torch.stack([pad(row, (0, 0, 0, most - len(row))) for row in rows]),
            "length": torch.tensor([len(row) for row in rows]),
        }

    def is_cut(self, pipeline: Any, prompt: str, max_tokens: int | None = None) -> bool:
        """As the pipeline asks: as a turn of a conversation."""
        text = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return super().is_cut(pipeline, text, max_tokens)

    def call(
        self, network: nn.Module, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        lengths = condition["length"].tolist()
        captions = [row[:length] for row, length in zip(condition["embedding"].float(), lengths, strict=True)]
        output: list[Tensor] = network(list(x[:, :, None].unbind()), label, captions, return_dict=False)[0]
        return -torch.stack(output)[:, :, 0]

    def drawn_size(self, pipeline: Any) -> tuple[int, int]:
        return 1024, 1024  # the pipeline's own number, which stands nowhere else

    def drawing(self, prompts: Sequence[str], guidance: float, max_tokens: int | None = None) -> dict[str, Any]:
        """The pipeline counts from 0 what others count from 1."""
        return super().drawing(prompts, max(0.0, guidance - 1.0), max_tokens)


FAMILIES = (ZImage(),)
