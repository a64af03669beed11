"""Which files of a component's folder the libraries load as its weights, and what they raise as an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inpo.common.errors import ModelError
from inpo.common.families.base import read_json


def weight_names(library: str, variant: str | None) -> list[str]:
    """Names of a component's weights, or of the list of their parts, in the order in which its library looks."""
    tag = f".{variant}" if variant else ""
    if library == "transformers":
        return [f"model{tag}.safetensors", f"model.safetensors.index{tag}.json"]
    stem = "diffusion_pytorch_model"
    indexes = [f"{stem}.safetensors.index{tag}.json", f"{stem}.safetensors{tag}.index.json"]
    return [*dict.fromkeys(indexes), f"{stem}{tag}.safetensors"]


def loaded_files(folder: Path, library: str, variant: str | None) -> list[Path]:
    """The files that `from_pretrained` of this library loads from a folder; [] if it finds none.

    Raises ModelError for a list of parts that cannot be read, and for what would be loaded beside the weights.
    """
    names = weight_names(library, variant)
    if library == "transformers":
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                "An adapter lies beside a text encoder's weights, and would be loaded into them.",
                where=folder / "adapter_config.json",
                expected="the text encoder alone",
                fix="merge the adapter into the weights, or move it away",
            )
        explicit = read_json(folder / "config.json").get("transformers_weights")
        names = [str(explicit)] if explicit else names
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None or found.suffix == ".safetensors":
        return [] if found is None else [found]
    parts = read_json(found).get("weight_map")
    if not isinstance(parts, dict) or any(Path(str(part)).name != part for part in parts.values()):
        raise ModelError(
            "The list of a model's weight files cannot be used.",
            where=found,
            expected="weight_map: the name of a file beside it for each tensor",
            fix="download the file again",
        )
    return [folder / part for part in sorted(set(parts.values()))]


def check_parts(folder: Path, variant: str | None) -> None:
    """Raise ValueError, with their names, if files that a sharded component's index lists are not there."""
    for index in folder.glob("*.safetensors.index*.json"):
        if (f".{variant}." in index.name) == (variant is not None):
            lost = sorted(
                name for name in set(read_json(index)["weight_map"].values()) if not (folder / name).is_file()
            )
            if lost:
                raise ValueError(f"{len(lost)} files of {index.name} are missing: {', '.join(lost[:3])}")


@contextmanager
def loading(what: str, where: Path) -> Iterator[None]:
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
