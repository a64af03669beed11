"""LoRA layers in the formats of other programs: read back by diffusers and peft, and by the names these build."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from inpo.cli import app
from inpo.common.errors import ModelError, UsageError
from inpo.common.families import FAMILIES
from inpo.common.families.lora import kohya_state
from inpo.common.models import open_model
from inpo.common.testing import save_tiny_pipeline
from inpo.common.trained_over import write_over
from inpo.train.export import export_single_file
from inpo.train.lora import export_lora, save_kohya

RANK = 2
SDXL = {"layers_per_block": 2, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
SDXL_TRANSFORMER = "transformer_blocks.0."

# Our layer, and the name that sd-scripts gives it and ComfyUI's key map holds (SD: lora_unet_ and diffusers' name; else
# lora_unet_ and the published name), as LoRA files in the wild have them.
NAMES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "sd": (
        {},
        {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": (
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
            ),
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"
            ),
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": (
                "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj"
            ),
        },
    ),
    "sdxl": (
        SDXL,
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k": (
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
            ),
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v": (
                "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_v"
            ),
            "mid_block.attentions.0.transformer_blocks.3.attn1.to_out.0": (
                "lora_unet_middle_block_1_transformer_blocks_3_attn1_to_out_0"
            ),
            "mid_block.resnets.1.conv1": "lora_unet_middle_block_2_in_layers_2",
            "up_blocks.0.attentions.2.proj_in": "lora_unet_output_blocks_2_1_proj_in",
            "up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
            "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.2": (
                "lora_unet_output_blocks_3_1_transformer_blocks_1_ff_net_2"
            ),
            "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
            "time_embedding.linear_1": "lora_unet_time_embed_0",
        },
    ),
    "flux": (
        {},
        {
            "transformer_blocks.0.attn.to_k": "lora_unet_double_blocks_0_img_attn_qkv",
            "transformer_blocks.18.attn.to_out.0": "lora_unet_double_blocks_18_img_attn_proj",
            "transformer_blocks.3.attn.add_v_proj": "lora_unet_double_blocks_3_txt_attn_qkv",
            "transformer_blocks.3.attn.to_add_out": "lora_unet_double_blocks_3_txt_attn_proj",
            "transformer_blocks.3.ff.net.0.proj": "lora_unet_double_blocks_3_img_mlp_0",
            "transformer_blocks.3.ff_context.net.2": "lora_unet_double_blocks_3_txt_mlp_2",
            "single_transformer_blocks.37.attn.to_q": "lora_unet_single_blocks_37_linear1",
            "single_transformer_blocks.0.proj_out": "lora_unet_single_blocks_0_linear2",
            "single_transformer_blocks.0.norm.linear": "lora_unet_single_blocks_0_modulation_lin",
        },
    ),
    "sd3": (
        {},
        {
            "transformer_blocks.0.attn.to_q": "lora_unet_joint_blocks_0_x_block_attn_qkv",
            "transformer_blocks.23.attn.add_k_proj": "lora_unet_joint_blocks_23_context_block_attn_qkv",
            "transformer_blocks.5.attn.to_add_out": "lora_unet_joint_blocks_5_context_block_attn_proj",
            "transformer_blocks.5.attn2.to_v": "lora_unet_joint_blocks_5_x_block_attn2_qkv",
            "transformer_blocks.5.ff.net.0.proj": "lora_unet_joint_blocks_5_x_block_mlp_fc1",
        },
    ),
}


def layers(names: list[str], rank: int = RANK, width: int = 6) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_{side}.weight": torch.randn(shape, generator=draw)
        for name in names
        for side, shape in (("A", (rank, width)), ("B", (4 * width if name.endswith("proj_mlp") else width, rank)))
    }


def family(name: str) -> Any:
    return FAMILIES[name]


@pytest.mark.parametrize("name", NAMES)
def test_kohyas_names_are_those_that_interfaces_look_for(name: str) -> None:
    config, expected = NAMES[name]
    for ours, theirs in expected.items():
        state = kohya_state(layers([ours]), lambda layer: family(name).original(layer, config))
        assert set(state) == {f"{theirs}.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")}
        assert state[f"{theirs}.alpha"] == len(state[f"{theirs}.lora_down.weight"])


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v", "proj_mlp"), ("to_k", "to_v"), ("to_v",), ("proj_mlp",)])
def test_layers_that_are_one_in_the_published_network_keep_their_change(parts: tuple[str, ...]) -> None:
    """Rows of linear1 are q, k, v and the four times wider hidden layer, whichever of them was trained."""
    block = "single_transformer_blocks.4."
    ours = {part: f"{block}{'' if part == 'proj_mlp' else 'attn.'}{part}" for part in parts}
    given = layers(list(ours.values()))
    state = kohya_state(given, lambda layer: family("flux").original(layer, {}))
    name = "lora_unet_single_blocks_4_linear1"
    change = state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    assert change.shape == (7 * 6, 6)
    for part, rows in {"to_q": (0, 6), "to_k": (6, 12), "to_v": (12, 18), "proj_mlp": (18, 42)}.items():
        want = torch.zeros(rows[1] - rows[0], 6)
        if part in ours:
            want = given[f"{ours[part]}.lora_B.weight"] @ given[f"{ours[part]}.lora_A.weight"]
        torch.testing.assert_close(change[slice(*rows)], want)


def test_a_tensor_that_diffusers_drops_without_a_word_is_named(tmp_path: Path) -> None:
    """Of FLUX's files it reads no layers of the second text encoder; one original layer becomes four of its own."""
    file, second = tmp_path / "lora.safetensors", "text_encoders.t5xxl.transformer.encoder.block.0"
    parts = {f"single_transformer_blocks.4.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
    state = kohya_state(layers(sorted(parts), width=3072), lambda layer: family("flux").original(layer, {}))
    state |= {name: each / 2 for name, each in state.items() if name.endswith("alpha")}
    save_file(state | {f"{second}.lora_up.weight": torch.zeros(2, 2)}, file)
    names = {f"transformer.{part}.lora_{which}.weight" for part in parts for which in "AB"}
    assert family("flux").lora_names(FluxPipeline, file) == names
    save_file(state | {f"{second}.lora_up.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match=rf"1 of its tensors out, the first: {second}\.lora_up\.weight"):
        family("flux").lora_names(FluxPipeline, file)


def forward(unet: UNet2DConditionModel, kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    own = {}
    if kind == "sdxl":
        own = {"text_embeds": torch.randn(2, 48, generator=draw), "time_ids": torch.full((2, 6), 16.0)}
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 8, 8, generator=draw),
            torch.tensor([100, 700]),
            encoder_hidden_states=torch.randn(2, 5, unet.config.cross_attention_dim, generator=draw),
            added_cond_kwargs=own or None,
        ).sample


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_format_has_the_effect_of_training_whatever_alpha_is(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """alpha 16 at rank 2, as saved beside the run, exported in each format, and merged into the single file."""
    world = make_world(kind)
    folder = str(world.model.folder)
    location = world.cache(tmp_path / "c", shards=(3,))
    output = run(model=folder, caches=[location], steps=2, lora_rank=RANK, lora_alpha=16, learning_rate=1e-2)

    def unet(path: Path | None = None) -> Any:
        pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        if path is not None:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        return pipeline.unet

    plain, want = forward(unet(), kind), forward(unet(output / "lora/pytorch_lora_weights.safetensors"), kind)
    files = {"beside": output / "lora-kohya.safetensors"}
    for form in ("kohya", "diffusers"):
        files[form] = export_lora(output, tmp_path / f"{form}.safetensors", form=form, dtype="float32")
    for name, file in files.items():
        assert (forward(unet(file), kind) - want).norm() < 1e-4 * (want - plain).norm(), name
    adapter = export_lora(output, tmp_path / "adapter", form="peft", dtype="float32")
    loaded = PeftModel.from_pretrained(unet(), adapter)
    assert (forward(loaded, kind) - want).norm() < 1e-4 * (want - plain).norm()

    for file in files.values():
        with safe_open(file, "pt") as weights:
            header, names = weights.metadata(), list(weights.keys())
        architecture = "stable-diffusion-xl-v1-base" if kind == "sdxl" else "stable-diffusion-v1"
        assert header["modelspec.architecture"] == f"{architecture}/lora"
        assert header["modelspec.prediction_type"] == "epsilon"
        # What A1111 files a LoRA under.
        assert header["ss_base_model_version"] == ("sdxl_base_v1-0" if kind == "sdxl" else "sd_v1")
        assert header["ss_network_dim"] == header["ss_network_alpha"] == str(RANK)
        assert "v_pred" not in names  # no reader of LoRA files knows it
    # What an earlier run left in the same folder is not given out.
    merged = export_single_file(output, tmp_path / "merged.safetensors", dtype="float32")
    shutil.copytree(folder, output / "pipeline")
    again = export_single_file(output, tmp_path / "again.safetensors", dtype="float32")
    plain_file = export_single_file(Path(folder), tmp_path / "plain.safetensors", dtype="float32")
    written, unchanged = load_file(again), load_file(plain_file)
    assert all(torch.equal(value, written[name]) for name, value in load_file(merged).items())
    assert any(not torch.equal(value, written[name]) for name, value in unchanged.items())
    recipe = (output / "recipe.toml").read_text()
    (output / "recipe.toml").write_text(recipe.replace(f"lora_rank = {RANK}", "lora_rank = 0"))
    with pytest.raises(UsageError, match="no LoRA layers here"):
        export_lora(output, tmp_path / "x.safetensors", form="kohya", dtype="float16")
    (output / "recipe.toml").write_text(recipe)
    half = export_lora(output, tmp_path / "half.safetensors", form="kohya", dtype="float16")
    assert {value.dtype for name, value in load_file(half).items() if "alpha" not in name} == {torch.float16}


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no LoRA layers here"):
        export_lora(tmp_path, tmp_path / "x.safetensors", form="kohya", dtype="float16")
    for target, form in (("x.pt", "kohya"), ("x", "diffusers"), ("x.safetensors", "peft")):
        with pytest.raises(UsageError, match="another kind of place"):
            export_lora(tmp_path, tmp_path / target, form=form, dtype="float16")
    with pytest.raises(UsageError, match=r"--lora model\.safetensors"):
        export_lora(tmp_path, Path("."), form="kohya", dtype="float16")
    for options in ([], ["--single-file", "a.safetensors", "--lora", "b.safetensors"]):
        result = CliRunner().invoke(app, ["export", str(tmp_path), *options])
        assert isinstance(result.exception, UsageError)
        assert "--single-file, --lora" in str(result.exception)


def test_a_family_without_kohyas_names_gets_peft_alone(tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model", "pixart-sigma")
    state = layers(["transformer_blocks.0.attn1.to_q"])
    family("pixart_sigma").save_lora(state, _folder(tmp_path / "run/lora"))
    (tmp_path / "run/recipe.toml").write_text(f'[model]\nmodel = "{model}"\n')
    with pytest.raises(ModelError, match="not told"):
        export_lora(tmp_path / "run", tmp_path / "x.safetensors", form="kohya", dtype="float32")
    told = tmp_path / "run/lora/trained-over.json"
    for text in ("{", "[]", "{}", '"network"'):
        told.write_text(text)
        with pytest.raises(ModelError, match=r"cannot be read[\s\S]*trained-over\.json"):
            export_lora(tmp_path / "run", tmp_path / "x.safetensors", form="kohya", dtype="float32")
    write_over(tmp_path / "run/lora", open_model(str(model)))
    for form in ("kohya", "diffusers"):
        with pytest.raises(ModelError, match="peft"):
            export_lora(tmp_path / "run", tmp_path / "x.safetensors", form=form, dtype="float32")
    assert not (tmp_path / "x.safetensors").exists()
    export_lora(tmp_path / "run", tmp_path / "adapter", form="peft", dtype="float32")
    assert {
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    } == set(state)
    # What an earlier run of another family left is not this one's.
    save_file(state, tmp_path / "run/lora-kohya.safetensors")
    save_kohya(state, open_model(str(model)), tmp_path / "run")
    assert not (tmp_path / "run/lora-kohya.safetensors").exists()


@pytest.mark.parametrize(
    ("layer", "layers_per_block"),
    [("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", [1, 1]), ("time_embedding.cond_proj", 1)],
)
def test_layers_without_a_name_of_kohyas_get_no_file(tmp_path: Path, layer: str, layers_per_block: Any) -> None:
    folder = save_tiny_pipeline(tmp_path / "model", "sdxl")
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": layers_per_block}))
    save_kohya(layers([layer]), open_model(str(folder)), tmp_path)
    assert not (tmp_path / "lora-kohya.safetensors").exists()


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
