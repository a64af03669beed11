"""HPSv2 against its project's computing, where open_clip is at hand: installed, or in build/open_clip."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SIDE_FOLDER = ROOT / "build" / "open_clip"
"""For a CPU build of torch, beside which torchvision must not be installed (see hps_equality.py)."""


@pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None and not SIDE_FOLDER.is_dir(),
    reason="open_clip is not installed (pip install open_clip_torch)",
)
def test_hps_equals_its_projects_computing(tmp_path: Path) -> None:
    paths = [str(ROOT), str(SIDE_FOLDER)] if SIDE_FOLDER.is_dir() else [str(ROOT)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "hps_equality.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads(done.stdout.splitlines()[-1])
    assert scores["ours"] == pytest.approx(scores["upstream"], rel=1e-4, abs=1e-6)
    assert np.ptp(scores["ours"]) > 0.05
