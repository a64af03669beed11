"""Finding a model and loading just the components a stage needs.

A model is a pipeline folder, a hub id, or one .safetensors file (common/single_file.py). What is not supported
(common/families/) is refused by name.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from inpo.common import fingerprint, single_file
from inpo.common.denoiser import Denoiser
from inpo.common.documents import read_json
from inpo.common.errors import ModelError
from inpo.common.families import BY_PIPELINE, SUPPORTED, Family
from inpo.common.levels import Levels
from inpo.common.prediction import check_prediction, noise_likeness

_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")


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
        folder = self.vae_folder if component == "vae" and self.vae_folder else self.folder / component
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
        with _loading("scheduler", self.folder / "scheduler"):
            return cls.from_pretrained(self.folder, subfolder="scheduler")

    @cached_property
    def levels(self) -> Levels:
        return self.family.levels(self.scheduler)

    @cached_property
    def prediction(self) -> str:
        """What the network predicts (common/predictions.py)."""
        return self.family.prediction(self.scheduler)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """{component: digest of its weights and configuration}, for the cache's identity."""
        prints = {"scheduler": fingerprint.of_config(self.config("scheduler"))}
        family = self.family
        for component in (family.network, "vae", *family.text_encoders):
            if component in self.index and self.index[component][0] is not None:
                prints["network" if component == family.network else component] = self._fingerprint(component)
        for component in family.tokenizers:
            files = [file for file in (self.folder / component).glob("*") if file.name in _TOKENIZER_FILES]
            if files:
                prints[component] = fingerprint.of_files(files)
        return prints

    def _fingerprint(self, component: str) -> str:
        config = self.config(component)
        if self.file is not None and not (component == "vae" and self.vae_folder):
            return fingerprint.of_files([self.file], config=config, prefix=self.family.prefixes[component])
        return fingerprint.of_files(self.weight_files(component), config=config)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, of the chosen variant if it has one."""
        folder = self.vae_folder if component == "vae" and self.vae_folder else self.folder / component
        files = sorted(folder.glob("*.safetensors"))
        tagged = [file for file in files if self.variant and f".{self.variant}" in file.name]
        plain = [file for file in files if not _is_variant(file)]
        chosen = tagged or plain
        if not chosen:
            raise ModelError(
                f"The model's {component} has no weights in safetensors format.",
                where=folder,
                expected=f"*.{self.variant}.safetensors" if self.variant else "*.safetensors",
                got=", ".join(file.name for file in files) or "none",
                fix="choose a --variant that exists" if files else "convert the weights to safetensors",
            )
        return chosen

    def _has_variant(self, folder: Path) -> str | None:
        if self.variant and any(f".{self.variant}" in file.name for file in folder.glob("*")):
            return self.variant
        return None

    def load_network(self) -> nn.Module:
        """The trained component in float32 on the CPU. Raises ModelError if it does not predict what the scheduler
        says (common/prediction.py).
        """
        part, family = self.family.network, self.family
        with _loading(part, self.file or self.folder / part):
            network = self._load(part, family.network_class, self.folder / part, in_file=self.file is not None)
        side, factor = family.probe_side(self.config(part)), family.vae_factor(self.config)
        shape = (int(self.config("vae")["latent_channels"]), side, side)
        check_prediction(
            noise_likeness(self.denoiser(network), family.blank(self.config, 2, side * factor), shape),
            self.levels,
            self.prediction,
            where=self.name,
            scheduler_file=str(self.folder / "scheduler" / "scheduler_config.json"),
            guessed_from=self.guessed_from,
        )
        return cast(nn.Module, network)

    def denoiser(self, network: nn.Module, levels: Levels | None = None, *, network_dtype: str = "float32") -> Denoiser:
        """A network of this model's kind, on the model's own levels or on a cache's."""
        return Denoiser(network, levels or self.levels, self.family.call, self.prediction, network_dtype=network_dtype)

    def _load(self, component: str, cls: Any, folder: Path, *, in_file: bool) -> Any:
        if in_file:
            return cls.from_single_file(
                str(self.file), config=str(self.folder), subfolder=component, dtype=torch.float32
            )
        return _whole(
            cls.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                variant=self._has_variant(folder),
                output_loading_info=True,
            )
        )

    def load_vae(self) -> Any:
        """The VAE in float32 on the CPU."""
        folder = self.vae_folder or self.folder / "vae"
        with _loading("vae", self.vae_folder or self.file or folder):
            in_file = self.file is not None and self.vae_folder is None
            return self._load("vae", self.family.vae_class, folder, in_file=in_file)

    def load_text_pipeline(self) -> DiffusionPipeline:
        """A pipeline that holds only tokenizers and text encoders, in float32: for `encode_prompt`."""
        return self._load_pipeline(**{self.family.network: None, "vae": None})

    def load_pipeline(self, **components: Any) -> DiffusionPipeline:
        """The whole pipeline in float32, with any component replaced (for instance unet=the trained one)."""
        if self.family.network not in components:
            components[self.family.network] = self.load_network()
        if self.vae_folder is not None and "vae" not in components:
            components["vae"] = self.load_vae()
        return self._load_pipeline(**components)

    def _load_pipeline(self, **components: Any) -> DiffusionPipeline:
        components |= self.family.unneeded
        cls = self.family.pipeline
        with _loading("pipeline", self.file or self.folder):
            if self.file is not None:
                return cls.from_single_file(str(self.file), config=str(self.folder), dtype=torch.float32, **components)
            components = self._text_encoders() | components
            parts = (self.family.network, "text_encoder", "vae")
            any_variant = any(self._has_variant(self.folder / part) for part in parts)
            return cls.from_pretrained(
                self.folder,
                dtype=torch.float32,
                use_safetensors=True,
                variant=self.variant if any_variant else None,
                **components,
            )

    def _text_encoders(self) -> dict[str, transformers.PreTrainedModel]:
        """Loaded here because the pipeline would load them without telling which weights are missing."""
        encoders = {}
        for part in self.family.text_encoders:
            library, name = self.index.get(part, (None, None))
            if library == "transformers":
                folder = self.folder / part
                with _loading(part, folder):
                    encoders[part] = _whole(
                        getattr(transformers, name).from_pretrained(
                            folder,
                            dtype=torch.float32,
                            use_safetensors=True,
                            variant=self._has_variant(folder),
                            output_loading_info=True,
                        )
                    )
        return encoders


