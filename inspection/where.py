"""`--where`: a condition on pairs, parsed, never run as code, over the table's columns.

A comparison with a value that a pair lacks (an inversion error that was not measured) is neither true nor false, and
`and`, `or`, `not` carry that on (Kleene's logic): such a pair is kept only if the rest decides without it.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Shaped

from inpo.common.errors import UsageError
from inpo.inspection.pair_table import PairTable

COLUMNS: Mapping[str, tuple[str, Callable[[PairTable], np.ndarray]]] = {
    "inversion_error": ("the larger of both sides", lambda table: table.worst_inversion_error),
    "inversion_error_win": ("of the win", lambda table: table.inversion_error[:, 0].astype(np.float64)),
    "inversion_error_lose": ("of the lose", lambda table: table.inversion_error[:, 1].astype(np.float64)),
    "reference_error": ("mean over timesteps and sides", lambda table: table.mean_reference_error),
    "reference_error_win": ("mean of the win", lambda table: table.reference_error[:, 0].mean(1, dtype=np.float64)),
    "reference_error_lose": ("mean of the lose", lambda table: table.reference_error[:, 1].mean(1, dtype=np.float64)),
    "reference_error_max": ("the largest", lambda table: table.reference_error.max((1, 2)).astype(np.float64)),
    "label": ("P(win preferred)", lambda table: table.label.astype(np.float64)),
    "caption_dropped": ("1 or 0", lambda table: table.caption_dropped.astype(np.float64)),
    "timestep_min": ("the pair's first", lambda table: table.timestep.min(1).astype(np.float64)),
    "timestep_max": ("the pair's last", lambda table: table.timestep.max(1).astype(np.float64)),
    "num_images": ("of the pair's group", lambda table: table.num_images.astype(np.float64)),
    "prompt": ("text", lambda table: table.prompt),
    "pair_id": ("text", lambda table: table.pair_id),
}


def parquet(table: PairTable) -> bytes:
    """The columns and the shard as a parquet file; what is not measured is null, and a field says what it holds."""
    import pyarrow
    import pyarrow.parquet

    names = {"pair_id": table.pair_id, "shard": np.array(table.shard_names, dtype=object)[table.shard]}
    columns = names | {name: of(table) for name, (_, of) in COLUMNS.items() if name not in names}
    fields, arrays = [], []
    for name, values in columns.items():
        # Parquet holds UTF-8: a lone surrogate of a broken caption becomes a question mark.
        plain = [str(each).encode(errors="replace").decode() for each in values] if values.dtype == object else values
        arrays.append(pyarrow.array(plain, from_pandas=True))
        meaning = COLUMNS.get(name, ("the shard that holds the pair",))[0]
        fields.append(pyarrow.field(name, arrays[-1].type, metadata={"meaning": meaning}))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=pyarrow.schema(fields)), sink)
    return bytes(sink.getvalue())


_COMPARE: Mapping[type[ast.cmpop], Callable[..., np.ndarray]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[..., np.ndarray]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_MOST_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """Three-valued: true where `yes`, false where `no`, unknown where neither."""

    yes: Bool[np.ndarray, " pair"]
    no: Bool[np.ndarray, " pair"]

    @property
    def unknown(self) -> Bool[np.ndarray, " pair"]:
        return ~self.yes & ~self.no


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What a condition gave, and how many pairs lack each column that it names."""

    truth: Truth
    num_lacking: dict[str, int]


