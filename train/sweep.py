"""`inpo train --sweep`: several runs one after another from one cache, and one table of what came of them."""

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from inpo.common.compiled import release
from inpo.common.durable import write_file
from inpo.common.errors import InpoError, UsageError, command
from inpo.common.log import fail, say
from inpo.common.processes import processes
from inpo.common.recipe import read_recipe, refuse_idle, resolve
from inpo.common.scorer import load_scorer
from inpo.common.text import read_text
from inpo.train.configuration import Resolved, resolve_run
from inpo.train.output import claim_output
from inpo.train.run import train
from inpo.train.settings import TrainSettings
from inpo.train.sweep_samples import SampleJudge
from inpo.train.sweep_table import SweepRow, markdown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NOT_VARIED = ("output", "caches")
TABLE, ROWS = "sweep.md", "sweep.json"


_A_SWEEP = 'name a TOML file of tables [[run]], for instance objective = ["inpo", "poly"] (docs/objectives.md)'


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep."""

    name: str
    values: dict[str, Any]
    """Settings of [train] that are its own."""


def read_sweep(file: Path) -> list[Planned]:
    """The runs of a sweep's file: one for each combination of the values that a [[run]] lists.

    Raises UsageError for what is no such file, a setting that there is not, and names that are none or meet twice.
    """
    text = read_text(file, what="The sweep cannot be read.", error=UsageError, where=f"--sweep {file}", fix=_A_SWEEP)
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError("The sweep is not valid TOML.", where=file, got=str(error), fix="correct that line") from None
    tables = document.get("run")
    if set(document) != {"run"} or not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise UsageError(
            "A sweep has tables [[run]], and nothing else.",
            where=file,
            expected='[[run]] with settings of [train], for instance objective = ["inpo", "poly"]',
            got=", ".join(document) or "nothing",
            fix="write one table for each run; a list is all its values in turn",
        )
    planned = [run for table in tables for run in _runs(table, file)]
    if not planned:
        raise _no_run("no table [[run]]", file)
    names = [run.name for run in planned]
    for name in names:
        if name in (TABLE, ROWS):
            raise UsageError(
                "A run of the sweep has the name of the sweep's own table.",
                where=file,
                expected=f"another name than {TABLE} and {ROWS}",
                got=repr(name),
                fix="give the table another name = ...",
            )
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise UsageError(
                "Two runs of the sweep have one name." if names.count(name) > 1 else "Bad name of a run.",
                where=file,
                expected="names of their own, of letters, digits, dots, dashes and underscores",
                got=repr(name),
                fix="give the table a name = ..., or leave out what repeats another",
            )
    return planned


def _runs(table: dict[str, Any], file: Path) -> Iterator[Planned]:
    """The runs of one table."""
    given = dict(table)
    known = {field.alias or name for name, field in TrainSettings.model_fields.items()} - {*_NOT_VARIED}
    base = given.pop("name", None)
    unknown = sorted(set(given) - known)
    if unknown or not (base is None or isinstance(base, str)):
        raise UsageError(
            "A run of the sweep has a setting that it cannot have.",
            where=f"[[run]] of {file}",
            expected=f"name, a text, or one of {', '.join(sorted(known))}",
            got=unknown[0] if unknown else repr(base),
            fix="correct the name; output and caches are the sweep's own",
        )
    listed = {name: value for name, value in given.items() if isinstance(value, list) and _is_choice(name, value)}
    if [] in listed.values():
        raise _no_run(f"{next(name for name, values in listed.items() if not values)} = []", f"[[run]] of {file}")
    for chosen in itertools.product(*listed.values()):
        values = given | dict(zip(listed, chosen, strict=True))
        first = [] if base is None else [base]
        if base is None or "objective" in listed:
            first.append(str(values.get("objective", "run")))
        # A table without a name tells all its settings, one with a name what its lists vary.
        told = [name for name in given if name != "objective" and (base is None or name in listed)]
        yield Planned(name="-".join([*first, *(f"{name}-{_word(values[name])}" for name in told)]), values=values)


def _no_run(got: str, where: object) -> UsageError:
    return UsageError("The sweep has no run.", where=where, expected="a value at least", got=got, fix=_A_SWEEP)


def _word(value: object) -> str:
    """A value as a part of a folder's name."""
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _is_choice(name: str, value: list[Any]) -> bool:
    """True: a list of values for several runs, not one value that is itself a list."""
    field = next(each for key, each in TrainSettings.model_fields.items() if (each.alias or key) == name)
    return "tuple" not in str(field.annotation) or any(isinstance(each, list) for each in value)


