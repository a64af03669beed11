"""What a run leaves behind: a pipeline folder or LoRA weights that diffusers loads, and a model card."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from torch import nn

from inpo.common.durable import alone_in, new_folder, storage_errors
from inpo.common.errors import UsageError
from inpo.common.fingerprint import write_taken_over
from inpo.common.log import LOG_FILE
from inpo.common.models import Model, open_model
from inpo.common.processes import processes
from inpo.common.trained_over import write_over
from inpo.train.lora import make_readable, save_kohya, scaled_lora


def check_output(output: Path, *models: Model) -> None:
    """Raise UsageError for a folder that holds something else than a run, or one of whose trained model a run is to
    be: what a run writes takes the place of what bears its names."""
    with storage_errors("look at the output folder", output):
        names = sorted(file.name for file in output.iterdir()) if output.is_dir() else []
    shown = [name for name in names if not name.startswith(".")]
    if shown and not {"checkpoints", LOG_FILE} & {*shown}:
        raise UsageError(
            "The output folder holds something that is no run.",
            where=f"--output {output}",
            expected="a new folder, an empty one, or that of a run",
            got=", ".join(shown[:5]) + (", ..." if len(shown) > 5 else ""),
            fix="choose another --output",
        )
    for model in models:
        read = [place.resolve() for place in (model.folder, model.file, model.vae_folder) if place is not None]
        for made in ("pipeline", "lora"):
            if any(place.is_relative_to((output / made).resolve()) for place in read):
                raise UsageError(
                    "The run would take the place of the model that it starts from.",
                    where=f"--output {output}",
                    got=f"the model {model.name}",
                    fix="choose another --output",
                )


@contextmanager
def claim_output(output: Path) -> Iterator[None]:
    """Make the run's folder, and keep others from writing there. Raises StorageError if that is impossible, and
    UsageError if it is a cache or another run writes there."""
    if (output / "manifest.json").is_file():
        raise UsageError(
            "The output folder is a cache.",
            where=f"--output {output}",
            expected="a folder of the run's own",
            got="manifest.json in it",
            fix="choose another --output",
        )
    with storage_errors("write the run", output):
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output, prefix="."):  # whose refusal says why; of several nodes the others may see it
            pass
    if not processes().is_main_process:
        yield
        return
    with ExitStack() as stack:
        with storage_errors("write the run", output):
            alone = stack.enter_context(alone_in(output))
        if not alone:
            raise UsageError(
                "Another run is writing here.",
                where=f"--output {output}",
                expected="a folder of the run's own",
                got="a folder that a living process has locked",
                fix="wait for that run or stop it, or choose another --output",
            )
        yield


def write_output(network: nn.Module, model: Model, output: Path, *, card: str, over: Model | None = None) -> Path:
    """Write `output`/pipeline, or of layers `over` another model's network `output`/lora and a file with kohya's names,
    whole or not at all; an older one is replaced. Returns its path.
    """
    final = output / ("lora" if over else "pipeline")
    layers = scaled_lora(network) if over else {}
    with new_folder(final, replace=True, action="write the trained model") as staged:
        if over is None:
            _save_pipeline(network, model, staged)
        else:
            # By peft's names: diffusers' older ones know the attention's layers only, and lose those among others.
            model.family.save_lora(layers, staged)
            write_over(staged, over)
        (staged / "README.md").write_text(card, encoding="utf-8")
        make_readable(*(file for file in staged.rglob("*") if file.is_file()))
    if over is not None:
        save_kohya(layers, model, output)
    return final


def _save_pipeline(network: nn.Module, model: Model, folder: Path) -> None:
    # Only here are the VAE and the text encoders read, to write them beside the trained network.
    pipeline: Any = model.load_pipeline(**{model.family.network: network})
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    written = open_model(str(folder))
    same = [each for each in written.fingerprinted if each != model.family.network]
    here = {name: written.digest_of(name) for name in same}
    write_taken_over(folder, here, {name: model.fingerprints.get(name, here[name]) for name in same})
