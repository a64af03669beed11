"""What a plan says of memory, against what real networks hold: bytes counted on a CPU, no clock."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from inpo.common.batch_size import MOST
from inpo.common.cache import Manifest
from inpo.common.conditions import Condition
from inpo.common.memory import FLOAT32, LOWER, META, Peak, bytes_of, counting
from inpo.common.models import Model
from inpo.common.tensor_watch import TensorWatch
from inpo.common.testing import TinyKind
from inpo.precompute.components import WHOLE, call_blank, fit, load_denoiser, shard_bytes
from inpo.precompute.configuration import build_manifest
from inpo.precompute.memory import precompute_peak
from inpo.precompute.settings import PrecomputeSettings
from inpo.train.memory import train_needs, train_peak
from inpo.train.optim import prepare_network
from inpo.train.settings import TrainSettings
from tests.steps import step_peak

CPU = torch.device("cpu")


def _manifest(model: Model, dtype: str) -> Manifest:
    return build_manifest(PrecomputeSettings(resolution=32, dtype=dtype), model, device_type="cpu")


def _saved(model: Model, manifest: Manifest, device: torch.device, images: int) -> int:
    """Bytes that the graph of one call keeps for its backward pass, beside the weights; every storage once."""
    network = model.empty_component(model.family.network) if device == META else model.load_network()
    network.requires_grad_(True).eval()
    own = {each.untyped_storage()._cdata for each in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    blank = model.family.blank(model.config, images, (32, 32), manifest.max_tokens)
    if "length" in blank:  # the longest prompts, as what is counted has them
        blank = Condition(**{**blank, "length": torch.full_like(blank["length"], manifest.max_tokens or 1)})
    blank = blank.to(device)
    x, label = torch.zeros(images, *manifest.latent_shape, device=device), torch.zeros(images, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.family.bound(manifest.static)(network, x, label, blank)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_autocast_is_counted_as_the_installed_torch_has_it() -> None:
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()

    def listed(*macros: str) -> set[str]:
        """Names in the macros' lists; those with an underscore in front are called by others of them."""
        found = set()
        for macro in macros:
            body = re.split(r"[^\\]\n", header.partition(f"#define {macro}(_)")[2])[0]
            found |= {name for name in re.findall(r"_\((?:ADD_NS\()?(\w+)", body) if not name.startswith("_")}
        return found

    float32 = listed("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE", "AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE")
    assert {"rms_norm", "softmax", "norm"} <= float32
    assert FLOAT32["cuda"] - {"interpolate"} == {name for name in float32 if not name.endswith(("_aa", "_exact1d"))}
    lower = listed("AT_FORALL_LOWER_PRECISION_FP")
    assert {each for each in lower if not each.endswith("_cell")} == LOWER


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_a_graph_without_numbers_keeps_what_the_real_one_keeps(kind: TinyKind, make_world: Callable[..., Any]) -> None:
    """Of every family, at a number of images at which nothing was counted."""
    model = make_world(kind).model
    manifest = _manifest(model, "float32")
    with counting("float32", tokens=manifest.max_tokens or 1, device_type="cpu"):
        counted = _saved(model, manifest, META, 3)
    assert counted == pytest.approx(_saved(model, manifest, CPU, 3), rel=0.002)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_it_keeps_what_autocast_makes(kind: str, make_world: Callable[..., Any]) -> None:
    model = make_world(kind).model
    manifest = _manifest(model, "bfloat16")
    with counting("bfloat16", tokens=manifest.max_tokens or 1, device_type="cpu"):
        counted = _saved(model, manifest, META, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        real = _saved(model, manifest, CPU, 3)
    assert counted == pytest.approx(real, rel=0.02)
    assert real < 0.8 * _saved(model, manifest, CPU, 3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"lora_rank": 4}, {"optimizer": "adafactor", "ema": 0.9}],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_the_peak_of_a_step(settings: dict[str, Any], world: Any) -> None:
    """Forward, backward and the optimiser, held against a real step of another number of images."""
    model, told, images = world.model, TrainSettings(**settings), 6
    predicted = train_peak(model, _manifest(model, "float32"), told, device_type="cpu")
    network = model.load_network()
    real = step_peak(network, model, told, device=CPU, dtype="float32", images=images, side=8)
    weights = bytes_of(network.parameters())
    assert predicted.weights == pytest.approx(weights, rel=0.01)
    ema = weights if told.ema else 0
    assert predicted.at(images) == pytest.approx(real + ema, rel=0.03)


