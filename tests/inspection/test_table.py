"""`table` and `to_xarray` give what the shards hold, row by row; latents are read when they are used."""

import numpy as np
import pyarrow.parquet
import pytest

from inpo.common.cache import Shard, open_cache, to_xarray
from inpo.common.errors import CacheError


def test_the_table_has_a_row_for_each_pair_and_null_for_what_was_not_measured(states, inspect, tmp_path):
    out = tmp_path / "pairs.parquet"
    done = inspect("table", states("healthy"), "--out", out)
    assert done.code == 0
    assert "5 pairs" in done.out
    read = pyarrow.parquet.read_table(out)
    rows = read.to_pylist()
    expected = []
    for shard in open_cache(str(states("healthy"))):
        sides = np.stack([shard.read("pair/win"), shard.read("pair/lose")], axis=1)
        for pair_id, side in zip(shard.read("pair/id"), sides, strict=True):
            errors, inversion = shard.read("reference_error")[side], shard.read("inversion_error")[side]
            expected.append((pair_id, shard.name, errors, inversion.max()))
    assert [(row["pair_id"], row["shard"]) for row in rows] == [each[:2] for each in expected]
    for row, (_, _, errors, inversion) in zip(rows, expected, strict=True):
        assert row["reference_error_win"] == pytest.approx(errors[0].mean())
        assert row["inversion_error"] == (None if np.isnan(inversion) else pytest.approx(inversion))
    assert read.schema.field("label").metadata[b"meaning"] == b"P(win preferred)"
    assert inspect("table", states("healthy"), "--out", tmp_path / "pairs.csv").code == 2


@pytest.mark.parametrize("state", ["healthy", "grouped"])
def test_the_dataset_is_the_shards_one_after_another(states, monkeypatch, state):
    read: list[str] = []
    original = Shard.read

    def spy(self, path, rows=None, **options):
        read.append(path)
        return original(self, path, rows, **options)

    monkeypatch.setattr(Shard, "read", spy)
    found = to_xarray(str(states(state)))
    assert not {"x_t", "target", "x0"} & set(read)
    monkeypatch.undo()
    shards = list(open_cache(str(states(state))))
    assert len(shards) > 1
    assert found.sizes["pair"] == sum(shard.num_pairs for shard in shards)
    assert found["target"].dims == ("image", "record", "C", "H", "W")
    for name in ("x0", "target", "reference_error", "x_t"):
        want = np.concatenate([shard.read(name) for shard in shards])
        np.testing.assert_array_equal(found[name].values, want)
    # One pair's images and caption, whatever its shard, by rows over all shards.
    for number, pair_id in enumerate(found["pair_id"].values):
        shard = next(each for each in shards if pair_id in each.read("pair/id"))
        row = int(np.flatnonzero(shard.read("pair/id") == pair_id)[0])
        image = int(found["pair_win"][number])
        np.testing.assert_array_equal(found["x_t"][image, 1].values, shard.read("x_t")[shard.sides()[row, 0], 1])
        group = int(found["image_group"][image])
        assert found["prompt"].values[group] == shard.prompts()[shard.groups()[row]]
        np.testing.assert_array_equal(found["timestep"].values[group], shard.timesteps()[shard.sides()[row, 0]])
    last = found.sizes["image"] - 1
    some = found["target"].isel(image=[last, 0], C=slice(1, 3))
    np.testing.assert_array_equal(some.values, found["target"].values[[last, 0], :, 1:3])
    assert found["target"].attrs["long_name"]
    assert found.attrs["equation"].startswith("x_t = ")


def test_no_cache_is_said(tmp_path):
    with pytest.raises(CacheError):
        to_xarray(str(tmp_path))
