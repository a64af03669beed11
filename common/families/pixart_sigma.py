"""PixArt-Sigma: a transformer that predicts noise on the old schedule, under a T5 encoder's states and their mask."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from inpo.common.conditions import Condition
from inpo.common.errors import ModelError
from inpo.common.families.base import EMBEDDING, LENGTH, Config, Family, State, read_json
from inpo.common.families.lora import WRAPPER, beyond_defaults, layers_of, save_adapter


class PixArtSigma(Family):
    """PixArt-Sigma."""

    name = "pixart_sigma"
    title = "PixArt-Sigma"
    tag = "pixart-sigma"
    no_transfer = "diffusers has no pipeline with given images for it"
    pipelines = ("PixArtSigmaPipeline",)
    pipeline = PixArtSigmaPipeline
    unneeded = {}
    network = "transformer"
    network_class = PixArtTransformer2DModel
    tokenizer_files = ("tokenizer.json", "spiece.model")
    conditions = {"embedding": EMBEDDING, "length": LENGTH}
    max_tokens = most_tokens = 300
    predictions = ("epsilon",)
    lora_file = "adapter_model.safetensors"
    blocks = ("BasicTransformerBlock",)

    def check_network(self, name: str, network: Config) -> None:
        channels = network.get("in_channels", 4)
        if network.get("out_channels", 8) not in (channels, 2 * channels):
            raise ModelError(
                "The transformer gives other channels than a prediction, and a variance beside it.",
                where=f"{name}: transformer/config.json, out_channels",
                expected=f"{channels} or {2 * channels}",
                got=network.get("out_channels"),
                fix=f"supported: {self.title}",
            )
        sizes = network.get("use_additional_conditions")
        if sizes or (sizes is None and network.get("sample_size", 128) == 128):
            raise ModelError(
                "The transformer takes other conditions than text.",
                where=f"{name}: transformer/config.json, use_additional_conditions",
                expected="false",
                got="unset, which is true at sample_size 128" if sizes is None else sizes,
                fix=f"PixArt-Alpha is not supported; supported: {self.title}",
            )

    def pixel_step(self, config: Callable[[str], Config]) -> int:
        return self.vae_factor(config) * int(config("transformer").get("patch_size", 2))

    def probe_side(self, network: Config) -> int:
        return 4 * int(network.get("patch_size", 2))

    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        return {
            "embedding": (max_tokens or self.max_tokens, int(config("transformer")["caption_channels"])),
            "length": (),
        }

    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        embedding, mask, *_ = pipeline.encode_prompt(
            prompt=list(prompts),
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clean_caption=False,
            max_sequence_length=max_tokens or self.max_tokens,
        )
        return {"embedding": embedding, "length": mask.sum(1)}

    def is_cut(self, pipeline: Any, prompt: str, max_tokens: int | None = None) -> bool:
        return super().is_cut(pipeline, prompt.lower().strip(), max_tokens)  # as the pipeline encodes it

    def call(
        self, network: nn.Module, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        """The noise; the variance that the transformer gives beside it is nobody's."""
        embedding = condition["embedding"].float()
        tokens = torch.arange(embedding.shape[1], device=embedding.device)
        output: Tensor = network(
            x,
            encoder_hidden_states=embedding,
            encoder_attention_mask=tokens < condition["length"][:, None],
            timestep=label,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]

    def drawing(self, prompts: Sequence[str], guidance: float, max_tokens: int | None = None) -> dict[str, Any]:
        """With the size asked for, and the prompt as precompute encodes it."""
        return super().drawing(prompts, guidance, max_tokens) | {
            "use_resolution_binning": False,
            "clean_caption": False,
        }

    # diffusers has no LoRA loader for this pipeline: its layers are a peft adapter, which
    # PeftModel.from_pretrained(pipeline.transformer, folder) takes.

    def save_lora(self, state: State, folder: Path) -> None:
        save_adapter(state, folder)

    def saved_lora(self, file: Path) -> dict[str, Tensor]:
        return {name.removeprefix(WRAPPER): value for name, value in load_file(file).items()}

    def lora_settings(self, file: Path) -> dict[str, Any]:
        told = read_json(file.parent / "adapter_config.json")
        return {"r": told.get("r"), "lora_alpha": told.get("lora_alpha", told.get("r"))} | beyond_defaults(told)

    def lora_names(self, pipeline: Any, file: Path) -> set[str]:
        return {f"{self.network}.{name}" for name in self.saved_lora(file)}

    def load_lora(self, pipeline: Any, file: Path) -> None:
        state = self.saved_lora(file)
        layers = LoraConfig(target_modules=layers_of(state), **self.lora_settings(file))
        transformer = self.network_of(pipeline)
        inject_adapter_in_model(layers, transformer)
        set_peft_model_state_dict(transformer, state)


FAMILIES = (PixArtSigma(),)
