"""Whatever the network predicts, noise and the clean latent come out, as float64 algebra says."""

import diffusers
import numpy as np
import pytest
import torch

from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser, dtype_name, prepare_for_inference
from inpo.common.errors import UsageError
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels
from inpo.common.models import open_model

CALL = FAMILIES["sd"].call
KINDS = ("epsilon", "v_prediction", "sample")
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction_type", [*KINDS, "flow_prediction"])
def test_an_exact_prediction_gives_its_noise_and_its_clean_latent(prediction_type):
    """x = a x0 + s eps and the network's answer: eps, v = a eps - s x0 (Salimans and Ho 2022), x0, or eps - x0."""
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 5, 4, 8, 8))
    timestep = np.array([0, 1, 50, 500, 999])
    scheduler = diffusers.DDIMScheduler(**SD15)
    abar = scheduler.alphas_cumprod.numpy().astype(np.float64)[timestep].reshape(-1, 1, 1, 1)
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    x = a * x0 + s * eps
    answers = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0, "flow_prediction": eps - x0}
    answer = answers[prediction_type]

    denoiser = Denoiser(torch.nn.Linear(1, 1), Levels.from_scheduler(scheduler), CALL, prediction_type)
    arguments = [torch.from_numpy(value).float() for value in (answer, x)]
    labels = torch.from_numpy(timestep)
    # float32 inputs: an error of 1e-7 in x is divided by s (noise from a sample) or by a (clean from noise).
    tolerance = 4e-6 / min(s.min(), a.min())
    for convert, expected in ((denoiser.to_noise, eps), (denoiser.to_clean, x0)):
        got = convert(*arguments, labels).double()
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_noise_and_clean_agree_with_the_schedulers_own_step(prediction_type):
    scheduler = diffusers.DDIMScheduler(**SD15, clip_sample=False, prediction_type=prediction_type)
    denoiser = Denoiser(torch.nn.Linear(1, 1), Levels.from_scheduler(scheduler), CALL, prediction_type)
    scheduler.set_timesteps(1000)
    output, x = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for label in (3, 400, 999):
        expected = scheduler.step(output, label, x).pred_original_sample
        got = denoiser.to_clean(output, x, torch.tensor([label]))
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "sd2-v", "sdxl"])
def test_a_call_is_the_network_and_the_conversion(tiny, kind):
    model = open_model(str(tiny(kind)))
    unet = model.load_network()
    prepare_for_inference(unet, network_dtype="float32", device=torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    generator = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    x = torch.randn(2, 4, size, size, generator=generator)
    timestep = torch.tensor([10, 700])
    condition = Condition(embedding=torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator))
    added = None
    if kind == "sdxl":
        pooled_width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        pooled, time_ids = torch.randn(2, pooled_width, generator=generator), torch.full((2, 6), 32.0)
        condition = Condition(embedding=condition["embedding"], pooled=pooled, time_ids=time_ids)
        added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        expected = unet(x, timestep, encoder_hidden_states=condition["embedding"], added_cond_kwargs=added).sample
        denoiser = model.denoiser(unet)
        output = denoiser.predict(x, timestep, condition)
        noise = denoiser(x, timestep, condition.to(torch.device("cpu")))
    assert torch.equal(output, expected)
    assert torch.equal(noise, denoiser.to_noise(expected, x, timestep))
    assert denoiser.num_calls == 4


def test_casting_the_weights_first_changes_no_number(tiny):
    """autocast casts the same weights at every call."""
    model = open_model(str(tiny("sd15")))
    size = model.load_network().config.sample_size
    x = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    condition = Condition(embedding=torch.ones(1, 16, model.load_network().config.cross_attention_dim))
    outputs = []
    for prepared in (False, True):
        unet = model.load_network().eval()
        if prepared:
            prepare_for_inference(unet, network_dtype="bf16", device=torch.device("cpu"))
            assert unet.conv_in.weight.dtype == torch.bfloat16
        with torch.no_grad():
            outputs.append(model.denoiser(unet, network_dtype="bf16")(x, torch.tensor([500]), condition))
    assert outputs[0].dtype == torch.float32
    assert torch.equal(*outputs)


def test_dtype_names():
    assert [dtype_name(name) for name in ("bf16", "float32", "fp16")] == ["bfloat16", "float32", "float16"]
    with pytest.raises(UsageError, match="float8"):
        dtype_name("float8")


def test_what_the_network_predicts_itself_is_handed_on_to_the_last_bit():
    levels = Levels.from_scheduler(diffusers.DDIMScheduler(**SD15))
    output, x = torch.randn(2, 50, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    timestep = torch.arange(0, 1000, 20)
    assert Denoiser(torch.nn.Linear(1, 1), levels, CALL, "epsilon").to_noise(output, x, timestep) is output
    assert Denoiser(torch.nn.Linear(1, 1), levels, CALL, "sample").to_clean(output, x, timestep) is output
    a, s = (torch.from_numpy(value).float()[:, None, None, None] for value in levels.at(timestep.numpy()))
    v = Denoiser(torch.nn.Linear(1, 1), levels, CALL, "v_prediction")
    assert torch.equal(v.to_noise(output, x, timestep), s * x + a * output)
    assert torch.equal(v.to_clean(output, x, timestep), a * x - s * output)
