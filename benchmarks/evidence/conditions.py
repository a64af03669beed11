"""What is compared: caches, methods, the grid, the variations, in an hour or at length. Pure data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inpo.common.cache import open_cache

DEFAULT_BETA = {"inpo": 2000.0, "dpo": 2000.0, "smpo": 2000.0, "kto": 1000.0, "inversion_dpo": 100.0}


@dataclass(frozen=True, kw_only=True)
class Length:
    """How much is spent on every run of the evidence, and on which base."""

    root: Path
    steps: int
    batch: int
    learning_rates: tuple[float, ...]
    beta_shares: tuple[float, ...]
    """Of each objective's default beta: the same grid for methods whose betas mean different things."""
    captions: Mapping[str, int | None]
    """Prompt files: how many captions of the split of that name. `test` chooses nothing."""
    inference_steps: int
    """Steps of every image's sampler. Ten of DDIM score the base 0.07 of 6 lower than twenty, in half the time."""
    model: str = "base"
    """By its name in the toy world."""
    only: tuple[str, ...] = ()
    """The methods that are compared; empty for all."""
    caches: tuple[str, ...] = ()
    """Options of `inpo precompute` for all caches, where a cache does not say otherwise."""
    tokens: tuple[str, ...] = ()
    """The option that bounds a prompt, where images are made."""

    @property
    def base(self) -> str:
        return f"toyworld/{self.model}"

    @property
    def pairs(self) -> Path:
        return self.root / "pairs"

    @property
    def source(self) -> str:
        return str(self.pairs / "webdataset")


HOUR = Length(
    root=Path("runs/evidence"),
    steps=64,
    batch=16,
    learning_rates=(1.5e-5, 3e-5, 6e-5),
    beta_shares=(0.1, 0.25),
    captions={"validation": 200, "test": 400},
    inference_steps=10,
)
LONG = Length(
    root=Path("runs/evidence-long"),
    steps=100,
    batch=32,
    learning_rates=(5e-6, 1e-5, 2e-5, 4e-5),
    beta_shares=(0.25, 1.0),
    captions={"validation": 200, "test": None},
    inference_steps=20,
)
FLOW = replace(
    HOUR,
    root=Path("runs/evidence-flow"),
    model="flow",
    only=("SFT", "Diffusion-DPO", "InPO", "InPO, noised start 0.3"),
    caches=("--inverter", "ab2", "--levels", "logit-normal", "--shift", "auto", "--max-tokens", "16"),
    tokens=("--max-tokens", "16"),
)
"""The hour's, of the flow. Its errors are of velocities and as large as those of noise, within a factor of three: the
grid of beta is the same.
"""
length = HOUR
"""The one in use."""
NUM_PAIRS = 1024
GRID_SEED = 0
TEST_SEEDS = (1, 2, 3, 4, 5)
FEWER_SEEDS = (1, 2, 3)
"""For variations and prolonged runs."""
SCORERS = ("toyworld-oracle", "toyworld-heldout")
LABELS = "oracle"


@dataclass(frozen=True, kw_only=True)
class CacheChoice:
    """A cache by name: options of `inpo precompute` beside those that all share."""

    name: str
    options: tuple[str, ...] = ()
    limit: int | None = None
    """Only the shards with the first so many pairs."""
    first: int | None = None
    """Trained on the first so many committed pairs only."""
    model: str | None = None
    """The length's base, unless another is named."""

    @property
    def folder(self) -> Path:
        return length.root / "caches" / self.name

    @property
    def only(self) -> Path:
        """The list of those pairs."""
        return self.folder.with_name(f"{self.name}-only.txt")

    def write_only(self) -> None:
        shards = open_cache(str(self.folder))
        ids = [str(pair_id) for shard in shards for pair_id in shard.read("pair/id")]
        self.only.write_text("".join(f"{pair_id}\n" for pair_id in ids[: self.first]))

    def command(self) -> list[str]:
        shared = [
            "--grid-points",
            "10",
            "--timesteps-per-pair",
            "4",
            "--resolution",
            "32",
            "--batch-size",
            "32",
            "--decode-workers",
            "0",
            *length.caches,
        ]
        for name in shared[::2]:
            if name in self.options:
                place = shared.index(name)
                del shared[place : place + 2]
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        return [
            "precompute",
            "--pairs",
            length.source,
            "--model",
            self.model or length.base,
            "--cache",
            str(self.folder),
            *shared,
            *self.options,
            *limit,
        ]


CLEAN = CacheChoice(name="clean", options=("--extra", "delta_prev"))
NOISE = CacheChoice(name="noise", options=("--inverter", "noise"))
NOISED = {
    share: CacheChoice(name=f"start-{share}", options=("--noised-start", share)) for share in ("0.1", "0.3", "0.5")
}
"""By f, the share of the schedule whose points are noised instead of inverted."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the main table."""

    name: str
    objective: str
    cache: CacheChoice
    extra: tuple[str, ...] = ()

    @property
    def betas(self) -> tuple[float | None, ...]:
        default = DEFAULT_BETA.get(self.objective)
        return (None,) if default is None else tuple(share * default for share in length.beta_shares)


