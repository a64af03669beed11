"""What is compared: caches, methods, the grid, the ablations. Pure data."""

from dataclasses import dataclass
from pathlib import Path

from common.cache import open_cache

ROOT = Path("runs/evidence")
PAIRS = ROOT / "pairs"
SOURCE = str(PAIRS / "webdataset")
BASE = "toyworld/base"
NUM_PAIRS = 1024
BATCH = 32
STEPS = 100
LEARNING_RATES = (5e-6, 1e-5, 2e-5, 4e-5)
BETA_SHARES = (0.25, 1.0)
"""Of each objective's default beta: the same grid for methods whose betas mean different things."""
DEFAULT_BETA = {"inpo": 2000.0, "dpo": 2000.0, "smpo": 2000.0, "kto": 1000.0, "inversion_dpo": 100.0}
GRID_SEED = 0
TEST_SEEDS = (1, 2, 3, 4, 5)
ABLATION_SEEDS = (1, 2, 3)
SAME_CALLS_SEEDS = (1, 2, 3)
PROMPTS = {"grid": ("validation", 200), "validation": ("validation", None), "test": ("test", None)}
"""Prompt files: split and how many of its captions. `grid` is a part of `validation`; `test` chooses nothing."""
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
    model: str = BASE

    @property
    def folder(self) -> Path:
        return ROOT / "caches" / self.name

    @property
    def only(self) -> Path:
        """The list of those pairs."""
        return self.folder.with_name(f"{self.name}-only.txt")

    def write_only(self) -> None:
        shards = open_cache(str(self.folder))
        ids = [str(pair_id) for shard in shards for pair_id in shard.read("pair_id")]
        self.only.write_text("".join(f"{pair_id}\n" for pair_id in ids[: self.first]))

    def command(self) -> list[str]:
        shared = ["--steps", "10", "--timesteps-per-pair", "4", "--resolution", "32", "--batch-size", "32"]
        for name in shared[::2]:
            if name in self.options:
                place = shared.index(name)
                del shared[place : place + 2]
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        return [
            "precompute", "--pairs", SOURCE, "--model", self.model, "--cache", str(self.folder), *shared,
            *self.options, *limit,
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
        return (None,) if default is None else tuple(share * default for share in BETA_SHARES)


DPO = Method(name="Diffusion-DPO", objective="dpo", cache=NOISE)
SFT = Method(name="SFT", objective="sft", cache=NOISE)
INPO = Method(name="InPO", objective="inpo", cache=CLEAN)
STARTS = tuple(Method(name=f"InPO, noised start {share}", objective="inpo", cache=cache) for share, cache in NOISED.items())
METHODS = (
    SFT,
    DPO,
    Method(name="Diffusion-KTO", objective="kto", cache=NOISE),
    Method(name="SmPO", objective="smpo", cache=CLEAN, extra=("--labels", LABELS)),
    Method(name="Inversion-DPO", objective="inversion_dpo", cache=CLEAN),
    INPO,
    *STARTS,
)
MAIN_CACHES = (CLEAN, NOISE, *NOISED.values())
SAME_CALLS = (SFT, DPO, METHODS[2])
"""Methods whose caches cost less than InPO's: they get more steps for the same network calls."""
SAME_RATE: dict[float, tuple[Method, ...]] = {2e-5: (INPO, *STARTS), 4e-5: STARTS[:1]}
"""Compared with Diffusion-DPO at the same learning rate and beta, whatever the grid chose for them."""
SAME_RATE_BETA = 500.0

SFT_REFERENCE = "reference from SFT"
ONLINE = "online inversion, released grid"
ABLATIONS: dict[str, CacheChoice] = {
    "n = 10 (InPO as above)": CLEAN,
    "noise at every point (DPO on cached noise)": NOISE,
    **{f"noised start {share}": cache for share, cache in NOISED.items()},
    "ab2, refined start": CacheChoice(name="ab2", options=("--inverter", "ab2", "--refine-start", "3")),
    "ab2, refined start, noised start 0.3": CacheChoice(
        name="ab2-start-0.3", options=("--inverter", "ab2", "--refine-start", "3", "--noised-start", "0.3")
    ),
    "empty-prompt inversion": CacheChoice(name="guidance-0", options=("--guidance", "0")),
    "faithful grid": CacheChoice(name="faithful", options=("--faithful",)),
    "fixed_point": CacheChoice(name="fixed-point", options=("--inverter", "fixed_point")),
    "n = 3, K = 3": CacheChoice(name="n-3", options=("--steps", "3", "--timesteps-per-pair", "3")),
    "n = 5": CacheChoice(name="n-5", options=("--steps", "5")),
    "n = 30": CacheChoice(name="n-30", options=("--steps", "30")),
    # All with as many records: pairs that are ties have left 958 of 1,024.
    "K = 1, 958 pairs": CacheChoice(name="k-1", options=("--timesteps-per-pair", "1")),
    "K = 2, 483 pairs": CacheChoice(name="k-2", options=("--timesteps-per-pair", "2"), limit=512),
    "K = 4, 245 pairs": CacheChoice(name="k-4", limit=256),
    "K = 10, 98 pairs": CacheChoice(name="k-10", options=("--timesteps-per-pair", "10"), limit=102, first=98),
}
"""InPO's objective, learning rate and beta on other caches."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained model."""

    label: str
    objective: str
    cache: CacheChoice
    learning_rate: float
    beta: float | None
    seed: int
    steps: int = STEPS
    extra: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.label).strip("-")
        beta = "" if self.beta is None else f"-beta-{self.beta:g}"
        longer = "" if self.steps == STEPS else f"-{self.steps}-steps"
        return ROOT / "runs" / f"{slug}-lr-{self.learning_rate:g}{beta}-seed-{self.seed}{longer}"

    @property
    def pipeline(self) -> Path:
        return self.folder / "train" / "pipeline"

    def train_command(self) -> list[str]:
        beta = [] if self.beta is None else ["--beta", f"{self.beta:g}"]
        only = [] if self.cache.first is None else ["--only", str(self.cache.only)]
        return [
            "train", "--cache", str(self.cache.folder), "--model", self.cache.model, "--output",
            str(self.folder / "train"), "--objective", self.objective, "--learning-rate", f"{self.learning_rate:g}",
            *beta, "--steps", str(self.steps), "--batch-size", str(BATCH), "--seed", str(self.seed), "--held-out",
            "0.05", "--evaluate-every", str(STEPS), "--save-every", str(STEPS), "--keep-last", "1",
            "--tracker", "none", *only, *self.extra,
        ]

    def images(self, prompts: str) -> Path:
        """`prompts` names a file of prompts."""
        return self.folder / prompts


def base_images(prompts: str) -> Path:
    return ROOT / "base" / prompts


def prompts_file(prompts: str) -> Path:
    return ROOT / f"{prompts}-prompts.txt"


def picture_commands(model: str | Path, folder: Path, prompts: str) -> list[list[str]]:
    """Images of a model and both scorers' scores, and the comparison with the base if this is not the base."""
    commands = [
        [
            "evaluate", "generate", "--model", str(model), "--prompts", str(prompts_file(prompts)), "--out", str(folder),
            "--inference-steps", "20", "--guidance", "2.5", "--seed", "1000", "--batch-size", "32",
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
