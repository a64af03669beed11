"""A pair, a cache and a number in words, for sheets, reports and the terminal."""

from inpo.common.cache import Manifest
from inpo.inspection.pair_view import PairView


def pair_facts(view: PairView) -> str:
    """Id, label, and whether the caption was dropped."""
    label = "win preferred" if view.label == 1.0 else f"P(win preferred) {view.label:.3g}"
    return f"pair {view.pair_id}   ·   {label}" + ("   ·   caption dropped" if view.caption_dropped else "")


def cache_facts(manifest: Manifest) -> str:
    """How the latents were made."""
    inverter = manifest.inverter
    condition = {0.0: "empty prompt", 1.0: "caption"}.get(inverter.guidance, f"guidance {inverter.guidance:g}")
    options = [f"refined start {inverter.refine_start}"] if inverter.refine_start else []
    options += [f"noised start {inverter.noised_start:g}"] if 0 < inverter.noised_start < 1 else []
    options += ["faithful to the released code"] if inverter.faithful else []
    return ", ".join(
        [
            f"{inverter.name}, {inverter.grid_points} grid points",
            condition,
            *options,
            manifest.network_dtype,
            f"{manifest.family} model",
            manifest.profile,
        ]
    )


def number(value: float | None) -> str:
    """Four digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.4g}"
