"""`--batch-size auto` in two processes, of which one has less memory: they agree, and none waits for the other."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from inpo.common.testing import save_tiny_pipeline
from tests.engines.runs import World, attempts
from tests.launching import Zygote, ranks


def ended(zygote: Zygote, arguments: Sequence[str], *, images: Sequence[int], code: int) -> list[str]:
    """What processes said that have room for so many `images` each; all of them ended with `code`."""
    processes = [
        zygote.start(arguments, environment | {"SHORT_OF_MEMORY": str(room)})
        for environment, room in zip(ranks(len(images)), images, strict=True)
    ]
    assert [each.wait() for each in processes] == [code] * len(images), [each.text() for each in processes]
    return [each.text() for each in processes]


def recorded(cache: Path) -> set[object]:
    """The batch sizes of a cache's configurations."""
    found = [tomllib.loads(each.read_text()) for each in (cache / "configurations").iterdir()]
    return {each["precompute"]["batch_size"] for each in found}


def test_precompute(zygote: Zygote, world: World, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    told = world.arguments(cache, "--batch-size", "auto")
    # One shard is one process's; the other has nothing to do, and is asked all the same.
    alone, idle = ended(zygote, [*told, "--limit", "4"], images=(1, 100), code=1)
    assert "too small for one pair" in alone
    assert "Another process of this run has ended" in idle
    assert not attempts(cache)
    first, _ = ended(zygote, [*told, "--limit", "8"], images=(100, 5), code=0)
    assert "batch size: 2 pairs" in first
    assert recorded(cache) == {"auto", 2}
    assert len(attempts(cache)) == 2


def test_train(zygote: Zygote, world: World, tmp_path: Path) -> None:
    """Of a network with buffers, which DDP would send around at every call: one that a process never makes."""
    model = save_tiny_pipeline(tmp_path / "model", "sd3")
    made = [f"--model={model}", f"--cache={tmp_path / 'cache'}"]
    small = ["--resolution=32", "--grid-points=2", "--timesteps-per-pair=1", "--decode-workers=0", "--limit=12"]
    zygote.run(["precompute", *made, f"--pairs={world.pairs}", *small])
    run = tmp_path / "run"
    told = ["train", *made, f"--output={run}", "--batch-size=auto", "--steps=1", "--tracker=none", "--held-out=0"]
    for said in ended(zygote, told, images=(100, 1), code=1):
        assert "too small for one pair" in said
    first, _ = ended(zygote, told, images=(100, 5), code=0)
    assert "batch size: 2 pairs" in first
    assert tomllib.loads((run / "recipe.toml").read_text())["train"]["batch_size"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
