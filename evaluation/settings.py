"""The [evaluate] section of a recipe."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from inpo.common.choices import CompileName, DtypeName
from inpo.common.recipe import Location, Section
from inpo.common.sizes import ImageSize, sides

SchedulerName = Literal["ddim", "own"]
CombineName = Literal["vote", "mean"]


class EvaluateSettings(Section):
    """[evaluate]: how images are generated, and by what they are scored."""

    panels: ClassVar = {"prompts": "Images", "controlnet": "Images that follow given ones"}
    most_used: ClassVar = frozenset(
        {"prompts", "lora", "seed", "images_per_prompt", "inference_steps", "guidance", "resolution"}
    )

    prompts: Location | None = None
    """Text file with one prompt a line, .tsv with a Prompt column (Parti-Prompts), .json list (HPDv2), or a hub
    dataset as OWNER/NAME[:SPLIT[:COLUMN]]."""
    lora: Location | None = None
    """LoRA weights in safetensors format, laid over the model."""
    seed: int = 0
    """Together with the prompt and the image's number it gives each image's own seed: equal seeds, equal noise."""
    images_per_prompt: int = Field(1, ge=1)
    """Images for each prompt."""
    inference_steps: int = Field(50, ge=1)
    """Denoising steps."""
    guidance: float = Field(7.5, ge=0)
    """Guidance scale, 1 is none; where a network has guidance built in, what it is told."""
    resolution: ImageSize | None = None
    """Size of the images in pixels: N for squares, or HEIGHTxWIDTH; unset: the model's own."""
    max_tokens: int | None = Field(None, ge=1, le=1 << 16)
    """Tokens that a prompt is cut at and padded to, as in the cache; unset: the model's own number."""
    scheduler: SchedulerName = "ddim"
    """ddim: deterministic DDIM on the model's schedule; own: the scheduler in the pipeline folder."""
    dtype: DtypeName | None = None
    """Network dtype; unset: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: int | None = Field(None, ge=1)
    """Images made or scored at once, which changes no noise; unset: 32, of large images as many as have the pixels of
    8 images of 512 px."""
    compile: CompileName = "auto"
    """What of the network is compiled: its repeated blocks, the whole, or nothing; auto: blocks on a GPU, where the
    work ahead is long enough to pay."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many prompts, a later run without it completes the folder; unset: all."""
    scorers: tuple[str, ...] = ()
    """Scorer by name; repeatable. Ours: pickscore, hpsv2, hpsv21, clip, aesthetic, imagereward, toyworld-oracle,
    toyworld-heldout; others come from installed packages."""

    controlnet: Location | None = None
    """ControlNet through which control images steer the model: a folder or hub id."""
    control_images: Location | None = None
    """Folder with images.jsonl, a line {"prompt", "file"} for each control image, a depth map for instance; its
    prompts are taken if no others are given."""
    control_scale: float | None = Field(None, ge=0)
    """How much the ControlNet counts; unset: 1. The paper has 0.5."""
    inpaint: Location | None = None
    """Folder with images.jsonl, a line {"prompt", "file", "mask"} for each image of which the mask's white is painted
    anew; its prompts are taken if no others are given."""
    inpaint_strength: float | None = Field(None, gt=0, le=1)
    """How much noise the image gets; unset: 1. The paper has 0.85."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None: the model's own."""
        return None if self.resolution is None else sides(self.resolution)

    @field_validator("scorers")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))
