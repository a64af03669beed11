"""[sample]: how a model makes images, which of them are compared, what is stored. [round]: again and again."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from inpo.common.choices import MAX_TIMESTEPS, PairsFrom
from inpo.common.recipe import LocalPath, Location, Section
from inpo.precompute.settings import PrecomputeSettings

MOST_PER_PROMPT = 16
_TAKEN = (
    "timesteps_per_pair",
    "caption_dropout",
    "timestep_range",
    "levels",
    "shift",
    "embedded_guidance",
    "max_tokens",
    "profile",
    "resolution",
    "dtype",
    "seed",
    "batch_size",
    "compile",
    "engine",
    "limit",
)
"""What means here what it means for precompute."""
_OWN = ("prompts", "per_prompt", "scorer", "pairs_from", "gap", "grid_points", "guidance")


class SampleSettings(PrecomputeSettings):
    """What makes the images and the cache what they are, and how the work is done, which leaves them unchanged."""

    panels: ClassVar = {"grid_points": "Images", "profile": "What is stored", "batch_size": "Work"}
    recipe_only: ClassVar = frozenset(PrecomputeSettings.model_fields) - {*_TAKEN, *_OWN}

    inverter: Literal["recorded"] = "recorded"  # type: ignore[assignment]
    """Nothing is inverted."""
    grid_points: int = Field(50, ge=1, le=MAX_TIMESTEPS, alias="inference_steps")
    """n: points of a group's grid, on which the sampler steps; it makes one call more, at the noisy end."""
    guidance: float = Field(7.5, ge=0.0, le=1e6)
    """Of the sampler: 1 is the caption alone, 0 the empty prompt. Records are of the caption alone."""
    caption_dropout: float = Field(0.0, ge=0.0, le=1.0)
    """Share of the prompts whose records are made, and trained, under the empty prompt; the images are not."""
    group: Literal["list"] = "list"
    """A prompt's images share their grid."""
    decode_workers: Literal[0] = 0
    """Nothing is read."""
    measure_inversion: float = Field(0.0, ge=0.0, le=0.0)
    """There is no round trip."""
    limit: int | None = Field(None, ge=1)
    """Stop after the shards that hold the first N prompts; unset: all."""

    prompts: Location | None = None
    """Text file with one prompt a line, .tsv with a Prompt column (Parti-Prompts), .json list (HPDv2), or a hub
    dataset as OWNER/NAME[:SPLIT[:COLUMN]]."""
    per_prompt: int = Field(2, ge=2, le=MOST_PER_PROMPT)
    """Images for each prompt."""
    scorer: str | None = None
    """What ranks them, by name, as in `inpo evaluate score`."""
    pairs_from: PairsFrom = "all"
    """What of a prompt's images is compared: every two, neighbours in the order of their scores, or its two ends."""
    gap: float = Field(0.0, ge=0.0)
    """Two images whose scores differ by no more are no pair."""

    @model_validator(mode="after")
    def _only_what_is_of_use(self) -> "SampleSettings":
        for name in self.recipe_only:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not a setting of sample")
        return self

    def without_effect(self) -> dict[str, str]:
        one_pair = {"pairs_from": "--per-prompt above 2"} if self.per_prompt == 2 else {}
        return super().without_effect() | one_pair

    @property
    def pairs_per_prompt(self) -> int:
        """As many as there are at most."""
        n = self.per_prompt
        return {"all": n * (n - 1) // 2, "adjacent": n - 1, "best-worst": 1}[self.pairs_from]

    @property
    def calls_per_image(self) -> float:
        """Network calls for each image that stands in a pair."""
        branches = 1 if self.guidance in (0.0, 1.0) else 2
        return float(branches * (self.grid_points + 1) + self.timesteps_per_pair)


class RoundSettings(Section):
    """[round]: how often, and from what to what."""

    panels: ClassVar = {"output": "Rounds"}

    output: LocalPath | None = None
    """Folder of the rounds."""
    rounds: int = Field(3, ge=1, le=1000)
    """How many; more than there are goes on."""
    reference: Literal["moving", "first"] = "moving"
    """Whose errors the loss compares with: the model that a round begins with, or the very first one."""
    points: Literal["sample", "refresh"] = "sample"
    """Where a round's points come from: new samples of the model that it begins with, or the first round's samples,
    inverted by that model."""
    prompts_per_round: int | None = Field(None, ge=1)
    """Each round samples so many of the prompts, going on where the one before stopped; unset: all of them."""
