"""Finding a model and loading just the components a stage needs.

A model is a pipeline folder, a hub id, or one .safetensors file (common/single_file.py). What is not supported
(common/families/) is refused by name.
"""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from inpo.common import fingerprint, single_file, weight_files
from inpo.common.cache.schema import Manifest
from inpo.common.denoiser import Denoiser
from inpo.common.errors import ModelError
from inpo.common.families import FAMILIES, SUPPORTED, Family, family_of
from inpo.common.families.base import read_json
from inpo.common.levels import Levels, TimeSettings
from inpo.common.log import note
from inpo.common.markers import check_markers
from inpo.common.model_folder import find_vae, folder_of, refuse_local
from inpo.common.prediction import check_flow, check_prediction, noise_likeness
from inpo.common.processes import settle_numbers

_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "spiece.model",
)
_CHANGES_NUMBERS = ("force_zeros_for_empty_prompt",)
"""Entries of model_index.json that change what the text encoders give."""


@dataclass(frozen=True)
class Model:
    """A model found on disk. Nothing is loaded until a `load_` method is called.

    `folder` is a pipeline folder (for a single file: the one with its configuration), `file` the single file.
    """

    name: str
    folder: Path
    family: Family
    file: Path | None = None
    variant: str | None = None
    vae_folder: Path | None = None
    guessed_from: str | None = None
    """The hub model whose configurations were taken for a single file because its weights look like that."""

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return read_json(self.folder / "model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        """A component's own configuration file."""
        folder = self._component_folder(component)
        for name in ("scheduler_config.json", "config.json"):
            if (folder / name).is_file():
                return read_json(folder / name)
        raise ModelError(
            f"The model has no {component} configuration.",
            where=folder,
            expected="config.json",
            got="no such file",
            fix=f"download the model again; supported: {SUPPORTED}",
        )

    @cached_property
    def scheduler(self) -> Any:
        """The pipeline's own scheduler object."""
        name = self.index["scheduler"][1]
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise ModelError(
                "Unknown scheduler class.",
                where=self.folder / "model_index.json",
                expected="a scheduler of the installed diffusers",
                got=name,
                fix="update diffusers, or correct the name",
            )
        with weight_files.loading("scheduler", self.folder / "scheduler"):
            return cls.from_pretrained(self.folder, subfolder="scheduler")

    @property
    def scheduler_file(self) -> str:
        """The scheduler's configuration, for messages."""
        return str(self.folder / "scheduler" / "scheduler_config.json")

    @cached_property
    def levels(self) -> Levels:
        """The scheduler's own table; of a flow, times evenly spread. A cache has chosen its own."""
        return self.family.levels(self.scheduler)

    def levels_of(self, manifest: Manifest) -> Levels:
        """What this model makes of a cache's choice of times."""
        chosen = manifest.levels
        if chosen.density is None:
            return self.levels
        times = TimeSettings(density=chosen.density, shift=str(chosen.shift), network_dtype=manifest.network_dtype)
        return self.family.levels(self.scheduler, times)

    @cached_property
    def prediction(self) -> str:
        """What the network predicts (common/predictions.py)."""
        return self.family.prediction(self.scheduler)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """{component: digest of its weights and configuration}, for the cache's identity."""
        return fingerprint.as_taken_over(
            self.folder,
            {"network" if each == self.family.network else each: self.digest_of(each) for each in self.fingerprinted},
        )

    @property
    def fingerprinted(self) -> tuple[str, ...]:
        """The components that a fingerprint is taken of."""
        return ("scheduler", *self.networks, *(each for each in self.family.tokenizers if self._tokenizer_files(each)))

    def digest_of(self, component: str) -> str:
        """Of a component's files as they lie here."""
        config = self.config(component) if component not in self.family.tokenizers else {}
        if component == "scheduler":
            return fingerprint.of_config(config)
        if component in self.family.tokenizers:
            return fingerprint.of_texts(self._tokenizer_files(component))
        if component in self.family.text_encoders:
            config |= {"class": self.index[component][1]}
            config |= {name: self.index[name] for name in _CHANGES_NUMBERS if name in self.index}
        if self.file is not None and self.in_file(component):
            return fingerprint.of_weights([self.file], config=config, prefix=self.family.prefixes[component])
        return fingerprint.of_weights(self.weight_files(component), config=config)

    def _tokenizer_files(self, component: str) -> list[Path]:
        """What any version of transformers reads for these tokenizers: a configuration may name files by version."""
        folder = self.folder / component
        config = folder / "tokenizer_config.json"
        versions = read_json(config).get("fast_tokenizer_files") if config.is_file() else None
        names = {*_TOKENIZER_FILES, *(map(str, versions) if isinstance(versions, list) else ())}
        return [folder / name for name in names if (folder / name).is_file()]

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files that the libraries load for a component, of the chosen variant if it has one."""
        folder = self._component_folder(component)
        chosen = weight_files.loaded_files(folder, self._library(component), self._variant_of(component))
        if not chosen:
            found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
            raise ModelError(
                f"The model's {component} has no weights in safetensors format.",
                where=folder,
                expected=" or ".join(weight_files.weight_names(self._library(component), self.variant)),
                got=found or "none",
                fix="choose a --variant that exists" if found else "convert the weights to safetensors",
            )
        return chosen

    def _library(self, component: str) -> str:
        return str(self.index[component][0]) if component in self.index else "diffusers"

    def _variant_of(self, component: str) -> str | None:
        """The chosen variant if this component has it: its plain weights are loaded if not."""
        folder, library = self._component_folder(component), self._library(component)
        return self.variant if self.variant and weight_files.loaded_files(folder, library, self.variant) else None

    def load_network(self) -> nn.Module:
        """The trained component in float32 on the CPU. Raises ModelError if it does not predict what the scheduler
        says (common/prediction.py).
        """
        family, network = self.family, self.load_component(self.family.network)
        side, factor = family.probe_side(self.config(family.network)), family.vae_factor(self.config)
        size = (side * factor, side * factor)
        shape = (family.latent_shape(self.config, size)[0], side, side)
        if family.space == "velocity":
            check_flow(
                self.denoiser(network), lambda rows: family.blank(self.config, rows, size), shape, where=self.name
            )
            return cast(nn.Module, network)
        check_prediction(
            noise_likeness(self.denoiser(network), family.blank(self.config, 2, size), shape),
            self.levels,
            self.prediction,
            where=self.name,
            scheduler_file=self.scheduler_file,
            guessed_from=self.guessed_from,
        )
        return cast(nn.Module, network)

    def denoiser(
        self, network: nn.Module, manifest: Manifest | None = None, *, network_dtype: str = "float32"
    ) -> Denoiser:
        """A network of this model's kind, on the model's own levels, or on the tables of a cache and told what that
        cache's was told at every call. A cache says nothing of its sampler's settings: those are the model's.
        """
        levels, static = self.levels, self.family.static(self.config)
        if manifest is not None:
            levels, static = replace(manifest.levels.levels(), sampler=levels.sampler), manifest.static
        return Denoiser(network, levels, self.family.bound(static), self.prediction, network_dtype=network_dtype)

    def load_vae(self) -> Any:
        """The VAE in float32 on the CPU."""
        return self.load_component("vae")

    def load_text_pipeline(self) -> DiffusionPipeline:
        """A pipeline that holds only tokenizers and text encoders, in float32: for its own encoding of prompts."""
        return self.load_pipeline(**{self.family.network: None, "vae": None})

    def load_pipeline(self, **components: Any) -> DiffusionPipeline:
        """The whole pipeline in float32, with any component replaced (for instance the network by the trained one).

        What images of a text do not need (safety checker, feature extractor, image encoder) is left out.
        """
        if self.family.network not in components:
            components[self.family.network] = self.load_network()
        if "vae" not in components:
            components["vae"] = self.load_vae()
        for part in self.networks:
            if part not in components:
                components[part] = self.load_component(part)
        with weight_files.loading("pipeline", self.folder):  # of which tokenizers and scheduler are left
            return self.family.pipeline.from_pretrained(
                self.folder, use_safetensors=True, **self.family.unneeded, **components
            )

    @property
    def networks(self) -> tuple[str, ...]:
        """The components that have weights and are needed: the network, the VAE and the text encoders."""
        texts = (name for name in self.family.text_encoders if self.index.get(name, [None])[0] is not None)
        return (self.family.network, "vae", *texts)

    def in_file(self, component: str) -> bool:
        """Whether a component's weights are in the single file."""
        return (
            self.file is not None
            and component in self.family.prefixes
            and not (component == "vae" and self.vae_folder is not None)
        )

    def load_component(self, component: str) -> Any:
        """A network in float32 on the CPU, in eval mode. Raises ModelError, with their names, if weights are missing:
        the libraries would draw them at random, or leave them without numbers.
        """
        if self.file is not None and self.in_file(component):
            with weight_files.loading(component, self.file):
                return single_file.load_component(
                    self.file, component, self._class_of(component), folder=self.folder, family=self.family
                )
        folder = self._component_folder(component)
        variant = self._variant_of(component)
        with weight_files.loading(component, folder):
            weight_files.check_parts(folder, variant)
            network, information = self._class_of(component).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, variant=variant, output_loading_info=True
            )
            if information["missing_keys"]:
                raise single_file.missing_weights(information["missing_keys"])
        return network

    def empty_component(self, component: str) -> Any:
        """A network as its configuration has it, without numbers."""
        return single_file.empty_network(self._class_of(component), self._component_folder(component))

    def shared_component(self, component: str) -> Any:
        """As `empty_component`, one for all who ask: to be looked at, not to be changed."""
        return single_file.shared_network(self._class_of(component), self._component_folder(component))

    def _class_of(self, component: str) -> Any:
        known = {self.family.network: self.family.network_class, "vae": self.family.vae_class}
        return known.get(component) or getattr(transformers, self.index[component][1])

    def _component_folder(self, component: str) -> Path:
        return self.vae_folder if component == "vae" and self.vae_folder else self.folder / component


