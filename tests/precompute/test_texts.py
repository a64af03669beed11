"""The text phase: every distinct prompt of a cache is encoded once, and before the network is there."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import inpo.precompute.texts as texts_module
import inpo.precompute.worker as precompute_worker
from inpo.common.cache import Cache, TextShard, open_cache
from inpo.common.conditions import Condition, read_prompts
from inpo.common.errors import CacheSchemaError
from inpo.common.families import FAMILIES
from inpo.precompute.components import Components
from inpo.precompute.encode import TextEncoder
from inpo.precompute.texts import TextWorker
from tests.precompute.conftest import WORDS

QUICK = {"grid_points": 1, "timesteps_per_pair": 1}


def of_prompts(cache: Cache) -> list[TextShard]:
    """The text shards but for the empty prompt's."""
    return [shard for shard in cache.texts if shard.name != "empty"]


def attempts(cache: Cache) -> dict[str, str]:
    return {shard.name: shard.commit.attempt for shard in cache.texts}


@pytest.mark.parametrize("kind", ["light", "pixart-sigma"])
def test_each_distinct_prompt_is_encoded_once_for_the_whole_cache(
    pipelines: Callable, examples: Callable, write_tars: Callable, run: Callable, tmp_path: Path, kind: str
) -> None:
    pairs = examples(8)  # four prompts in turn, over two input shards
    source = write_tars(tmp_path / "pairs", pairs, 4)
    cache = run.cache(source, pipelines(kind), tmp_path / "cache", **QUICK)
    assert sorted(run.encoded) == sorted(["", *WORDS])
    assert len(cache.shards) == 2
    assert [shard.num_prompts for shard in of_prompts(cache)] == [4]
    assert cache.texts.need("empty").text == ("",)
    prompts = [prompt for shard in cache for prompt in shard.prompts()]
    assert prompts == [pair.prompt for pair in pairs]

    # More inputs: one prompt that is there, and one that is new.
    more = [
        replace(pair, prompt=prompt) for pair, prompt in zip(examples(2, first=20), (WORDS[1], "a cat"), strict=True)
    ]
    write_tars(tmp_path / "more", more, 2)
    (tmp_path / "more" / "00000.tar").rename(tmp_path / "pairs" / "00009.tar")
    run.encoded.clear()
    after = run.cache(source, pipelines(kind), tmp_path / "cache", **QUICK)
    assert run.encoded == ["a cat"]
    assert attempts(cache).items() < attempts(after).items()
    assert [str(each) for each in after.shards["00009-00000000"].prompts()] == [WORDS[1], "a cat"]

    # And once more: nothing is left to encode, and no encoder is loaded.
    run.encoded.clear()
    run.prepare_texts = lambda encoder: pytest.fail("a text encoder was loaded")
    assert run(source, pipelines(kind), tmp_path / "cache", **QUICK) == 0
    assert run.encoded == []


