"""`inpo round`: whole rounds on a tiny pipeline, stopped and gone on with, and what is watched meanwhile."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import inpo.common.scorer as scorers
import inpo.rounds.clock as clock_module
import inpo.rounds.round as round_module
import inpo.rounds.worker as worker_module
from inpo.common.cache import open_cache
from inpo.common.errors import OutOfMemory, UsageError
from inpo.common.models import open_model
from inpo.rounds.figures import sample_figures
from inpo.rounds.page import RoundRow, warnings
from inpo.rounds.prompts import PromptGroup
from inpo.rounds.round import read_lines, resolve_rounds, run_rounds
from inpo.toyworld.scenes import captions
from inpo.train.output import claim_output, write_output
from tests.launching import Zygote, ranks
from tests.rounds.conftest import Brightness, Samples
from tests.rounds.test_recorded import pictures

SAMPLED = ("a red cat", "a blue dog", "photo of the sky", "green house")
HELD_OUT = ("a blue house", "the red sky")


@pytest.fixture
def recipe(
    pipelines: Callable, scorer: Brightness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Path]:
    """recipe(section={setting: value}): one with these settings changed; None takes one out."""
    watcher = Brightness(name="watcher")

    class Entry:
        def __init__(self, made: Brightness) -> None:
            self.name, self.made = made.name, made

        def load(self) -> Callable[[], Brightness]:
            return lambda: self.made

    monkeypatch.setattr(scorers, "entry_points", lambda group: [Entry(scorer), Entry(watcher)])
    for name, prompts in (("sampled", SAMPLED), ("held-out", HELD_OUT)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    sections: dict[str, dict[str, Any]] = {
        "model": {"model": str(pipelines())},
        "sample": {"prompts": str(tmp_path / "sampled.txt"), "scorer": "brightness", "resolution": "32"}
        | {"inference_steps": 2, "guidance": 1.0, "timesteps_per_pair": 1, "batch_size": 4},
        "train": {"steps": 1, "batch_size": 2, "tracker": "none", "held_out": 0.0, "learning_rate": 1e-3},
        "evaluate": {"prompts": str(tmp_path / "held-out.txt"), "inference_steps": 1, "guidance": 1.0}
        | {"resolution": "32", "scorers": ["brightness", "watcher"]},
        "round": {"output": str(tmp_path / "rounds"), "rounds": 2},
    }

    def write(**changes: dict[str, Any]) -> Path:
        file = tmp_path / "recipe.toml"
        lines = []
        for name, section in sections.items():
            lines.append(f"[{name}]")
            values = {**section, **changes.get(name, {})}
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


def network_of(folder: Path) -> str:
    return open_model(str(folder)).fingerprints["network"]


@pytest.mark.parametrize(("reference", "points"), [("moving", "refresh"), ("first", "sample")])
def test_a_round_begins_where_the_one_before_ended(
    recipe: Callable, pipelines: Callable, tmp_path: Path, reference: str, points: str
) -> None:
    file = recipe(round={"reference": reference, "points": points})
    assert run_rounds(resolve_rounds(file, {})) == 0
    output = tmp_path / "rounds"
    first, second = (network_of(output / f"round-{number}" / "run" / "pipeline") for number in (1, 2))
    base = network_of(pipelines())
    assert len({base, first, second}) == 3
    caches = [open_cache(str(output / f"round-{number}" / "cache")) for number in (1, 2)]
    told = [cache.manifest.fingerprints["network"] for cache in caches]
    assert told == ([base, first] if reference == "moving" else [base, base])
    if reference == "first":
        begun = open_cache(str(output / "round-2" / "points"))
        assert begun.manifest.fingerprints["network"] == first
        for shard in caches[1]:
            np.testing.assert_array_equal(shard.read("x_t"), begun.shards[shard.name].read("x_t"))
        # Of this seed and of its neighbours: no noise is that of another round.
        noise = [
            PromptGroup(prompt=prompt).image_seed(resolve_rounds(recipe(sample={"seed": seed}), {}).seed(number), image)
            for seed, number in itertools.product((0, 1, 2), (1, 2, 3))
            for prompt, image in itertools.product(SAMPLED, (0, 1))
        ]
        assert len(set(noise)) == len(noise)
        for number, images in ((1, "cache"), (2, "points")):
            made = pictures(output / f"round-{number}" / images).values()
            assert {seed for each in made for seed in each["seeds"]} == set(noise[8 * number - 8 : 8 * number])
    assert caches[1].manifest.inverter.name == ("recorded" if points == "sample" else "ddim")
    ids = [{str(name) for shard in cache for name in shard.read("group/id")} for cache in caches]
    assert ids[0] == ids[1]
    lines = read_lines(output)
    assert sorted(lines) == [1, 2]
    for number in (1, 2):
        assert set(lines[number]["win_rate"]) == {"brightness", "watcher"}
        assert set(lines[number]["seconds"]) == {"points", "train", "evaluate"}
        for name in ("page.html", "page.md"):
            assert "diversity" in (output / f"round-{number}" / name).read_text()


def test_two_processes_make_whole_rounds(recipe: Callable, zygote: Zygote, tmp_path: Path) -> None:
    scorers = {
        "sample": {"scorer": "toyworld-oracle"},
        "evaluate": {"scorers": ["toyworld-oracle", "toyworld-heldout"]},
    }
    asked = ["round", "--recipe", str(recipe(**scorers)), "--rounds", "1"]
    for name, prompts in (("sampled", captions("train")[:4]), ("held-out", captions("test")[:2])):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    both = [zygote.start(asked, environment) for environment in ranks(2)]
    assert [process.wait() for process in both] == [0, 0], [process.text()[-3000:] for process in both]
    assert sorted(read_lines(tmp_path / "rounds")) == [1]


def test_a_folder_that_other_rounds_are_made_in(recipe: Callable, tmp_path: Path) -> None:
    file = recipe()
    with claim_output(tmp_path / "rounds"):
        with pytest.raises(UsageError, match="Another run is writing here"):
            run_rounds(resolve_rounds(file, {}))
        assert [each.name for each in (tmp_path / "rounds").iterdir()] == [".lock"]
    (tmp_path / "rounds" / "mine.txt").touch()
    with pytest.raises(UsageError, match="holds something else"):
        run_rounds(resolve_rounds(file, {}))


def test_what_a_run_did_not_train_is_what_it_was(pipelines: Callable, tmp_path: Path) -> None:
    """Written in another dtype, and with another version's files; but what is changed later is another component."""
    half = tmp_path / "half"
    DiffusionPipeline.from_pretrained(pipelines()).to(torch.float16).save_pretrained(half)
    base = open_model(str(half))
    network = base.load_network()
    network.conv_out.bias.data += 1
    written = open_model(str(write_output(network, base, tmp_path / "run", card="")))
    changed = {name for name, digest in written.fingerprints.items() if digest != base.fingerprints[name]}
    assert changed == {"network"}
    (file,) = (written.folder / "vae").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    again = open_model(str(written.folder)).fingerprints
    assert {name for name in again if again[name] != base.fingerprints[name]} == {"network", "vae"}


