"""Options of other trainers are answered with ours, and `doctor` says what is here."""

import re

import pytest
from typer.testing import CliRunner

from inpo.cli import app
from inpo.common.errors import UsageError
from inpo.common.foreign import _ANSWERS


def invoke(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["train", "--max_train_steps", "10"], "--steps"),
        (["train", "--max-train-steps=10"], "--steps"),
        (["train", "--pretrained_model_name_or_path", "m"], "--model"),
        (["train", "--mixed_precision=bf16"], "--dtype"),
        (["train", "--rank", "4"], "--lora-rank"),
        (["train", "--resume_from_checkpoint", "latest"], "--resume"),
        (["train", "--report_to", "wandb"], "--tracker"),
        (["precompute", "--train_batch_size", "4"], "--batch-size"),
        (["precompute", "--max_train_steps", "4"], "another command: see `inpo train --help`"),
        (["train", "--dataset_name", "d"], "another command: see `inpo precompute --help`"),
        (["evaluate", "generate", "--num_inference_steps", "4"], "--inference-steps"),
    ],
    ids=" ".join,
)
def test_another_trainers_option_is_answered_with_ours(words, ours):
    error = invoke(*words).exception
    assert isinstance(error, UsageError)
    assert ours in str(error)
    assert error.exit_code == 2


def test_our_own_options_are_nobody_elses_and_every_answer_exists():
    shown = "".join(invoke(*words, "--help").output for words in (["precompute"], ["train"], ["evaluate", "generate"]))
    ours = set(re.findall(r"--[a-z0-9-]+", shown))
    named = {option for answer in _ANSWERS.values() for option in re.findall(r"--[a-z0-9-]+", answer)}
    assert named <= ours
    assert invoke("train", "--no-such-thing").exit_code == 2  # as ever
    assert "nothing" not in str(invoke("train", "--resume", "never", "--steps", "0").exception)


def test_doctor_names_versions_device_disk_hub_and_what_is_missing(tmp_path, monkeypatch):
    done = invoke("doctor", str(tmp_path))
    assert done.exit_code in (0, 1)
    for words in ("torch ", "diffusers ", "torch is built for", "free at", "hub: ", "not installed", str(tmp_path)):
        assert words in done.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert re.search("only for: .*torchao.*datasets", invoke("doctor", str(tmp_path)).output)
    # What is missing is called as pip calls it, and looked for as Python does.
    monkeypatch.setattr("importlib.util.find_spec", {"open_clip": True}.get)
    missing = invoke("doctor", str(tmp_path)).output.partition("only for: ")[2]
    assert "image-reward (" in missing
    assert "open_clip" not in missing
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        refused = invoke("doctor", str(path))
        assert refused.exit_code == 1
        assert f"problem: {tmp_path / 'file'} is not a folder" in refused.output
    monkeypatch.setattr("inpo.common.device.why_no_gpu", lambda: "an NVIDIA GPU is there, and torch cannot use it")
    broken = invoke("doctor", str(tmp_path))
    assert broken.exit_code == 1
    assert "problem: an NVIDIA GPU is there" in broken.output