def select(table: PairTable, condition: str) -> Selection:
    """Evaluate `condition` on every pair.

    Raises UsageError, pointing at the place, for anything but comparisons of columns, numbers and texts, joined by
    and, or, not; `"cat" in prompt` looks for text.
    """
    if len(condition) > _MOST_CHARACTERS:
        raise UsageError(
            "The condition is too long.",
            where="--where",
            expected=f"at most {_MOST_CHARACTERS} characters",
            got=len(condition),
            fix="select in several steps, or list the pairs in a file for --only",
        )
    try:
        tree = ast.parse(condition.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else error  # its text would name a file that is not there
        raise UsageError(
            "The condition cannot be parsed.",
            where="--where",
            got=f"{condition!r}: {why}",
            expected='something like "inversion_error < 0.2 and reference_error < 3"',
            fix="write == for equal, and put the whole condition into quotes",
        ) from None
    evaluation = _Evaluation(table, condition)
    try:
        truth = evaluation.truth(tree.body)
    except (RecursionError, OverflowError) as error:
        raise UsageError(
            "The condition cannot be evaluated.",
            where="--where",
            got="too many signs in one another" if isinstance(error, RecursionError) else str(error),
            expected="fewer of not, -, + in one another, and numbers below 1e308",
            fix="write it shorter",
        ) from None
    lacking = {
        name: int(np.isnan(values).sum()) for name, values in evaluation.used.items() if values.dtype.kind == "f"
    }
    return Selection(truth=truth, num_lacking={name: count for name, count in lacking.items() if count})


class _Evaluation:
    """One condition over one table."""

    def __init__(self, table: PairTable, condition: str) -> None:
        self.table = table
        self.condition = condition
        self.used: dict[str, np.ndarray] = {}

    def truth(self, node: ast.expr) -> Truth:
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(part) for part in node.values]
            yes, no = np.stack([part.yes for part in parts]), np.stack([part.no for part in parts])
            if isinstance(node.op, ast.And):
                return Truth(yes=np.all(yes, axis=0), no=np.any(no, axis=0))
            return Truth(yes=np.any(yes, axis=0), no=np.all(no, axis=0))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return Truth(yes=inner.no, no=inner.yes)
        if isinstance(node, ast.Compare):
            values = [self.value(each) for each in (node.left, *node.comparators)]
            links = [
                self._link(kind, left, right, node)
                for kind, left, right in zip(node.ops, values[:-1], values[1:], strict=True)
            ]
            return Truth(yes=np.all([link.yes for link in links], 0), no=np.any([link.no for link in links], 0))
        if isinstance(node, ast.Name) and node.id == "caption_dropped":
            values = self.value(node) != 0
            return Truth(yes=values, no=~values)
        raise self._refuse(node, "a comparison, or comparisons joined by and, or, not")

    def value(self, node: ast.expr) -> Shaped[np.ndarray, " pair"]:
        count = len(self.table)
        if isinstance(node, ast.Name):
            if node.id not in COLUMNS:
                raise self._refuse(node, f"one of {', '.join(COLUMNS)}")
            self.used.setdefault(node.id, COLUMNS[node.id][1](self.table))
            return self.used[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            return np.full(count, float(node.value))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return np.full(count, node.value, dtype=object)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            with np.errstate(divide="ignore", invalid="ignore"):
                return _ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right))
        raise self._refuse(node, "a column, a number, a text, or + - * / of numbers")

    def _number(self, node: ast.expr) -> Shaped[np.ndarray, " pair"]:
        values = self.value(node)
        if values.dtype.kind != "f":
            raise self._refuse(node, "a number")
        return values

    def _link(self, kind: ast.cmpop, left: np.ndarray, right: np.ndarray, node: ast.expr) -> Truth:
        texts = (left.dtype.kind == "O", right.dtype.kind == "O")
        if isinstance(kind, ast.In | ast.NotIn):
            if not all(texts):
                raise self._refuse(node, '"text" in prompt')
            found = np.array([str(part) in str(whole) for part, whole in zip(left, right, strict=True)], dtype=bool)
            return Truth(yes=found, no=~found) if isinstance(kind, ast.In) else Truth(yes=~found, no=found)
        if type(kind) not in _COMPARE or texts[0] != texts[1]:
            raise self._refuse(node, "< <= > >= == != between numbers, or between texts")
        yes = np.asarray(_COMPARE[type(kind)](left, right), dtype=bool)
        known = np.ones(len(yes), bool) if texts[0] else ~(np.isnan(left) | np.isnan(right))
        return Truth(yes=yes & known, no=~yes & known)

    def _refuse(self, node: ast.expr, expected: str) -> UsageError:
        return UsageError(
            "The condition says something else than a comparison of columns.",
            where="--where",
            expected=expected,
            got=ast.get_source_segment(self.condition.strip(), node) or type(node).__name__,
            fix="`inpo inspect filter --help` lists the columns",
        )
