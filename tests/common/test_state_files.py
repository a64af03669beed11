"""States come back as they were, types and bits, from files that hold no code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from inpo.common import state_files
from inpo.common.state_files import read_state, write_state


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right)) and type(left) is type(right)
    return type(left) is type(right) and left == right


def test_an_eight_bit_optimisers_state(tmp_path: Path) -> None:
    """bitsandbytes' form: quantised moments, their scales, and one map of values that all parameters share."""
    shared = torch.linspace(-1, 1, 256)
    state = {
        "state": {
            number: {
                "step": 3,
                "state1": torch.randint(0, 255, (7, 5), dtype=torch.uint8),
                "absmax1": torch.rand(1),
                "qmap1": shared,
                "half": torch.rand(3).bfloat16(),
                "scalar": torch.tensor(4.0),
                "empty": torch.zeros(0),
                "transposed": torch.rand(4, 3).t(),
            }
            for number in (0, 1)
        },
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "fused": True, "params": [0, 1]}],
    }
    write_state(tmp_path, "optimizer", state)
    assert same(read_state(tmp_path, "optimizer"), state)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop])
def test_torchs_optimisers_go_on_where_they_were(kind: Any, tmp_path: Path) -> None:
    def network() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, kind(net.parameters(), lr=0.1)

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = network()
    step(net, optimizer)
    write_state(tmp_path, "net", net.state_dict())
    write_state(tmp_path, "optimizer", optimizer.state_dict())
    step(net, optimizer)
    other, other_optimizer = network()
    other.load_state_dict(read_state(tmp_path, "net"))
    other_optimizer.load_state_dict(read_state(tmp_path, "optimizer"))
    step(other, other_optimizer)
    assert same(dict(net.state_dict()), dict(other.state_dict()))


def test_plain_values_and_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "BYTES_PER_FILE", 100)
    state = {
        "a": [1, 2.5, "x", None, True, (), {}],
        3: {"b": math.inf},
        "t": [torch.arange(30.0) + n for n in range(4)],
    }
    write_state(tmp_path, "many", state)
    assert len(list(tmp_path.glob("many-*.safetensors"))) == 4
    assert same(read_state(tmp_path, "many"), state)
    write_state(tmp_path, "plain", {"last_epoch": 7})
    assert [file.name for file in tmp_path.glob("plain*")] == ["plain.json"]
    assert read_state(tmp_path, "plain") == {"last_epoch": 7}


def test_what_has_no_plain_form_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds a object"):
        write_state(tmp_path, "odd", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "shape", ["x", {"dict": 3}, {"list": None}, {"tensor": "9"}, {"odd": []}, {"a": 1, "b": 2}, {}]
)
def test_other_shapes_are_errors_and_no_code(shape: Any, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"files": 0, "state": shape}))
    if shape == "x":
        assert read_state(tmp_path, "s") == "x"
        return
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_state(tmp_path, "s")
