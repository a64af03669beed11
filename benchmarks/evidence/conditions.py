"""What is compared: pairs, caches, methods, grids, and how much is spent on each. Pure data, and the commands of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from inpo.toyworld.backdrops import SIZE

SCORERS = ("toyworld-oracle", "toyworld-heldout")
SEEDS = (1, 2, 3, 4, 5)
"""Test seeds of every table. Those of a grid are none of them."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """How much is spent on every run of the evidence, and on which base."""

    root: Path
    steps: int = 80
    batch: int = 16
    learning_rates: tuple[float, ...] = (1.5e-5, 3e-5, 6e-5)
    strengths: tuple[float, ...] = (40.0, 160.0)
    """beta times the mean reference error of a cache. Errors of caches differ by a factor of three, and beta multiplies
    them: one beta for all would compare strengths."""
    seeds: tuple[int, ...] = SEEDS
    """Of the main tables."""
    captions: Mapping[str, int | None] = field(default_factory=lambda: {"validation": 150, "test": 300})
    """Prompt files: how many captions of the split of that name. `test` chooses nothing."""
    inference_steps: int = 10
    """Steps of every image's sampler."""
    model: str = "base"
    """By its name in the toy world."""
    without: tuple[str, ...] = ("InPO, ddim",)
    """Methods and loops that it does not have. Plain InPO inverts by the inverter of `caches`, or by ddim."""
    caches: tuple[str, ...] = ()
    """Options of all caches, where one does not say otherwise."""
    tokens: tuple[str, ...] = ()
    """The option that bounds a prompt, where images are made."""

    own_grids: bool = False
    """Whether grids are made even if those of the document are known."""

    @property
    def base(self) -> str:
        return f"toyworld/{self.model}"

    @property
    def document(self) -> Path:
        """Where the results stand, and the settings that grids chose."""
        return Path("docs") / f"{self.root.name}.json"


SHORT = Length(root=Path("runs/evidence"))
FLOW = replace(
    SHORT,
    root=Path("runs/evidence-flow"),
    model="flow",
    without=("InPO, released grid", "InPO online, released grid", "InPO, ab2"),
    caches=("--inverter", "ab2", "--levels", "logit-normal", "--shift", "auto", "--max-tokens", "20"),
    tokens=("--max-tokens", "20"),
)
length = SHORT
"""The one in use."""
NUM_PAIRS = 1024
MORE_SEEDS = (7, 8, 9, 10, 11, 12, 13, 14)
"""For the main tables and the wider grids. With these a 95% t-interval over seeds is half as wide: t(12) / sqrt(13) is
0.49 of t(4) / sqrt(5)."""
GRID_SEEDS = (0, 6)
"""All cells of a grid have the first, the best of them, or all of a wider one, the second too."""
FINALISTS = 2
FLIPS = (5, 30)
"""Per cent of the labels that say the opposite of what the oracle thinks."""
LOWER_STRENGTH = 10.0
"""Below those of a length: most of their grids' best lie at the lower of two."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A kind of preference pairs by name: options of `inpo toyworld pairs`."""

    name: str
    options: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return length.root / "pairs" / self.name

    @property
    def source(self) -> str:
        return str(self.folder / "webdataset")

    def command(self) -> list[str]:
        made = ["toyworld", "pairs", "--out", str(self.folder), "--pairs", str(NUM_PAIRS), "--seed", "0"]
        # Labels are turned in the caches' label sets, so that both shares of turned labels have one cache.
        made += ["--format", "webdataset", "--flip-labels", "0", *self.options]
        return made if "rendered" in self.options else [*made, "--model", length.model]


OWN = Pairs(name="own", options=())
OTHER = Pairs(name="other", options=("--images", "other"))
RENDERED = tuple(
    Pairs(name=f"rendered-{distance}", options=("--images", "rendered", "--distance", str(distance)))
    for distance in (0, 1, 2)
)
KINDS = (OWN, OTHER, *RENDERED)
MAIN = (OWN, RENDERED[1])
"""The kinds of the main table: on-policy and off-policy."""
TURNED = (*MAIN, OTHER)
"""Those that are tried with more turned labels too."""


