"""What columns a source has, what each is taken for, and what its first rows are."""

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from inpo.common.errors import DataError
from inpo.common.pairs.columns import brief, recognise_set
from inpo.common.pairs.pair import InputShard, Pair, PairSource, Skipped
from inpo.common.printable import escaped, shown, shown_message

if TYPE_CHECKING:
    from rich.table import Table

_RECORDS = 20
_SHOWN = 60


@dataclass(kw_only=True)
class ColumnsReport:
    """The first shard of a source that can be read."""

    location: str
    kind: str
    shard: str = ""
    recognised: str | None = None
    """The public data set or plain layout with these columns."""
    columns: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """{column: {role, example}}; the role is null where no pair is made of it."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What the first rows give: id, prompt, label, list, scores, sizes; or id, reason, detail."""
    problem: str | None = None
    """Why nothing can be made of it."""


def columns_report(source: PairSource, *, num_rows: int) -> ColumnsReport:
    """Look at the first shard that can be read. An error of all shards is the report's problem."""
    report = ColumnsReport(location=shown(source.location), kind=source.kind)
    for shard in source.shards:
        try:
            records = shard.head(_RECORDS)
            report.shard, report.problem = shard.name, None if records else f"{shard.name} has no rows"
            _look_at(report, shard, records)
            report.rows = [_told(item) for item in islice(shard.rows(0, shard.num_rows), num_rows)]
        except DataError as error:
            report.problem = shown_message(str(error))
        if report.columns:
            break
    return report


def _look_at(report: ColumnsReport, shard: InputShard, records: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record))
    report.recognised = recognise_set(names)
    roles = {name: role for role, columns in shard.reading.columns.layout(names).items() for name in columns}
    for name in names:
        example = next((record[name] for record in records if record.get(name) is not None), None)
        report.columns[name] = {"role": roles.get(name), "example": _example(example)}
    for counted in shard.not_read:  # `column user_id`, `field x`, `member .cls`
        name = counted.partition(" ")[2].removeprefix(".")
        report.columns.get(name, {})["role"] = None


def _example(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{brief(str(name))}: {_example(each)}" for name, each in islice(value.items(), 4)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_example, value[:3])) + (f", ... {len(value)}]" if len(value) > 3 else "]")
    text = escaped(shown(str(value)), line=True)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _told(item: Pair | Skipped) -> dict[str, Any]:
    if isinstance(item, Skipped):
        return {"id": item.pair_id, "reason": item.reason, "detail": item.detail}
    told: dict[str, Any] = {"id": item.pair_id, "prompt": item.prompt, "label": item.label}
    told |= {"win_bytes": len(item.win), "lose_bytes": len(item.lose)}
    return told | {"list": item.list, "scores": item.scores}


def columns_tables(report: ColumnsReport) -> list["Table"]:
    """The report as tables: columns, first rows."""
    from rich.markup import escape
    from rich.table import Table

    columns = Table()
    for heading in ("column", "taken for", "for instance"):
        columns.add_column(heading, overflow="fold")
    for name, told in report.columns.items():
        columns.add_row(escape(brief(name)), told["role"] or "not read", escape(told["example"] or ""))
    rows = Table(title="first rows", title_justify="left")
    for heading in ("id", "label", "prompt, or why there is no pair"):
        rows.add_column(heading, overflow="fold")
    for row in report.rows:
        if "reason" in row:
            rows.add_row(escape(brief(row["id"])), "", escape(f"{row['reason']}: {row['detail']}"))
        else:
            rows.add_row(escape(brief(row["id"])), f"{row['label']:.4g}", escape(_example(row["prompt"])))
    return [table for table in (columns, rows) if table.row_count]
