"""`report`: one file that needs nothing else, escapes what users wrote, and stays small by sampling."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from inpo.common.cache import open_cache
from inpo.common.cache.labels import LabelSet, PairLabel, write_labels
from inpo.inspection import report_sample
from inpo.inspection.pair_table import PairTable
from inpo.inspection.report import make_report
from tests.html_page import Page


def page_of(inspect, cache, out, *words, code=0):
    done = inspect("report", cache, "--out", out, *words)
    assert done.code == code, done.out
    return Page(out.read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing_and_holds_every_pair(states, inspect, tmp_path):
    out = tmp_path / "sub" / "r.html"
    page = page_of(inspect, states("healthy"), out)
    html = out.read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"https?://|@import|url\((?!\$\{sheet\.sprite\})", html)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    ids = [pair["pair_id"] for pair in page.data["pairs"]]
    assert ids == ["pair-0-0", "pair-0-1", "pair-0-2", "pair-1-0", "pair-1-1"]
    cache = open_cache(str(states("healthy")))
    first = page.data["pairs"][0]
    shard = cache.shards["s0"]
    sheet = first["sheet"]
    assert first["timesteps"] == sheet["timesteps"] == shard.read("timestep")[0].tolist()
    errors = shard.read("reference_error")[:2]
    assert np.allclose(sheet["errors"], errors.T, atol=1e-6)
    assert np.isclose(first["gap"], errors[0].mean() - errors[1].mean(), atol=1e-6)
    assert sheet["columns"] == ["x0(t)", "x_t", "|delta|", "target - delta"]
    image = Image.open(io.BytesIO(base64.b64decode(sheet["sprite"].removeprefix("data:image/webp;base64,"))))
    assert image.size == ((1 + 2 * 4) * 8, 2 * 8)
    headings = " ".join([*page.text["h3"], *page.text["h2"]])
    assert html.index('id="cards"') < html.index("<svg")  # the gallery comes first
    assert ["tie-0", "tie-1"] == [cell for cell in page.text["td"] if cell.startswith("tie-")]
    for name in ("Reference error by timestep", "Timesteps", "Inversion error", "Size of delta", "Labels", "Skipped"):
        assert name in headings


def test_prompts_cannot_break_out_of_the_page(states, inspect, tmp_path):
    page = page_of(inspect, states("healthy"), tmp_path / "r.html")
    prompts = {pair["prompt"] for pair in page.data["pairs"]}
    assert 'the dog & <b>a</b> "cat"' in prompts
    assert any('the dog & <b>a</b> "cat"' in text for text in page.text["span"])
    assert ("b", {}) not in [tag for tag in page.tags if tag[0] == "b" and "a" in page.text.get("b", [])]
    assert "</b>" not in (tmp_path / "r.html").read_text().split('id="data">')[1].split("</script>")[0]


@pytest.mark.parametrize(
    ("state", "code", "num_pairs", "words"),
    [
        ("empty", 0, 0, "Nothing is committed yet."),
        ("writing", 0, 3, "being written"),
        ("corrupt", 1, 3, "array target of shard s1"),
        ("lean", 0, 5, "stores neither delta nor x0(t)"),
        ("sdxl", 0, 5, "text_encoder_2"),
        ("texts", 0, 0, "No pair is committed yet."),
        ("grouped", 0, 5, "3 groups"),
    ],
)
def test_every_state_gives_a_page(states, inspect, tmp_path, state, code, num_pairs, words):
    page = page_of(inspect, states(state), tmp_path / "r.html", code=code)
    assert sum("sheet" in pair for pair in page.data["pairs"]) == num_pairs
    assert words in " ".join(text for texts in page.text.values() for text in texts)


def test_numbers_that_are_not_finite_leave_the_page_whole(write_cache, inspect, monkeypatch, tmp_path):
    def tamper(arrays):
        arrays["reference_error"][:2] = np.nan
        arrays["inversion_error"][:2] = np.inf
        arrays["pair/label"][0] = np.nan

    monkeypatch.setattr("inpo.common.cache.writer._check_arrays", lambda *_: None)  # another writer may not look
    page = page_of(inspect, write_cache(tmp_path / "c", tamper=tamper), tmp_path / "r.html")
    broken = page.data["pairs"][3]
    assert (broken["pair_id"], broken["gap"], broken["reference_error"], broken["label"]) == ("pair-1-0", *[None] * 3)
    assert broken["sheet"]["errors"][0] == [None, None]
    assert page.data["pairs"][4]["gap"] is not None


def test_all_pairs_are_listed_and_only_the_asked_ones_drawn(states, inspect, tmp_path):
    page = page_of(inspect, states("healthy"), tmp_path / "r.html", "--pairs", "1")
    drawn = [pair["pair_id"] for pair in page.data["pairs"] if "sheet" in pair]
    assert 1 <= len(drawn) <= 4 < len(page.data["pairs"]) == 5
    widest = max(page.data["pairs"], key=lambda pair: pair["gap"])
    assert widest["groups"].count("gap") == 1


def test_through_the_vae_pictures_are_larger_and_label_sets_are_drawn(fresh, inspect, tiny, tmp_path):
    folder = fresh("healthy")
    cache = open_cache(str(folder))
    for shard in cache:
        ids = shard.read("pair/id")
        labels = {str(name): PairLabel(scores=(2.0, 1.0 + row), label=0.7) for row, name in enumerate(ids)}
        labels = LabelSet(attempt=shard.commit.attempt, scorer="x", temperature=1.0, source="/pairs", pairs=labels)
        assert write_labels(cache.store, "better", shard.name, labels)
    page = page_of(inspect, folder, tmp_path / "r.html", "--model", tiny())
    sprite = page.data["pairs"][0]["sheet"]["sprite"].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(sprite))).size == ((1 + 2 * 4) * 32, 2 * 32)
    assert "Scores of label set better" in page.text["h3"]
    # Scores of win are above those of lose in the first row of each shard: 2 of 5 pairs.
    assert any("agrees with the source on 40% of 5 pairs" in text for text in page.text["figcaption"])


def test_a_damaged_label_set_is_named_and_hides_no_pair(fresh, inspect, tmp_path):
    folder = fresh("healthy")
    (folder / "labels" / "mine").mkdir(parents=True)
    (folder / "labels" / "mine" / "s1.json").write_text("{}")
    page = page_of(inspect, folder, tmp_path / "r.html", code=1)
    assert len(page.data["pairs"]) == 5
    assert any("label" in text and "s1.json" in text for text in page.text["pre"])


def test_a_large_cache_is_sampled_by_each_reason_and_the_page_stays_small():
    rng = np.random.default_rng(0)
    count = 100_000
    inversion = rng.random((count, 2)).astype(np.float32)
    inversion[: count // 2] = np.nan
    table = PairTable(
        shard_names=("s0",),
        shard=np.zeros(count, int),
        row=np.arange(count),
        image=np.arange(2 * count).reshape(count, 2),
        num_images=np.full(count, 2),
        pair_id=np.array([f"p{row}" for row in range(count)], object),
        prompt=np.full(count, "p", object),
        caption_dropped=np.zeros(count, bool),
        label=np.ones(count, np.float32),
        timestep=np.zeros((count, 2), int),
        reference_error=rng.random((count, 2, 2)).astype(np.float32),
        inversion_error=inversion,
        unreadable={},
    )
    chosen = report_sample.choose(table, 40)
    by_group = {name: {row for row, groups in chosen.items() if name in groups} for name in report_sample.GROUPS}
    assert {name: len(rows) for name, rows in by_group.items()} == dict.fromkeys(report_sample.GROUPS, 40)
    worst = np.nanmax(np.where(np.isnan(inversion), -1, inversion), 1)
    assert by_group["inversion"] == set(np.argsort(-worst, kind="stable")[:40].tolist())
    mean = table.reference_error.mean((1, 2), dtype=float)
    assert by_group["error"] == set(np.argsort(-mean, kind="stable")[:40].tolist())
    assert report_sample.MOST_PICTURE_BYTES < 15e6  # of the 20 MB that a page may have


def test_pictures_stop_at_their_share_and_the_page_says_how_many_there_are(states, monkeypatch):
    monkeypatch.setattr(report_sample, "MOST_PICTURE_BYTES", 9_000)
    made = make_report(str(states("healthy")))
    assert 0 < made.num_shown < 5
    assert f"Pictures of {made.num_shown} of 5 pairs" in made.html
    assert len(made.html) < 9_000 + 90_000