_Loaded = TypeVar("_Loaded")


def _whole(loaded: tuple[_Loaded, dict[str, Any]]) -> _Loaded:
    """The model. Raises ValueError if its files lack a weight: diffusers would draw it at random and go on."""
    model, information = loaded
    missing = sorted(information["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights are missing: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")
    return model


@contextmanager
def _loading(what: str, where: Path) -> Iterator[None]:
    """Whatever the libraries raise for files that are damaged or do not fit becomes one ModelError."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError, KeyError, SafetensorError, ...
        lines = str(error).strip().splitlines()
        raise ModelError(
            f"The model's {what} cannot be loaded.",
            where=where,
            expected="whole files, weights that fit their configuration",
            got=(lines[0] if lines else type(error).__name__)[:200],
            fix="download or convert the model again; it should load with diffusers' own DiffusionPipeline",
        ) from error


def _is_variant(file: Path) -> bool:
    """True for names like diffusion_pytorch_model.fp16.safetensors."""
    return len(file.name.split(".")) > 2 and "-of-" not in file.name.split(".")[-2]


def open_model(
    location: str, *, variant: str | None = None, model_config: str | None = None, vae: str | None = None
) -> Model:
    """Find a model: a pipeline folder, a hub id, or one .safetensors file (`model_config` is a pipeline folder with
    its configurations; without it the hub is asked for those that its weights look like). `vae` names a replacement
    VAE: its folder, or a pipeline folder with vae/ in it.

    Raises ModelError, saying what is supported, for anything else.
    """
    _quiet_loading()
    path = Path(location)
    vae_folder = None if vae is None else _vae_folder(vae)
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
            folder = _folder_of(model_config, variant=None)
        else:
            folder, guessed_from = single_file.fetch_configuration(path)
        family = _family_of(folder)
        if not family.prefixes:
            raise ModelError(
                f"A model of this family is not read from a single file: {family.title}.",
                where=path,
                expected="a pipeline folder",
                fix="pass the pipeline's folder or hub id",
            )
        return _checked(Model(location, folder, family, file=path, vae_folder=vae_folder, guessed_from=guessed_from))
    folder = _folder_of(location, variant=variant)
    model = _checked(Model(location, folder, _family_of(folder), variant=variant, vae_folder=vae_folder))
    if variant and not any(f".{variant}." in file.name for file in folder.glob("*/*.safetensors")):
        # No error: a recipe's variant is the base model's, and the pipelines trained from it have none.
        print(f"note: {location} has no {variant} weights; its plain ones are used", file=sys.stderr)
    return model


def _family_of(folder: Path) -> Family:
    """By the pipeline's class in model_index.json. Raises ModelError if there is none, or another one."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            "This folder is no diffusers pipeline.",
            where=folder,
            expected="model_index.json",
            got=", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder",
            fix="pass the pipeline's folder, not one of its components; a .safetensors file works with --model-config",
        )
    name = read_json(index_file).get("_class_name", "?")
    if name not in BY_PIPELINE:
        raise ModelError(
            f"A model of class {name} is not supported.",
            where=folder,
            expected=SUPPORTED,
            got=name,
            fix="inpainting, pixel-space and flow-matching models have other inputs or other equations",
        )
    return BY_PIPELINE[name]