def test_gradients_that_processes_exchange_lie_there_from_the_start(world: Any) -> None:
    """DDP of one process: they lie once in memory, with few activations beside them."""
    told = TrainSettings()
    predicted = train_peak(world.model, _manifest(world.model, "float32"), told, device_type="cpu", num_processes=2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network = DistributedDataParallel(world.model.load_network(), gradient_as_bucket_view=True)
        real = step_peak(network, world.model, told, device=CPU, dtype="float32", images=1, side=8)
    finally:
        torch.distributed.destroy_process_group()
    assert predicted.at(1) == pytest.approx(real, rel=0.03)
    assert predicted.most_images(2 * predicted.at(4)) > 4


def test_what_precompute_holds(world: Any) -> None:
    manifest = _manifest(world.model, "float32")
    predicted = precompute_peak(world.model, manifest, device_type="cpu")
    network, vae = world.model.load_network(), world.model.load_vae()
    blank = world.model.family.blank(world.model.config, 10, (32, 32))
    with torch.inference_mode():
        with TensorWatch() as inverting:
            world.model.family.call(network, torch.zeros(10, 4, 8, 8), torch.zeros(10), blank)
        with TensorWatch() as encoding:
            vae.encode(torch.zeros(16, 3, 32, 32))
    weights = bytes_of(network.parameters()) + bytes_of(vae.parameters())
    assert predicted.weights == weights
    assert predicted.activations(10) == pytest.approx(inverting.peak, rel=0.03)
    assert predicted.elsewhere == pytest.approx(weights + encoding.peak, rel=0.03)
    assert predicted.at(1000) > predicted.at(1) == predicted.elsewhere
    whole = world.model.family.blank(world.model.config, 512, (32, 32))
    assert predicted.shard == bytes_of(iter(whole.values())) + 512 * 2 * 4 * 8 * 8
    assert predicted.at(1000) == predicted.weights + predicted.shard + predicted.activations(1000)
    guided = manifest.model_copy(update={"inverter": manifest.inverter.model_copy(update={"guidance": 3.0})})
    held = precompute_peak(world.model, guided, device_type="cpu").shard
    assert held - predicted.shard == bytes_of(iter(whole.values()))


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_a_batch_size_is_found_beside_what_a_shard_holds(kind: str, make_world: Callable[..., Any]) -> None:
    model = make_world(kind).model
    manifest = _manifest(model, "float32")
    held, settings = shard_bytes(model, manifest), PrecomputeSettings(batch_size="auto")
    denoiser = load_denoiser(model, manifest, CPU)
    with TensorWatch() as watch:
        call_blank(denoiser, model, manifest, MOST)
    with TensorWatch() as found:
        assert fit(denoiser, model, manifest, settings, WHOLE) == MOST
    assert found.peak == watch.peak + held


@pytest.mark.parametrize("told", [{}, {"lora_rank": 2}, {"lora_rank": 2, "lora_targets": ("to_q", "net.2")}])
@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_all_that_is_trained_gets_a_gradient(
    kind: TinyKind, told: dict[str, Any], make_world: Callable[..., Any]
) -> None:
    """Or processes wait for each other's, and a checkpoint of split weights has no optimiser's state to go on from."""
    model = make_world(kind).model
    network, settings = model.load_network(), TrainSettings(**told)
    if kind == "z-image":  # whose MLPs have other names
        settings = settings.model_copy(update={"lora_targets": tuple(settings.lora_targets[:1])})
    trained = prepare_network(network, model.family, settings, network_dtype="float32", device=CPU)
    manifest = _manifest(model, "float32")
    blank = model.family.blank(model.config, 2, (32, 32), manifest.max_tokens)
    x = torch.zeros(2, *manifest.latent_shape)
    model.family.bound(manifest.static)(network, x, torch.zeros(2), blank).sum().backward()
    assert trained
    assert {name for name, each in network.named_parameters() if each.requires_grad and each.grad is None} == set()
    if told:
        targets = settings.lora_targets or model.family.lora_targets
        named = [
            name for name, _ in network.named_modules() if f".{name}".endswith(tuple(f".{end}" for end in targets))
        ]
        with_layers = {name.partition(".lora_")[0] for name, _ in network.named_parameters() if ".lora_" in name}
        last = ("transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.txt_mlp.net.2")
        assert with_layers == {name for name in named if kind != "qwen-image" or name not in last}


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_twice_the_images_without_gradients_take_less_than_a_step(kind: str, make_world: Callable[..., Any]) -> None:
    """So that the zero-step proof's second look has room, also beside few trained weights."""
    model = make_world(kind).model
    manifest, told = _manifest(model, "float32"), TrainSettings(lora_rank=4)
    look = precompute_peak(model, manifest, device_type="cpu")
    step = train_peak(model, manifest, told, device_type="cpu")
    assert look.activations(4 * 2) < step.activations(4)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    peak = Peak(weights=100, optimizer=50, gradients=400, fixed=30.0, per_image=20.0)
    assert [peak.at(images) for images in (1, 20)] == [550, 580]
    assert peak.most_images(1000) == 36
    assert peak.at(36) <= 900 < peak.at(37)
    assert peak.most_images(600) == 0
    assert Peak(weights=1, per_image=1.0, elsewhere=500).most_images(500) == 0


@pytest.mark.parametrize(("objective", "sides"), [("inpo", 2), ("listwise", 5)])
def test_a_batch_of_lists_has_the_images_of_the_longest(objective: str, sides: int, world: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "lists.toml"
    recipe.write_text(f'[train]\nobjective = "{objective}"\nbatch_size = 3\n')
    plain, _ = train_needs(recipe, world.model, _manifest(world.model, "float32"), 5)
    assert ("lists of 5" in plain.what) == (sides == 5)
    memory = 10 * plain.peak.at(sides)
    told = plain.to_json(memory)
    assert told["activations"] == plain.peak.activations(3 * sides)
    assert told["largest_batch_size"] == plain.peak.most_images(memory) // sides > 0


def test_quantised_weights_are_a_byte_each(world: Any) -> None:
    """Of linear layers; a row of them has a scale in the dtype."""
    told = TrainSettings(lora_rank=4)
    plain, quantised = (
        train_peak(world.model, _manifest(world.model, "bfloat16").model_copy(update={"network_dtype": dtype}), told)
        for dtype in ("bfloat16", "bfloat16-int8")
    )
    layers = [each.weight for each in world.model.load_network().modules() if isinstance(each, torch.nn.Linear)]
    saved = sum(each.numel() - 2 * len(each) for each in layers)
    assert plain.weights - quantised.weights == saved > 0
    assert (plain.optimizer, plain.per_image) == (quantised.optimizer, quantised.per_image)


def test_the_model_folder_is_all_that_is_read(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for a model that fits no memory here."""
    monkeypatch.setattr(Model, "load_component", lambda *arguments: pytest.fail("weights were read"))
    assert train_peak(world.model, _manifest(world.model, "bfloat16"), TrainSettings()).at(4) > 0