DPO = Method(name="Diffusion-DPO", objective="dpo", cache=NOISE)
SFT = Method(name="SFT", objective="sft", cache=NOISE)
INPO = Method(name="InPO", objective="inpo", cache=CLEAN)
STARTS = {
    share: Method(name=f"InPO, noised start {share}", objective="inpo", cache=cache) for share, cache in NOISED.items()
}
METHODS = (
    SFT,
    DPO,
    Method(name="Diffusion-KTO", objective="kto", cache=NOISE),
    Method(name="SmPO", objective="smpo", cache=CLEAN, extra=("--labels", LABELS)),
    Method(name="Inversion-DPO", objective="inversion_dpo", cache=CLEAN),
    INPO,
    STARTS["0.1"],
    STARTS["0.3"],
)


def methods() -> tuple[Method, ...]:
    """Those of the length."""
    return tuple(method for method in METHODS if not length.only or method.name in length.only)


SAME_CALLS = (SFT, DPO, METHODS[2])
"""Methods whose caches cost less than InPO's: they get more steps for the same network calls."""

ONLY_NOISE = "noise at every point (Diffusion-DPO)"
SFT_REFERENCE = "reference from SFT"
ONLINE = "online inversion, released grid"
OTHER_CACHES: dict[str, CacheChoice] = {
    "ab2, refined start": CacheChoice(name="ab2", options=("--inverter", "ab2", "--refine-start", "3")),
    "ab2, refined start, noised start 0.3": CacheChoice(
        name="ab2-start-0.3", options=("--inverter", "ab2", "--refine-start", "3", "--noised-start", "0.3")
    ),
    "empty-prompt inversion": CacheChoice(name="guidance-0", options=("--guidance", "0")),
    "faithful grid": CacheChoice(name="faithful", options=("--faithful",)),
    "fixed_point": CacheChoice(name="fixed-point", options=("--inverter", "fixed_point")),
    "n = 3, K = 3": CacheChoice(name="n-3", options=("--grid-points", "3", "--timesteps-per-pair", "3")),
    "n = 5": CacheChoice(name="n-5", options=("--grid-points", "5")),
    "n = 30": CacheChoice(name="n-30", options=("--grid-points", "30")),
    # All with as many records: pairs that are ties have left 958 of 1,024.
    "K = 1, 958 pairs": CacheChoice(name="k-1", options=("--timesteps-per-pair", "1")),
    "K = 2, 483 pairs": CacheChoice(name="k-2", options=("--timesteps-per-pair", "2"), limit=512),
    "K = 4, 245 pairs": CacheChoice(name="k-4", limit=256),
    "K = 10, 98 pairs": CacheChoice(name="k-10", options=("--timesteps-per-pair", "10"), limit=102, first=98),
}
"""What InPO's objective is trained on in the variations, beside CLEAN and NOISED."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained model."""

    label: str
    objective: str
    cache: CacheChoice
    learning_rate: float
    beta: float | None
    seed: int
    longer: int | None = None
    """Steps of a prolonged run; the others have the usual number."""
    extra: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return self.longer or length.steps

    @property
    def folder(self) -> Path:
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.label).strip("-")
        beta = "" if self.beta is None else f"-beta-{self.beta:g}"
        longer = "" if self.longer is None else f"-{self.longer}-steps"
        return length.root / "runs" / f"{slug}-lr-{self.learning_rate:g}{beta}-seed-{self.seed}{longer}"

    @property
    def pipeline(self) -> Path:
        return self.folder / "train" / "pipeline"

    def train_command(self) -> list[str]:
        beta = [] if self.beta is None else ["--beta", f"{self.beta:g}"]
        only = [] if self.cache.first is None else ["--only", str(self.cache.only)]
        return [
            "train",
            "--cache",
            str(self.cache.folder),
            "--model",
            self.cache.model or length.base,
            "--output",
            str(self.folder / "train"),
            "--objective",
            self.objective,
            "--learning-rate",
            f"{self.learning_rate:g}",
            *beta,
            "--steps",
            str(self.steps),
            "--batch-size",
            str(length.batch),
            "--seed",
            str(self.seed),
            "--held-out",
            "0.05",
            "--evaluate-every",
            str(length.steps),
            "--save-every",
            str(length.steps),
            "--keep-last",
            "1",
            "--tracker",
            "none",
            *only,
            *self.extra,
        ]

    def images(self, prompts: str) -> Path:
        """`prompts` names a file of prompts."""
        return self.folder / prompts


def base_images(prompts: str) -> Path:
    return length.root / "base" / prompts


def prompts_file(prompts: str) -> Path:
    return length.root / f"{prompts}-prompts.txt"


def picture_commands(model: str | Path, folder: Path, prompts: str) -> list[list[str]]:
    """Images of a model and both scorers' scores, and the comparison with the base if this is not the base."""
    commands = [
        [
            "evaluate",
            "generate",
            "--model",
            str(model),
            "--prompts",
            str(prompts_file(prompts)),
            "--out",
            str(folder),
            "--inference-steps",
            str(length.inference_steps),
            "--guidance",
            "2.5",
            "--seed",
            "1000",
            "--batch-size",
            "32",
            *length.tokens,
        ]
    ]
    scorers = [part for name in SCORERS for part in ("--scorer", name)]
    commands.append(["evaluate", "score", str(folder), *scorers])
    if folder != base_images(prompts):
        commands.append(compare_command(base_images(prompts), folder, folder.with_name(f"{folder.name}-compare")))
    return commands


def compare_command(a: Path, b: Path, out: Path) -> list[str]:
    scorers = [part for name in SCORERS for part in ("--scorer", name)]
    return ["evaluate", "compare", str(a), str(b), *scorers, "--out", str(out)]
