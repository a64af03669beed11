"""Two models of the embedded world, from prompts to the table: it comes again from nothing but the saved images."""

import json
import shutil
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from inpo.evaluation.cli import app
from inpo.toyworld.heldout import HeldoutScorer
from inpo.toyworld.oracle import OracleScorer
from inpo.toyworld.scenes import captions

BASE = Path(__file__).parents[2] / "toyworld" / "base"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.exception
    return result.output


def test_a_comparison_of_two_models_comes_again_from_the_saved_images(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    (file,) = (other / "unet").glob("*.safetensors")
    weights = load_file(file)
    save_file(weights | {"conv_out.weight": 0.8 * weights["conv_out.weight"]}, file, {"format": "pt"})
    prompts = captions("test")[:8]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    folders = {"base": BASE, "tuned": other}
    for name, model in folders.items():
        run(
            *("generate", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt")),
            *("--out", str(tmp_path / name), "--inference-steps", "4", "--guidance", "2.5"),
        )
    compare = ("compare", *(str(tmp_path / name) for name in folders), "--out")
    scorers = ("--scorer", "toyworld-oracle", "--scorer", "toyworld-heldout")
    first = run(*compare, str(tmp_path / "first"), *scorers)
    for name in folders:
        for file in (tmp_path / name).glob("scores-*"):
            file.unlink()
    run(*compare, str(tmp_path / "second"), *scorers)
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "first" / "comparison.md").read_text() in first

    # The table's numbers, from the saved files with nothing of ours but the scorers.
    document = json.loads((tmp_path / "first" / "comparison.json").read_text())["scorers"]
    lines = [json.loads(line) for line in (tmp_path / "base" / "images.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(prompts)
    for scorer in (OracleScorer(), HeldoutScorer()):
        a, b = (
            scorer.score([Image.open(tmp_path / name / line["file"]) for line in lines], list(prompts))
            for name in folders
        )
        found = document[scorer.name]
        assert found["num_pairs"] == 8
        np.testing.assert_allclose(found["mean_difference"], np.mean(b - a), rtol=1e-5)
        np.testing.assert_allclose(found["median_difference"], np.median(b - a), rtol=1e-5)
        assert found["win_rate"] == np.mean(b > a)
        assert found["mean_difference"] != 0
        wilson = scipy.stats.binomtest(int((b > a).sum()), 8).proportion_ci(method="wilson")
        np.testing.assert_allclose(found["win_rate_wilson"], [wilson.low, wilson.high])
    # Scored in other batches the same images are alike, whatever that changes in the last digits.
    shutil.copytree(tmp_path / "base", tmp_path / "again", ignore=shutil.ignore_patterns("scores-*"))
    run("score", str(tmp_path / "again"), "--scorer", "toyworld-heldout", "--batch-size", "1")
    told = run("compare", str(tmp_path / "base"), str(tmp_path / "again"))
    assert "again is better than base on 0 of 8 images (alike on 8) by toyworld-heldout." in told
