"""`python -m benchmarks.evidence [--long] [--flow]`: make what is missing, then write docs/evidence*.json, plots and
tables. Learning rates and strengths are those of that document's grids; rows that it does not have get grids.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.evidence import choice
from benchmarks.evidence import conditions as c
from benchmarks.evidence import results as r
from benchmarks.evidence.caches import label_steps, mean_error
from benchmarks.evidence.conditions import Run
from benchmarks.evidence.jobs import Job, run_jobs
from benchmarks.evidence.online import train_online

AGAINST_DPO = "test-against-dpo"
AGAINST_WIDER_DPO = "test-against-wider-dpo"
WIDER = "wider grids"
"""The table of what is compared with that."""
Tables = dict[str, dict[str, Any]]
"""{title: {row: its numbers}}."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="jobs at once, one thread each")
    phases = {"main": _main, "answer": _answer, "more": _more}
    parser.add_argument("--until", choices=list(phases), default="main", help="the last kind of runs to make")
    parser.add_argument("--grid", action="store_true", help="choose all rates and strengths again, by grids made here")
    parser.add_argument("--long", action="store_true", help="eight more seeds for the main tables of the document")
    parser.add_argument("--flow", action="store_true", help="the toy world's flow in place of its UNet")
    options = parser.parse_args()
    length = c.FLOW if options.flow else c.SHORT
    if options.long and options.until != "main":
        parser.error("--long makes seeds for the main tables; the others, --until, are made without it.")
    c.length = replace(length, own_grids=options.grid, seeds=c.MORE_SEEDS if options.long else length.seeds)
    for name, phase in phases.items():
        phase(options.processes)
        if name == options.until:
            break
    _results()


def _main(at_once: int) -> None:
    """The main table: every method on two kinds of pairs, each with the setting that its own grid chose."""
    _world(at_once, c.MAIN)
    _grids(at_once, c.rows())
    _tested("seeds", at_once, [run for row in c.rows() for run in choice.tested(row)])


def _grids(at_once: int, rows: list[c.Row]) -> None:
    wanting = choice.wanting(rows)
    run_jobs("grid", [_job(run, "validation") for row in wanting for run in choice.grid(row)], at_once=at_once)
    jobs = [_job(run, "validation") for row in wanting for run in choice.finalists(row)]
    run_jobs("grid, the second seed of the best", jobs, at_once=at_once)


def _answer(at_once: int) -> None:
    """Few methods on all kinds of pairs, with both shares of turned labels."""
    _world(at_once, c.KINDS)
    _tested("answer", at_once, [run for runs in choice.answer().values() for run in runs])


def _more(at_once: int) -> None:
    """As many network calls for all, points against pairs, loops without a cache, and wider grids."""
    for pairs in c.MAIN:
        prolonged = choice.same_calls(pairs).values()
        _tested(f"same calls, {pairs.name}", at_once, [run for runs in prolonged for run in runs])
    if c.length.model == "base":
        run_jobs("caches of few pairs", [_cache_job(each.cache, c.OWN) for each in c.POINTS], at_once=at_once)
        _tested("points", at_once, [run for runs in choice.points().values() for run in runs])
    _grids(at_once, c.loops())
    loops = [run for row in c.loops() for runs in choice.online(row).values() for run in runs]
    _tested("DPO for the loops", at_once, list(dict.fromkeys(map(choice.dpo_of, loops))))
    _tested("online", at_once, loops)
    _grids(at_once, c.wider())
    wider = [run for row in c.wider() for run in choice.wider(row)]
    _tested(WIDER, at_once, wider, dpo_of=choice.wider_dpo_of, against=AGAINST_WIDER_DPO)


