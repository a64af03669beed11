"""What a model family answers. Defaults are what most families share; a family's file says what is its own.

Packing, ids, signs and time scales of a network never leave its family: outside, a network takes plain latents
[batch, c, h, w], the label of its level and a Condition, and gives latents back.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from inpo.common.cache.schema import ConditionSpec
from inpo.common.choices import Space
from inpo.common.conditions import Condition, NetworkCall
from inpo.common.errors import ModelError, UsageError
from inpo.common.families.lora import Original, adapter_metadata, converted_names, numbered
from inpo.common.levels import Levels, TimeSettings
from inpo.common.sizes import latent_sides

Config = Mapping[str, Any]
State = Mapping[str, Tensor]
EMBEDDING = ConditionSpec(dtype="float16", axes=("token", "width"), per="prompt")
POOLED = ConditionSpec(dtype="float16", axes=("width",), per="prompt")
LENGTH = ConditionSpec(dtype="int32", axes=(), per="prompt")


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file. Raises ModelError if it is not a JSON object."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"{type(document).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise ModelError(
            "A configuration file of the model cannot be read.",
            where=file,
            expected="a JSON object",
            got=str(error),
            fix="download the model again",
        ) from error
    return document


class Family(ABC):
    """One family of models."""

    name: str
    """In the manifest of a cache."""
    title: str
    """For messages: what of it is supported."""
    tag: str
    """On a model card."""
    pipelines: tuple[str, ...]
    """Class names in model_index.json that are this family."""
    pipeline: type[Any]
    """The diffusers pipeline that images are made with."""
    unneeded: Mapping[str, Any]
    """Arguments that leave out what images of a text do not need."""
    network: str
    """The trained component."""
    network_class: type[Any]
    vae_class: type[Any] = AutoencoderKL
    text_encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    tokenizer_files: tuple[str, ...] = ("tokenizer.json", "vocab.json")
    """One of them makes a tokenizer."""
    conditions: Mapping[str, ConditionSpec]
    """What the network is told beside latent and label. A family with a condition `length` has a mask: what is behind
    so many tokens of a prompt is not stored, and zeros stand for it."""
    max_tokens: int | None = None
    """Tokens of every prompt, unless the user says another number; None: the tokenizers have one for all."""
    most_tokens: int | None = None
    """As many as the user may ask for."""
    space: Space = "noise"
    """Of targets and errors."""
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    unread: tuple[str, ...] = ()
    """Of the last of `transformer_blocks`: modules whose output nothing reads. They are not trained."""
    originals: Mapping[str, Original] = {}
    """{layer, with # for a block's number: where it stands in the network as it was published}."""
    lora_file: str = "pytorch_lora_weights.safetensors"
    """What `save_lora` writes."""
    prefixes: Mapping[str, tuple[str, ...]] = {}
    """Where a single file keeps a component's weights, of components that are read from one; empty: no such file."""
    patch: int = 1
    """Elements of a latent's plane in one of the network's input vectors."""
    blocks: tuple[str, ...] = ()
    """Classes of the network's modules that are compiled one by one; empty: those that diffusers names."""
    varying: bool = False
    """Whether the network cuts prompts to their lengths, so that sizes inside it change from call to call."""
    latent_colours: tuple[Sequence[Sequence[float]], Sequence[float]] | None = None
    """(weight [4, 3], bias [3]) of a linear map from latents to RGB in 0..1, where one is known."""
    controlled: type[Any] | None = None
    """diffusers' pipeline of such a model and a ControlNet; None: not supported."""
    controlnet_class: type[Any]
    """Of the ControlNet, where there is such a pipeline."""
    inpainted: type[Any] | None = None
    """diffusers' pipeline that paints what a mask says anew; None: not supported."""
    no_transfer: str = "diffusers' pipelines with given images take other arguments for it, and were not tried"
    """Why a family has neither."""

    # Configuration

    def check(self, *, name: str, folder: Path, index: Config, config: Callable[[str], Config]) -> None:
        """Raise ModelError for a model, called `name` in messages, that the equations or the conditions do not hold
        for. `index` is model_index.json, `config` gives a component's configuration by its name.
        """
        for component in ("scheduler", self.network, *self.text_encoders, *self.tokenizers):
            if not all(index.get(component) or [None]):  # it is no damage: a new download would not bring it
                raise ModelError(f"The pipeline has no {component}.", where=name, fix=f"supported: {self.title}")
        network, vae = config(self.network), config("vae")
        channels = self.patch * self.vae_channels(vae)
        if network.get("in_channels") != channels:
            packed = f"{self.patch} times " if self.patch > 1 else ""
            raise ModelError(
                f"The {self.network} does not take plain latents of this VAE.",
                where=name,
                expected=f"in_channels {channels} ({packed}the VAE's latent_channels)",
                got=f"in_channels {network.get('in_channels')}",
                fix=f"inpainting and depth models are not supported; supported: {self.title}",
            )
        self.check_network(name, network)
        for component in self.tokenizers:
            # The libraries make an empty tokenizer of an empty folder, and fail much later.
            if not any((folder / component / file).is_file() for file in self.tokenizer_files):
                raise ModelError(
                    f"The model has no {component}.",
                    where=folder / component,
                    expected=" or ".join(self.tokenizer_files),
                    got="none of them",
                    fix="download the model again",
                )

    def check_network(self, name: str, network: Config) -> None:
        """Raise ModelError for a network's configuration that asks for what this family does not give."""
        return

    def levels(self, scheduler: object, times: TimeSettings | None = None) -> Levels:
        """The levels; where the family is a flow, those of `times`. Raises ModelError for a scheduler that the
        equations do not hold for."""
        return Levels.from_scheduler(scheduler)

    def prediction(self, scheduler: object) -> str:
        """What the network's output is (common/predictions.py). Raises ModelError for what this family does not do."""
        name = getattr(scheduler, "config", {}).get("prediction_type", "epsilon")
        if name not in self.predictions:
            raise ModelError(
                "Unknown prediction type.",
                where=type(scheduler).__name__,
                expected=", ".join(self.predictions),
                got=name,
                fix=f"use a model that predicts one of them; supported: {self.title}",
            )
        return str(name)

    # Latents

    def latent_shape(self, config: Callable[[str], Config], size: tuple[int, int]) -> tuple[int, int, int]:
        """[C, H, W] of the latent of an image of `size` (height, width) in pixels. `config` gives a component's
        configuration by its name.
        """
        factor = self.vae_factor(config)
        return (self.vae_channels(config("vae")), size[0] // factor, size[1] // factor)

    def vae_channels(self, vae: Config) -> int:
        """Channels of a latent, by the VAE's configuration."""
        return int(vae.get("latent_channels", 0))

    def vae_factor(self, config: Callable[[str], Config]) -> int:
        """Pixels along a side of a latent's element."""
        return int(2 ** (len(config("vae")["block_out_channels"]) - 1))

    def pixel_step(self, config: Callable[[str], Config]) -> int:
        """What both sides of an image must be multiples of."""
        return self.vae_factor(config)

    def longest_side(self, config: Callable[[str], Config]) -> int | None:
        """Pixels along a side of the largest image whose places the network knows; None: any."""
        return None

    @abstractmethod
    def probe_side(self, network: Config) -> int:
        """A small side of a latent that the network takes."""

    def posterior(self, vae: Any, pixels: Float[Tensor, "image 3 height width"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images in -1..1, [image, c, h, w] each, in the VAE's scale."""
        latents = vae.encode(pixels).latent_dist
        return latents.mean, latents.std

    def decoded(self, vae: Any, latents: Float[Tensor, "image c h w"]) -> Float[Tensor, "image 3 height width"]:
        """Images of latents in the VAE's scale."""
        pixels: Tensor = vae.decode(latents).sample
        return pixels

    def vae_scale(self, vae: Any) -> tuple[Any, Any]:
        """(shift, factor) of x0 = (latent - shift) * factor: numbers, or tensors [c, 1, 1]."""
        return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor

    # Conditions

    @abstractmethod
    def encode(
        self, pipeline: Any, prompts: Sequence[str], device: torch.device, max_tokens: int | None = None
    ) -> dict[str, Tensor]:
        """{name: [prompt, ...]} of what prompts own, from a pipeline that holds tokenizers and text encoders; cut at
        `max_tokens`, where a family takes such a number."""

    def is_cut(self, pipeline: Any, prompt: str, max_tokens: int | None = None) -> bool:
        """Whether the model sees only the beginning of a prompt."""
        tokenizers = [getattr(pipeline, name) for name in self.tokenizers]
        return any(
            len(each(prompt, truncation=False, verbose=False)["input_ids"])
            > (max_tokens or self.max_tokens or each.model_max_length)
            for each in tokenizers
        )

    def check_tokens(self, max_tokens: int | None) -> None:
        """Raise UsageError for a number of tokens that a user has asked for in vain."""
        if max_tokens is None:
            return
        if self.max_tokens is None:
            raise UsageError(
                "The model has no use for this option.",
                where="--max-tokens",
                expected=f"no --max-tokens for {self.title}: its text encoders have one length",
                got=max_tokens,
                fix="leave it out",
            )
        if self.most_tokens is not None and max_tokens > self.most_tokens:
            raise UsageError(
                "The model does not take prompts that long.",
                where="--max-tokens",
                expected=f"at most {self.most_tokens}",
                got=max_tokens,
                fix=f"take {self.most_tokens} or fewer",
            )

    def of_image(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> dict[str, tuple[float, ...]]:
        """What an image owns, from its size before, the corner it was cut at, and its size now: (height, width)."""
        return {}

    @abstractmethod
    def lengths(self, config: Callable[[str], Config], max_tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        """{condition: lengths of its axes} as the configurations give them."""

    def static(self, config: Callable[[str], Config]) -> dict[str, float]:
        """What the network is told alike at every call, by name, with the value that nobody chose."""
        return {}

    def blank(
        self, config: Callable[[str], Config], images: int, size: tuple[int, int], max_tokens: int | None = None
    ) -> Condition:
        """A condition that says nothing: zeros for prompts, of one token where that counts, and whole images of that
        size (height, width).
        """
        lengths = self.lengths(config, max_tokens)
        own = self.of_image(size, (0, 0), size)
        return Condition(
            **{
                name: torch.full((images, *lengths[name]), name == "length", dtype=getattr(torch, spec.dtype))
                if spec.per == "prompt"
                else torch.tensor([own[name]]).repeat(images, 1)
                for name, spec in self.conditions.items()
            }
        )

    # The network

    @abstractmethod
    def call(
        self, network: nn.Module, x: Float[Tensor, "batch c h w"], label: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch c h w"]:
        """The network's output, of the latents' shape."""

    def bound(self, static: Mapping[str, float]) -> NetworkCall:
        """`call` with what is told alike at every call."""
        return self.call

    # LoRA

    def save_lora(self, state: State, folder: Path) -> None:
        """Write LoRA layers, by peft's names and with their scale multiplied in, as diffusers loads them."""
        self.pipeline.save_lora_weights(str(folder), **{f"{self.network}_lora_layers": state}, safe_serialization=True)

    def saved_lora(self, file: Path) -> dict[str, Tensor]:
        """The layers in a file that `save_lora` wrote, as it was given them."""
        return {name.removeprefix(f"{self.network}."): value for name, value in load_file(file).items()}

    def original(self, layer: str, network: Config) -> Original | None:
        """Where a layer of the network stands in the network as it was published, by the network's configuration; None:
        nowhere, or kohya's scripts have no name for it."""
        return numbered(self.originals, layer)

    def base_version(self, config: Callable[[str], Config], prediction: str) -> dict[str, str]:
        """What kohya's header calls the model that LoRA layers belong to."""
        return {"ss_base_model_version": self.name}

    def lora_settings(self, file: Path) -> dict[str, Any]:
        """What `load_lora` obeys beside a file's tensors. Raises ModelError if that cannot be read."""
        return adapter_metadata(file)

    def lora_names(self, pipeline: Any, file: Path) -> set[str]:
        """Names of the file's LoRA tensors after diffusers' own conversion of other projects' formats. Raises
        ValueError if that leaves one out."""
        return converted_names(file, partial(pipeline.lora_state_dict, unet_config=self.network_of(pipeline).config))

    def load_lora(self, pipeline: Any, file: Path) -> None:
        """Lay a file's LoRA layers over a pipeline; whatever the libraries raise is the caller's to tell."""
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)

    def placed_lora(self, pipeline: Any) -> set[str]:
        """Names of the LoRA tensors that a pipeline's networks hold, as `lora_names` has them."""
        return {
            f"{part}.{re.sub(r'[.]default(_0)?(?=[.])', '', name)}"
            for part in (self.network, *self.text_encoders)
            for name, _ in getattr(pipeline, part).named_parameters()
            if ".lora_" in name
        }

    # Pipelines and single files

    def network_of(self, pipeline: DiffusionPipeline) -> Any:
        """The trained component of a pipeline."""
        return getattr(pipeline, self.network)

    def drawn_size(self, pipeline: Any) -> tuple[int, int]:
        """(height, width) of the images that a pipeline makes by itself. Raises UsageError if it does not say so."""
        size = latent_sides(self.sample_size(pipeline))
        if size is None:
            raise UsageError(
                "The model does not say how large its images are.",
                where=f"{self.network}/config.json, sample_size",
                expected="a number, or two",
                got="none",
                fix="add --resolution",
            )
        height, width = (each * int(pipeline.vae_scale_factor) for each in size)
        return height, width

    def sample_size(self, pipeline: Any) -> Any:
        """Of the latents that a pipeline draws by itself, as its configuration has it."""
        return self.network_of(pipeline).config.sample_size

    def drawing(self, prompts: Sequence[str], guidance: float, max_tokens: int | None = None) -> dict[str, Any]:
        """What the pipeline is called with beside noise, steps and size. At guidance 1 prompts alone count."""
        told = {"prompt": list(prompts), "guidance_scale": guidance}
        tokens = max_tokens or self.max_tokens
        return told if tokens is None else told | {"max_sequence_length": tokens}

    def sampler(self, scheduler: Any) -> Any:
        """Deterministic DDIM on a scheduler's own table."""
        return DDIMScheduler.from_config({"clip_sample": False, **scheduler.config})

    def check_steps(self, scheduler: Any, steps: int, *, where: str) -> None:
        """Raise UsageError if a scheduler does not take so many steps; `where` they were asked for."""
        config, offset = scheduler.config, 0
        if config.get("timestep_spacing") == "leading":
            offset = int(config.get("steps_offset", 0))  # the first step would lie behind the table
        most = int(config.num_train_timesteps) - offset
        try:
            if steps > most:
                raise ValueError(steps)
            scheduler.set_timesteps(steps)
        except ValueError as error:
            raise UsageError(
                "The scheduler does not take this number of steps.",
                where=where,
                expected=f"at most {most} (the model's timesteps{', less steps_offset' if offset else ''})",
                got=steps,
                fix="take fewer, 20 or 50 for instance",
            ) from error

    def architecture(self, config: Callable[[str], Config], prediction: str) -> str:
        """What a file's header calls it, by the Stability AI model metadata standard."""
        return self.tag

    def layout(self, component: str, state: State, config: Any) -> dict[str, Tensor]:
        """A component's weights under the names that they have in a single file."""
        raise NotImplementedError

    def check_layout(self) -> None:
        """Raise ModelError for a family whose single file nobody reads."""
        raise ModelError(
            f"A model of this family has no single-file layout: {self.title}.",
            where="--single-file",
            expected="a family that programs read from one file",
            fix="use the pipeline folder",
        )