def test_it_resumes_anywhere_and_goes_on(
    recipe: Callable, sample: Samples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = recipe(round={"prompts_per_round": 2})
    output = tmp_path / "rounds"
    made: list[str] = []
    killed: list[bytes] = []  # what is known of a round whose process is killed while it trains
    work = round_module.train

    def counted(*arguments: Any, **options: Any) -> bool:
        made.append("train")
        killed[:] = [(arguments[0].output.parent / "seconds.json").read_bytes()]
        return work(*arguments, **options)

    monkeypatch.setattr(round_module, "train", counted)
    # Every look at the clock is a second after the one before, so each visit to a stage that ends takes one.
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "sample_path", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(OutOfMemory, match=r"--batch-size 2,(?s:.*)a setting of \[sample\] in .*recipe\.toml"):
            run_rounds(resolve_rounds(file, {"rounds": 1}))
    file = recipe(round={"prompts_per_round": 2}, sample={"batch_size": 2})
    for stage in ("train", "compare_folders"):
        with monkeypatch.context() as patched:
            patched.setattr(round_module, stage, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                run_rounds(resolve_rounds(file, {"rounds": 1}))
        assert read_lines(output) == {}
    calls = sample.network_calls
    with monkeypatch.context() as patched:
        patched.setattr(round_module, "train", lambda *_, **__: False)  # SIGTERM, with a checkpoint
        shutil.move(output / "round-1" / "run" / "pipeline", tmp_path / "pipeline")
        assert run_rounds(resolve_rounds(file, {"rounds": 1})) == 1
        shutil.move(tmp_path / "pipeline", output / "round-1" / "run" / "pipeline")
    assert run_rounds(resolve_rounds(file, {"rounds": 1})) == 0
    assert (made, sample.network_calls) == (["train"], calls)
    # Points were begun five times, and once they ran out of memory; training four times.
    assert read_lines(output)[1]["seconds"] == {"points": 5, "train": 4, "evaluate": 2}
    before = (output / "rounds.jsonl").read_text()
    assert run_rounds(resolve_rounds(file, {"rounds": 2})) == 0
    assert (made, sample.network_calls) == (["train"] * 2, 2 * calls)
    assert (output / "rounds.jsonl").read_text().startswith(before)
    assert sorted(read_lines(output)) == [1, 2]
    assert json.loads((output / "round-2" / "prompts.json").read_text()) == list(SAMPLED[2:])
    (output / "rounds.jsonl").write_text(before)
    (output / "round-2" / "seconds.json").write_bytes(*killed)
    assert run_rounds(resolve_rounds(file, {"rounds": 2})) == 0
    assert read_lines(output)[2]["seconds"] == {"points": 2, "train": None, "evaluate": 1}
    assert "points 2, train unknown, evaluate 1" in (output / "round-2" / "page.md").read_text()
    # What changes no number is free, and a model is known by its weights.
    monkeypatch.chdir(Path(json.loads(before.splitlines()[0])["begins_with"]).parent)
    free: dict[str, dict[str, Any]] = {
        "model": {"model": f"./{Path(json.loads(before.splitlines()[0])['begins_with']).name}"},
        "sample": {"batch_size": 2, "compile": "off", "engine": "local", "pairs_from": "adjacent", "seed": 0},
        "train": {"gradient_checkpointing": True, "log_every": 1, "keep_last": 1, "overfitting": "ignore"},
        "evaluate": {"batch_size": 1, "compile": "off", "scorers": ["watcher"], "dtype": "float32"},
    }
    again = {"prompts_per_round": 2}
    assert run_rounds(resolve_rounds(recipe(**free, round=again), {"rounds": 2})) == 0
    assert made == ["train"] * 2
    for section, name, value in (
        ("round", "prompts_per_round", 3),
        ("sample", "inference_steps", 3),
        ("train", "steps", 2),
        ("train", "beta", 500.0),
        ("evaluate", "guidance", 2.0),
        ("evaluate", "limit", 1),
    ):
        file = recipe(**{"round": again, section: {**(again if section == "round" else {}), name: value}})
        told = "prompts in [evaluate] = 2" if name == "limit" else f"{name} in [{section}] = "
        with pytest.raises(UsageError, match=re.escape(told)) as caught:
            run_rounds(resolve_rounds(file, {}))
        assert len(str(caught.value.expected).split(";")) == 1, "nothing else differs"
    (output / "round.json").write_text("[]")
    with pytest.raises(UsageError, match="cannot be read"):
        run_rounds(resolve_rounds(recipe(round=again), {}))


def test_a_round_whose_line_is_damaged_is_looked_at_again(recipe: Callable, sample: Samples, tmp_path: Path) -> None:
    file, output = recipe(), tmp_path / "rounds"
    assert run_rounds(resolve_rounds(file, {})) == 0
    whole = (output / "rounds.jsonl").read_text()
    first, second = whole.splitlines()
    for damaged in (
        second.replace('"number": 2', '"number": "two"'),
        json.dumps({**json.loads(second), "interval": [1, 2]}),
        json.dumps({**json.loads(second), "seconds": {"points": "long"}}),
        json.dumps({**json.loads(second), "figures": 1}),
        "[]",
        second[:40],
    ):
        (output / "rounds.jsonl").write_text(f"{first}\n{damaged}\n")
        with pytest.raises(UsageError, match="cannot be read"):
            run_rounds(resolve_rounds(file, {}))
    (output / "rounds.jsonl").write_text(f"{second}\n")
    calls = sample.network_calls
    assert run_rounds(resolve_rounds(file, {})) == 0
    assert sample.network_calls == calls
    again = [{**json.loads(line), "seconds": {}} for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert again == [{**json.loads(line), "seconds": {}} for line in (first, second)]
    rows = [line.split(" | ")[0] for line in (output / "round-1" / "page.md").read_text().splitlines()]
    assert "| 1" in rows
    assert "| 2" not in rows


def test_what_cannot_tell_what_was_learnt_is_refused(recipe: Callable, tmp_path: Path) -> None:
    for changes, match in (
        ({"evaluate": {"scorers": ["brightness"]}}, "never ranks"),
        ({"evaluate": {"prompts": str(tmp_path / "sampled.txt")}}, "no prompt in both"),
        ({"train": {"lora_rank": 4}}, "lora_rank"),
        ({"train": {"output": "elsewhere"}}, "output"),
        ({"train": {"push_to_hub": "me/mine"}}, "push_to_hub"),
        ({"sample": {"scorer": None}}, "scorer"),
        ({"evaluate": {"prompts": None}}, "held out"),
        ({"evaluate": {"lora": "some/lora"}}, r"lora in \[evaluate\]"),
        ({"round": {"output": None}}, "--output"),
    ):
        with pytest.raises(UsageError, match=match):
            resolve_rounds(recipe(**changes), {})
    with pytest.raises(UsageError, match="--recipe"):
        resolve_rounds(None, {})
    assert not (tmp_path / "rounds").exists()
    (tmp_path / "rounds").mkdir()
    (tmp_path / "rounds" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        run_rounds(resolve_rounds(recipe(), {}))


def test_a_ranker_that_rises_alone_is_told() -> None:
    def row(number: int, ranker: float, watcher: float, diversity: float) -> RoundRow:
        figures = {"num_pairs": 1, "num_groups": 1, "num_ties": 0, "score": 0.0, "advantage_norm": 1.0}
        values = {"ranker": ranker, "watcher": watcher}
        return RoundRow.from_json(
            {"number": number, "begins_with": "a", "reference": "a", "figures": {**figures, "diversity": diversity}}
            | {"mean": values, "difference": values, "interval": dict.fromkeys(values), "win_rate": values}
            | {"seconds": {}}
        )

    scorers = ("ranker", "watcher")
    assert warnings([row(1, 0.1, 0.1, 1.0), row(2, 0.2, 0.1, 0.9)], scorers) == []
    (alarm,) = warnings([row(1, 0.1, 0.1, 1.0), row(2, 0.3, -0.1, 0.9)], scorers)
    assert "watcher, which never does, falls" in alarm
    (alarm,) = warnings([row(1, 0.1, 0.1, 1.0), row(2, 0.3, 0.1, 0.5)], scorers)
    assert "differ by 0.5" in alarm


def test_the_figures_of_samples(sample: Samples, scorer: Brightness, pipelines: Callable, tmp_path: Path) -> None:
    scorer.told = lambda prompts: [float(3 * (i % 3)) for i, _ in enumerate(prompts)]
    cache = sample.cache(pipelines(), tmp_path / "cache", per_prompt=3, batch_size=12)
    found = sample_figures(cache)
    (shard,) = cache
    x0, group = shard.read("x0").astype(float), shard.read("image/group")
    apart = [
        np.mean([np.mean((x0[i] - x0[j]) ** 2) for i in inside for j in inside if i < j]) ** 0.5
        for number in range(4)
        for inside in [np.flatnonzero(group == number)]
    ]
    assert (found.num_pairs, found.num_groups, found.num_ties, found.score) == (12, 4, 0, 3.0)
    assert found.advantage_norm == pytest.approx(np.sqrt(6.0))
    assert found.diversity == pytest.approx(np.mean(apart) / x0.std())
