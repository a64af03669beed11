"""Which inverter comes how near to the exact ODE and to known noise, at what cost: the tables of docs/inversion.md.

    python -m benchmarks.inversion --model toyworld/base --pairs runs/demo/pairs/webdataset --document docs/inversion.md

Prints Markdown, and writes it between the document's marks for this model; writes OUT.json and OUT.png. The exact ODE
is Heun's method on some 300 levels, in float32 from the same rounded x0, with the network under the caption. Known
noise is what a sampler of 500 steps made images from, under the captions of the pairs, without guidance or VAE.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from benchmarks.inversion_tables import Row, by_calls, by_timestep, plot, write_between
from benchmarks.measure import machine
from benchmarks.rivals import RIVALS, Ode, Rival, exact, walk
from inpo.common.cache.schema import InverterIdentity
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import Group, Inverted, build_path, invert
from inpo.common.levels import exact_grid
from inpo.common.models import open_model
from inpo.common.pairs import Pair, decode_image, open_source, prepare_image
from inpo.common.seeding import normal, uniform
from inpo.precompute.components import load_components
from inpo.precompute.configuration import build_manifest
from inpo.precompute.encode import TextEncoder
from inpo.precompute.settings import PrecomputeSettings
from inpo.rounds.sampler import SamplerGrid, sample_path

SEED = 0
BINS = (0, 100, 250, 500, 750, 1000)
BY_TIMESTEP = 10
"""Grid points of the table, and of the plots, by timestep."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """An inverter of ours, or a rival on the same path."""

    settings: dict[str, Any] = field(default_factory=lambda: {"inverter": "ddim", "refine_start": 0})
    rival: Rival | None = None

    def identity(self, grid_points: int, total: int) -> InverterIdentity:
        chosen = PrecomputeSettings(grid_points=grid_points, timesteps_per_pair=grid_points, **self.settings)
        return chosen.inverter_identity(total)

    def grid_points(self, calls: int) -> int:
        """The most that so many network calls of an image allow."""
        per_step, begins = 1 + self.settings.get("iterations", 0), 1
        if self.rival is not None:
            per_step, begins = self.rival.calls_per_step, self.rival.begins
        return (calls - begins) // per_step - int(self.settings["refine_start"])

    def with_records(self, calls: float, grid_points: int) -> float:
        """Network calls where all grid points are records, whose delta is the prediction at x_t itself."""
        if self.rival is None:
            return calls
        return calls + (1 if self.rival.evaluates else grid_points)


def _ours(inverter: str, refine: int = 0, **settings: Any) -> Method:
    return Method(settings={"inverter": inverter, "refine_start": refine, **settings})


METHODS = {
    "ddim": _ours("ddim"),
    "ddim, refine 3": _ours("ddim", 3),
    "ab2": _ours("ab2"),
    "ab2, refine 3": _ours("ab2", 3),
    "fixed_point, 1 iteration": _ours("fixed_point", iterations=1),
    **{
        name + (", refine 3" if refine else ""): Method(settings=_ours("ddim", refine).settings, rival=rival)
        for name, rival in RIVALS.items()
        for refine in (0, 3)
    },
}
OURS = {
    **{name: METHODS[name] for name in ("ddim", "ddim, refine 3", "ab2, refine 3")},
    "fireflow, refine 3": _ours("fireflow", 3),
    "fixed_point": _ours("fixed_point"),
    "noise": _ours("noise"),
}
"""What the table by timestep shows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Visited:
    """Where an inversion of pairs came by."""

    timestep: np.ndarray
    """[pair, record]"""
    target: Tensor
    """[image, record, ...], float32 on the CPU."""
    end: Tensor
    """x at the noisy end, [image, ...]: from the last record straight on, without a call."""
    network_calls: float
    """Per image."""
    inverted: Inverted | None
    """None for a rival."""


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """Latents of pairs, and the network that inverts them."""

    denoiser: Denoiser
    x0: Float16[Tensor, "image c h w"]
    pair_ids: list[str]
    caption: Condition

    @property
    def ode(self) -> Ode:
        return Ode.of(self.denoiser, self.x0, self.caption)

    def visit(self, method: Method, steps: int, pair_ids: Sequence[str], *, measure: float = 0.0) -> Visited:
        """Invert all images to `steps` grid points that hang on (SEED, pair id), all of them records."""
        levels = self.denoiser.levels
        identity = method.identity(steps, levels.num_train_timesteps)
        if method.rival is not None:
            return self._visit_as(method.rival, identity, pair_ids)
        calls = self.denoiser.num_calls
        made = invert(
            self.denoiser,
            self.x0,
            [Group(id=name, num_images=2) for name in pair_ids],
            identity=identity,
            seed=SEED,
            timesteps_per_pair=steps,
            caption=self.caption,
            measure_inversion=measure,
        )
        a, s = levels.point(levels.noisy)
        return Visited(
            timestep=made.timestep.numpy().astype(np.int64),
            target=made.target.float(),
            end=a * made.x0_t[:, -1].float() + s * made.delta[:, -1].float(),
            network_calls=(self.denoiser.num_calls - calls) / len(self.x0),
            inverted=made,
        )

    def _visit_as(self, rival: Rival, identity: InverterIdentity, pair_ids: Sequence[str]) -> Visited:
        levels, ode, steps = self.denoiser.levels, self.ode, identity.grid_points
        paths = [
            build_path(identity, levels, seed=SEED, group_id=name, timesteps_per_pair=steps).points for name in pair_ids
        ]
        tau = self.tau(np.array([[point.level for point in path] for path in paths])).repeat(2, axis=0).T
        kept = np.array([[len(point.records) for point in path] for path in paths]).repeat(2, axis=0).astype(bool)
        points, slope = walk(ode, rival.move, tau)
        away = (torch.stack(points) - ode.x0).cpu() / torch.from_numpy(tau).float()[..., None, None, None]
        return Visited(
            timestep=np.array([[point.level for point in path if point.records] for path in paths]),
            target=torch.stack([away[torch.from_numpy(kept[image]), image] for image in range(len(self.x0))]),
            end=self.noisy_end(points[-1], tau[-1], slope),
            network_calls=ode.denoiser.num_calls / len(self.x0),
            inverted=None,
        )

    def noisy_end(self, y: Tensor, tau: np.ndarray, slope: Tensor) -> Tensor:
        """x there, from y straight on."""
        levels = self.denoiser.levels
        rise = torch.from_numpy(self.tau(np.array([levels.noisy])) - tau).float().to(y.device)[:, None, None, None]
        scale = 1.0 if levels.space == "velocity" else levels.point(levels.noisy)[0]
        return (scale * (y + rise * slope)).cpu()

    def tau(self, points: np.ndarray) -> np.ndarray:
        """Of points that a path may visit, as `Ode.tau`."""
        a, s, _ = self.denoiser.levels.walked[:, points].numpy()
        return s if self.denoiser.levels.space == "velocity" else s / a


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """Images that the model made from known noise, and the exact ODE's way back."""

    world: World
    noise: Tensor
    back: Tensor
    """x at the noisy end by the exact ODE."""

    def pair_ids(self, steps: int) -> list[str]:
        """Pairs whose last grid point is the noisiest timestep."""
        total = self.world.denoiser.levels.num_train_timesteps
        names = (str(number) for number in itertools.count())
        fitting = (name for name in names if exact_grid(uniform(SEED, name, "offset"), steps, total)[-1] == total - 1)
        return list(itertools.islice(fitting, len(self.noise) // 2))

    def likeness(self, end: Tensor) -> tuple[float, float]:
        """(correlation, mean over the images; RMS distance) of x at the noisy end and the noise."""
        correlation = [torch.corrcoef(torch.stack(both).flatten(1))[0, 1] for both in zip(end, self.noise, strict=True)]
        return float(torch.stack(correlation).mean()), float((end - self.noise).square().mean().sqrt())


def load(arguments: argparse.Namespace, device: torch.device) -> World:
    """Read, resize and encode the first pairs of the source, as precompute does."""
    model = open_model(arguments.model)
    settings = PrecomputeSettings(
        resolution=arguments.resolution, dtype="float32", max_tokens=arguments.max_tokens, timesteps_per_pair=1
    )
    manifest = build_manifest(settings, model, device_type=device.type)
    components = load_components(model, manifest, device)
    shard = open_source(arguments.pairs).shards[0]
    pairs = [item for item in shard.rows(0, min(2 * arguments.count, shard.num_rows)) if isinstance(item, Pair)]
    pairs = pairs[: arguments.count]

    def levels(data: bytes) -> np.ndarray:
        return prepare_image(
            decode_image(data), resolution=(arguments.resolution, arguments.resolution), crop="center", flip=False
        ).levels

    files = [data for pair in pairs for data in (pair.win, pair.lose)]
    x0 = components.images([levels(data) for data in files], [str(number) for number in range(len(files))])
    encoder = TextEncoder(model.load_text_pipeline(), model.family, device=device, max_tokens=manifest.max_tokens)
    told = encoder([pair.prompt for pair in pairs])
    caption = Condition.build(told, torch.arange(len(pairs)).repeat_interleave(2), {})
    ids = [pair.pair_id for pair in pairs]
    return World(denoiser=components.denoiser, x0=x0, pair_ids=ids, caption=caption.to(device))


def exact_way(world: World, *, every: int = 4) -> tuple[Tensor, Tensor]:
    """(targets of the exact ODE [timestep, image, ...], x at the noisy end).

    Its points are the first 32 timesteps and every so many; targets between them are interpolated.
    """
    ode, total = world.ode, world.denoiser.levels.num_train_timesteps
    timesteps = np.unique([*range(min(32, total)), *range(0, total, every), total - 1])
    table = ode.nearest(world.tau(timesteps))
    below = np.arange(0, table[0], every // 4 or 1)
    found, slope = exact(ode, [*below.tolist(), *table.tolist()])
    targets = (torch.stack(found[len(below) :]) - ode.x0).cpu() / torch.from_numpy(ode.tau[table]).float().view(
        -1, 1, 1, 1, 1
    )
    right = np.searchsorted(timesteps, np.arange(total)).clip(1)
    share = torch.from_numpy((np.arange(total) - timesteps[right - 1]) / (timesteps[right] - timesteps[right - 1]))
    between = torch.lerp(targets[right - 1], targets[right], share.float().view(-1, 1, 1, 1, 1))
    return between, world.noisy_end(found[-1], ode.tau[table[-1:]], slope)


def draw(world: World) -> Known:
    """Images from known noise, under the world's captions."""
    fine = world.ode.denoiser
    steps = np.arange(0, fine.levels.num_train_timesteps, max(1, fine.levels.num_train_timesteps // 500))
    grid = SamplerGrid(grid=steps, kept=np.arange(0))
    noise = torch.stack(
        [normal(tuple(world.x0.shape[1:]), SEED, name, side, "noise") for name in world.pair_ids for side in range(2)]
    )
    x0, _ = sample_path(fine, noise, [grid] * len(noise), caption=world.caption, empty=world.caption, guidance=1.0)
    made = replace(world, x0=x0.half())
    return Known(world=made, noise=noise, back=exact_way(made)[1])


def measure(name: str, method: Method, steps: int, world: World, targets: Tensor, known: Known) -> Row:
    """One row: distance from `targets` on the world's own grids, and from the known noise on grids that end at it."""
    total = world.denoiser.levels.num_train_timesteps
    visited = world.visit(method, steps, world.pair_ids, measure=1.0)
    drawn = known.world.visit(method, steps, known.pair_ids(steps))
    bins = np.searchsorted(BINS, visited.timestep * 1000 // total, side="right") - 1
    wanted = torch.stack([targets[visited.timestep[image // 2], image] for image in range(len(world.x0))])
    squares = (visited.target - wanted).square().flatten(2).mean(-1).unflatten(0, (-1, 2)).mean(1).numpy()
    made, is_noise = visited.inverted, method.settings["inverter"] == "noise"
    reference = None if made is None else made.reference_error.unflatten(0, (-1, 2)).mean(1).numpy()
    correlation, distance = known.likeness(drawn.end)

    def by_bin(values: np.ndarray | None) -> tuple[float, ...]:
        """Of [pair, record]."""
        return tuple(
            float(values[bins == index].mean()) if values is not None and (bins == index).any() else math.nan
            for index in range(len(BINS) - 1)
        )

    return Row(
        name=name,
        steps=steps,
        network_calls=drawn.network_calls,
        calls_with_records=method.with_records(drawn.network_calls, steps),
        inversion_error=math.nan if made is None else float(made.inversion_error.mean()),
        tau_error=math.nan if is_noise else math.sqrt(squares.mean()),
        noise_correlation=math.nan if is_noise else correlation,
        noise_distance=math.nan if is_noise else distance,
        reference_error=by_bin(reference),
        tau_error_by_bin=tuple(math.nan if is_noise else math.sqrt(value) for value in by_bin(squares)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare inverters with the exact ODE and with known noise.")
    parser.add_argument("--model", default="toyworld/base")
    parser.add_argument("--pairs", default="runs/demo/pairs/webdataset")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, help="Of a prompt, for families that pad it.")
    parser.add_argument("--count", type=int, default=8, help="Pairs.")
    parser.add_argument("--calls", type=int, nargs="+", default=[6, 11, 14, 31], help="Network calls of an image.")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/inversion"))
    parser.add_argument("--document", type=Path, help="Where the tables of this model are written anew.")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = load(chosen, device)
    targets, coarse = exact_way(world)[0], exact_way(world, every=8)[0]
    apart = (targets - coarse).square().mean().sqrt()
    known = draw(world)
    back = known.likeness(known.back)
    groups = {
        calls: [
            measure(name, method, steps, world, targets, known)
            for name, method in METHODS.items()
            if (steps := method.grid_points(calls)) >= 1
        ]
        for calls in chosen.calls
    }
    ours = [measure(name, method, BY_TIMESTEP, world, targets, known) for name, method in OURS.items()]
    name = Path(chosen.model).name
    text = "\n\n".join(
        [
            f"{name} at {chosen.resolution} px: {2 * len(world.pair_ids)} images of {len(world.pair_ids)} pairs, and "
            f"as many from known noise; float32. With half its points the exact ODE moves by {float(apart):.4f} (RMS "
            "of the target). From the images of known noise it leads back to noise whose correlation with the known "
            f"one is {back[0]:.3f}, at a distance of {back[1]:.3f}.",
            by_calls(groups),
            by_timestep(ours, BINS),
        ]
    )
    print(f"{machine()}\n{text}")
    if chosen.document is not None:
        write_between(chosen.document, name, text)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "machine": machine(),
        "pairs": len(world.pair_ids),
        "bins": BINS,
        "oracle_halved": float(apart),
        "oracle_noise": back,
        "by_calls": {calls: [asdict(row) for row in rows] for calls, rows in groups.items()},
        "by_timestep": [asdict(row) for row in ours],
    }
    chosen.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    plot(groups, ours, BINS, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
