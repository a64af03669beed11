"""What must hold inside one shard, and how closely.

Every stored number describes one point (the stored-point rule), so most of them follow from the others:

    x_t               float16(A x0 + B target), bit for bit: (A, B) is (a, s), in velocity space (1, s)
    x0_t              (x_t - s delta) / a. Stored from the unrounded prediction; delta is rounded to float16, so the two
                      differ by at most s/a times delta's rounding, x0_t's own rounding, and the float32 arithmetic of
                      the inversion (the bound holds for noise, v and sample prediction alike)
    reference_error   mean((target - eps_ref)^2), in velocity space of v_ref = eps_ref - x0(t) instead; eps_ref = delta
                      where the reference inverts under the caption. Stored from the unrounded prediction:
                      |difference| <= mean(2 |r| e + e^2), r the residual, e the rounding

Bounds are element by element and rigorous: nothing is tuned.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from inpo.common.cache import Manifest, Shard, TextCommit, TextShard
from inpo.common.cache.committed import CommittedArrays
from inpo.common.cache.derive import derive_x_t
from inpo.common.cache.schema import EMPTY_PROMPT
from inpo.common.cache.specs import TEXT
from inpo.common.errors import CacheSchemaError, InpoError, StorageError

TEXTS = f"{TextCommit.arrays}/"
"""Begins the name of a text shard among those of all shards."""
_IMAGES_AT_ONCE = 16
_PROMPTS_AT_ONCE = 32
_HALF_ULP, _TINY = 2.0**-11, 2.0**-25
"""Rounding to float16: relative to the value, and absolute where the value is subnormal."""
_FLOAT32 = 8 * 2.0**-24
"""The few float32 operations between the prediction and the stored numbers."""
_NAN_MEANS_NONE = ("inversion_error", "image/score")

CHECKS: Mapping[str, tuple[str, str]] = {
    "commit": ("the commit is the one written, under this manifest", "commits"),
    "bytes": ("every file: name, size, digest, and the checksum of every chunk", "files"),
    "finite": ("no NaN or infinity (inversion_error, image/score: NaN means none)", "images"),
    "timestep": ("ascending, inside the inverter's range", "groups"),
    "rows": ("images group by group, all in pairs; pairs of two images of a group; label; ids unique", "pairs"),
    "texts": ("text shards: bytes, no NaN, those that shards name; each prompt's place, the empty one", "prompts"),
    "x_t": ("float16(A x0 + B target), bit for bit", "images"),
    "x0_t": ("(x_t - s delta) / a, to the rounding of float16", "images"),
    "reference_error": ("mean (target - prediction)^2, to the rounding of delta", "images"),
    "skipped": ("lists of skipped rows: the ones written, with the rows that the commit counts", "rows"),
    "configurations": ("what runs were told: as it was written", "files"),
    "labels": ("label sets: every document whole, for the committed attempt and all its pairs", "pairs"),
    "reference": ("a sample of pairs: --model at the stored x_t gives the stored error", "pairs"),
    "re-inversion": ("a sample of pairs, inverted again by --model", "pairs"),
}
"""{check: (what holds, what is counted)}."""
_POSITIONS = {
    "timestep": "timestep",
    "image/group": "rows",
    "pair/win": "rows",
    "pair/lose": "rows",
    "group/prompt": "texts",
}
"""Arrays whose numbers are places, and the check that says that there is something in that place."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong with a shard; of texts: texts/NAME. `remake`: making the shard again would cure it."""

    shard: str
    check: str
    detail: str
    remake: bool = True


@dataclass(kw_only=True)
class ShardResult:
    """What checking one shard gave: how much was looked at per check, and the findings."""

    shard: str
    num_checked: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pair_ids: list[str] = field(default_factory=list)
    row_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of texts: what a row of each condition looks like."""
    bytes_read: int = 0
    is_whole: bool = True
    """False once an array could not be read."""
    refusal: StorageError | None = None
    """What the disk or the store said where it refused: whether the shard is sound is not known then."""

    def bad(self, check: str, detail: str) -> None:
        """One finding per check and text: the same damage met again says nothing new."""
        finding = Finding(shard=self.shard, check=check, detail=detail)
        if finding not in self.findings:
            self.findings.append(finding)

    def held(self, check: str, count: int) -> None:
        self.num_checked[check] = self.num_checked.get(check, 0) + count


def check_shard(shard: Shard) -> ShardResult:
    """Read every byte of a committed shard of images and check everything that can be checked without a model."""
    result = ShardResult(shard=shard.name, bytes_read=sum(shard.commit.files.values()))
    with _findings(shard, result, check="bytes", misfit="bytes"):
        shard.check_groups()
    paths = shard.stored & shard.specs.keys()
    big = sorted(path for path in paths if "H" in shard.specs[path].axes)
    small = {path: _read(shard, path, result) for path in sorted(paths - set(big))}
    _check_rows(shard, small, result)
    names = _names_of_images(shard, small)
    timestep, group, error = (small.get(path) for path in ("timestep", "image/group", "reference_error"))
    for start in range(0, shard.num_images, _IMAGES_AT_ONCE):
        rows = slice(start, min(start + _IMAGES_AT_ONCE, shard.num_images))
        arrays = {path: _read(shard, path, result, rows) for path in big}
        present = {path: values for path, values in arrays.items() if values is not None}
        if error is not None:
            present["reference_error"] = error[rows]
        _check_finite(present, names[rows], result)
        # Damaged arrays were not looked at: a check that needs them has not held.
        if result.is_whole:
            result.held("finite", len(names[rows]))
        if timestep is not None and group is not None:
            _check_identities(shard, present, timestep[group[rows]], names[rows], result)
    if result.is_whole:
        result.held("bytes", len(shard.commit.files))
    return result


def check_texts(shard: TextShard, manifest: Manifest) -> ShardResult:
    """The same of a committed shard of texts of a cache of this manifest."""
    result = ShardResult(shard=f"{TEXTS}{shard.name}", bytes_read=sum(shard.commit.files.values()))
    with _findings(shard, result, check="texts", misfit="texts"):
        shard.check_groups()
    small: dict[str, np.ndarray] = {}
    for path, spec in shard.specs.items():
        step = _PROMPTS_AT_ONCE if spec.chunking == "prompt" else max(shard.num_prompts, 1)
        for start in range(0, shard.num_prompts, step):
            rows = slice(start, min(start + step, shard.num_prompts))
            values = _read(shard, path, result, rows, check="texts")
            if values is None:
                break
            if spec.chunking == "whole":
                small[path] = values
            result.row_shapes[path] = values.shape[1:]
            if values.dtype.kind == "f":
                wrong = ~np.isfinite(values).reshape(len(values), -1).all(1)
                if wrong.any():
                    result.bad("texts", f"{path}: prompt {start + int(wrong.argmax())} holds NaN or infinity")
    _check_prompts(shard, manifest.max_tokens if manifest.is_padded else None, small, result)
    if result.is_whole:
        result.held("texts", shard.num_prompts)
    return result


def _check_prompts(shard: TextShard, most: int | None, small: Mapping[str, np.ndarray], result: ShardResult) -> None:
    """`most`: the manifest's max_tokens, where prompts are padded to it."""
    text, length = small.get(TEXT.path), small.get("length")
    prompts = [] if text is None else [str(each) for each in text]
    if len(set(prompts)) != len(prompts):
        result.bad("texts", "a prompt stands twice in this shard")
    if shard.name == EMPTY_PROMPT and prompts[:1] != [""]:
        result.bad("texts", "row 0 is not the empty prompt")
    tokens = {
        shape[shard.specs[path].axes.index("token") - 1]
        for path, shape in result.row_shapes.items()
        if "token" in shard.specs[path].axes
    }
    if len(tokens) > 1:
        result.bad("texts", f"arrays of {' and '.join(map(str, sorted(tokens)))} tokens")
    if most is not None and max(tokens, default=0) > most:
        result.bad("texts", f"{max(tokens)} tokens, and the manifest has at most {most}")
    if length is not None and len(length) and not (length.min() >= 1 and length.max() <= min(tokens, default=0)):
        result.bad("texts", f"length {length.min()}..{length.max()} of {min(tokens, default=0)} tokens")


def _read(
    arrays: CommittedArrays, path: str, result: ShardResult, rows: slice | None = None, *, check: str = "bytes"
) -> np.ndarray | None:
    """A stored array (latents in slices), or None with a finding.

    Without one where it is the text shard that it points into that cannot be read: that is a finding of its own.
    """
    values = None
    with _findings(arrays, result, check=check, misfit=_POSITIONS.get(path, check)):
        values = arrays.read_stored(path, rows)
    return values


