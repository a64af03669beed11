"""`--faithful` as a run: it reads the model's scheduler, and refuses models that the released code does not invert."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inpo.common.errors import ModelError


def test_the_clean_end_is_the_models_schedulers(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """With set_alpha_to_one the first step is longer, and adds no noise: other targets at every timestep."""
    other = shutil.copytree(pipelines(), tmp_path / "alpha-one")
    file = other / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert config["set_alpha_to_one"] is False
    file.write_text(json.dumps(config | {"set_alpha_to_one": True}))
    source = write_tars(tmp_path / "pairs", examples(3), 3)
    made = [
        run.cache(source, model, tmp_path / f"cache-{number}", faithful=True)
        for number, model in enumerate((pipelines(), other))
    ]
    (plain,), (one,) = made
    np.testing.assert_array_equal(plain.read("timestep"), one.read("timestep"))
    difference = (plain.read("target").astype(float) - one.read("target")) ** 2
    assert (difference.mean((-3, -2, -1)) > 1e-5).all()


@pytest.mark.parametrize("kind", ["sd2-v", "sample"])
def test_a_model_that_the_released_code_does_not_invert_is_refused(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, kind: str
) -> None:
    source = write_tars(tmp_path / "pairs", examples(2), 2)
    with pytest.raises(ModelError, match="--faithful"):
        run(source, pipelines(kind), tmp_path / "cache", faithful=True)
    assert not (tmp_path / "cache").exists()
