"""A fingerprint is the content: not the path, not the time, not the free text in a header."""

import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from inpo.common import fingerprint
from inpo.common.errors import ModelError
from inpo.common.fingerprint import of_config, of_weights
from inpo.common.models import open_model


@pytest.fixture
def weights(tmp_path):
    tensors = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.float16)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    return tensors, file


def test_path_time_and_header_text_do_not_count(weights, tmp_path):
    tensors, file = weights
    original = of_weights([file])
    copy = tmp_path / "elsewhere" / "model.safetensors"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    os.utime(copy, (1, 1))
    assert of_weights([copy]) == original
    save_file(dict(reversed(tensors.items())), copy, metadata={"format": "pt", "note": "another"})
    assert copy.read_bytes() != file.read_bytes()
    assert of_weights([copy]) == original


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"b.weight": t["b.weight"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])},
        lambda t: t | {"b.weight": t["b.weight"].reshape(3, 2)},
        lambda t: t | {"b.weight": t["b.weight"].to(torch.float64)},
        lambda t: {"c.weight": t["b.weight"], "a.bias": t["a.bias"]},
        lambda t: {"b.weight": t["b.weight"]},
    ],
    ids=["value", "shape", "dtype", "name", "fewer"],
)
def test_every_change_of_content_counts(weights, tmp_path, change):
    tensors, file = weights
    other = tmp_path / "other.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, other)
    assert of_weights([other]) != of_weights([file])


def test_other_bytes_under_the_same_name_size_and_time_are_another_model(weights):
    """What a reproducible archive, a container's layer or `cp -p` leaves: nothing but the bytes tells them apart."""
    tensors, file = weights
    os.utime(file, (0, 0))
    before, status = of_weights([file]), file.stat()
    other = file.with_name("other")
    save_file(tensors | {"a.bias": torch.zeros(3, dtype=torch.float16)}, other)
    os.utime(other, (0, 0))
    os.replace(other, file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert of_weights([file]) != before


def test_the_same_tensors_in_several_files_are_the_same_model(weights, tmp_path):
    tensors, file = weights
    parts = []
    for number, (name, tensor) in enumerate(tensors.items()):
        parts.append(tmp_path / f"part-{number}.safetensors")
        save_file({name: tensor}, parts[-1])
    assert of_weights(parts) == of_weights(reversed(parts)) == of_weights([file])
    assert of_weights(parts[:1]) != of_weights([file])


def _header(data: bytes, header: bytes) -> bytes:
    """The file with another header of its own length."""
    old = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + old :]


DAMAGES = {
    "cut": lambda data: data[:-4],
    "cut in the header": lambda data: data[:20],
    "three bytes": lambda data: data[:3],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "a header of exabytes": lambda data: data[:6] + b"\x7f" + data[7:],
    "a header that is no text": lambda data: data[:12] + b"\xff" + data[13:],
    "a header that is no JSON": lambda data: _header(data, b"{" * 64),
    "a header that is no object": lambda data: _header(data, b"[1, 2]"),
    "no offsets": lambda data: _header(data, b'{"a": {"dtype": "F32", "shape": [1]}}'),
    "offsets that run backwards": lambda data: _header(
        data, b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'
    ),
    "offsets beyond the end": lambda data: _header(
        data, b'{"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}'
    ),
    "no safetensors at all": lambda data: b"PK\3\4" + bytes(400),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_one_clear_error(weights, name):
    _, file = weights
    file.write_bytes(DAMAGES[name](file.read_bytes()))
    with pytest.raises(ModelError) as caught:
        of_weights([file])
    message = str(caught.value)
    for part in (str(file), f"{file.stat().st_size} bytes", "to do:"):
        assert part in message


def test_weights_without_read_permission_are_not_called_damaged(weights, monkeypatch):
    _, file = weights
    file.chmod(0)
    if os.access(file, os.R_OK):  # the superuser may read everything: be somebody else

        def refused(*_: object, **__: object) -> str:
            raise SafetensorError(f"No such file or directory: {file}")

        monkeypatch.setattr(fingerprint, "safe_open", refused)
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ModelError) as caught:
        of_weights([file])
    for part in ("may not be read", str(file), "permission denied", "owner and mode"):
        assert part in str(caught.value)


def test_a_link_to_nothing_is_one_clear_error(tmp_path):
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(ModelError, match="no such file"):
        of_weights([link])


def test_a_file_without_the_component_has_no_fingerprint(weights):
    """Nothing read would be one digest for every such file."""
    _, file = weights
    with pytest.raises(ModelError) as caught:
        of_weights([file], prefix=("model.diffusion_model.",))
    message = str(caught.value)
    for part in ("model.diffusion_model.", "a.bias", "whole checkpoint"):
        assert part in message


def test_one_component_of_a_single_file(weights, tmp_path):
    tensors, file = weights
    only, other = tmp_path / "only.safetensors", tmp_path / "other.safetensors"
    save_file({"b.weight": tensors["b.weight"]}, only)
    save_file(tensors | {"a.bias": torch.zeros(3)}, other)
    expected = of_weights([only])
    assert of_weights([file], prefix=("b.",)) == of_weights([other], prefix=("b.",)) == expected
    assert of_weights([file]) != of_weights([other])


def test_configurations_without_what_changes_no_number():
    config = {"sample_size": 64, "act_fn": "silu"}
    volatile = {"_name_or_path": "/a", "_diffusers_version": "1", "torch_dtype": "float16", "_commit_hash": "x"}
    assert of_config(config | volatile) == of_config(dict(reversed(config.items())))
    assert of_config(config | {"act_fn": "gelu"}) != of_config(config)


def test_sharded_and_whole_weights_are_told_apart_by_content_and_not_by_mtime(tiny, model_copy):
    prints = open_model(str(model_copy)).fingerprints
    assert prints == open_model(str(tiny("sd15"))).fingerprints
    assert set(prints) == {"network", "vae", "text_encoder", "scheduler", "tokenizer"}
    (file,) = (model_copy / "unet").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = open_model(str(model_copy)).fingerprints
    assert {name for name in prints if prints[name] != changed[name]} == {"network"}
