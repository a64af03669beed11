"""`inpo round`: sample, train, evaluate, again. Each round is a folder, and each stage resumes by itself.

OUTPUT/round.json       what the rounds were begun with
OUTPUT/rounds.jsonl     a line for each finished round
OUTPUT/first/           held-out images of the first model, and their scores
OUTPUT/round-1/         prompts.json, cache/, cache-images/, run/, images/, seconds.json, page.html, page.md
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inpo.common.cache import open_cache
from inpo.common.cache.store import digest
from inpo.common.cache_settings import CacheSettings
from inpo.common.compiled import release
from inpo.common.denoiser import default_dtype
from inpo.common.durable import write_file
from inpo.common.errors import InpoError, UsageError
from inpo.common.log import say
from inpo.common.models import Model
from inpo.common.processes import processes
from inpo.common.recipe import ModelSection, read_recipe, resolve
from inpo.common.scorer import load_scorer
from inpo.common.seeding import stable_hash
from inpo.common.text import plain_prompt
from inpo.evaluation.compare import Comparison, compare_folders
from inpo.evaluation.generate import generate
from inpo.evaluation.image_folder import ImageFolder
from inpo.evaluation.prompts import read_prompts
from inpo.evaluation.score import score_folder
from inpo.evaluation.settings import EvaluateSettings
from inpo.precompute.run import run_precompute
from inpo.precompute.settings import RayOptions
from inpo.rounds.claim import claim_rounds
from inpo.rounds.clock import StageClock
from inpo.rounds.figures import SampleFigures, sample_figures
from inpo.rounds.page import RoundRow, page, table
from inpo.rounds.sample import configure_sample, run_sample
from inpo.rounds.settings import RoundSettings, SampleSettings
from inpo.train.configuration import resolve_run
from inpo.train.identity import result_identity
from inpo.train.output import claim_output
from inpo.train.run import train
from inpo.train.settings import TrainSettings

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What all rounds share."""

    recipe: Path
    model: ModelSection
    sample: SampleSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    settings: RoundSettings
    output: Path
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def scorers(self) -> tuple[str, ...]:
        """The one that ranks, and those that never do."""
        ranker = str(self.sample.scorer)
        return (ranker, *(name for name in self.evaluate.scorers if name != ranker))

    def folder(self, number: int) -> Path:
        return self.output / f"round-{number}"

    def begins_with(self, number: int) -> ModelSection:
        """The model that a round begins with."""
        if number == 1:
            return self.model
        return ModelSection(model=str(self.folder(number - 1) / "run" / "pipeline"))

    def reference(self, number: int) -> ModelSection:
        return self.model if self.settings.reference == "first" else self.begins_with(number)

    def seed(self, number: int) -> int:
        """Of what a round samples, 63 bits: a hash, so that rounds of neighbouring seeds share no noise."""
        return stable_hash("round", self.sample.seed, number) >> 1

    def identity(self, model: Model) -> dict[str, Any]:
        """What changes a number of the rounds, by what it means; `model`: the first one."""
        drawn = default_dtype(processes().device.type)
        evaluate = self.evaluate.model_dump(
            mode="json", exclude={"prompts", "limit", "batch_size", "compile", "scorers"}
        )
        sample = self.sample.effective().model_dump(
            mode="json",
            by_alias=True,
            include={*CacheSettings.model_fields, "per_prompt", "scorer", "pairs_from", "gap"},
        )
        of_round = self.settings.model_dump(include={"reference", "points", "prompts_per_round"})
        sections = {
            "sample": sample | {"dtype": sample["dtype"] or drawn},
            "train": result_identity(self.train, model),
            "evaluate": evaluate | {"dtype": evaluate["dtype"] or drawn, "scorers": sorted(self.scorers)},
            "round": of_round,
        }
        told: dict[str, Any] = {f"the model's {name}": value for name, value in model.fingerprints.items()}
        for name, prompts in (("sample", self.prompts), ("evaluate", self.held_out)):
            told[f"prompts in [{name}]"] = f"{len(prompts)}, {digest(chr(0).join(prompts).encode())}"
        for section, values in sections.items():
            told |= {f"{name} in [{section}]": value for name, value in values.items()}
        normalised: dict[str, Any] = json.loads(json.dumps(told))
        return normalised

    def prompts_of(self, number: int) -> list[str]:
        """What a round samples."""
        count = self.settings.prompts_per_round
        if count is None:
            return list(self.prompts)
        start = (number - 1) * count
        return [self.prompts[each % len(self.prompts)] for each in range(start, start + min(count, len(self.prompts)))]


