"""`inpo export`: a run's pipeline as one safetensors file in the layout that other programs read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from inpo.common.denoiser import DTYPES, dtype_name
from inpo.common.durable import new_file
from inpo.common.errors import StorageError, UsageError
from inpo.common.markers import markers_for
from inpo.common.models import Model, open_model
from inpo.common.space import free_bytes, human_bytes
from inpo.train.lora import as_safetensors, make_readable, model_of, result_folder


def export_single_file(run: Path, file: Path, *, dtype: str) -> Path:
    """Write `file` from a run's output folder (its pipeline, or its LoRA merged into the model) or a pipeline folder.

    Whole or not at all. Raises UsageError if `run` holds neither, ModelError if the architecture has no such layout,
    StorageError if the disk is too small.
    """
    if file.suffix != ".safetensors":
        raise UsageError(
            "A single file is written as safetensors.",
            where="--single-file",
            expected="*.safetensors",
            got=file,
            fix=f"--single-file {as_safetensors(file)}",
        )
    number = DTYPES[dtype_name(dtype)]
    model, load = _open(run)
    model.family.check_layout()
    pipeline = load()
    weights = single_file_weights(pipeline, model)
    tensors = {name: value.detach().to(number).contiguous().clone() for name, value in weights.items()}
    markers, header = markers_for(model, title=run.resolve().name)
    needed, free = sum(value.nbytes for value in tensors.values()), free_bytes(file)
    if needed > free:
        raise StorageError(
            "The disk is too small for this file.",
            where=file,
            expected=f"{human_bytes(needed)} free",
            got=f"{human_bytes(free)} free",
            fix="free some space, or choose another --single-file; float16 takes half of float32",
        )
    with new_file(file, action="write the single file") as staged:
        save_file(tensors | markers, staged, metadata={"format": "pt"} | header)
        make_readable(staged)
    return file


def single_file_weights(pipeline: Any, model: Model) -> dict[str, Tensor]:
    """All weights of a pipeline under the names that they have in a single file."""
    tensors: dict[str, Tensor] = {}
    for component in model.networks:
        network = getattr(pipeline, component)
        tensors |= model.family.layout(component, network.state_dict(), network.config)
    return tensors


def _open(run: Path) -> tuple[Model, Callable[[], Any]]:
    result = result_folder(run)
    folder = run if result is None else result
    if (folder / "model_index.json").is_file():
        model = open_model(str(folder))
        return model, model.load_pipeline
    if result == run / "lora" and (run / "recipe.toml").is_file():
        model = model_of(run)
        return model, partial(_merged, model, run)
    raise UsageError(
        "There is nothing to export here.",
        where=run,
        expected="a finished run's output folder, or a pipeline folder",
        got=", ".join(sorted(entry.name for entry in run.iterdir())[:8]) if run.is_dir() else "no folder",
        fix="let `inpo train` finish: it writes pipeline/ or lora/ at its end",
    )


def _merged(model: Model, run: Path) -> Any:
    pipeline: Any = model.load_pipeline()
    model.family.load_lora(pipeline, run / "lora" / model.family.lora_file)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline
