"""How far rounding alone can bring two numbers apart, so that a bound holds on any machine.

A processor chooses how a float32 network sums, and so moves its output by about 1e-6 of its size. Where that crosses an
edge of float16, what is stored moves by one unit in the last place, and what is computed from it moves by that much
times the factor with which it enters.
"""

import numpy as np

HALF_STEP = 2.0**-11
"""Relative distance of a number from the nearest float16, at most: half a unit in the last place."""
UNIT = 2.0**-10
"""A whole unit, relative to the number, at most."""


def half_unit(value: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of float16 at each value: the error of storing it."""
    return np.spacing(np.abs(np.asarray(value, np.float64)).astype(np.float16)).astype(np.float64) / 2


def rms(value: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(value, np.float64)))))


def of_mean(bound: float, count: int) -> float:
    """A bound on a mean of `count` values, of which each is off by at most `bound`: their roundings are independent.

    Four standard deviations; 16 values and fewer are not counted on.
    """
    return bound * min(1.0, 4 / np.sqrt(count))


def record_bounds(record: dict[str, np.ndarray], a: float, s: float) -> dict[str, float]:
    """Relative RMS by which a record may differ between two runs whose stored x0 and x_t differ by one unit everywhere.

    From x_t = a x0 + s tau, tau = (x_t - a x0) / s and x0(t) = (x_t - s delta) / a, with a network whose prediction
    moves by no more than its input does. `record` has x_t, delta, x0_t, target and reference_error of one record, both
    sides.
    """
    x_t, delta, clean, target = (rms(record[name]) for name in ("x_t", "delta", "x0_t", "target"))
    error = np.sqrt(np.mean(record["reference_error"]))
    return {
        "x0": UNIT,
        "x_t": UNIT * (1 + s * target / x_t),
        "target": UNIT * (1 + x_t / (s * target)),
        "delta": UNIT * (1 + x_t / delta),
        "x0_t": UNIT * (1 + (x_t + s * delta) / (a * clean)),
        "reference_error": of_mean(2 * UNIT * (target + x_t / s + delta) / error, record["target"][0].size),
    }


def assert_alike(one: object, other: object, a: np.ndarray, s: np.ndarray, *, pairs: list[int] | None = None) -> None:
    """Two inversions of the same pairs (or of `pairs` among them) are the same but for rounding, record by record.

    `a` and `s` are the schedule's tables.
    """
    names = ("x_t", "delta", "x0_t", "target", "reference_error")
    left, right = ({name: getattr(each, name).double().numpy() for name in names} for each in (one, other))
    timestep = one.timestep.numpy()  # type: ignore[attr-defined]
    for pair in range(len(timestep)) if pairs is None else pairs:
        for step, t in enumerate(timestep[pair]):
            bounds = record_bounds({name: left[name][pair, step] for name in names}, a[t], s[t])
            for name in names:
                values = left[name][pair, step]
                apart = rms(values - right[name][pair, step]) / rms(values)
                assert apart <= bounds[name], (name, pair, t, apart, bounds[name])