def _quiet_loading() -> None:
    """The libraries draw a bar for every component they load; a run's own progress would drown in them."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _folder_of(location: str, *, variant: str | None) -> Path:
    path = Path(location)
    if path.is_dir():
        return path
    if path.exists() or location.startswith(("/", ".", "~")) or location.count("/") != 1:
        raise ModelError(
            "There is no model here.",
            where=location,
            expected="a pipeline folder, a hub id like owner/name, or a .safetensors file",
            got="a file" if path.exists() else "nothing",
            fix="check the path",
        )
    tag = f".{variant}" if variant else ""
    # Whole, or in numbered parts; of one variant; the last pattern is a repository that is a VAE alone.
    stems = ("*/model", "*/diffusion_pytorch_model", "diffusion_pytorch_model")
    weights = [f"{stem}{tag}{part}.safetensors" for stem in stems for part in ("", "-*-of-*")]
    try:
        return Path(
            snapshot_download(
                location, allow_patterns=["*.json", "*/*.json", "*/*.txt", *weights], ignore_patterns="safety_checker/*"
            )
        )
    except Exception as error:  # the hub client raises many kinds; each means the model could not be fetched
        raise ModelError(
            "The model is no local folder, and could not be fetched from the hub.",
            where=location,
            got=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
            fix="check the name, the network and HF_HUB_OFFLINE, or download it and pass the folder",
        ) from error


def _vae_folder(location: str) -> Path:
    path = Path(location) if Path(location).is_dir() else _folder_of(location, variant=None)
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return folder
    raise ModelError(
        "There is no VAE here.",
        where=location,
        expected="config.json and *.safetensors, there or in vae/",
        got=", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder",
        fix="check --vae",
    )


def _checked(model: Model) -> Model:
    """Refuse early, from the configuration files alone, what later equations would not hold for."""
    family = model.family
    family.check(
        name=model.name,
        folder=model.folder,
        index=model.index,
        network=model.config(family.network),
        vae=model.config("vae"),
    )
    try:
        _ = model.levels, model.prediction
    except ModelError as error:
        error.where = f"{model.name}: {error.where}"
        raise
    return model
