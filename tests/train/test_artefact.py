"""What is written computes what was trained, whatever option trained it: reloaded by diffusers, the same forward."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

import inpo.train.run
from inpo.common.cache import open_cache
from inpo.common.errors import UsageError
from inpo.common.models import open_model
from inpo.evaluation.lora import load_lora, lora_file
from inpo.train.export import export_single_file
from inpo.train.settings import TrainSettings

LORA = {"lora_rank": 4, "learning_rate": 1e-1}
# Each run tries several options, and together they try all objectives that this cache serves.
OPTIONS: dict[str, dict[str, Any]] = {
    "learning_rate, weight_decay, adam_betas, adam_eps, clip, schedule, warmup_steps": {
        "weight_decay": 0.3,
        "adam_betas": (0.5, 0.5),
        "adam_eps": 1e-4,
        "clip": 0.1,
        "schedule": "cosine",
        "warmup_steps": 1,
    },
    "beta, seed, batch_size, accumulate, steps, window_shards, gradient_checkpointing": {
        "beta": 50.0,
        "seed": 3,
        "batch_size": 1,
        "accumulate": 2,
        "steps": 1,
        "window_shards": 1,
        "gradient_checkpointing": True,
    },
    "optimizer, objective": {"optimizer": "adafactor", "objective": "kto"},
    "ema": {"ema": 0.9, "steps": 3, "objective": "hinge"},
    "dtype": {"dtype": "bfloat16", "objective": "ipo"},
    "compile": {"compile": "whole", "objective": "sft"},
    "init_from": {"init_from": "other", "objective": "mapo"},
    "held_out, only, except": {"held_out": 0.3},
    "lora_rank": LORA,
    "lora_alpha": LORA | {"lora_alpha": 16.0},
    "lora_alpha below the rank, odd": LORA | {"lora_rank": 3, "lora_alpha": 0.7},
    "lora_alpha, ema, dtype": LORA | {"lora_alpha": 16.0, "ema": 0.9, "dtype": "bfloat16"},
    "lora_alpha, rank above it, ema": LORA | {"lora_rank": 16, "lora_alpha": 4.0, "ema": 0.9},
    "lora_alpha, init_from": LORA | {"lora_alpha": 2.0, "init_from": "other"},
    "lora_targets": LORA
    | {
        "lora_alpha": 1.0,
        "lora_targets": (
            *("to_k", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_in", "conv_out"),
            *("conv_shortcut", "time_emb_proj", "time_embedding.linear_1", "downsamplers.0.conv", "upsamplers.0.conv"),
        ),
    },
    "lora_rank, compile": LORA | {"compile": "blocks"},
    "parameter, sdpo, loss_space, swap_labels, timestep_range": {
        "objective": "poly",
        "parameter": 2.0,
        "sdpo": 0.9,
        "loss_space": "v",
        "swap_labels": True,
        "timestep_range": (0, 900),
    },
}
DECIDE_NO_WEIGHT = {
    *("output", "caches", "log_every", "save_every", "keep_last", "evaluate_every", "held_out_records", "tracker"),
    *("project", "run_name", "push_to_hub", "push_private"),
    *("sample_every", "sample_prompts", "sample_steps", "sample_guidance", "check_finite"),
    *("labels", "score_temperature"),  # columns of the data, as the pairs are
    "overfitting",  # decides when a run ends, as the steps do
    "except_",  # `except` above
}


def test_no_option_is_left_out() -> None:
    tried = {word for name in OPTIONS for word in name.replace(",", "").split()}
    assert set(TrainSettings.model_fields) - DECIDE_NO_WEIGHT <= tried


@torch.no_grad()
def forward(unet: torch.nn.Module) -> torch.Tensor:
    """The network's output for fixed inputs, in eval mode as it is."""
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 16, 32, generator=draw)
    dtypes = {parameter.dtype for parameter in unet.parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.bfloat16 in dtypes):
        return unet(x, torch.tensor([100, 700]), text).sample.float()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.nn.Module]]:
    """The networks that runs trained, as those left them."""
    kept: list[torch.nn.Module] = []
    prepare = inpo.train.run.prepare_network

    def keep(unet: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        kept.append(unet)
        return prepare(unet, *arguments, **options)

    monkeypatch.setattr(inpo.train.run, "prepare_network", keep)
    # The network is wrapped as ever, and neither traced nor translated, which would take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch.compiler.set_stance("force_eager"):
        yield kept


def unet_in(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def base_pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_written_output_computes_what_was_trained(
    make_world: Callable[..., Any],
    cache: str,
    run: Callable[..., Path],
    tmp_path: Path,
    trained: list[torch.nn.Module],
    name: str,
) -> None:
    flags = {"steps": 2, "learning_rate": 1e-2} | OPTIONS[name]
    start = make_world().model.folder
    if "init_from" in flags:
        start = make_world(seed=1).model.folder
        flags["init_from"] = str(start)
    if flags.get("dtype") == "bfloat16":
        cache = make_world().cache(tmp_path / "cache", shards=(3,), network_dtype="bfloat16")
    if "only" in name:
        known = [str(pair_id) for shard in open_cache(cache) for pair_id in shard.read("pair/id")]
        (tmp_path / "only").write_text("\n".join(known[:6]))
        (tmp_path / "except").write_text(known[0])
        flags |= {"only": tmp_path / "only", "except": tmp_path / "except"}
    output = run(caches=[cache], **flags)
    (network,) = trained
    assert not network.training
    want, plain = forward(network), forward(unet_in(start))
    effect = (want - plain).norm()
    # Computed in bfloat16, against a pipeline in float32; of an alpha that is lost 0.75 would be missing.
    tolerance = 0.1 if flags.get("dtype") == "bfloat16" else 1e-4
    assert effect > 1e-2

    found: dict[str, torch.nn.Module] = {}
    if "lora_rank" in flags:
        loaded = base_pipeline(start)
        loaded.load_lora_weights(output / "lora")
        found["load_lora_weights"] = loaded.unet
        ours = base_pipeline(start)
        load_lora(ours, lora_file(str(output / "lora")), open_model(str(start)))
        found["evaluate --lora"] = ours.unet
    else:
        found["pipeline"] = unet_in(output / "pipeline")
    single = export_single_file(output, tmp_path / "one" / "one.safetensors", dtype="float32")
    found["export"] = UNet2DConditionModel.from_single_file(str(single), config=str(start), subfolder="unet")
    for loader, unet in found.items():
        assert (forward(unet) - want).norm() < tolerance * effect, loader


def test_a_lora_survives_the_conversion_to_the_interfaces_format(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, trained: list[torch.nn.Module]
) -> None:
    """diffusers' own conversion writes the rank for alpha, as every loader takes it where there is none."""
    output = run(steps=2, **LORA, lora_alpha=16.0)
    base = make_world().model.folder
    state = convert_state_dict_to_kohya(
        convert_all_state_dict_to_peft(load_file(output / "lora/pytorch_lora_weights.safetensors"))
    )
    assert {float(value) for name, value in state.items() if name.endswith("alpha")} == {4.0}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "kohya.safetensors")
    loaded = base_pipeline(base)
    loaded.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    want, plain = forward(trained[0]), forward(unet_in(base))
    assert (forward(loaded.unet) - want).norm() < 1e-4 * (want - plain).norm()


ENVIRONMENT = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
    "ACCELERATE_GRADIENT_CLIPPING": "1e-6",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "NVIDIA_TF32_OVERRIDE": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def test_the_environment_decides_nothing(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `accelerate launch` would set from its flags or its own file, and what torch reads."""
    options = {"steps": 2, "accumulate": 2, "learning_rate": 1e-2, "held_out": 0.0}
    plain = run(output=tmp_path / "plain", **options)
    assert "not followed" not in capsys.readouterr().err
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)
    try:
        again = run(output=tmp_path / "again", **options)
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_default_dtype() is torch.float32
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_default_dtype(torch.float32)
    left, right = (load_file(next((each / "pipeline/unet").glob("*.safetensors"))) for each in (plain, again))
    assert all(torch.equal(left[name], right[name]) for name in left)
    notes = capsys.readouterr().err
    for name in (
        *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=3", "ACCELERATE_MIXED_PRECISION=bf16", "ACCELERATE_DYNAMO_BACKEND"),
        *("ONEDNN_DEFAULT_FPMATH_MODE=BF16", "NVIDIA_TF32_OVERRIDE=1", "FSDP_CPU_RAM_EFFICIENT_LOADING"),
        "ACCELERATE_USE_FSDP",
    ):
        assert name in notes


@pytest.mark.parametrize(
    "name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"]
)
def test_another_way_of_training_is_refused(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(UsageError, match="not supported") as caught:
        run(steps=1)
    assert name in str(caught.value)


def test_dropout_is_off_in_training_and_said(
    make_world: Callable[..., Any], run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same network with dropout in its configuration: the same cache, losses and weights, to the last bit."""
    world = make_world()
    folder = shutil.copytree(world.model.folder, tmp_path / "dropout")
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.5}))
    outputs = []
    for name, model in (("plain", world.model), ("dropout", open_model(str(folder)))):
        location = type(world)(model=model).cache(tmp_path / f"{name}-cache", shards=(4,))
        outputs.append(
            run(
                model=str(model.folder), caches=[location], steps=3, learning_rate=1e-3, output=tmp_path / f"{name}-run"
            )
        )
        assert ("the network's dropout 0.5 is off" in capsys.readouterr().err) == (name == "dropout")
    left, right = (load_file(next((each / "pipeline/unet").glob("*.safetensors"))) for each in outputs)
    assert all(torch.equal(left[name], right[name]) for name in left)
