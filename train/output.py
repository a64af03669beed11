"""What a run leaves behind: a pipeline folder or LoRA weights that diffusers loads, and a model card."""

import errno
import os
from pathlib import Path

from torch import nn

from inpo.common.durable import new_folder, storage_errors
from inpo.common.errors import UsageError
from inpo.common.fingerprint import write_taken_over
from inpo.common.models import Model, open_model
from inpo.train.lora import make_readable, save_kohya, scaled_lora


def claim_output(output: Path) -> None:
    """Make the run's folder. Raises StorageError if that is impossible, and UsageError if it is a cache."""
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
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(output))


def write_output(network: nn.Module, model: Model, output: Path, *, card: str, lora: bool) -> Path:
    """Write `output`/pipeline (or `output`/lora, and a file with kohya's names), whole or not at all;
    an older one is replaced. Returns its path.
    """
    final = output / ("lora" if lora else "pipeline")
    # Only here are the VAE and the text encoders read, to write them beside the trained network.
    pipeline = None if lora else model.load_pipeline(**{model.family.network: network})
    layers = scaled_lora(network) if lora else {}
    with new_folder(final, replace=True, action="write the trained model") as staged:
        if pipeline is None:
            # By peft's names: diffusers' older ones know the attention's layers only, and lose those among others.
            model.family.save_lora(layers, staged)
        else:
            pipeline.save_pretrained(str(staged), safe_serialization=True)
            written = open_model(str(staged))
            same = [each for each in written.fingerprinted if each != model.family.network]
            here = {name: written.digest_of(name) for name in same}
            write_taken_over(staged, here, {name: model.fingerprints.get(name, here[name]) for name in same})
        (staged / "README.md").write_text(card, encoding="utf-8")
        make_readable(*(file for file in staged.rglob("*") if file.is_file()))
    if lora:
        save_kohya(layers, model, output)
    return final
