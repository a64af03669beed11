"""[train]: every setting of the second stage."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from inpo.common.choices import BatchSize, CompileName, NetworkDtypeName
from inpo.common.recipe import LocalPath, Location, Section

ObjectiveName = Literal[
    "inpo",
    "dpo",
    "ipo",
    "hinge",
    "kto",
    "sft",
    "smpo",
    "mapo",
    "inversion_dpo",
    "poly",
    "bdpo",
    "snpo",
    "linear",
    "capo",
    "dmpo",
    "listwise",
    "lair",
]
LossSpace = Literal["own", "noise", "v"]
TrackerName = Literal[
    "tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "none"
]
ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class TrainSettings(Section):
    """What is optimised, how, and what is written."""

    panels: ClassVar = {
        "output": "Run",
        "objective": "Objective",
        "learning_rate": "Optimisation",
        "dtype": "Network",
        "gradient_checkpointing": "Memory and speed",
        "lora_rank": "LoRA",
        "labels": "Pairs",
        "evaluate_every": "While it runs",
    }
    most_used: ClassVar = frozenset(
        {"output", "caches", "objective", "beta", "learning_rate", "steps", "batch_size", "accumulate"}
        | {"gradient_checkpointing", "lora_rank", "sample_every", "tracker"}
    )

    output: LocalPath | None = None
    """Folder of the run."""
    caches: tuple[Location, ...] = ()
    """Cache to train on; repeatable: several are trained on together."""
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    """Seed of the order and of new weights."""

    objective: ObjectiveName = "inpo"
    """The loss."""
    beta: float | None = Field(None, gt=0)
    """Strength of the reference. diffusers' DPO has no 1/2: double its beta here; unset: inpo 2000 (InPO, for SD1.5),
    dpo 2000 (ours; released launchers 5000), ipo 0.05 and hinge 1000 (ours; diffusers' example 5000), kto 1000
    (Diffusion-KTO's script), smpo 2000 (SmPO's launcher), mapo 1000 (MaPO's code), inversion_dpo 100 (ours, as the loss
    is), linear 100 (Linear-DPO's script), dmpo 2000 (Diffusion-SDPO's script), all others 2000 (ours: inpo's)."""
    parameter: float | None = None
    """The objective's own number beside beta; unset: poly's alpha 8, lambda of bdpo and snpo 0.9, linear's eta 0.001,
    dmpo's alpha 0.01, lair's lambda 0.5, kto's share of wins 0.5, smpo's gamma 10, mapo's weight 0.1."""
    sdpo: float | None = Field(None, ge=0, le=1)
    """Diffusion-SDPO's mu: the lose side's gradient is scaled so that the win's error cannot rise to first order, while
    the objective lowers it at all (ipo, capo and dmpo pull back beyond their aim); more is stricter; unset: off."""
    loss_space: LossSpace = "own"
    """What errors are of in the loss. own: what the network predicts, as the released codes of KTO, MaPO and diffusers
    have it; v: by 1 / abar more than noise, and of a flow its velocity."""
    timestep_range: tuple[int, int] | None = None
    """Only records whose timesteps lie in [LOW, HIGH); unset: all."""

    learning_rate: float = Field(1e-5, gt=0)
    """Effective: nothing scales it."""
    steps: int = Field(400, ge=1)
    """Optimiser steps."""
    batch_size: BatchSize = 8
    """Records (pairs, of list objectives lists, at one timestep) per micro-batch and process; auto: the largest power
    of two that every device takes."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step."""
    optimizer: Literal["adamw", "adafactor", "adamw8bit"] = "adamw"
    """adamw8bit needs bitsandbytes."""
    weight_decay: float = Field(1e-2, ge=0)
    """Share of the learning rate by which weights shrink each step."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay of the gradient's and of its square's moving average."""
    adam_eps: float = Field(1e-8, ge=0)
    """Adam's epsilon."""
    schedule: ScheduleName = "constant_with_warmup"
    """Learning-rate schedule, by diffusers' name."""
    warmup_steps: int = Field(0, ge=0)
    """Warm-up in optimiser steps."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Largest decay of the weights' moving average, which is then what is written; 0: none. At step s it is at most
    s / (9 + s), as in diffusers: 0.98 at step 400, 0.999 from step 9000."""

    dtype: NetworkDtypeName | None = None
    """Network dtype, which must be the cache's: the stored reference errors belong to it."""
    init_from: Location | None = None
    """Start from another model's network than the cache's reference; unset: from the reference."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    compile: CompileName = "auto"
    """What of the network is compiled: its repeated blocks, the whole, or nothing; auto: blocks on a GPU, where the
    work ahead is long enough to pay."""
    lora_rank: int = Field(0, ge=0)
    """Rank of the LoRA layers; 0: full fine-tuning."""
    lora_alpha: float | None = Field(None, gt=0)
    """Scale of the LoRA layers is alpha / rank; unset: the rank."""
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get LoRA layers; repeatable; unset: the projections of the attention."""

    labels: str | None = None
    """A label set made by `inpo relabel` (for smpo: at SmPO's temperature); unset: the labels of the pair source."""
    swap_labels: bool = False
    """Prefer what the labels do not: the negative model of Diffusion-NPO."""
    score_temperature: float = Field(1.0, gt=0)
    """Unit of the source's own scores, for capo and lair; a label set has its own."""
    only: LocalPath | None = None
    """File of pair ids to train on; unset: all."""
    except_: LocalPath | None = Field(None, alias="except")
    """File of pair ids to leave out."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Share of the prompts whose pairs are never trained on."""
    held_out_records: int = Field(256, ge=1)
    """Most held-out records per evaluation."""
    window_shards: int = Field(4, ge=1)
    """Shards whose records are shuffled together; two windows are in memory."""

    evaluate_every: int = Field(50, ge=1)
    """Steps between held-out evaluations."""
    overfitting: Literal["warn", "stop", "ignore"] = "warn"
    """What to do when the held-out accuracy has turned: three evaluations in a row below the best by its standard
    error."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl."""
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints to keep."""
    check_finite: bool = True
    """Stop when a loss, held out or not, or the gradient is not finite; the last good checkpoint stays."""
    tracker: TrackerName = "tensorboard"
    """Where curves go beside metrics.jsonl: one of accelerate's trackers, each of which needs its package."""
    project: str | None = None
    """Project, or experiment, of the tracker; unset: inpo, of W&B WANDB_PROJECT before that."""
    run_name: str | None = None
    """Name of the run at the tracker; unset: the output folder's."""
    push_to_hub: str | None = None
    """Repository OWNER/NAME that the result goes to in the end, as by `inpo push`; asked for at the start."""
    push_private: bool = False
    """That repository is one that others cannot read."""
    sample_every: int = Field(0, ge=0)
    """Steps between sample images; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompt of a sample image, in place of the cache's first four; repeatable."""
    sample_steps: int = Field(20, ge=1)
    """Denoising steps of a sample image."""
    sample_guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale of a sample image."""

    def without_effect(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for needed, has_use, names in (
            ("--lora-rank above 0: LoRA layers", self.lora_rank, ("lora_alpha", "lora_targets")),
            ("--sample-every above 0", self.sample_every, ("sample_prompts", "sample_steps", "sample_guidance")),
            ("--held-out above 0", self.held_out, ("held_out_records", "evaluate_every", "overfitting")),
            ("--optimizer adamw or adamw8bit", self.optimizer != "adafactor", ("adam_betas", "adam_eps")),
            ("a --schedule that warms up", self.schedule != "constant", ("warmup_steps",)),
            ("--push-to-hub", self.push_to_hub, ("push_private",)),
            ("a --tracker", self.tracker != "none", ("project", "run_name")),
            ("no --labels: a label set has its own unit", self.labels is None, ("score_temperature",)),
        ):
            if not has_use:
                found |= dict.fromkeys(names, needed)
        return found

    @field_validator("timestep_range")
    @classmethod
    def _ascending(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError("0 <= LOW < HIGH")
        return value

    @field_validator("adam_betas")
    @classmethod
    def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= each < 1 for each in value):
            raise ValueError("both lie in [0, 1)")
        return value