def _world(at_once: int, kinds: Iterable[c.Pairs]) -> None:
    root = c.length.root
    counts = {str(c.own_prompts(each).stem): c.NUM_PAIRS * 2 // each.per_prompt for each in (c.RECORDED, c.LISTS)}
    splits = [("train", root / f"{name}.txt", count) for name, count in counts.items()]
    splits += [(split, c.prompts_file(split), limit) for split, limit in c.length.captions.items()]
    prompts = [
        [
            "toyworld",
            "prompts",
            "--split",
            split,
            "--out",
            str(out),
            *([] if limit is None else ["--limit", str(limit)]),
        ]
        for split, out, limit in splits
    ]
    run_jobs("prompts", [Job(name="prompts", folder=root, steps=prompts)], at_once=1)
    # It has processes of its own.
    made = [Job(name=f"{each.name}-pairs", folder=root / "pairs", steps=[each.command()]) for each in kinds]
    run_jobs("pairs", made, at_once=1)
    jobs = [_cache_job(each, pairs) for pairs in kinds for each in c.caches(pairs)]
    for name in c.length.captions:
        steps = c.picture_commands(c.length.base, c.base_images(name), name)
        jobs.append(Job(name="images", folder=c.base_images(name).with_name(f"{name}-log"), steps=steps))
    run_jobs("caches and the base's images", jobs, at_once=at_once)


def _cache_job(each: c.Cache, pairs: c.Pairs) -> Job:
    soft = any(method.labels == "soft" and method.cache == each for method in c.methods(pairs))
    folder = each.folder(pairs)
    labels = label_steps(each, pairs, soft=soft) if each is not c.LISTS else []
    return Job(name="cache", folder=folder.with_name(f"{each.name}-log"), steps=[each.command(pairs), *labels])


@cache
def _error(folder: Path) -> float:
    return mean_error(folder)


def _job(run: Run, prompts: str) -> Job:
    """Train, if that is not done yet, and compare with the base on `prompts`. A longer run goes on from the usual
    one.
    """
    beta = None if run.strength is None else run.strength / _error(run.method.cache.folder(run.pairs))
    shorter = replace(run, longer=None)
    begin = [lambda: shutil.copytree(shorter.folder / "train", run.folder / "train", dirs_exist_ok=True)]
    train = [*(begin if run.longer else []), run.train_command(beta)]
    if (loop := run.online) is not None:
        train = [lambda: train_online(run, loop, beta or 0.0)]
    return Job(
        name=prompts, folder=run.folder, steps=[*train, *c.picture_commands(run.pipeline, run.images(prompts), prompts)]
    )


def _tested(
    title: str,
    at_once: int,
    runs: list[Run],
    *,
    dpo_of: Callable[[Run], Run] = choice.dpo_of,
    against: str = AGAINST_DPO,
) -> None:
    """The runs on test captions, against the base and against DPO's of the same pairs, labels and seed.

    Seed by seed, so that tables can be written of what there is.
    """
    runs = sorted(runs, key=lambda run: run.seed)
    run_jobs(title, [_job(run, "test") for run in runs], at_once=at_once)
    jobs = []
    for run in runs:
        theirs = dpo_of(run)
        if run.method is not c.DPO or run.online:
            compare = c.compare_command(theirs.images("test"), run.images("test"), run.folder / against)
            jobs.append(Job(name=against, folder=run.folder, steps=[compare]))
    run_jobs(f"{title}: head to head", jobs, at_once=at_once)


def _finished_runs() -> dict[str, dict[str, list[Run]]]:
    """By table and row, the runs that have been compared with the base; rows of two seeds at least."""
    found: dict[str, dict[str, list[Run]]] = {
        f"main, {pairs.name}": {row.method.name: choice.tested(row) for row in c.rows() if row.pairs == pairs}
        for pairs in c.MAIN
    }
    found |= {f"same calls, {pairs.name}": choice.same_calls(pairs) for pairs in c.MAIN}
    found["points"] = choice.points()
    found["online"] = {name: runs for row in _with_grid(c.loops()) for name, runs in choice.online(row).items()}
    found["answer"] = choice.answer()
    found[WIDER] = {
        f"{row.method.name} | {row.pairs.name} | {row.flips}": choice.wider(row) for row in _with_grid(c.wider())
    }
    tested = {
        title: {name: [run for run in runs if _is_tested(run)] for name, runs in rows.items()}
        for title, rows in found.items()
    }
    kept = {title: {name: runs for name, runs in rows.items() if len(runs) > 1} for title, rows in tested.items()}
    return {title: rows for title, rows in kept.items() if rows}


def _is_tested(run: Run) -> bool:
    return _is_done(run, "test")


def _with_grid(rows: list[c.Row]) -> list[c.Row]:
    """Those whose grid the document has, or that was made here."""
    return [row for row in rows if not choice.wanting([row]) or _is_made(row)]


def _is_made(row: c.Row) -> bool:
    return all(_is_done(run, "validation") for runs in (choice.grid, choice.finalists) for run in runs(row))


def _is_done(run: Run, prompts: str) -> bool:
    return Job(name=prompts, folder=run.folder, steps=()).mark.exists()


def _document() -> dict[str, Any]:
    """What the document has had so far."""
    return json.loads(c.length.document.read_text()) if c.length.document.exists() else {}


def joined(known: Tables, made: Tables) -> Tables:
    """The document's tables with what was made here: seeds join those of a row of the same setting, and take the place
    of a row of another."""
    tables = {}
    for title in {**made, **known}:
        before, rows = known.get(title, {}), made.get(title, {})
        same = {name for name, row in rows.items() if name in before and r.is_alike(before[name], row)}
        rows = {name: r.merged(before[name], row) if name in same else row for name, row in rows.items()}
        tables[title] = rows | {name: row for name, row in before.items() if name not in rows}
    return tables


def _results() -> None:
    """docs/evidence.json, or that of another model, and its plots; what was made here as Markdown on the terminal.

    What was not made here stays in the document as it is.
    """
    name = c.length.root.name
    grids = {row.title: choice.cells(row) for row in [*c.rows(), *_with_grid([*c.loops(), *c.wider()])]}
    made = {
        title: {row: r.row(runs, AGAINST_WIDER_DPO if title == WIDER else AGAINST_DPO) for row, runs in rows.items()}
        for title, rows in _finished_runs().items()
    }
    known = _document()
    caches = [(each.folder(pairs), _cache_job(each, pairs)) for pairs in c.KINDS for each in c.caches(pairs)]
    errors = {
        str(folder.relative_to(c.length.root / "caches")): _error(folder) for folder, job in caches if job.mark.exists()
    }
    hours, earlier = r.hours(c.length.root), known.get("hours", {})
    tables = joined(known.get("tables", {}), made)
    values = {
        "steps": c.length.steps,
        "batch": c.length.batch,
        "pairs": c.NUM_PAIRS,
        "hours": {kind: max(spent, earlier.get(kind, 0.0)) for kind, spent in hours.items()},
        "mean_reference_error": {**known.get("mean_reference_error", {}), **errors},
        "grid": {key: [vars(cell) for cell in cells] for key, cells in grids.items()},
        "tables": tables,
    }
    c.length.document.write_text(json.dumps(values, indent=1) + "\n")
    for title, rows in made.items():
        if title.startswith("main"):
            kind = title.removeprefix("main, ")
            image = Path(f"docs/images/{name}-{kind}.png")
            r.draw_wins(tables[title], image, title=f"Pairs: {kind}; 95% intervals over seeds")
        text = r.answer_table(rows, values["mean_reference_error"]) if title == "answer" else r.rows_table(rows)
        print(f"\n{title}\n\n{text}\n")
        print(r.difference(known.get("tables", {}).get(title, {}), rows))
    print(f"\ngrid\n\n{r.grid_table(grids)}\n\nmean E_ref: {errors}\nhours: {values['hours']}")


if __name__ == "__main__":
    main()