def tuned_on(pairs: Pairs) -> Pairs:
    """The kind whose grid chose the settings for these."""
    return RENDERED[1] if pairs in RENDERED else OWN


@dataclass(frozen=True, kw_only=True)
class Cache:
    """How the points are made: options of `inpo precompute`, or of `inpo sample`."""

    name: str
    options: tuple[str, ...] = ()
    per_prompt: int = 0
    """Own samples with the sampler's path: so many of a prompt. 0: from pairs."""

    def folder(self, pairs: Pairs) -> Path:
        return length.root / "caches" / pairs.name / self.name

    def command(self, pairs: Pairs) -> list[str]:
        shared = ["--model", length.base, "--cache", str(self.folder(pairs)), "--resolution", str(SIZE)]
        shared += ["--batch-size", "32", "--timesteps-per-pair", "4"]
        if self.per_prompt:
            told = ["--prompts", str(own_prompts(self)), "--per-prompt", str(self.per_prompt), "--scorer", SCORERS[0]]
            told += ["--gap", "0.05", "--inference-steps", "20", "--guidance", "2.5", *_without(_INVERTER)]
            return ["sample", *shared, *told, *self.options]
        told = ["--pairs", pairs.source, "--grid-points", "10", "--decode-workers", "0"]
        return ["precompute", *shared, *told, *_without(self.options[::2]), *self.options]


_INVERTER = ("--inverter",)


def _without(names: tuple[str, ...]) -> list[str]:
    """The length's own options of caches, but those."""
    given = length.caches
    return [
        word for name, value in zip(given[::2], given[1::2], strict=True) if name not in names for word in (name, value)
    ]


def own_prompts(cache: Cache) -> Path:
    """Captions that own samples are of: as many images as the pairs have."""
    return length.root / f"prompts-{NUM_PAIRS * 2 // cache.per_prompt}.txt"


NOISE = Cache(name="noise", options=("--inverter", "noise"))
DROPPED = Cache(name="noise-dropout", options=("--inverter", "noise", "--caption-dropout", "0.15"))
CLEAN = Cache(name="clean")
DDIM = Cache(name="ddim", options=("--inverter", "ddim"))
NOISED = {
    share: Cache(name=f"start-{share}", options=("--inverter", "ddim", "--noised-start", share))
    for share in ("0.1", "0.3")
}
REFINED = Cache(name="refined", options=("--inverter", "ddim", "--refine-start", "1"))
AB2 = Cache(name="ab2", options=("--inverter", "ab2", "--refine-start", "3"))
FAITHFUL = Cache(name="faithful", options=("--faithful",))
RECORDED = Cache(name="recorded", per_prompt=2)
LISTS = Cache(name="lists", per_prompt=4)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the tables."""

    name: str
    objective: str
    cache: Cache
    labels: str = "hard"
    """hard: the preferred image, with turned labels. soft: the oracle's margins, turned alike. Empty: scores."""
    on: tuple[Pairs, ...] = (OWN,)
    has_beta: bool = True

    @property
    def strengths(self) -> tuple[float | None, ...]:
        return length.strengths if self.has_beta else (None,)