@contextmanager
def _findings(arrays: CommittedArrays, result: ShardResult, *, check: str, misfit: str) -> Iterator[None]:
    """What is wrong with an attempt's files becomes a finding; where the store refuses, a refusal: who could not look
    has found nothing."""
    try:
        yield
    except StorageError as error:
        result.refusal = result.refusal or error
        result.is_whole = False
    except InpoError as error:
        if not str(error.where).startswith(arrays.location):
            return
        parts = [f"{name} {value}" for name, value in (("got", error.got), ("in", error.where)) if value is not None]
        found = misfit if isinstance(error, CacheSchemaError) else check
        result.bad(found, " ".join([error.what, "; ".join(parts)]).strip())
        result.is_whole = False


def _names_of_images(shard: Shard, small: Mapping[str, np.ndarray | None]) -> list[str]:
    """Of each image its first pair, for messages."""
    names = [f"image {row}" for row in range(shard.num_images)]
    ids, win, lose = (small.get(path) for path in ("pair/id", "pair/win", "pair/lose"))
    if ids is not None and win is not None and lose is not None:
        for name, *sides in reversed(list(zip(ids, win.tolist(), lose.tolist(), strict=True))):
            for row in sides:
                names[row] = f"pair {name}"
    return names


def _check_rows(shard: Shard, small: Mapping[str, np.ndarray | None], result: ShardResult) -> None:
    manifest = shard.cache.manifest
    for path, values in small.items():
        if values is None or values.dtype.kind != "f":
            continue
        wrong = np.isinf(values) if path in _NAN_MEANS_NONE else ~np.isfinite(values)
        if wrong.any():
            result.bad("finite", f"{path}: {int(wrong.sum())} values are NaN or infinite")
    timestep = small.get("timestep")
    if timestep is not None:
        low, high = manifest.inverter.timestep_range
        if (np.diff(timestep.astype(np.int64), axis=1) <= 0).any():
            result.bad("timestep", "timesteps of a group do not ascend")
        elif (timestep < max(low, 0)).any() or (timestep >= min(high, manifest.num_train_timesteps)).any():
            result.bad("timestep", f"{timestep.min()}..{timestep.max()} lies outside [{low}, {high})")
        result.held("timestep", len(timestep))
    ids, label = small.get("pair/id"), small.get("pair/label")
    if ids is not None:
        result.pair_ids = [str(name) for name in ids]
        if len(set(result.pair_ids)) != len(ids):
            result.bad("rows", "a pair id stands twice in this shard")
    if label is not None and not ((label >= 0) & (label <= 1)).all():
        result.bad("rows", f"label {label.min()}..{label.max()} is not a probability")
    _check_groups(shard, small, result)
    needed = ("pair/id", "pair/label", "pair/win", "pair/lose", "group/id", "image/group")
    if not any(small.get(path) is None for path in needed):
        result.held("rows", shard.num_pairs)


def _check_groups(shard: Shard, small: Mapping[str, np.ndarray | None], result: ShardResult) -> None:
    """Which images stand together: what draws, grid and noise hang on."""
    ids, group_ids, group = (small.get(path) for path in ("pair/id", "group/id", "image/group"))
    win, lose = small.get("pair/win"), small.get("pair/lose")
    if group is not None and ((np.diff(group) < 0).any() or len(np.unique(group)) != shard.commit.num_groups):
        result.bad("rows", "image/group does not ascend by ones: images that are of no group, or groups of no image")
    if group_ids is not None and len({str(name) for name in group_ids}) != len(group_ids):
        result.bad("rows", "a group id stands twice in this shard")
    if win is None or lose is None:
        return
    names = [f"row {row}" for row in range(len(win))] if ids is None else [str(name) for name in ids]
    if (win == lose).any():
        result.bad("rows", f"pair {_first(names, win == lose)} is of an image and itself")
    alone = shard.num_images - len(np.unique(np.concatenate([win, lose])))
    if alone:
        result.bad("rows", f"{alone} images are of no pair")
    if group is None:
        return
    apart = group[win] != group[lose]
    if apart.any():
        result.bad("rows", f"pair {_first(names, apart)} is of images of two groups")
    if shard.cache.manifest.group == "pair" and ids is not None and group_ids is not None:
        other = group_ids[group[win]].astype(object) != ids.astype(object)
        if other.any():
            result.bad("rows", f"the group of pair {_first(names, other)} has another id than the pair")


