"""LoRA weights laid over a pipeline: all of them, or none.

diffusers warns and goes on when tensors of the file have no place in the model, so weights of another model would give
images of the plain one under the name of the LoRA; here that is an error.
"""

from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from inpo.common.errors import ModelError
from inpo.common.log import note
from inpo.common.models import Model
from inpo.common.trained_over import read_over, says_over


def lora_file(location: str) -> Path:
    """The file itself, or the one file of a folder. Raises ModelError if it is not there, or no safetensors file."""
    path = Path(location)
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file() or found[0].suffix != ".safetensors":
        raise ModelError(
            "There are no LoRA weights here.",
            where=location,
            expected="one .safetensors file, or a folder with one",
            got=(", ".join(file.name for file in found) or "a folder without one") if path.exists() else "nothing",
            fix="check --lora",
        )
    try:
        with safe_open(found[0], "pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ModelError(
            "The LoRA weights are damaged, or in another format.",
            where=found[0],
            expected="a safetensors file",
            got=str(error),
            fix="save or copy them again",
        ) from None
    return found[0]


def load_lora(pipeline: DiffusionPipeline, file: Path, model: Model) -> None:
    """Lay the file's weights over the pipeline.

    Raises ModelError if they do not fit it, or if a tensor of the file or of the adapters made for it is left over.
    Layers of a run say which network they were trained over; over another one they are laid with a note.
    """
    if says_over(file.parent):
        over = read_over(file.parent, fix="copy the run's folder again, or leave that file out")
        if over != model.fingerprints["network"]:
            note(
                f"the LoRA layers in {file.parent} were trained over another network than that of {model.name}: "
                f"{over}, not {model.fingerprints['network']}"
            )
    logging = diffusers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, below
    try:
        given = model.family.lora_names(pipeline, file)
        model.family.load_lora(pipeline, file)
    except Exception as error:  # diffusers and peft raise many kinds; each means the weights do not fit
        # torch's first line only announces the mismatches that it lists.
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        raise _misfit(file, model.name, " ".join(lines[:2])[:300]) from error
    finally:
        logging.set_verbosity(verbosity)
    placed = model.family.placed_lora(pipeline)
    if len(given) != len(placed):
        leftover = sorted(given - placed) + sorted(placed - given)
        raise _misfit(
            file,
            model.name,
            f"{len(given)} LoRA tensors, of which the model takes {len(placed)}; the first of the others: "
            f"{leftover[0]}",
        )


def _misfit(file: Path, model_name: str, got: str) -> ModelError:
    return ModelError(
        "The LoRA weights do not fit the model.",
        where=file,
        expected=f"LoRA weights for {model_name}, all of which have a place in it",
        got=got,
        fix="check --lora and --model; of some families diffusers reads RUN/lora and no file with kohya's names",
    )
