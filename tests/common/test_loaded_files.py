"""A file of a model's folder changes the fingerprint exactly if it changes what is loaded: the loader is the oracle."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inpo.common.errors import ModelError
from inpo.common.models import Model, open_model


def changed(file: Path, out: Path) -> None:
    """The same tensors, shapes and dtypes with other numbers."""
    tensors = {name: value * 1.125 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(tensors, out, metadata={"format": "pt"})


def split(file: Path, index: str, stem: str) -> None:
    """The tensors of `file` in two files beside it, and the list that names them."""
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({each: tensors[each] for each in part}, file.with_name(name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    file.with_name(index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def loaded(model: Model, component: str) -> dict[str, torch.Tensor]:
    return dict(model.load_component(component).state_dict())


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
LAYOUTS = (
    "plain",
    "variant beside plain",
    "parts beside whole",
    "parts of a variant",
    "strangers",
    "variant of another",
)


@pytest.mark.parametrize("component", STEMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_counts_exactly_if_it_is_loaded(model_copy: Path, component: str, layout: str) -> None:
    folder, stem = model_copy / component, STEMS[component]
    whole = folder / f"{stem}.safetensors"
    variant = None
    if layout == "variant beside plain":
        variant = "fp16"
        changed(whole, folder / f"{stem}.fp16.safetensors")
    elif layout == "parts beside whole":
        split(whole, f"{stem}.safetensors.index.json", stem)
    elif layout == "parts of a variant":
        variant = "fp16"
        split(whole, f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16")
    elif layout == "strangers":
        for name in ("ema", f"{stem}.ema", f"{stem}.non_ema", f"{stem}-00001-of-00002", "pytorch_model", "lora"):
            changed(whole, folder / f"{name}.safetensors")
        (folder / f"{stem.replace('diffusion_', '')}.bin").write_bytes(b"no pickle is ever read")
    elif layout == "variant of another":  # of that name, but not one that a loader looks for
        variant = "fp16"
        changed(whole, folder / "other.fp16.safetensors")

    def look() -> tuple[str, dict[str, torch.Tensor]]:
        model = open_model(str(model_copy), variant=variant)
        return model.digest_of(component), loaded(model, component)

    before, weights = look()
    files = sorted(folder.glob("*.safetensors"))
    num_loaded = 0
    for file in files:
        shutil.copy(file, model_copy / "kept")
        changed(model_copy / "kept", file)
        after, found = look()
        is_loaded = any(not torch.equal(found[name], weights[name]) for name in weights)
        assert (after != before) == is_loaded, file.name
        num_loaded += is_loaded
        shutil.copy(model_copy / "kept", file)
    assert num_loaded >= 1
    assert num_loaded < len(files) or layout == "plain"
    assert look()[0] == before


def test_the_written_pipeline_has_the_vae_of_the_fingerprint(model_copy: Path) -> None:
    """One component has the variant, the others have not: each is loaded by the rule that its digest went by."""
    for component, stem in STEMS.items():
        file = model_copy / component / f"{stem}.safetensors"
        changed(file, file.with_name(f"{stem}.fp16.safetensors"))
    (model_copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    model = open_model(str(model_copy), variant="fp16")
    pipeline = model.load_pipeline(unet=model.load_network())
    expected = load_file(model_copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(pipeline.vae.state_dict()[name], value) for name, value in expected.items())


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_splits_otherwise_is_another(model_copy: Path, file: str) -> None:
    before = open_model(str(model_copy)).fingerprints
    path = model_copy / "tokenizer" / file
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document, indent=7))
    assert open_model(str(model_copy)).fingerprints == before
    path.write_text(json.dumps(document | {"model_max_length": 5, "truncation": None, "added": [1]}))
    after = open_model(str(model_copy)).fingerprints
    assert {name for name in before if before[name] != after[name]} == {"tokenizer"}


def test_a_tokenizer_file_that_a_configuration_names_counts(model_copy: Path) -> None:
    folder = model_copy / "tokenizer"
    versioned, config = folder / "tokenizer.4.0.json", folder / "tokenizer_config.json"
    plain = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = plain["model"]["vocab"]
    plain["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))

    def look() -> tuple[str, list[int]]:
        model = open_model(str(model_copy))
        return model.fingerprints["tokenizer"], model.load_text_pipeline().tokenizer("a red circle").input_ids

    before = look()
    versioned.write_text(json.dumps(plain))
    assert look() == before  # it lies beside
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"fast_tokenizer_files": ["tokenizer.json", versioned.name]}))
    named = look()
    shutil.copy(folder / "tokenizer.json", versioned)
    other = look()
    assert named[0] != other[0]
    assert named[1] != other[1] == before[1]


def test_the_class_of_a_text_encoder_counts(model_copy: Path) -> None:
    before = open_model(str(model_copy)).fingerprints
    file = model_copy / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}))
    after = open_model(str(model_copy)).fingerprints
    assert {name for name in before if before[name] != after[name]} == {"text_encoder"}


def test_an_adapter_beside_a_text_encoder_is_refused(model_copy: Path) -> None:
    (model_copy / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter lies beside"):
        _ = open_model(str(model_copy)).fingerprints


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../other.safetensors"}}'])
def test_a_list_of_parts_that_cannot_be_used_is_refused(model_copy: Path, text: str) -> None:
    (model_copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors\.index\.json"):
        _ = open_model(str(model_copy)).fingerprints
