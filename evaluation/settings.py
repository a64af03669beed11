"""The [evaluate] section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from inpo.common.recipe import Location, Section

SchedulerName = Literal["ddim", "own"]
DtypeName = Literal["float32", "float16", "bfloat16"]


class EvaluateSettings(Section):
    """[evaluate]: how images are generated, and by what they are scored."""

    prompts: Location | None = None
    """A text, TSV or JSON file, or a hub dataset; see evaluation/prompts.py."""
    lora: Location | None = None
    """LoRA weights in safetensors format, laid over the model."""
    seed: int = 0
    """Together with the prompt and the image's number it gives each image's own seed."""
    images_per_prompt: Annotated[int, Field(ge=1)] = 1
    inference_steps: Annotated[int, Field(ge=1)] = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    scheduler: SchedulerName = "ddim"
    """ddim: deterministic DDIM on the model's schedule. own: the scheduler in the pipeline folder."""
    dtype: DtypeName | None = None
    """None: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Images made or scored at once. None: as many as have the pixels of 8 images of 512 px, 32 at most."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """The first so many prompts; a later run without it completes the folder."""
    scorers: tuple[str, ...] = ()
    """Names of scorers, for `score` and `compare`."""
