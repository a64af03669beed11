"""What must hold inside one shard, and how closely.

Every stored number describes one point (the stored-point rule), so most of them follow from the others:

    x_t               float16(a x0 + s target), bit for bit
    x0_t              (x_t - s delta) / a. Stored from the unrounded prediction; delta is rounded to float16, so the two
                      differ by at most s/a times delta's rounding, x0_t's own rounding, and the float32 arithmetic of
                      the inversion (the bound holds for noise, v and sample prediction alike)
    reference_error   mean((target - eps_ref)^2), eps_ref = delta where the reference inverts under the caption. Stored
                      from the unrounded prediction: |difference| <= mean(2 |r| e + e^2), r the residual, e the rounding

Bounds are element by element and rigorous: nothing is tuned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from inpo.common.cache import Shard
from inpo.common.cache.derive import derive_x_t
from inpo.common.errors import InpoError

_PAIRS_AT_ONCE = 8
_HALF_ULP, _TINY = 2.0**-11, 2.0**-25
"""Rounding to float16: relative to the value, and absolute where the value is subnormal."""
_FLOAT32 = 8 * 2.0**-24
"""The few float32 operations between the prediction and the stored numbers."""

CHECKS: Mapping[str, str] = {
    "commit": "the commit is the one written, under this manifest",
    "bytes": "every file: name, size, digest, and the checksum of every chunk",
    "finite": "no NaN or infinity (inversion_error: NaN means not measured)",
    "timestep": "ascending, inside the inverter's range",
    "rows": "prompt_index, label, empty prompt; pair ids unique in the whole cache",
    "x_t": "float16(a x0 + s target), bit for bit",
    "x0_t": "(x_t - s delta) / a, to the rounding of float16",
    "reference_error": "mean (target - eps_ref)^2, to the rounding of delta",
    "skipped": "lists of skipped rows: the ones written, with the rows that the commit counts",
    "configurations": "what runs were told: as it was written",
    "labels": "label sets: every document whole, for the committed attempt and all its pairs",
    "reference": "a sample of pairs: --model at the stored x_t gives the stored error",
    "re-inversion": "a sample of pairs, inverted again by --model",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with a shard. `remake`: making the shard again would cure it."""

    shard: str
    check: str
    detail: str
    remake: bool = True


@dataclass(kw_only=True)
class ShardResult:
    """What checking one shard gave: pairs looked at per check, and the findings."""

    shard: str
    num_checked: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pair_ids: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def bad(self, check: str, detail: str) -> None:
        """One finding per check and text: the same damage met again says nothing new."""
        finding = Finding(shard=self.shard, check=check, detail=detail)
        if finding not in self.findings:
            self.findings.append(finding)

    def held(self, check: str, num_pairs: int) -> None:
        self.num_checked[check] = self.num_checked.get(check, 0) + num_pairs


def check_shard(shard: Shard) -> ShardResult:
    """Read every byte of a committed shard and check everything that can be checked without a model."""
    result = ShardResult(shard=shard.name, bytes_read=sum(shard.commit.files.values()))
    paths = sorted((shard.stored & shard.cache.manifest.specs.keys()) - _big(shard))
    small = {path: _read(shard, path, result) for path in paths}
    names = small.pop("pair_id", None)
    ids = [f"row {row}" for row in range(shard.num_pairs)] if names is None else [str(name) for name in names]
    if names is not None:
        result.pair_ids = ids
    _check_rows(shard, small, names, result)
    for start in range(0, shard.num_pairs, _PAIRS_AT_ONCE):
        rows = slice(start, min(start + _PAIRS_AT_ONCE, shard.num_pairs))
        arrays = {path: _read(shard, path, result, rows) for path in sorted(_big(shard))}
        present = {path: values for path, values in arrays.items() if values is not None}
        present |= {
            path: values[rows]
            for path, values in small.items()
            if values is not None and path in ("timestep", "reference_error")
        }
        _check_finite(present, ids[rows], result)
        # Damaged arrays were not looked at: a check that needs them has not held.
        if not any(values is None for values in (*arrays.values(), *small.values())):
            result.held("finite", len(ids[rows]))
        _check_identities(shard, present, ids[rows], result)
    if not any(finding.check == "bytes" for finding in result.findings):
        result.held("bytes", shard.num_pairs)
    return result


def _big(shard: Shard) -> set[str]:
    """The latents."""
    return {path for path, spec in shard.cache.manifest.specs.items() if "H" in spec.axes} & shard.stored


def _read(shard: Shard, path: str, result: ShardResult, rows: slice | None = None) -> np.ndarray | None:
    """The array (latents in slices), or None with a finding."""
    try:
        return shard.read(path, rows)
    except InpoError as error:
        parts = [f"{name} {value}" for name, value in (("got", error.got), ("in", error.where)) if value is not None]
        result.bad("bytes", " ".join([error.what, "; ".join(parts)]).strip())
        return None


