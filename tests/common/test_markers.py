"""What a single file says of its own weights, read and written."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError
from inpo.common.models import open_model
from inpo.train.export import export_single_file

V = [
    ({"v_pred": torch.zeros(0)}, {}, "the tensor v_pred"),
    ({}, {"modelspec.prediction_type": "v"}, "modelspec.prediction_type 'v'"),
    ({}, {"ss_v_parameterization": "True"}, "ss_v_parameterization"),
]


@pytest.fixture
def plain(exports, tmp_path):
    """A writer of marked copies of a single file that says nothing of itself."""
    weights = load_file(exports("sd15"))

    def marked(tensors, header):
        save_file(weights | tensors, tmp_path / "marked.safetensors", metadata={"format": "pt"} | header)
        return str(tmp_path / "marked.safetensors")

    return marked


@pytest.mark.parametrize(("tensors", "header", "marker"), V)
def test_a_file_that_says_v_is_not_read_as_noise(tiny, plain, tensors, header, marker):
    location = plain(tensors, header)
    with pytest.raises(ModelError, match="different things") as caught:
        open_model(location, model_config=str(tiny("sd15")))
    for word in (marker, "v_prediction", "prediction_type epsilon", str(tiny("sd15")), "--model-config"):
        assert word in str(caught.value)
    open_model(location, model_config=str(tiny("sd2-v")))


def test_a_file_that_says_noise_or_something_else_is_not_read_as_v(tiny, plain):
    for word in ("epsilon", "EPS", "rectified flow"):
        with pytest.raises(ModelError, match="different things"):
            open_model(plain({}, {"modelspec.prediction_type": word}), model_config=str(tiny("sd2-v")))
    open_model(plain({}, {"modelspec.prediction_type": "epsilon"}), model_config=str(tiny("sd15")))
    open_model(plain({}, {"ss_v_parameterization": "False"}), model_config=str(tiny("sd15")))
    # A file that contradicts itself fits no configuration.
    for kind in ("sd15", "sd2-v"):
        location = plain({"v_pred": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"})
        with pytest.raises(ModelError, match="different things"):
            open_model(location, model_config=str(tiny(kind)))


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"ztsnr": torch.zeros(0)}, {}, "zero-terminal-SNR"),
        ({}, {"ss_zero_terminal_snr": "True"}, "zero-terminal-SNR"),
        ({"edm_vpred.sigma_max": torch.tensor(80.0)}, {}, "EDM"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, {}, "EDM"),
    ],
)
def test_a_schedule_that_is_not_supported_is_refused(tiny, plain, tensors, header, message):
    with pytest.raises(ModelError, match=message):
        open_model(plain({"v_pred": torch.zeros(0)} | tensors, header), model_config=str(tiny("sd2-v")))


@pytest.mark.parametrize(
    ("kind", "prediction_type", "word", "architecture"),
    [
        ("sd15", "epsilon", "epsilon", "stable-diffusion-v1"),
        ("sd2-v", "v_prediction", "v", "stable-diffusion-v1"),
        ("sdxl", "epsilon", "epsilon", "stable-diffusion-xl-v1-base"),
        ("sdxl", "v_prediction", "v", "stable-diffusion-xl-v1-base"),
    ],
)
def test_a_written_file_says_what_it_predicts(tiny, tmp_path, kind, prediction_type, word, architecture):
    folder = shutil.copytree(tiny(kind), tmp_path / "model")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": prediction_type}))
    file = export_single_file(folder, tmp_path / "one.safetensors", dtype="float16")
    with safe_open(file, "pt") as written:
        header, names = written.metadata(), set(written.keys())
    assert ("v_pred" in names) == (word == "v")
    assert header["modelspec.prediction_type"] == word
    assert header["modelspec.architecture"] == architecture
    assert header["modelspec.resolution"] == "32x32"
    open_model(str(file), model_config=str(folder)).load_network()


@pytest.mark.parametrize(("sample_size", "said"), [([8, 12], "48x32"), (None, None)])
def test_a_written_file_says_the_size_that_the_model_was_made_for(model_copy, tmp_path, sample_size, said):
    config = model_copy / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": sample_size}))
    file = export_single_file(model_copy, tmp_path / "one.safetensors", dtype="float16")
    with safe_open(file, "pt") as written:
        assert written.metadata().get("modelspec.resolution") == said