def test_prompts_lie_in_the_order_of_the_pairs_or_of_their_length(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """By length where what is behind a shard's longest prompt is cut off: little is padded then."""
    source = tars(4, 4)
    (plain,) = of_prompts(run.cache(source, pipelines(), tmp_path / "sd", **QUICK))
    assert plain.text == WORDS
    (sorted_ones,) = of_prompts(run.cache(source, pipelines("pixart-sigma"), tmp_path / "pixart", **QUICK))
    assert sorted_ones.text == tuple(sorted(WORDS, key=lambda text: (len(text), text)))


def test_text_encoders_are_gone_before_the_network_is_loaded(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where references in a circle hold them, which only a collection ends: they fill the device until then."""
    encoders: list[weakref.ref[Any]] = []
    left: list[int] = []

    def watch(encoder: TextEncoder) -> None:
        model = encoder.pipeline.text_encoder
        model.in_a_circle = [model]
        encoders.append(weakref.ref(model))

    load = precompute_worker.load_components

    def loading(*arguments: Any) -> Components:
        left.append(sum(each() is not None for each in encoders))
        return load(*arguments)

    run.prepare_texts = watch
    monkeypatch.setattr(precompute_worker, "load_components", loading)
    gc.disable()
    try:
        run.cache(tars(2, 2), pipelines(), tmp_path / "cache", **QUICK)
    finally:
        gc.enable()
    assert len(encoders) == 1
    assert left == [0]


@pytest.fixture
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts in a text shard."""
    monkeypatch.setattr(texts_module, "MAX_PROMPTS_PER_SHARD", 2)


@pytest.mark.usefixtures("short_shards")
def test_a_run_that_died_in_the_text_phase_goes_on_with_the_same_text_shards(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tars(4, 4)
    whole = run.cache(source, pipelines(), tmp_path / "whole", **QUICK)
    assert len(of_prompts(whole)) == 2
    compute, made = TextWorker.compute, []

    def dying(self: TextWorker, task: Any) -> Any:
        if len(made) == 2:
            raise MemoryError("the machine gave up")
        made.append(task.name)
        return compute(self, task)

    monkeypatch.setattr(TextWorker, "compute", dying)
    with pytest.raises(MemoryError):
        run(source, pipelines(), tmp_path / "parts", **QUICK)
    monkeypatch.setattr(TextWorker, "compute", compute)
    halfway = open_cache(str(tmp_path / "parts"), allow_empty=True)
    assert set(attempts(halfway)) == set(made)
    assert not halfway.commits
    run.encoded.clear()
    done = run.cache(source, pipelines(), tmp_path / "parts", **QUICK)
    assert len(run.encoded) == 2
    assert attempts(halfway).items() < attempts(done).items()
    assert set(attempts(done)) == set(attempts(whole))
    for shard, other in zip(whole.texts, done.texts, strict=True):
        for path in whole.manifest.text_specs:
            np.testing.assert_array_equal(shard.read_stored(path), other.read_stored(path))


@pytest.mark.usefixtures("short_shards")
@pytest.mark.parametrize("lost", ["commit and arrays", "commit"])
def test_a_text_shard_that_is_lost_is_made_again_by_the_same_command(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, lost: str
) -> None:
    source = tars(4, 4)
    before = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    calls = run.network_calls
    gone, stays = of_prompts(before)
    prompts, numbers = gone.text, {path: gone.read_stored(path) for path in gone.specs}
    (tmp_path / "cache" / "text-commits" / f"{gone.name}.json").unlink()
    if lost == "commit and arrays":
        for file in sorted(Path(gone.location).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    run.encoded.clear()
    after = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    assert sorted(run.encoded) == sorted(prompts)
    assert run.network_calls == calls  # no image is inverted again
    assert after.commits == before.commits
    assert attempts(after)[stays.name] == attempts(before)[stays.name]
    assert attempts(after).keys() == attempts(before).keys()
    for path, values in numbers.items():
        np.testing.assert_array_equal(after.texts.need(gone.name).read_stored(path), values)


@pytest.mark.parametrize("kind", ["light", "pixart-sigma"])
def test_text_shards_of_several_selections_that_are_all_lost_are_made_again(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, kind: str
) -> None:
    """A whole run would put the prompts of both into one text shard, and nothing committed names that one."""
    source = tars(4, 1)
    for limit in (1, 3, None):
        before = run.cache(source, pipelines(kind), tmp_path / "cache", limit=limit, **QUICK)
    numbers = {shard.name: {path: shard.read_stored(path) for path in shard.specs} for shard in before.texts}
    assert len(numbers) == 4
    calls = run.network_calls
    for file in (tmp_path / "cache" / "text-commits").iterdir():
        file.unlink()
    after = run.cache(source, pipelines(kind), tmp_path / "cache", **QUICK)
    assert run.network_calls == calls
    assert after.commits == before.commits
    assert attempts(after).keys() == numbers.keys()
    for name, arrays in numbers.items():
        for path, values in arrays.items():
            np.testing.assert_array_equal(after.texts.need(name).read_stored(path), values)


def test_a_run_that_leaves_a_committed_shard_without_its_texts_says_so_and_fails(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tars(4, 1)
    before = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    (lost,) = of_prompts(before)
    (tmp_path / "cache" / "text-commits" / f"{lost.name}.json").unlink()
    (tmp_path / "pairs" / "00001.tar").rename(tmp_path / "00001.tar")
    assert run(source, pipelines(), tmp_path / "cache", **QUICK) == 1
    said = capsys.readouterr().err
    for words in (f"{lost.name}.json", "3 shards cannot be read", "00000-00000000", "to do:"):
        assert words in said
    (tmp_path / "00001.tar").rename(tmp_path / "pairs" / "00001.tar")  # what the message asks for
    assert run(source, pipelines(), tmp_path / "cache", **QUICK) == 0
    assert lost.name in attempts(open_cache(str(tmp_path / "cache")))


def _without_numbers(*prompts: str) -> Callable[[TextEncoder], None]:
    """The encoder gives NaN for these prompts."""

    def prepare(encoder: TextEncoder) -> None:
        encode = encoder.pipeline.encode_prompt

        def broken(*, prompt: list[str], **rest: Any) -> Any:
            embedding, *others = encode(prompt=prompt, **rest)
            embedding[[index for index, text in enumerate(prompt) if text in prompts]] = float("nan")
            return (embedding, *others)

        encoder.pipeline.encode_prompt = broken

    return prepare


def test_a_prompt_without_numbers_is_skipped_with_the_reason_and_not_asked_for_again(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    source = tars(8, 2)  # four prompts in turn; the third is in the second and the fourth shard
    run.prepare_texts = _without_numbers(WORDS[2])
    cache = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    assert [commit.skipped for commit in cache.commits.values()] == [{}, {"not_finite": 1}] * 2
    rows = [json.loads(file.read_text()) for file in (tmp_path / "cache" / "skipped").rglob("*.jsonl")]
    assert {row["pair_id"] for row in rows} == {"pair-002", "pair-006"}
    assert {row["detail"] for row in rows} == {"the text embedding is NaN or infinite"}
    (texts,) = of_prompts(cache)
    assert (texts.text, texts.commit.not_finite) == (WORDS, (2,))
    assert {str(prompt) for shard in cache for prompt in shard.prompts()} == {WORDS[0], WORDS[1], WORDS[3]}
    (tmp_path / "cache" / "commits" / "00001-00000000.json").unlink()
    run.encoded.clear()
    assert run.cache(source, pipelines(), tmp_path / "cache", **QUICK).num_pairs == 6
    assert run.encoded == []


def test_rows_stay_where_a_text_shard_is_made_again_and_other_prompts_have_numbers(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """What overflows on one device does not on another."""
    source = tars(4, 1)
    run.prepare_texts = _without_numbers(WORDS[1])
    before = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    told = {shard.name: Condition.of(shard, np.arange(2))["embedding"] for shard in before}
    assert len(told) == 3
    (lost,) = of_prompts(before)
    (tmp_path / "cache" / "text-commits" / f"{lost.name}.json").unlink()
    run.prepare_texts = _without_numbers(WORDS[2])
    after = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    (again,) = of_prompts(after)
    assert (again.name, again.commit.not_finite) == (lost.name, (2,))
    for number, word in ((0, WORDS[0]), (3, WORDS[3])):
        shard = after.shards[f"0000{number}-00000000"]
        assert shard.prompts().tolist() == [word]
        assert torch.equal(Condition.of(shard, np.arange(2))["embedding"], told[shard.name])
    with pytest.raises(CacheSchemaError, match="prompt 2 of text shard"):
        Condition.of(after.shards["00002-00000000"], np.arange(2))


def test_without_numbers_for_the_empty_prompt_there_is_no_pair(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.prepare_texts = _without_numbers("")
    assert run(tars(2, 2), pipelines(), tmp_path / "cache", **QUICK) == 1
    assert "2 x not_finite" in capsys.readouterr().err
    (listed,) = (tmp_path / "cache" / "skipped").rglob("*.jsonl")
    assert "the empty prompt's embedding is NaN" in listed.read_text()


def test_rows_are_as_long_as_the_longest_of_their_shard_and_the_network_does_not_see_it(
    pipelines: Callable, tars: Callable, run: Callable, tmp_path: Path
) -> None:
    """PixArt-Sigma takes 300 tokens of a prompt: what the T5 encoder says behind a prompt's end is not stored."""
    folder = pipelines("pixart-sigma")
    cache = run.cache(tars(4, 4), folder, tmp_path / "cache", **QUICK)
    for shard in cache.texts:
        longest = int(shard.read_stored("length").max())
        assert shard.read_stored("embedding").shape[1] == longest < 300
    (texts,) = of_prompts(cache)
    assert len(set(texts.read_stored("length").tolist())) > 1
    told = read_prompts(cache.texts, [(texts.name, row) for row in range(4)])
    assert told["embedding"].shape == (4, 300, 32)

    family, pipeline = FAMILIES["pixart_sigma"], DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        untrimmed = family.encode(pipeline, list(texts.text), torch.device("cpu"))
    assert untrimmed["embedding"].shape == (4, 300, 32)
    assert float(untrimmed["embedding"][:, 299].abs().max()) > 0  # there is something that is not stored
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([3.0, 400.0, 700.0, 999.0])
    with torch.no_grad():
        stored, whole = (
            family.call(pipeline.transformer.eval(), x, label, condition)
            for condition in (
                Condition(**{name: torch.from_numpy(values).to(_dtype(name)) for name, values in told.items()}),
                Condition(**{name: tensor.to(torch.float16).to(_dtype(name)) for name, tensor in untrimmed.items()}),
            )
        )
    assert float((stored - whole).abs().max()) < 1e-5 * float(whole.abs().max())


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "embedding" else torch.int32


def test_lost_text_shards_are_made_again_whatever_lies_between(
    pipelines: Callable,
    examples: Callable,
    write_tars: Callable,
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the second window, whose first prompt stands in the first one's text shard: that window is read again too."""
    monkeypatch.setattr(texts_module, "WINDOW", 3)
    prompts = ("a cat", "a dog", "a cat", "a cat", "a sky", "a house")
    pairs = [replace(pair, prompt=prompt) for pair, prompt in zip(examples(6), prompts, strict=True)]
    source = write_tars(tmp_path / "pairs", pairs, 1)
    first = run.cache(source, pipelines(), tmp_path / "cache", limit=5, **QUICK)
    whole = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    lost = [each for each in of_prompts(whole) if list(each.text) in (["a sky"], ["a house"])]
    assert len(lost) == 2
    assert len(of_prompts(first)) + 1 == len(of_prompts(whole))
    for each in lost:
        (tmp_path / "cache" / "text-commits" / f"{each.name}.json").unlink()
    after = run.cache(source, pipelines(), tmp_path / "cache", **QUICK)
    assert after.commits == whole.commits
    assert attempts(after).keys() == attempts(whole).keys()
