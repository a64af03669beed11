"""A compiled network makes the same cache: one shape, whatever a shard's last batch holds; eager where it fails."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import inpo.precompute.components as components
from inpo.common.cache import open_cache
from inpo.common.cache.schema import MANIFEST
from tests.precompute.test_independence import assert_same_but_for_rounding

SETTINGS = {"timesteps_per_pair": 2, "grid_points": 3, "guidance": 2.0, "batch_size": 2}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """backend(b): from here on torch.compile takes it in place of the one that generates code."""
    original = torch.compile

    def choose(chosen: Any) -> None:
        torch.compiler.reset()
        counters.clear()
        monkeypatch.setattr(torch, "compile", partial(original, backend=chosen))

    return choose


@pytest.mark.parametrize(("kind", "how"), [("light", "whole"), ("sdxl", "blocks"), ("pixart-sigma", "blocks")])
def test_one_shape_for_all_batches(
    kind: str,
    how: str,
    pipelines: Callable,
    tars: Callable,
    run: Any,
    tmp_path: Path,
    by_id: Callable,
    backend: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs are captured as ever and run by PyTorch; all of them before the first shard, which ends with a batch
    of one pair. No number of a latent that nobody asked for is kept or counted."""
    source = tars(3, 3)
    plain = run.cache(source, pipelines(kind), tmp_path / "plain", compile="off", **SETTINGS)
    backend("eager")
    captured: list[int] = []

    def watched(*arguments: Any, **options: Any) -> bool:
        done = compile_network(*arguments, **options)
        captured.append(counters["stats"]["unique_graphs"])
        return done

    compile_network = components.compile_network
    monkeypatch.setattr(components, "compile_network", watched)
    compiled = run.cache(source, pipelines(kind), tmp_path / "compiled", compile=how, **SETTINGS)
    assert captured == [counters["stats"]["unique_graphs"]] != [0]
    assert_same_but_for_rounding(plain, compiled, by_id)
    # What the option is stands in the configuration, and nowhere in the identity: either run goes on with the other.
    assert (tmp_path / "plain" / MANIFEST).read_bytes() == (tmp_path / "compiled" / MANIFEST).read_bytes()
    off, on = (each.denoiser for each in run.components)
    assert on.num_calls == off.num_calls + 2 * SETTINGS["batch_size"]  # the first call, of nobody's latents


def test_a_run_goes_on_where_compiling_fails(
    pipelines: Callable, tars: Callable, run: Any, tmp_path: Path, backend: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    source = tars(3, 3)
    plain = run.cache(source, pipelines(), tmp_path / "plain", **SETTINGS)
    assert "compil" not in capsys.readouterr().err  # auto, on a CPU
    backend(broken)
    again = run.cache(source, pipelines(), tmp_path / "compiled", compile="blocks", **SETTINGS)
    said = capsys.readouterr().err
    assert "note: the network runs as it is, because compiling it failed: " in said
    assert "no compiler here" in said
    assert "Traceback" not in said
    for name, shard in plain.shards.items():
        for spec in plain.manifest.arrays:
            assert shard.read(spec.path).tobytes() == again.shards[name].read(spec.path).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_generated_code(
    how: str,
    pipelines: Callable,
    tars: Callable,
    run: Any,
    tmp_path: Path,
    by_id: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same with real kernels, which take minutes to make; a second run finds them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    source = tars(3, 3)
    plain = run.cache(source, pipelines(), tmp_path / "plain", **SETTINGS)
    torch.compiler.reset()
    run.cache(source, pipelines(), tmp_path / "compiled", compile=how, **SETTINGS)
    assert_same_but_for_rounding(plain, open_cache(str(tmp_path / "compiled")), by_id)
    torch.compiler.reset()
    counters.clear()
    run.cache(source, pipelines(), tmp_path / "again", compile=how, **SETTINGS)
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