def open_model(
    location: str,
    *,
    variant: str | None = None,
    model_config: str | None = None,
    vae: str | None = None,
    revision: str | None = None,
) -> Model:
    """Find a model: a pipeline folder, a hub id, or one .safetensors file (`model_config` is a pipeline folder with
    its configurations; without it the hub is asked for those that its weights look like). `revision` is a hub id's
    branch, tag or commit. `vae` names a replacement VAE: its folder, or a pipeline folder with vae/ in it.

    Raises ModelError, saying what is supported, for anything else.
    """
    settle_numbers()
    _quieten()
    path = Path(location)
    if revision is not None:
        refuse_local(location, revision)
    vae_folder = None if vae is None else find_vae(vae)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(
                "A single-file model must be in safetensors format.",
                where=path,
                got=path.suffix or "no suffix",
                fix="convert it first: pickled checkpoints can run code when loaded",
            )
        guessed_from = None
        if model_config:
            folder = folder_of(model_config, variant=None)
        else:
            folder, guessed_from = single_file.fetch_configuration(path)
        family = family_of(folder)
        if not family.prefixes:
            raise ModelError(
                f"A model of this family is not read from a single file: {family.title}.",
                where=path,
                expected="a pipeline folder",
                fix="pass the pipeline's folder or hub id",
            )
        model = _checked(Model(location, folder, family, file=path, vae_folder=vae_folder, guessed_from=guessed_from))
        elsewhere = [component for component in model.networks if component not in family.prefixes]
        if guessed_from is not None and elsewhere:
            raise ModelError(
                f"Of a model of this family a file is read for its {family.network} alone.",
                where=path,
                expected=f"a pipeline that the rest comes from: {', '.join(elsewhere)}",
                got="none named",
                fix=f"--model-config with a pipeline folder or hub id, {guessed_from} for instance",
            )
        check_markers(path, model.prediction, scheduler_file=model.scheduler_file)
        if variant:
            note(f"{location} is one file, of which there are no variants: {variant} is not looked for")
        return model
    if model_config:
        note(f"{location} has its own configurations: those of {model_config} are not read")
    folder = folder_of(location, variant=variant, revision=revision)
    model = _checked(Model(location, folder, family_of(folder), variant=variant, vae_folder=vae_folder))
    if variant and not any(f".{variant}." in file.name for file in folder.glob("*/*.safetensors")):
        # No error: a recipe's variant is the base model's, and the pipelines trained from it have none.
        note(f"{location} has no {variant} weights; its plain ones are used")
    return model


def _quieten() -> None:
    """The libraries draw a bar for every component they load, and print prompts that are too long for the encoder
    whole; a run's own progress would drown in them, and it counts such prompts itself."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for family in FAMILIES.values():
        logging.getLogger(family.pipeline.__module__).setLevel(logging.ERROR)
    # Weights of float32 that are cast to float32, no layers for the text encoders: what matters is checked here.
    for name in ("diffusers.models.modeling_utils", "diffusers.loaders.peft", "diffusers.loaders.lora_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def _checked(model: Model) -> Model:
    """Refuse early, from the configuration files alone, what later equations would not hold for."""
    family = model.family
    family.check(name=model.name, folder=model.folder, index=model.index, config=model.config)
    try:
        _ = model.levels, model.prediction
    except ModelError as error:
        error.where = f"{model.name}: {error.where}"
        raise
    return model