SFT = Method(name="SFT", objective="sft", cache=NOISE, on=MAIN, has_beta=False)
DPO = Method(name="DPO", objective="dpo", cache=NOISE, on=MAIN)
KTO = Method(name="KTO", objective="kto", cache=NOISE, on=MAIN)
INPO = Method(name="InPO", objective="inpo", cache=CLEAN, on=MAIN)
STARTS = {
    share: Method(name=f"InPO, noised start {share}", objective="inpo", cache=cache, on=MAIN)
    for share, cache in NOISED.items()
}
INPO_AB2 = Method(name="InPO, ab2", objective="inpo", cache=AB2, on=MAIN)
INPO_DDIM = Method(name="InPO, ddim", objective="inpo", cache=DDIM, on=MAIN)
METHODS = (
    SFT,
    DPO,
    KTO,
    Method(name="SmPO", objective="smpo", cache=CLEAN, labels="soft", on=MAIN),
    Method(name="poly", objective="poly", cache=NOISE, on=MAIN),
    Method(name="bdpo", objective="bdpo", cache=NOISE, on=MAIN),
    Method(name="snpo", objective="snpo", cache=DROPPED, on=MAIN),
    Method(name="linear", objective="linear", cache=NOISE, on=MAIN),
    Method(name="listwise", objective="listwise", cache=LISTS, labels=""),
    INPO,
    STARTS["0.1"],
    STARTS["0.3"],
    Method(name="InPO, refine 1", objective="inpo", cache=REFINED, on=MAIN),
    INPO_AB2,
    INPO_DDIM,
    Method(name="InPO, recorded path", objective="inpo", cache=RECORDED),
    Method(name="InPO, released grid", objective="inpo", cache=FAITHFUL, on=MAIN),
)
"""poly, bdpo, snpo and linear are losses for any points; here they have DPO's, whose loss they change. Lists and the
sampler's own path are of own samples alone."""
SAME_CALLS = (SFT, DPO, KTO)
"""Methods whose caches cost less than InPO's: they get more steps for the same network calls."""
POINTS = tuple(
    Method(
        name=f"InPO, K = {count}, {pairs} pairs",
        objective="inpo",
        cache=Cache(
            name=f"clean-{count}-of-{pairs}", options=("--timesteps-per-pair", str(count), "--limit", str(pairs))
        ),
    )
    for count, pairs in ((1, 1024), (2, 512), (4, 256), (10, 256))
)
"""Fewer pairs with more points of each: the same number of records, but for the last. A file of pairs has 256."""
ANSWER = (DPO, KTO, INPO, STARTS["0.3"], INPO_AB2)
"""What is followed over all kinds of pairs and both shares of turned labels."""


@dataclass(frozen=True, kw_only=True)
class Online:
    """A loop without a cache (benchmarks/online.py)."""

    name: str
    method: Method
    """By whose cache's mean error beta is measured."""
    shares_noise: bool = True
    """Whether both sides of a pair have one noise. Nothing else sets the two loops of DPO apart."""
    flips: tuple[int, ...] = FLIPS


ONLINE = (
    Online(name="DPO online, shared noise", method=DPO),
    Online(name="DPO online, a noise per side", method=DPO, shares_noise=False),
    Online(name="InPO online, released grid", method=INPO, flips=FLIPS[:1]),
)