def _check_finite(arrays: Mapping[str, np.ndarray], names: Sequence[str], result: ShardResult) -> None:
    for path, values in arrays.items():
        wrong = ~np.isfinite(values).reshape(len(names), -1).all(1)
        if wrong.any():
            result.bad("finite", f"{path}: {_first(names, wrong)} holds NaN or infinity")


def _check_identities(
    shard: Shard, arrays: Mapping[str, np.ndarray], timestep: np.ndarray, names: Sequence[str], result: ShardResult
) -> None:
    levels = shard.cache.levels
    (a, s), mixture = levels.at(timestep), levels.mixture(timestep)
    # Not-finite values have their own finding; here they only make comparisons false.
    with np.errstate(invalid="ignore", over="ignore"):
        if {"x0", "target", "x_t"} <= set(arrays):
            derived = derive_x_t(arrays["x0"], arrays["target"], *mixture)
            wrong = derived.view(np.int16) != arrays["x_t"].view(np.int16)
            _judge("x_t", wrong, "is not float16(A x0 + B target)", names, result)
        if {"x_t", "delta", "x0_t"} <= set(arrays):
            wrong = ~(_clean_excess(arrays["x_t"], arrays["delta"], arrays["x0_t"], a, s) <= 0)
            _judge("x0_t", wrong, "is not (x_t - s delta) / a", names, result)
        prediction = "eps_ref" if "eps_ref" in arrays else "delta" if shard.cache.delta_is_reference else None
        if prediction in arrays and {"target", "reference_error"} <= set(arrays):
            told = arrays[str(prediction)].astype(np.float64)
            rounding = (1 + 2 * _HALF_ULP) * (_HALF_ULP * np.abs(told) + _TINY)
            if (
                levels.space == "velocity"
            ):  # noise - x0(t), of which only the noise is rounded: x0(t) is (x_t - s eps) / a
                x_t = arrays["x_t"] if "x_t" in arrays else derive_x_t(arrays["x0"], arrays["target"], *mixture)
                scale = a[:, :, None, None, None]
                told, rounding = (told - x_t) / scale, rounding / scale
            excess = _error_excess(arrays["target"], told, rounding, arrays["reference_error"])
            _judge("reference_error", ~(excess <= 0), f"is not the error of {prediction}", names, result)


def _judge(check: str, wrong: np.ndarray, text: str, names: Sequence[str], result: ShardResult) -> None:
    by_image = np.any(wrong.reshape(len(names), -1), axis=1)
    if by_image.any():
        result.bad(check, f"{check} of {_first(names, by_image)} {text} ({int(wrong.sum())} of {wrong.size} values)")
    result.held(check, len(names))


def _first(names: Sequence[str], wrong: np.ndarray) -> str:
    return names[int(np.flatnonzero(wrong)[0])]


def _clean_excess(
    x_t: Float[np.ndarray, "image record c h w"],
    delta: Float[np.ndarray, "image record c h w"],
    x0_t: Float[np.ndarray, "image record c h w"],
    a: Float[np.ndarray, "image record"],
    s: Float[np.ndarray, "image record"],
) -> Float[np.ndarray, "image record c h w"]:
    """|x0_t - (x_t - s delta) / a| minus its bound; above 0: wrong."""
    a, s = (level[:, :, None, None, None] for level in (a, s))
    x, eps, clean = x_t.astype(np.float64), delta.astype(np.float64), x0_t.astype(np.float64)
    difference = np.abs(clean - (x - s * eps) / a)
    bound = s / a * (_HALF_ULP * np.abs(eps) + _TINY) + _HALF_ULP * np.abs(clean) + _TINY
    arithmetic = _FLOAT32 * ((np.abs(x) + s * np.abs(eps)) / a + np.abs(clean))
    # The half unit in the last place is relative to the unrounded value, at most one part in 2^11 away.
    return difference - (1 + 2 * _HALF_ULP) * bound - arithmetic


def _error_excess(
    target: Float[np.ndarray, "image record c h w"],
    prediction: Float[np.ndarray, "image record c h w"],
    rounding: Float[np.ndarray, "image record c h w"],
    stored: Float[np.ndarray, "image record"],
) -> Float[np.ndarray, "image record"]:
    """|stored - mean (target - prediction)^2| minus its bound; above 0: wrong. `rounding`: of the prediction."""
    residual = target.astype(np.float64) - prediction
    error = (residual**2).mean((-3, -2, -1))
    bound = (2 * np.abs(residual) * rounding + rounding**2).mean((-3, -2, -1))
    return np.abs(stored - error) - bound - _FLOAT32 * (error + np.abs(stored))