def _refuse_one_repository(runs: Mapping[str, Resolved]) -> None:
    """Raise UsageError for a repository of the hub that several runs would write to: the last one's would be left."""
    asked = [run.settings.push_to_hub for run in runs.values() if run.settings.push_to_hub]
    for repository in asked:
        if asked.count(repository) > 1:
            raise UsageError(
                "Several runs of the sweep would be pushed to one repository.",
                where="--push-to-hub",
                expected="a repository for each run",
                got=f"{repository} for {asked.count(repository)} runs",
                fix="set push_to_hub in each [[run]], or `inpo push RUN OWNER/NAME` the one that is best",
            )


def run_sweep(
    file: Path,
    recipe: Path | None,
    model_flags: Mapping[str, Any],
    caches: list[str] | None,
    flags: Mapping[str, Any],
    *,
    scorers: Sequence[str],
    resume: str,
) -> int:
    """Train every run of `file` below --output; returns the exit code, 1 if one of them failed."""
    planned = read_sweep(file)
    base = resolve_run(recipe, model_flags, caches, flags, may_idle=True)
    sections = read_recipe(recipe)
    outputs = {each.name: base.output / each.name for each in planned}
    told = [
        resolve(TrainSettings, "train", sections, {**flags, **each.values, "output": outputs[each.name]}, may_idle=True)
        for each in planned
    ]
    refuse_idle(told, flags)
    runs: dict[str, Resolved] = {}
    for (name, output), settings in zip(outputs.items(), told, strict=True):
        # What one run has no use for, another may have.
        settings = settings.effective().model_copy(update={"caches": base.settings.caches})
        runs[name] = replace(base, settings=settings, output=output)
        runs[name].check()
    _refuse_one_repository(runs)
    with claim_output(base.output):
        return _train_all(base, runs, scorers=scorers, resume=resume)


def _train_all(base: Resolved, runs: Mapping[str, Resolved], *, scorers: Sequence[str], resume: str) -> int:
    judges = [load_scorer(name) for name in scorers]
    if judges and not all(run.settings.sample_every for run in runs.values()):
        raise UsageError(
            "There are no samples to score.",
            where="--sweep-scorer",
            expected="--sample-every above 0, for every run",
            got=0,
            fix="pass --sample-every as well, or leave --sweep-scorer out",
        )
    main, rows = processes().is_main_process, []
    measured: set[str] = set()
    judge = SampleJudge(judges if main else (), runs)
    for number, (name, run) in enumerate(runs.items(), start=1):
        if main:
            say(f"\n== run {number}/{len(runs)}: {name}")
        failed = None
        try:
            if not train(run, resume=resume, on_metrics=partial(measured.add, name)):
                return 0
        except InpoError as error:
            if len(runs) == 1 or processes().num_processes > 1:
                raise  # the other processes may be waiting for this one
            failed = error.what
            fail(error)
        release()
        if main:
            rows.append(SweepRow.read(name, run, failed=failed, measured=name in measured))
    if not main:
        return 0
    compared, judged = {}, True
    try:
        compared = judge.compare(measured)
    except InpoError as error:  # the runs are trained: their table is not the scorer's to lose
        judged = False
        fail(error)
    rows = [replace(each, scores=compared.get(each.name, {})) for each in rows]
    table = markdown(rows)
    write_file(base.output / TABLE, table.encode())
    write_file(base.output / ROWS, (json.dumps([each.to_json() for each in rows], indent=1) + "\n").encode())
    print(f"\n{table}\ntable in {base.output}")
    print(f"next: {command('inspect', 'run', base.output)}")
    return int(not judged or any(each.failed for each in rows))
