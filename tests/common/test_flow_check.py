"""A trained flow gives its noise back at time 1 and minus its latent at time 0, which tells sign and time."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError
from inpo.common.families import FAMILIES
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.toyworld.sampling import MODELS

SD3 = FAMILIES["sd3"]


@pytest.fixture(scope="module")
def trained() -> Path:
    """A flow that has been trained."""
    return MODELS["flow"]


def load(folder: Path) -> Any:
    return open_model(str(folder)).load_network()


def test_a_trained_flow_is_taken_in_silence(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(trained)
    assert "noise - x0" not in capsys.readouterr().err


def test_weights_of_another_sign_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "flipped")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.weight"] *= -1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="noise - x0") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


CALL = type(SD3).call
WRONG: dict[str, Callable[..., Any]] = {
    "sign": lambda *given: -CALL(*given),
    "time reversed": lambda family, network, x, label, told: CALL(family, network, x, 1000 - label, told),
    "time unscaled": lambda family, network, x, label, told: CALL(family, network, x, label / 1000, told),
    "sign and time": lambda family, network, x, label, told: -CALL(family, network, x, 1000 - label, told),
    "sign and scale": lambda family, network, x, label, told: -CALL(family, network, x, label / 1000, told),
    "time scaled": lambda family, network, x, label, told: CALL(family, network, x, label * 1000, told),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_family_that_calls_its_network_wrongly_is_refused(
    trained: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(SD3), "call", WRONG[how])
    with pytest.raises(ModelError, match="noise - x0"):
        load(trained)


def test_weights_that_show_nothing_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_pipeline(tmp_path / "random", "sd3")
    load(folder)
    load(folder)
    assert capsys.readouterr().err.count("does not give noise - x0") == 1


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "broken", "sd3")
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        load(folder)