def resolve_rounds(recipe: Path | None, flags: Mapping[str, Any]) -> Rounds:
    """Everything that can be wrong with the settings is told here, before anything is made. Raises UsageError,
    DataError for prompts that cannot be read."""
    if recipe is None:
        raise UsageError(
            "No recipe given.",
            where="--recipe",
            expected="a recipe with [model], [sample], [train], [evaluate] and [round]",
            fix="pass --recipe; recipes/rounds.toml is one",
        )
    sections = read_recipe(recipe)
    settings = resolve(RoundSettings, "round", sections, flags)
    sample = resolve(SampleSettings, "sample", sections, {})
    trained = resolve(TrainSettings, "train", sections, {})
    evaluate = resolve(EvaluateSettings, "evaluate", sections, {})
    _check(settings, sample, trained, evaluate)
    prompts, held_out = read_prompts(str(sample.prompts)), read_prompts(str(evaluate.prompts))[: evaluate.limit]
    if sample.limit is not None:
        prompts = prompts[: sample.limit]
    aside = {plain_prompt(each) for each in held_out}
    both = [each for each in prompts if plain_prompt(each) in aside]
    if both:
        raise UsageError(
            "Prompts that are sampled and trained on cannot tell what was learnt.",
            where="prompts in [sample] and [evaluate]",
            expected="no prompt in both, in whatever case",
            got=f"{len(both)} in both, {both[0][:80]!r} for one",
            fix="hold some prompts out: take them from one of the files",
        )
    assert settings.output is not None
    return Rounds(
        recipe=recipe,
        model=resolve(ModelSection, "model", sections, {}),
        sample=sample,
        train=trained,
        evaluate=evaluate,
        settings=settings,
        output=settings.output,
        prompts=tuple(prompts),
        held_out=tuple(held_out),
    )


def _check(settings: RoundSettings, sample: SampleSettings, trained: TrainSettings, evaluate: EvaluateSettings) -> None:
    """Raise UsageError for what is missing, or does not go together."""
    watchers = [name for name in evaluate.scorers if name != sample.scorer]
    taken = [name for name in ("output", "caches", "init_from", "push_to_hub") if getattr(trained, name)]
    laid = [name for name in ("lora", "controlnet", "inpaint") if getattr(evaluate, name)]
    for wrong, where, expected, fix in (
        (settings.output is None, "--output", "a folder", "pass --output, or set output in [round]"),
        (sample.prompts is None, "[sample]", "prompts", "set prompts in [sample] of the recipe"),
        (sample.scorer is None, "[sample]", "scorer", "set scorer in [sample] of the recipe"),
        (evaluate.prompts is None, "[evaluate]", "prompts that are held out", "set prompts in [evaluate]"),
        (
            not watchers,
            "scorers in [evaluate]",
            "a second scorer, which never ranks: whoever is trained by a score learns what only the score sees",
            f"name another scorer than {sample.scorer}",
        ),
        (
            trained.lora_rank > 0,
            "lora_rank in [train]",
            "0: the next round begins with a whole model",
            "train all weights, or go round by round yourself",
        ),
        (
            bool(laid),
            f"{', '.join(laid)} in [evaluate]",
            "none: the rounds' models are compared as they are",
            "leave out",
        ),
        (bool(taken), f"{', '.join(taken)} in [train]", "none: each round has its own", "leave out; `inpo push` a run"),
    ):
        if wrong:
            raise UsageError(
                "A setting of the rounds is missing, or does not fit.", where=where, expected=expected, fix=fix
            )
    for name in (sample.scorer or "", *evaluate.scorers):
        load_scorer(name)


def run_rounds(rounds: Rounds) -> int:
    """All rounds that are not there yet. Returns the exit code: 1 if a stage made nothing, or was stopped. Raises
    UsageError if the folder is something else's, or another process makes rounds in it."""
    with claim_output(rounds.output):
        return _run_rounds(rounds)


def _run_rounds(rounds: Rounds) -> int:
    state, model = processes(), rounds.model.open()
    if state.is_main_process:
        claim_rounds(rounds.output, rounds.identity(model))
    state.wait_for_everyone()
    lines = read_lines(rounds.output)
    first = _drawn(rounds, model, rounds.output / "first")
    for number in range(1, rounds.settings.rounds + 1):
        folder = rounds.folder(number)
        if number in lines:
            continue
        say(f"\n== round {number} of {rounds.settings.rounds}: {rounds.begins_with(number).model}")
        clock = StageClock(folder)
        with _stage(clock, "points"), _advice_of(rounds, "sample"):
            code, samples = _points(rounds, number)
        if code:
            return code
        with _stage(clock, "train"), _advice_of(rounds, "train"):
            is_trained = _trained(rounds, number)
        if not is_trained:
            say("stopped: run the same command again to go on")
            return 1
        with _stage(clock, "evaluate"):
            drawn = _drawn(rounds, rounds.begins_with(number + 1).open(), folder / "images")
        before = _images(rounds, number - 1) if number > 1 else first
        if state.is_main_process:
            compared = [compare_folders([each, drawn], rounds.scorers)[0] for each in (first, before)]
            row = _row(rounds, number, sample_figures(open_cache(str(samples))), compared, clock.seconds())
            lines[number] = row.to_json()
            rows = [RoundRow.from_json(line) for each, line in sorted(lines.items()) if each <= number]
            write_file(folder / "page.md", table(rows, compared, rounds.scorers).encode())
            write_file(folder / "page.html", page(rows, compared, rounds.scorers).encode())
            text = "".join(json.dumps(line) + "\n" for _, line in sorted(lines.items()))
            write_file(rounds.output / ROUNDS, text.encode())  # last: a round with a line is done
            print(table(rows, compared, rounds.scorers), flush=True)
        state.wait_for_everyone()
    say(f"{rounds.settings.rounds} rounds in {rounds.output}; their lines: {rounds.output / ROUNDS}")
    return 0


