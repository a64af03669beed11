"""What the benchmarks share: a cache of one model is none of another's, in one folder too."""

from pathlib import Path
from typing import Any

import pytest

import benchmarks.setting
from benchmarks.setting import setting
from inpo.common.models import open_model
from tests.light import save_light_pipeline


def test_another_model_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"num_pairs": 1, "steps": 2, "kept": 1, "batch_size": 1}
    made = []
    for seed in (0, 1, 0):
        model = save_light_pipeline(tmp_path / f"{seed}", seed=seed)
        monkeypatch.setattr(benchmarks.setting, "model_for", lambda *_, at=model: open_model(str(at)))
        made.append(setting("toyworld", tmp_path / "bench").cache(**asked))
    first, second, again = made
    assert first.location == again.location != second.location
    assert first.commits == again.commits
    assert first.manifest.fingerprints != second.manifest.fingerprints
