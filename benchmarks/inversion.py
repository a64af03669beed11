"""Which inverter comes how near to the exact ODE, at what cost: the table of docs/inversion.md.

    python -m benchmarks.inversion --pairs runs/demo/pairs/webdataset --count 8 --out docs/inversion

Prints a Markdown table; writes OUT.json and OUT.png. The exact ODE is Heun's method on about 300 labels and every label
that an inverter visits, in float32 from the same rounded x0, with the network under the caption.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from benchmarks.measure import machine, synchronise
from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, Inverted, invert
from inpo.common.models import open_model
from inpo.common.pairs import Pair, decode_image, open_source, prepare_image
from inpo.precompute.components import load_components
from inpo.precompute.configuration import build_manifest
from inpo.precompute.encode import TextEncoder
from inpo.precompute.settings import PrecomputeSettings

CHOICES: dict[str, dict[str, Any]] = {
    "ddim": {"inverter": "ddim"},
    "ddim, refine 3": {"inverter": "ddim", "refine_start": 3},
    "ab2, refine 3": {"inverter": "ab2", "refine_start": 3},
    "fixed_point": {"inverter": "fixed_point"},
    "noise": {"inverter": "noise"},
}
BINS = (0, 100, 250, 500, 750, 1000)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One inverter at one n, means over all sides of all pairs."""

    name: str
    steps: int
    network_calls: float
    """Per image; the measured round trip not counted."""
    inversion_error: float
    tau_error: float
    """RMS of (target - exact target) over all records; NaN for noise, which approximates no ODE."""
    seconds: float
    """Per pair, process time on a CPU, wall time on a GPU."""
    reference_error: tuple[float, ...]
    """Mean in the bins of timesteps; NaN where no record falls."""
    tau_error_by_bin: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """Encoded pairs, and the network that inverts them."""

    denoiser: Denoiser
    x0: Float16[Tensor, "image c h w"]
    pair_ids: list[str]
    caption: Condition

    def run(self, identity: InverterIdentity, *, measure: float) -> Inverted:
        return invert(
            self.denoiser,
            self.x0,
            [Group(id=name, num_images=2) for name in self.pair_ids],
            identity=identity,
            seed=0,
            timesteps_per_pair=identity.grid_points,
            caption=self.caption,
            measure_inversion=measure,
            images_per_batch=32,
        )


def load(arguments: argparse.Namespace, device: torch.device) -> World:
    """Read, resize and encode the first pairs of the source, as precompute does."""
    model = open_model(arguments.model)
    settings = PrecomputeSettings(resolution=arguments.resolution, dtype="float32")
    components = load_components(model, build_manifest(settings, model, device_type=device.type), device)
    shard = open_source(arguments.pairs).input_shards()[0]
    pairs = [item for item in shard.rows(0, min(2 * arguments.count, shard.num_rows)) if isinstance(item, Pair)]
    pairs = pairs[: arguments.count]

    def levels(data: bytes) -> np.ndarray:
        return prepare_image(
            decode_image(data), resolution=(arguments.resolution, arguments.resolution), crop="center", flip=False
        ).levels

    files = [data for pair in pairs for data in (pair.win, pair.lose)]
    x0 = components.images([levels(data) for data in files], [str(number) for number in range(len(files))])
    told = TextEncoder(model.load_text_pipeline(), model.family, device=device)([pair.prompt for pair in pairs])
    caption = Condition.build(told, torch.arange(len(pairs)).repeat_interleave(2), {})
    ids = [pair.pair_id for pair in pairs]
    return World(denoiser=components.denoiser, x0=x0, pair_ids=ids, caption=caption.to(device))