def read_lines(output: Path) -> dict[int, dict[str, Any]]:
    """{round: its line} of those that are finished. Raises UsageError for a file that is not ours."""
    file = output / ROUNDS
    if not file.is_file():
        return {}
    try:
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {RoundRow.from_json(line).number: line for line in found}
    except ValueError as error:
        raise UsageError(
            "The list of rounds cannot be read.",
            where=file,
            expected="a line for each finished round, as it was written",
            got="; ".join(str(error).splitlines()[:3]),
            fix="remove the lines that are damaged: those rounds are looked at again, and made only where they lack",
        ) from None


def _points(rounds: Rounds, number: int) -> tuple[int, Path]:
    """(exit code, the cache whose images and scores are the round's). The round's cache is there then."""
    folder = rounds.folder(number)
    cache = folder / "cache"
    is_moved = rounds.settings.reference == "first" and number > 1
    points = folder / "points" if is_moved else cache
    samples = points
    model = rounds.begins_with(number)
    if rounds.settings.points == "sample" or number == 1:
        prompts = folder / "prompts.json"
        if processes().is_main_process and not prompts.is_file():
            write_file(prompts, (json.dumps(rounds.prompts_of(number), ensure_ascii=False, indent=1) + "\n").encode())
        processes().wait_for_everyone()
        flags = {"prompts": str(prompts), "seed": rounds.seed(number)}
        told = configure_sample(rounds.recipe, model.model_dump(exclude_none=True), {"cache": str(points)}, flags)
        code = run_sample(told, None, ray_options=RayOptions(), dry_run=False)
    else:
        samples = rounds.folder(1) / "cache"
        code = _again(rounds, model, samples, points)
    if code == 0 and is_moved:
        code = _again(rounds, rounds.model, points, cache, errors_only=True)
    return code, samples


def _again(rounds: Rounds, model: ModelSection, like: Path, cache: Path, **flags: Any) -> int:
    work = {name: getattr(rounds.sample, name) for name in ("batch_size", "compile", "engine")}
    told = {"like": str(like), **work, **flags}
    named = model.model_dump(exclude_none=True)
    return run_precompute(None, named, {"cache": str(cache)}, told, ray_options=RayOptions(), dry_run=False)


def _trained(rounds: Rounds, number: int) -> bool:
    """Train on the round's cache, if that is not done. False if it was stopped, with a checkpoint."""
    folder = rounds.folder(number)
    if (folder / "run" / "pipeline").is_dir():
        return True
    origin, reference = rounds.begins_with(number), rounds.reference(number)
    flags = {"output": str(folder / "run")}
    if origin != reference:
        flags["init_from"] = str(origin.model)
    named = reference.model_dump(exclude_none=True)
    return train(resolve_run(rounds.recipe, named, [str(folder / "cache")], flags), resume="auto")


def _images(rounds: Rounds, number: int) -> ImageFolder:
    return ImageFolder(rounds.folder(number) / "images")


def _drawn(rounds: Rounds, model: Model, out: Path) -> ImageFolder:
    """A model's images of the prompts that were held out, scored by all scorers."""
    with _advice_of(rounds, "evaluate"):
        generate(model, list(rounds.held_out), rounds.evaluate, out)
        images = ImageFolder(out)
        for name in rounds.scorers:
            if not images.has_scores(name):
                score_folder(images, load_scorer(name), batch_size=rounds.evaluate.batch_size)
    return images


@contextmanager
def _stage(clock: StageClock, name: str) -> Iterator[None]:
    """Around one stage, in every process."""
    with clock.running(name) if processes().is_main_process else nullcontext():
        yield
    release()
    processes().wait_for_everyone()


@contextmanager
def _advice_of(rounds: Rounds, section: str) -> Iterator[None]:
    """A stage's errors speak of the options of its own command, most of which rounds have in their recipe alone."""
    try:
        yield
    except InpoError as error:
        if "--" in error.fix:
            error.fix += f"; in rounds every option but --output is a setting of [{section}] in {rounds.recipe}"
        raise


def _row(
    rounds: Rounds,
    number: int,
    figures: SampleFigures,
    compared: Sequence[Comparison],
    seconds: Mapping[str, float | None],
) -> RoundRow:
    against_first = {one.scorer: one.statistics for one in compared[0].scored}
    return RoundRow(
        number=number,
        begins_with=str(rounds.begins_with(number).model),
        reference=str(rounds.reference(number).model),
        figures=figures,
        mean={name: each.mean_b for name, each in against_first.items()},
        difference={name: each.mean_difference for name, each in against_first.items()},
        interval={name: each.mean_difference_interval for name, each in against_first.items()},
        win_rate={name: each.win_rate for name, each in against_first.items()},
        seconds=seconds,
    )
