"""LoRA weights as files: beside a run's result, and by `inpo export --lora` in the format that a program reads."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from inpo.common.choices import LoraFormat
from inpo.common.denoiser import DTYPES, dtype_name
from inpo.common.durable import new_file, new_folder
from inpo.common.errors import ModelError, UsageError
from inpo.common.families.lora import kohya_state, layers_of, save_adapter
from inpo.common.markers import markers_for
from inpo.common.models import Model, open_model
from inpo.common.recipe import ModelSection, read_recipe, resolve
from inpo.common.trained_over import read_over

KOHYA_FILE = "lora-kohya.safetensors"
"""In a run's folder, beside lora/."""


def result_folder(run: Path) -> Path | None:
    """What a run has written, pipeline/ or lora/: the one that its recipe says, since an earlier run may have left the
    other; None: it is not there."""
    recipe = run / "recipe.toml"
    train = read_recipe(recipe).get("train", {}) if recipe.is_file() else {}
    names = ["pipeline", "lora"] if "lora_rank" not in train else ["lora" if train["lora_rank"] else "pipeline"]
    return next((run / name for name in names if (run / name).is_dir()), None)


def make_readable(*files: Path) -> None:
    """Permissions as any new file has them: safetensors writes files that nobody else may read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


def as_safetensors(target: Path) -> Path:
    """The place with that ending, for advice; of a folder a file in it."""
    if target.is_dir():
        return target / "model.safetensors"
    return target.with_suffix(".safetensors")


def scaled_lora(network: Any) -> dict[str, Tensor]:
    """The LoRA layers by peft's names, alpha / rank multiplied into their up weights.

    A file has no place for alpha that every loader reads, and without one all of them take the rank for it.
    """
    (adapter,) = network.peft_config
    config = network.peft_config[adapter]
    factor = config.lora_alpha / config.r
    return {
        name: value * factor if ".lora_B." in name else value
        for name, value in get_peft_model_state_dict(network, adapter_name=adapter).items()
    }


def save_kohya(state: Mapping[str, Tensor], model: Model, output: Path) -> None:
    """Write a run's LoRA layers as a file for programs that read kohya's names, where every layer has one."""
    network, file = model.config(model.family.network), output / KOHYA_FILE
    if all(model.family.original(layer, network) for layer in layers_of(state)):
        with new_file(file, action="write the LoRA weights") as staged:
            write_lora(state, model, staged, form="kohya", title=output.resolve().name)
    else:
        file.unlink(missing_ok=True)  # an older run's


def export_lora(run: Path, target: Path, *, form: LoraFormat, dtype: str) -> Path:
    """Write a run's LoRA layers to `target`: a .safetensors file; for peft a new folder.

    Raises UsageError if `run` holds none or `target` has another kind of name, and ModelError if the model's family has
    no names in that format.
    """
    if (target.suffix == ".safetensors") != (form != "peft"):
        expected = "a folder" if form == "peft" else "*.safetensors"
        raise UsageError(
            f"LoRA layers in {form} format are written to another kind of place.",
            where="--lora",
            expected=expected,
            got=target,
            fix=f"--lora {target.with_suffix('') if form == 'peft' else as_safetensors(target)}",
        )
    model = model_of(run)
    number = DTYPES[dtype_name(dtype)]
    try:
        saved = model.family.saved_lora(run / "lora" / model.family.lora_file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            "The run's LoRA weights cannot be read.", where=run / "lora", got=str(error), fix="train again"
        ) from None
    if form == "diffusers" and model.family.lora_file != "pytorch_lora_weights.safetensors":
        raise ModelError(
            "diffusers has no LoRA loader for this family.",
            where=run,
            expected="a family whose pipeline has load_lora_weights",
            got=model.family.title,
            fix="--format peft, for PeftModel.from_pretrained",
        )
    state = {name: value.to(number) for name, value in saved.items()}
    if form == "peft":
        with new_folder(target, action="write the LoRA weights") as folder:
            save_adapter(state, folder)
            make_readable(*folder.iterdir())
        return target
    with new_file(target, action="write the LoRA weights") as staged:
        write_lora(state, model, staged, form=form, title=run.resolve().name)
    return target


def write_lora(
    state: Mapping[str, Tensor], model: Model, file: Path, *, form: Literal["kohya", "diffusers"], title: str
) -> None:
    """Write layers by peft's names, their scale multiplied in, as one file that says what it is for."""
    _, header = markers_for(model, title=title, lora=True)
    network = model.config(model.family.network)
    rank = len(state[f"{layers_of(state)[0]}.lora_A.weight"])
    header |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if form == "kohya":
        tensors = kohya_state(state, lambda layer: model.family.original(layer, network))
    else:
        tensors = {f"{model.family.network}.{name}": value for name, value in state.items()}
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"} | header)
    make_readable(file)


def model_of(run: Path) -> Model:
    """The model that a run's LoRA layers belong to: what was trained, the reference or that of --init-from.

    Raises UsageError if the folder is not that of a finished LoRA run, and ModelError if another model lies where the
    run's recipe says.
    """
    if result_folder(run) != run / "lora" or not (run / "recipe.toml").is_file():
        raise UsageError(
            "There are no LoRA layers here.",
            where=run,
            expected="the output folder of a finished run with --lora-rank",
            got=", ".join(sorted(entry.name for entry in run.iterdir())[:8]) if run.is_dir() else "no folder",
            fix="name the run's folder; a full pipeline is exported with --single-file",
        )
    sections = read_recipe(run / "recipe.toml")
    start = sections.get("train", {}).get("init_from")
    model = open_model(start) if start else resolve(ModelSection, "model", sections, {}).open()
    wanted = read_over(run / "lora", fix="export from the folder as the run left it, or train again")
    if model.fingerprints["network"] != wanted:
        raise ModelError(
            "The LoRA layers were trained over other weights than lie here.",
            where=f"{model.name}, which {run / 'recipe.toml'} names",
            expected=f"network {wanted}",
            got=f"network {model.fingerprints['network']}",
            fix="run where the recipe's path leads to the model that was trained, or bring it back",
        )
    return model