@torch.inference_mode()
def exact_targets(world: World, timesteps: list[list[int]], *, points: int = 300) -> list[dict[int, torch.Tensor]]:
    """Per pair {label: tau [side, c, h, w]} of the exact ODE dz/dsigma = eps(a z, t), z = x / a, by Heun's method."""
    total, device = world.denoiser.levels.num_train_timesteps, world.denoiser.device
    fine = np.linspace(0, total - 1, points).round().astype(int).tolist()
    grids = [sorted({*fine, 0, 1, 2, 3, 5, 7, *mine}) for mine in timesteps]
    longest = max(map(len, grids))
    labels = torch.tensor([grid + [grid[-1]] * (longest - len(grid)) for grid in grids], device=device)
    clean = world.x0.to(device).float()

    def slope(z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        a = world.denoiser.at(label)[0]
        return world.denoiser(a * z, label, world.caption)

    first = labels[:, 0].repeat_interleave(2)
    z, sigma = clean.clone(), torch.zeros(len(clean), 1, 1, 1, device=device)
    eps = world.denoiser(clean, first, world.caption)
    found: list[dict[int, torch.Tensor]] = [{} for _ in grids]
    for column in range(longest):
        label = labels[:, column].repeat_interleave(2)
        a, s, *_ = world.denoiser.at(label)
        step = s / a - sigma
        predicted = z + step * eps
        z = z + step * 0.5 * (eps + slope(predicted, label))
        sigma, eps = s / a, slope(z, label)
        target = ((a * z - a * clean) / s).unflatten(0, (-1, 2)).cpu()
        for pair, mine in enumerate(timesteps):
            if int(labels[pair, column]) in mine:
                found[pair][int(labels[pair, column])] = target[pair]
    return found


def clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def measure(world: World, name: str, steps: int, exact: list[dict[int, torch.Tensor]]) -> Row:
    total = world.denoiser.levels.num_train_timesteps
    settings = PrecomputeSettings(grid_points=steps, timesteps_per_pair=steps, **CHOICES[name])
    identity = settings.inverter_identity(total)
    device = world.denoiser.device
    calls, start = world.denoiser.num_calls, clock(device)
    world.run(identity, measure=0.0)
    synchronise()
    seconds, calls = clock(device) - start, world.denoiser.num_calls - calls
    made = world.run(identity, measure=1.0)
    squares, references, bins = [], [], []
    for pair in range(len(world.pair_ids)):
        images = slice(2 * pair, 2 * pair + 2)
        for place, t in enumerate(made.timestep[pair].tolist()):
            error = made.target[images, place].float() - exact[pair][t]
            squares.append(error.square().mean().item())
            references.append(made.reference_error[images, place].mean().item())
            bins.append(np.searchsorted(BINS, t * 1000 // total, side="right") - 1)
    where = np.array(bins)

    def by_bin(values: list[float]) -> tuple[float, ...]:
        return tuple(
            float(np.mean(np.array(values)[where == index])) if (where == index).any() else math.nan
            for index in range(len(BINS) - 1)
        )

    is_noise = name == "noise"
    return Row(
        name=name,
        steps=steps,
        network_calls=calls / (2 * len(world.pair_ids)),
        inversion_error=float(made.inversion_error.mean()),
        tau_error=math.nan if is_noise else math.sqrt(float(np.mean(squares))),
        seconds=seconds / len(world.pair_ids),
        reference_error=by_bin(references),
        tau_error_by_bin=tuple(math.nan if is_noise else math.sqrt(value) for value in by_bin(squares)),
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    unit = next(row.seconds for row in rows if row.name == "ddim" and row.steps == 10)
    spans = [f"E_ref {low}-{high}" for low, high in itertools.pairwise(BINS)]
    head = ["inverter", "n", "calls per image", "tau error (RMS)", "round trip", "time", *spans]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]

    def shown(value: float, digits: int = 3) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    for row in rows:
        cells = [
            row.name,
            str(row.steps),
            f"{row.network_calls:.1f}",
            shown(row.tau_error),
            shown(row.inversion_error),
            f"{row.seconds / unit:.2f}",
            *[shown(value, 4) for value in row.reference_error],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Left: error against calls. Middle: error by timestep at n = 10. Right: reference error by timestep at n = 10."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    middles = [(low + high) / 2 for low, high in itertools.pairwise(BINS)]
    for name in CHOICES:
        mine = [row for row in rows if row.name == name]
        if name != "noise":
            left.loglog([row.network_calls for row in mine], [row.tau_error for row in mine], "o-", label=name)
        ten = next((row for row in mine if row.steps == 10), None)
        if ten is not None:
            if name != "noise":
                middle.semilogy(middles, ten.tau_error_by_bin, "o-", label=name)
            right.semilogy(middles, ten.reference_error, "o-", label=name)
    left.set(xlabel="network calls per image", ylabel="RMS error of the target", title="against the exact ODE")
    middle.set(xlabel="timestep", title="error by timestep, n = 10")
    right.set(xlabel="timestep", ylabel="E_ref", title="reference error, n = 10")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axis in (left.xaxis, left.yaxis, middle.yaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare inverters with the exact ODE.")
    parser.add_argument("--model", default="toyworld/base")
    parser.add_argument("--pairs", default="runs/demo/pairs/webdataset")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--count", type=int, default=12, help="Pairs.")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 10, 30])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/inversion"))
    chosen = parser.parse_args(arguments)
    if 10 not in chosen.steps:
        parser.error("--steps needs 10: times are shares of its, and two plots are of it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = load(chosen, device)
    total = world.denoiser.levels.num_train_timesteps
    grids: list[list[int]] = [[] for _ in world.pair_ids]
    for steps in chosen.steps:
        made = world.run(PrecomputeSettings(grid_points=steps, inverter="noise").inverter_identity(total), measure=0.0)
        for pair, row in enumerate(made.timestep.tolist()):
            grids[pair].extend(row)
    exact = exact_targets(world, grids)
    check = exact_targets(world, grids, points=150)
    apart = torch.stack(
        [(exact[pair][t] - check[pair][t]).square().mean() for pair, mine in enumerate(grids) for t in mine]
    )
    rows = [measure(world, name, steps, exact) for steps in chosen.steps for name in CHOICES]
    print(f"{machine()}; {len(world.pair_ids)} pairs of {chosen.pairs}; model {chosen.model}; float32")
    print(f"the oracle with half its points is {apart.mean().sqrt():.4f} away (RMS of tau)\n")
    print(table(rows))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".json").write_text(
        json.dumps(
            {
                "machine": machine(),
                "pairs": len(world.pair_ids),
                "bins": BINS,
                "oracle_halved": float(apart.mean().sqrt()),
                "rows": [asdict(row) for row in rows],
            },
            indent=1,
        )
        + "\n"
    )
    plot(rows, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
