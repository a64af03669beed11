"""Every part of a model is there, or the weights that are missing are named, before anything is computed."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from inpo.common.completeness import check_complete
from inpo.common.errors import ModelError
from inpo.common.models import open_model
from inpo.train.export import export_single_file

PARTS = {
    "sd15": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."),
    "sd2-v": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."),
    "sdxl": ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1."),
}


@pytest.mark.parametrize("kind", PARTS)
def test_whole_models_pass_and_the_same_one_computes_the_same_from_a_single_file(exported, kind):
    folder, file = exported(kind)
    check_complete(open_model(str(folder)))
    model = open_model(str(file), model_config=str(folder))
    check_complete(model)
    ours, theirs = model.load_pipeline(), open_model(str(folder)).load_pipeline()
    for part in model.networks:
        left, right = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in right)
        assert not getattr(ours, part).training


@pytest.mark.parametrize(("kind", "prefix"), [(kind, prefix) for kind in PARTS for prefix in PARTS[kind]])
def test_a_weight_that_a_single_file_lacks_is_named(exported, kind, prefix):
    folder, file = exported(kind)
    weights = load_file(file)
    names = sorted(name for name in weights if name.startswith(prefix))
    model = open_model(str(file), model_config=str(folder))
    # The first, the last and those in the middle that diffusers' conversions look for by name; then all of them.
    marked = [name for name in names if "position" in name or "projection" in name or "quant" in name]
    for lost in ([names[0]], [names[-1]], *([name] for name in marked[:2]), names):
        save_file({name: value for name, value in weights.items() if name not in lost}, file)
        with pytest.raises(ModelError, match="weights are missing") as caught:
            check_complete(model)
        assert f"{len(lost)} weights are missing: {sorted(lost)[0]}" in str(caught.value)
        assert "meta" not in str(caught.value)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folders_weight_that_is_missing_is_named_before_anything_is_loaded(tiny, tmp_path, component):
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing") as caught:
        check_complete(open_model(str(folder)))
    assert lost.removeprefix("text_model.") in str(caught.value)


def test_a_missing_shard_of_a_folder_is_named(tiny, tmp_path):
    folder = shutil.copytree(tiny("sd15"), tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    check_complete(open_model(str(folder)))
    shards[1].unlink()
    with pytest.raises(ModelError, match="unet cannot be loaded") as caught:
        check_complete(open_model(str(folder)))
    assert shards[1].name in str(caught.value)


def test_two_encoders_of_one_width_are_told_apart(tiny, tmp_path):
    """diffusers' own pipeline takes the first for the second by its width."""
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    torch.manual_seed(5)
    second = CLIPTextModelWithProjection(config)
    second.save_pretrained(folder / "text_encoder_2")
    unet = json.loads((folder / "unet/config.json").read_text())
    width = config.hidden_size
    unet |= {"cross_attention_dim": 2 * width, "projection_class_embeddings_input_dim": 6 * 8 + width}
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")
    file = export_single_file(folder, tmp_path / "one.safetensors", dtype="float32")
    pipeline = open_model(str(file), model_config=str(folder)).load_pipeline()
    for name, value in second.state_dict().items():
        assert torch.equal(pipeline.text_encoder_2.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("sd15", "feature_extractor"),
        ("sd15", "safety_checker"),
        ("sd15", "image_encoder"),
        ("sdxl", "feature_extractor"),
        ("sdxl", "image_encoder"),
    ],
)
def test_a_part_that_no_stage_needs_is_not_missed(tiny, tmp_path, kind, part):
    folder = shutil.copytree(tiny(kind), tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: ["transformers", "CLIPImageProcessor"]}))
    model = open_model(str(folder))
    check_complete(model)
    model.load_pipeline().save_pretrained(tmp_path / "written")
    written = open_model(str(tmp_path / "written"))
    check_complete(written)
    assert written.index.get(part) in (None, [None, None])
    if kind == "sdxl":
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "written")
