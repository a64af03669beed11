"""`filter`: conditions against numpy's answer; what is not measured is counted; nothing is ever run as code."""

import numpy as np
import pytest

from inpo.common.cache import open_cache


def arrays(folder):
    """{column: [pair, ...]}, sides before records."""
    columns = {"pair_id": [], "reference_error": [], "inversion_error": []}
    for shard in open_cache(str(folder)):
        sides = np.stack([shard.read("pair/win"), shard.read("pair/lose")], axis=1)
        columns["pair_id"].append(shard.read("pair/id"))
        for name in ("reference_error", "inversion_error"):
            columns[name].append(shard.read(name)[sides])
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def test_conditions_give_what_numpy_gives_and_missing_values_are_counted(states, inspect, tmp_path):
    found = arrays(states("healthy"))
    mean = found["reference_error"].mean((1, 2), dtype=np.float64)
    worst = found["inversion_error"].max(1)
    middle = float(np.median(mean))
    out = tmp_path / "new" / "list.txt"
    done = inspect("filter", states("healthy"), "--where", f"reference_error <= {middle}", "--out", out)
    assert done.code == 0
    assert out.read_text().splitlines() == found["pair_id"][mean <= middle].tolist()

    unmeasured = int(np.isnan(worst).sum())
    assert 0 < unmeasured < 5
    condition = f"inversion_error < 1e9 and reference_error <= {middle}"
    done = inspect("filter", states("healthy"), "--where", condition, "--out", out)
    expected = found["pair_id"][(mean <= middle) & ~np.isnan(worst)].tolist()
    assert out.read_text().splitlines() == expected
    assert f"{unmeasured} pairs lack inversion_error" in done.out
    assert f"--like {states('healthy')} --model MODEL --measure-inversion 1 --cache OTHER` measures all" in done.out
    assert f"{len(expected)} of 5 pairs" in done.out

    # Kleene: the rest decides where it can, and only there.
    done = inspect("filter", states("healthy"), "--where", "inversion_error < 0 or label > 0.5", "--out", out)
    assert len(out.read_text().splitlines()) == 5
    done = inspect("filter", states("healthy"), "--where", "not inversion_error < 0", "--out", out)
    assert len(out.read_text().splitlines()) == 5 - unmeasured


def test_text_and_flags(states, inspect, tmp_path):
    out = tmp_path / "list.txt"
    inspect("filter", states("healthy"), "--where", '"house" in prompt', "--out", out)
    assert out.read_text().split() == ["pair-0-1", "pair-1-1"]
    inspect("filter", states("healthy"), "--where", "label == 0.75", "--out", out)
    assert out.read_text().split() == ["pair-0-2"]
    inspect("filter", states("healthy"), "--where", "not caption_dropped and 0 < timestep_min < 1000", "--out", out)
    assert "pair-0-1" not in out.read_text().split()


@pytest.mark.parametrize(
    ("state", "expected"), [("healthy", []), ("grouped", ["pair-0-0", "pair-0-1", "pair-1-0", "pair-1-1"])]
)
def test_pairs_of_larger_groups_are_told_from_plain_ones(states, inspect, tmp_path, state, expected):
    out = tmp_path / "list.txt"
    inspect("filter", states(state), "--where", "num_images == 3", "--out", out)
    assert out.read_text().split() == expected
    inspect("filter", states(state), "--where", "num_images == 2", "--out", out)
    assert len(out.read_text().split()) == 5 - len(expected)


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('touch owned')",
        "label.__class__ == 1",
        "(lambda: 1)() == 1",
        "label",
        "1 +",
        "",
        "[x for x in (1,)] == 1",
        "unknown_column < 1",
        "label < 'a'",
        "label if label else label",
        "label := 2",
        "-" * 1500 + "1 < label",
        "not " * 480 + "label",
        "label < " + "9" * 400,
    ],
)
def test_anything_but_a_condition_is_refused(states, inspect, tmp_path, monkeypatch, condition):
    monkeypatch.chdir(tmp_path)
    done = inspect("filter", states("healthy"), "--where", condition, "--out", "list.txt")
    assert done.code == 2, done.out
    assert "--where" in done.out
    assert "<unknown>" not in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "code", "count"), [("writing", 0, 3), ("lean", 0, 5), ("sdxl", 0, 5), ("grouped", 0, 5)]
)
def test_other_states(states, inspect, tmp_path, state, code, count):
    out = tmp_path / "list.txt"
    assert inspect("filter", states(state), "--where", "label > 0", "--out", out).code == code
    assert len(out.read_text().split()) == count


def test_an_empty_cache_and_a_damaged_shard(states, fresh, inspect, tmp_path):
    out = tmp_path / "list.txt"
    assert "no committed pair yet" in inspect("filter", states("empty"), "--where", "label > 0").out
    folder = fresh("healthy")
    label = next(file for file in (folder / "shards" / "s1").rglob("label/c/*") if file.is_file())
    label.write_bytes(b"")
    done = inspect("filter", folder, "--where", "label > 0", "--out", out)
    assert done.code == 1
    assert "cannot be read, left out: s1" in done.out
    assert out.read_text().split() == ["pair-0-0", "pair-0-1", "pair-0-2"]


def test_ids_that_no_list_can_hold_are_counted_and_not_listed(write_cache, inspect, tmp_path):
    """Of a cache that other code wrote; precompute lets none in."""

    def tamper(arrays):
        arrays["pair/id"] = np.array(["a\nb", "c\x1b[2J", "[/bold]"], dtype=object)

    cache = write_cache(tmp_path / "cache", pairs=(2, 3), tamper=tamper)
    out = tmp_path / "list.txt"
    done = inspect("filter", cache, "--where", "label > 0", "--out", out)
    assert done.code == 1
    assert "2 pairs have ids that no list can hold" in done.out
    assert len(out.read_text().splitlines()) == 3
    assert "[/bold]" in out.read_text().splitlines()
    done = inspect("filter", cache, "--where", "label > 0")
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 3
    assert inspect("summary", cache).code == 0


def test_without_a_condition_all_pairs_are_listed(states, inspect):
    """As the option's default says."""
    done = inspect("filter", states("healthy"))
    ids = [str(pair_id) for shard in open_cache(str(states("healthy"))) for pair_id in shard.read("pair/id")]
    assert done.code == 0
    assert sorted(done.out.split("\n")[: len(ids)]) == sorted(ids)


def test_a_list_without_a_pair_is_no_list_to_train_on(states, inspect, tmp_path):
    done = inspect("filter", states("healthy"), "--where", "reference_error < 0", "--out", tmp_path / "none.txt")
    assert done.code == 0
    assert "0 of 5 pairs" in done.out
    assert "inpo train" not in done.out
    assert f"{tmp_path / 'none.txt'}: an empty list" in done.out
    assert (tmp_path / "none.txt").read_text() == ""
