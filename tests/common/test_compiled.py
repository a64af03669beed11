"""A network compiled in place: the same object, the same numbers, one shape; and eager, in words, where it fails."""

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from inpo.common.compiled import compile_network, kernel_folder, uses_graphs
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.errors import UsageError
from inpo.common.families import FAMILIES
from inpo.common.levels import Levels
from inpo.common.models import open_model

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.linear(x))


class Network(nn.Module):
    """Two blocks and what is around them."""

    _repeated_blocks = ("Block",)  # as diffusers' networks name theirs

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Block(), Block(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """backend(b): from here on torch.compile takes it in place of the one that generates code."""
    original = torch.compile
    return lambda chosen: monkeypatch.setattr(torch, "compile", partial(original, backend=chosen))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_generated_code_gives_the_same_numbers_and_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    """The one test with real kernels. One batch, again, and again: nothing is compiled but once."""
    plain, compiled = network(), network()
    names = list(compiled.state_dict())
    x = torch.randn(4, 6)

    def gradients(of: Network) -> list[Tensor]:
        of.zero_grad()
        of(x).square().mean().backward()
        return [each.grad.clone() for each in of.parameters()]

    assert compile_network(compiled, "blocks", lambda: gradients(compiled), blocks=(), device=CPU)
    made = graphs()
    assert made >= 1
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert graphs() == made
    assert list(compiled.state_dict()) == names
    assert isinstance(compiled, Network)
    said = capsys.readouterr().err
    assert f"compiling 2 blocks of the network (Block); kernels are kept in {kernel_folder()}" in said
    assert "compiled in " in said
    assert any(Path(kernel_folder()).iterdir())


@pytest.mark.parametrize(
    ("ahead", "all_agree", "called"), [(None, True, 1), (0, True, 1), (1 << 60, True, 3), (1 << 60, False, 1)]
)
def test_auto_compiles_on_a_gpu_where_the_work_ahead_is_long(
    ahead: int | None, all_agree: bool, called: int, backend: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Called as it is, then again, and once more to be compiled; all processes do as the one with the least to do."""
    backend("eager")
    net, calls, x = network(), [], torch.randn(4, 6)
    done = compile_network(
        net,
        "auto",
        lambda: calls.append(net(x)),
        blocks=(),
        device=torch.device("cuda"),
        ahead=ahead,
        agree=lambda fine: fine and all_agree,
    )
    assert (done, len(calls)) == (ahead != 0 and all_agree, called)
    assert bool(graphs()) == done
    assert ("nothing is compiled: the work ahead is too short" in capsys.readouterr().err) == (not done)


def test_auto_compiles_what_does_not_fit_as_it_is(backend: Callable) -> None:
    """A compiled network may: it holds less."""
    backend("eager")
    net, x = network(), torch.randn(4, 6)

    def first() -> None:
        if net.first._compiled_call_impl is None:
            torch.empty(1 << 46, dtype=torch.uint8)
        net(x)

    told: Any = {"blocks": (), "device": torch.device("cuda"), "ahead": 1}
    assert compile_network(net, "auto", first, **told)
    net = network()
    asked: list[bool] = []
    with pytest.raises(RuntimeError, match="allocate memory"):
        compile_network(net, "auto", first, agree=asked.append, meeting=True, **told)
    assert not asked, "the others wait inside the call, and would never answer"


@pytest.mark.parametrize(("how", "calls"), [("off", 0), ("auto", 0), ("blocks", 1), ("whole", 1)])
def test_what_is_compiled(how: Any, calls: int, backend: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU auto is off: code for it takes longer to make than it saves."""
    seen: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        seen.append(len(list(graph.graph.nodes)))
        return graph.forward

    backend(counting)
    net, called = network(), []
    x = torch.randn(4, 6)
    expected = net(x)
    done = compile_network(net, how, lambda: called.append(net(x)), blocks=(), device=CPU)
    assert (done, len(called)) == (calls > 0, calls)
    assert bool(seen) == done
    torch.testing.assert_close(net(x), expected)
    assert (capsys.readouterr().err == "") == (not done)
    assert copy.deepcopy(net).state_dict().keys() == net.state_dict().keys()


def test_a_family_may_name_the_blocks_and_a_wrapper_may_hide_their_class(backend: Callable) -> None:
    backend("eager")
    net = network()
    net.second.__class__ = type("FSDPBlock", (Block,), {})  # as FSDP does
    before = graphs()
    assert compile_network(net, "blocks", lambda: net(torch.randn(4, 6)), blocks=("Block",), device=CPU)
    assert graphs() > before
    assert not compile_network(network(), "blocks", lambda: 1 / 0, blocks=("Nothing",), device=CPU)


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nwith pages of what it was called with\n" + "x" * 5000)


@pytest.mark.parametrize(
    "how_it_fails", [broken, aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=broken)]
)
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_where_compiling_fails_the_network_runs_as_it_is(
    how: Any, how_it_fails: Any, backend: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward, or as late as in the backward pass."""
    backend(how_it_fails)
    net, plain = network(), network()
    x = torch.randn(4, 6)
    assert not compile_network(net, how, lambda: net(x).sum().backward(), blocks=(), device=CPU)
    said = capsys.readouterr().err
    assert "note: the network runs as it is, because compiling it failed: " in said
    assert "no compiler here" in said
    assert "--compile off" in said
    assert "Traceback" not in said
    assert len(said) < 1000
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)
    net(x).sum().backward()


def test_where_there_is_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unsupported(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", unsupported)
    net, plain = network(), network()
    x = torch.randn(4, 6)
    assert not compile_network(net, "whole", lambda: net(x), blocks=(), device=CPU)
    assert "because compiling it failed: RuntimeError: torch.compile is not supported" in capsys.readouterr().err
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)


def test_all_processes_are_compiled_or_none(backend: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    backend("eager")
    net, asked = network(), []
    x = torch.randn(4, 6)

    def agree(fine: bool) -> bool:
        asked.append(fine)
        return False

    assert not compile_network(net, "blocks", lambda: net(x), blocks=(), device=CPU, agree=agree)
    assert asked == [True]
    assert "it failed in another process" in capsys.readouterr().err
    before = graphs()
    net(torch.randn(3, 6))
    assert graphs() == before


@pytest.mark.parametrize("error", [UsageError("mine", where="here", fix="none"), torch.OutOfMemoryError("full")])
def test_what_is_no_compilers_fault_is_raised(error: Exception, backend: Callable) -> None:
    def first() -> None:
        raise error

    backend("eager")
    with pytest.raises(type(error)):
        compile_network(network(), "blocks", first, blocks=(), device=CPU)


def test_the_kernels_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    assert kernel_folder() == "/chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_folder() == str(tmp_path / "inpo" / "kernels") == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert (tmp_path / "inpo" / "kernels").stat().st_mode & 0o77 == 0
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_folder() == str(tmp_path / ".cache" / "inpo" / "kernels")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch leaves it, once it has looked
    assert kernel_folder() == str(tmp_path / ".cache" / "inpo" / "kernels")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel_folder() == "torch's temporary folder"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


class Sizes(nn.Module):
    """A network that notes how many rows it is called with, and mixes nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.rows: list[int] = []

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> tuple[Tensor]:
        self.rows.append(len(x))
        return (self.scale * x + label[:, None, None, None] + encoder_hidden_states.mean((1, 2))[:, None, None, None],)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_a_denoiser_with_a_fixed_number_of_rows_calls_with_no_other(count: int) -> None:
    levels = Levels.from_alphas_cumprod(torch.linspace(0.99, 0.01, 10, dtype=torch.float64))
    denoiser = Denoiser(Sizes(), levels, FAMILIES["sd"].call)
    x = torch.randn(count, 4, 2, 2)
    condition = Condition(embedding=torch.randn(count, 3, 5))
    timestep = torch.arange(count) % 10
    with torch.no_grad():
        expected = denoiser.predict(x, timestep, condition)
        denoiser.network.rows.clear()
        denoiser.rows, denoiser.num_calls = 4, 0
        torch.testing.assert_close(denoiser.predict(x, timestep, condition), expected, rtol=0, atol=0)
    assert denoiser.network.rows == [4] * -(-count // 4)
    assert denoiser.num_calls == count


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart-sigma"])
def test_every_family_has_blocks(kind: str, tiny: Callable[[str], Path], backend: Callable, capsys: Any) -> None:
    """The blocks hold nearly all weights: what is left is compiled with `whole` alone."""
    backend("eager")
    model = open_model(str(tiny(kind)))
    net = model.load_network()
    assert compile_network(net, "blocks", lambda: None, blocks=model.family.blocks, device=CPU)
    compiled = [each for each in net.modules() if each._compiled_call_impl is not None]
    inside = {id(weight) for each in compiled for weight in each.parameters()}
    sizes = [(weight.numel(), id(weight) in inside) for weight in net.parameters()]
    assert sum(size for size, found in sizes if found) > 0.5 * sum(size for size, _ in sizes)


@pytest.mark.parametrize(
    ("how", "device", "images", "expected"),
    [("whole", "cuda", 8, True), ("whole", "cuda", 9, False), ("blocks", "cuda", 4, False), ("whole", "cpu", 4, False)],
)
def test_where_a_network_runs_as_a_cuda_graph(how: Any, device: str, images: int, expected: bool) -> None:
    assert uses_graphs(how, torch.device(device), images) == expected


def test_a_graph_is_called_until_it_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, recorded, played, before anything hangs on it: what fails then is a note, as any compiling."""
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    net, called = network(), []
    assert compile_network(net, "whole", lambda: called.append(1), blocks=(), device=CPU, graphs=True)
    assert (asked, len(called)) == ([{"dynamic": False, "mode": "reduce-overhead"}], 3)


def test_where_sizes_change_blocks_are_compiled_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Z-Image cuts prompts to their lengths: no kernels of the whole, and no graph, would be used twice."""
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append((type(self), options)))
    told: dict[str, Any] = {"blocks": (), "device": CPU, "graphs": True}
    assert compile_network(network(), "whole", lambda: None, varying=True, **told)
    assert asked == 2 * [(Block, {"dynamic": True, "mode": None})]
    assert {each.name for each in FAMILIES.values() if each.varying} == {"z_image"}


def test_what_a_compiled_network_gives_is_copied() -> None:
    """Its next call may write over it."""
    kept = torch.zeros(4, 4, 2, 2)
    levels = Levels.from_alphas_cumprod(torch.linspace(0.99, 0.01, 10, dtype=torch.float64))
    denoiser = Denoiser(Sizes(), levels, lambda *arguments: kept)
    told = torch.zeros(4, dtype=torch.int64), Condition(embedding=torch.zeros(4, 3, 5))
    denoiser.rows = 4
    assert denoiser.predict(torch.zeros(4, 4, 2, 2), *told).data_ptr() != kept.data_ptr()