def methods(pairs: Pairs) -> tuple[Method, ...]:
    """Those of the length that there are on these pairs."""
    return tuple(each for each in METHODS if pairs in each.on and each.name not in length.without)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What has a grid of its own."""

    method: Method
    pairs: Pairs
    online: Online | None = None
    """The loop, where no cache is read."""
    turned: int | None = None
    """The share of turned labels, where a wider grid is made for these pairs and labels alone."""

    @property
    def title(self) -> str:
        told = [(self.online or self.method).name, self.pairs.name]
        return ", ".join(told if self.turned is None else [*told, f"{self.turned}% turned"])

    @property
    def strengths(self) -> tuple[float | None, ...]:
        return self.method.strengths if self.turned is None else (LOWER_STRENGTH, *self.method.strengths)

    @property
    def flips(self) -> int:
        return FLIPS[0] if self.turned is None else self.turned


def rows() -> list[Row]:
    """Those of the main tables."""
    return [Row(method=method, pairs=pairs) for pairs in MAIN for method in methods(pairs)]


def loops() -> list[Row]:
    """Those without a cache."""
    return [
        Row(method=loop.method, pairs=pairs, online=loop)
        for pairs in MAIN
        for loop in ONLINE
        if loop.name not in length.without
    ]


def wider() -> list[Row]:
    """DPO and what is ahead of it on pairs of other origin with many wrong labels, each at its best for just these."""
    return [Row(method=method, pairs=RENDERED[1], turned=FLIPS[1]) for method in (DPO, KTO)]


def caches(pairs: Pairs) -> tuple[Cache, ...]:
    """Those that are needed of these pairs."""
    wanted = methods(pairs) if pairs in MAIN else tuple(each for each in ANSWER if each in methods(OWN))
    return tuple(dict.fromkeys(each.cache for each in wanted))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained model."""

    method: Method
    pairs: Pairs
    learning_rate: float
    strength: float | None
    seed: int
    flips: int = FLIPS[0]
    longer: int | None = None
    """Steps of a prolonged run; the others have the usual number."""
    online: Online | None = None
    """The loop, where no cache is read."""

    @property
    def steps(self) -> int:
        return self.longer or length.steps

    @property
    def folder(self) -> Path:
        named = self.online.name if self.online else self.method.name
        slug = "".join(letter if letter.isalnum() else "-" for letter in named).strip("-")
        strength = "" if self.strength is None else f"-strength-{self.strength:g}"
        longer = "" if self.longer is None else f"-{self.longer}-steps"
        name = f"{slug}-lr-{self.learning_rate:g}{strength}-seed-{self.seed}{longer}"
        return length.root / "runs" / f"{self.pairs.name}-{self.flips}" / name

    @property
    def pipeline(self) -> Path:
        return self.folder / "train" / "pipeline"

    @property
    def labels(self) -> str:
        """The label set's name; empty for none."""
        return f"{self.method.labels}-{self.flips}" if self.method.labels else ""

    def train_command(self, beta: float | None) -> list[str]:
        told = ["--cache", str(self.method.cache.folder(self.pairs)), "--model", length.base]
        told += ["--output", str(self.folder / "train"), "--objective", self.method.objective]
        told += ["--learning-rate", f"{self.learning_rate:g}", "--steps", str(self.steps), "--seed", str(self.seed)]
        told += ["--batch-size", str(length.batch if self.method.labels else length.batch // 2)]
        told += ["--held-out", "0.05", "--evaluate-every", str(length.steps), "--save-every", str(length.steps)]
        told += ["--keep-last", "1", "--tracker", "none"]
        told += [] if beta is None else ["--beta", f"{beta:.6g}"]
        return ["train", *told, *(["--labels", self.labels] if self.labels else [])]

    def images(self, prompts: str) -> Path:
        """`prompts` names a file of prompts."""
        return self.folder / prompts


def base_images(prompts: str) -> Path:
    return length.root / "base" / prompts


def prompts_file(prompts: str) -> Path:
    return length.root / f"{prompts}-prompts.txt"


def picture_commands(model: str | Path, folder: Path, prompts: str) -> list[list[str]]:
    """Images of a model and both scorers' scores, and the comparison with the base if this is not the base."""
    draw = ["--model", str(model), "--prompts", str(prompts_file(prompts)), "--out", str(folder)]
    draw += ["--inference-steps", str(length.inference_steps), "--guidance", "2.5", "--seed", "1000"]
    commands = [["evaluate", "generate", *draw, "--batch-size", "32", *length.tokens]]
    commands.append(["evaluate", "score", str(folder), *_scorers()])
    if folder != base_images(prompts):
        commands.append(compare_command(base_images(prompts), folder, folder.with_name(f"{folder.name}-compare")))
    return commands


def compare_command(a: Path, b: Path, out: Path) -> list[str]:
    return ["evaluate", "compare", str(a), str(b), *_scorers(), "--out", str(out)]


def _scorers() -> list[str]:
    return [part for name in SCORERS for part in ("--scorer", name)]
