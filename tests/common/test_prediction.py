"""A trained network that predicts noise gives noise back at the last label: the toy world's base is one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError
from inpo.common.models import open_model
from inpo.common.prediction import noise_likeness
from inpo.train.export import export_single_file

BASE = Path(__file__).parents[2] / "toyworld" / "base"


@pytest.fixture
def configured(tmp_path):
    """The trained base with another prediction type written into its scheduler's configuration."""

    def make(prediction_type: str, model: Path = BASE, **scheduler: int) -> Path:
        folder = shutil.copytree(model, tmp_path / prediction_type)
        file = folder / "scheduler" / "scheduler_config.json"
        values = {"prediction_type": prediction_type, **scheduler}
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return folder

    return make


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one configuration."""

    def serve(folder: Path) -> None:
        monkeypatch.setattr(
            "inpo.common.single_file.snapshot_download", lambda location, *, allow_patterns: str(folder)
        )

    return serve


def test_a_trained_network_agrees_with_its_configuration_in_silence(capsys):
    model = open_model(str(BASE))
    model.load_network()
    model.load_pipeline()
    assert "configured" not in capsys.readouterr().err


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("load", ["load_network", "load_pipeline"])
def test_noise_weights_under_another_name_are_refused(configured, prediction_type, load):
    folder = configured(prediction_type)
    with pytest.raises(ModelError, match="weights predict noise") as caught:
        getattr(open_model(str(folder)), load)()
    message = str(caught.value)
    assert str(folder) in message
    assert prediction_type in message
    assert f"prediction_type to epsilon in {folder / 'scheduler' / 'scheduler_config.json'}" in message


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
def test_a_schedule_that_keeps_much_of_the_image_is_not_judged(tiny, configured, prediction_type, capsys):
    """With 250 labels of Stable Diffusion's betas a_T is 0.5: there v is like x, whatever the network."""
    open_model(str(configured(prediction_type, num_train_timesteps=250))).load_network()
    assert "configured" not in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(configured):
    folder = configured("v_prediction")
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        open_model(str(folder)).load_network()


def test_a_guessed_configuration_of_the_wrong_kind_is_refused(configured, hub, tmp_path):
    """Stable Diffusion 2 base, for which diffusers takes 2.1's configuration."""
    single = export_single_file(BASE, tmp_path / "base.safetensors", dtype="float32")
    save_file(load_file(single), single)  # most files say nothing of themselves
    hub(configured("v_prediction"))
    with pytest.raises(ModelError, match="weights predict noise") as caught:
        open_model(str(single)).load_network()
    assert "--model-config DIR" in str(caught.value)
    assert "prediction_type epsilon" in str(caught.value)
    assert "stable-diffusion-v1-5" in str(caught.value)
    hub(BASE)
    guessed = open_model(str(single)).load_network().state_dict()
    named = open_model(str(single), model_config=str(BASE)).load_network().state_dict()
    assert all(torch.equal(guessed[name], value) for name, value in named.items())


def test_weights_that_give_no_noise_back_are_noted_and_refused_where_the_configuration_was_guessed(
    tiny, configured, hub, tmp_path, capsys
):
    folder = configured("epsilon", tiny("sd15"))
    open_model(str(folder)).load_network()
    open_model(str(folder)).load_network()
    assert capsys.readouterr().err.count("does not give noise back") == 1
    single = export_single_file(folder, tmp_path / "single.safetensors", dtype="float32")
    open_model(str(single), model_config=str(folder)).load_network()
    hub(folder)
    with pytest.raises(ModelError, match="do not predict noise") as caught:
        open_model(str(single)).load_network()
    assert "probably v_prediction" in str(caught.value)


def test_the_call_leaves_no_trace_in_other_random_numbers(tiny):
    model = open_model(str(tiny("sdxl")))
    asked = (model.denoiser(model.load_network()), model.family.blank(model.config, 2, (32, 32)), (4, 4, 4))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert noise_likeness(*asked) == noise_likeness(*asked)
    assert torch.equal(torch.rand(3), expected)


def test_what_networks_of_v_and_of_the_sample_would_show():
    """The base's own noise, written as v and as the sample in float64, where the check asks: without text, at the last
    label.
    """
    model = open_model(str(BASE))
    unet, a, s = model.load_network(), model.levels.signal[-1], model.levels.noise[-1]
    x = torch.randn(16, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        noise = unet(x, 999, torch.zeros(16, 77, unet.config.cross_attention_dim)).sample.double()
    sample = (x - s * noise) / a
    v = a * noise - s * sample
    found = [
        torch.nn.functional.cosine_similarity(each.flatten(), x.double().flatten(), dim=0)
        for each in (noise, v, sample)
    ]
    assert found[0] > 0.95
    assert abs(found[1]) < 0.8
    assert abs(found[2]) < 0.8