def _check_rows(
    shard: Shard, small: Mapping[str, np.ndarray | None], names: np.ndarray | None, result: ShardResult
) -> None:
    manifest = shard.cache.manifest
    for path, values in small.items():
        if values is None or values.dtype.kind != "f" or path == "inversion_error":
            continue
        if not np.isfinite(values).all():
            result.bad("finite", f"{path}: {int((~np.isfinite(values)).sum())} values are NaN or infinite")
    error = small.get("inversion_error")
    if error is not None and np.isinf(error).any():
        result.bad("finite", f"inversion_error: {int(np.isinf(error).sum())} values are infinite")
    timestep = small.get("timestep")
    if timestep is not None:
        low, high = manifest.inverter.timestep_range
        if (np.diff(timestep.astype(np.int64), axis=1) <= 0).any():
            result.bad("timestep", "timesteps of a pair do not ascend")
        elif (timestep < max(low, 0)).any() or (timestep >= min(high, manifest.num_train_timesteps)).any():
            result.bad("timestep", f"{timestep.min()}..{timestep.max()} lies outside [{low}, {high})")
        result.held("timestep", shard.num_pairs)
    text, index, label = small.get("prompt/text"), small.get("prompt_index"), small.get("label")
    if text is not None and (len(text) == 0 or str(text[0]) != ""):
        result.bad("rows", "row 0 of prompt/text is not the empty prompt")
    if text is not None and index is not None and ((index < 0).any() or (index >= len(text)).any()):
        result.bad("rows", f"prompt_index {index.min()}..{index.max()} for {len(text)} prompts")
    if label is not None and not ((label >= 0) & (label <= 1)).all():
        result.bad("rows", f"label {label.min()}..{label.max()} is no probability")
    if names is not None and len({str(name) for name in names}) != len(names):
        result.bad("rows", "a pair id stands twice in this shard")
    if not any(values is None for values in (names, text, index, label)):
        result.held("rows", shard.num_pairs)


def _check_finite(arrays: Mapping[str, np.ndarray], ids: list[str], result: ShardResult) -> None:
    for path, values in arrays.items():
        wrong = ~np.isfinite(values).reshape(len(ids), -1).all(1)
        if wrong.any():
            result.bad("finite", f"{path}: pair {_first(ids, wrong)} holds NaN or infinity")


def _check_identities(shard: Shard, arrays: Mapping[str, np.ndarray], ids: list[str], result: ShardResult) -> None:
    timestep = arrays.get("timestep")
    if timestep is None or (timestep < 0).any() or (timestep >= shard.cache.manifest.num_train_timesteps).any():
        return
    a, s = shard.cache.levels.at(timestep)
    # Not-finite values have their own finding; here they only make comparisons false.
    with np.errstate(invalid="ignore", over="ignore"):
        if {"x0", "target", "x_t"} <= set(arrays):
            wrong = derive_x_t(arrays["x0"], arrays["target"], a, s).view(np.int16) != arrays["x_t"].view(np.int16)
            _judge("x_t", wrong, "is not float16(a x0 + s target)", ids, result)
        if {"x_t", "delta", "x0_t"} <= set(arrays):
            wrong = ~(_clean_excess(arrays["x_t"], arrays["delta"], arrays["x0_t"], a, s) <= 0)
            _judge("x0_t", wrong, "is not (x_t - s delta) / a", ids, result)
        prediction = "eps_ref" if "eps_ref" in arrays else "delta" if shard.cache.delta_is_reference else None
        if prediction in arrays and {"target", "reference_error"} <= set(arrays):
            excess = _error_excess(arrays["target"], arrays[str(prediction)], arrays["reference_error"])
            _judge("reference_error", ~(excess <= 0), f"is not mean (target - {prediction})^2", ids, result)


def _judge(check: str, wrong: np.ndarray, text: str, ids: list[str], result: ShardResult) -> None:
    by_pair = wrong.reshape(len(ids), -1).any(1)
    if by_pair.any():
        result.bad(check, f"{check} of pair {_first(ids, by_pair)} {text} ({int(wrong.sum())} of {wrong.size} values)")
    result.held(check, len(ids))


def _first(ids: list[str], wrong: np.ndarray) -> str:
    return ids[int(np.flatnonzero(wrong)[0])]


def _clean_excess(
    x_t: Float[np.ndarray, "pair step side c h w"],
    delta: Float[np.ndarray, "pair step side c h w"],
    x0_t: Float[np.ndarray, "pair step side c h w"],
    a: Float[np.ndarray, "pair step"],
    s: Float[np.ndarray, "pair step"],
) -> Float[np.ndarray, "pair step side c h w"]:
    """|x0_t - (x_t - s delta) / a| minus its bound; above 0: wrong."""
    a, s = (level[:, :, None, None, None, None] for level in (a, s))
    x, eps, clean = x_t.astype(np.float64), delta.astype(np.float64), x0_t.astype(np.float64)
    difference = np.abs(clean - (x - s * eps) / a)
    bound = s / a * (_HALF_ULP * np.abs(eps) + _TINY) + _HALF_ULP * np.abs(clean) + _TINY
    arithmetic = _FLOAT32 * ((np.abs(x) + s * np.abs(eps)) / a + np.abs(clean))
    # The half unit in the last place is relative to the unrounded value, at most one part in 2^11 away.
    return difference - (1 + 2 * _HALF_ULP) * bound - arithmetic


def _error_excess(
    target: Float[np.ndarray, "pair step side c h w"],
    prediction: Float[np.ndarray, "pair step side c h w"],
    stored: Float[np.ndarray, "pair step side"],
) -> Float[np.ndarray, "pair step side"]:
    """|stored - mean (target - prediction)^2| minus its bound; above 0: wrong."""
    eps = prediction.astype(np.float64)
    residual = target.astype(np.float64) - eps
    rounding = (1 + 2 * _HALF_ULP) * (_HALF_ULP * np.abs(eps) + _TINY)
    error = (residual**2).mean((-3, -2, -1))
    bound = (2 * np.abs(residual) * rounding + rounding**2).mean((-3, -2, -1))
    return np.abs(stored - error) - bound - _FLOAT32 * (error + np.abs(stored))
