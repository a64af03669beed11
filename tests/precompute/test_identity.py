"""A cache's identity gives back the settings that it was made with, so that advice how to make it anew is whole."""

from collections.abc import Callable
from typing import Any

import pytest

from inpo.common.cache import Manifest
from inpo.common.cache_settings import CacheSettings
from inpo.common.errors import UsageError
from inpo.common.models import open_model
from inpo.precompute.configuration import build_manifest
from inpo.precompute.settings import PrecomputeSettings

ALL = {
    "grid_points": 8,
    "timesteps_per_pair": 3,
    "inverter": "fixed_point",
    "refine_start": 2,
    "noised_start": 0.25,
    "guidance": 3.5,
    "iterations": 7,
    "tolerance": 0.0,
    "caption_dropout": 0.1,
    "timestep_range": (100, 900),
    "profile": "lean",
    "extra": ("delta_prev", "eps_ref"),
    "resolution": 32,
    "flip": True,
    "vae_latent": "sample",
    "measure_inversion": 0.5,
    "dtype": "bfloat16",
    "seed": -7,
    "group": "prompt",
}
"""Away from its default whatever may stand beside the others: `faithful` fixes the inverter."""
CASES: dict[str, dict[str, Any]] = {
    "all": ALL,
    "faithful": {"faithful": True},
    "ab2 as it comes": {"inverter": "ab2"},
    "ab2 not refined": {"inverter": "ab2", "refine_start": 0},
    "noise": {"inverter": "noise"},
    "the default": {},
    "flow": {"levels": "uniform", "shift": "2.5", "embedded_guidance": 3.5, "max_tokens": 128},
}
MODELS = {"flow": "flux"}


@pytest.mark.parametrize("case", CASES)
def test_every_setting_comes_back_from_a_manifest(pipelines: Callable, case: str) -> None:
    settings = PrecomputeSettings(**{"resolution": 32, "dtype": "float32"} | CASES[case])
    model = open_model(str(pipelines(MODELS.get(case, "sd15"))))
    document = build_manifest(settings, model, device_type="cpu").to_json()
    found = CacheSettings.of(Manifest.from_json(document, "manifest.json"))
    told = {name: getattr(settings, name) for name in CacheSettings.model_fields}
    assert found.model_dump() == told | {"group": settings.group or "pair"}


def test_the_resolution_that_is_advised_is_one(pipelines: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """PixArt-Sigma's step is 16 pixels, twice the smallest resolution."""
    model = open_model(str(pipelines("pixart-sigma")))
    monkeypatch.setattr(type(model.family), "vae_factor", lambda self, config: 8)
    with pytest.raises(UsageError, match=r"(?s)multiples of 16.*round it up to 16"):
        build_manifest(PrecomputeSettings(resolution=8), model, device_type="cpu")


def test_no_setting_is_left_out_above() -> None:
    changed = {name for case in CASES.values() for name in case}
    assert changed | CacheSettings.recipe_only == set(CacheSettings.model_fields)
    assert all(value != CacheSettings.model_fields[name].default for name, value in ALL.items())
