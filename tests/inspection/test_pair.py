"""`pair`: the sheet holds the pictures it should, and says what it cannot show."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from inpo.common.cache import open_cache
from inpo.inspection.pair_view import find_pair
from inpo.inspection.preview import linear_preview
from inpo.inspection.sheet import _legend_lines
from tests.inspection.test_quarantine import precompute


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def places(page, tile):
    """Where `tile` stands in `page`, to one grey level."""
    corner = (np.abs(page[: -len(tile) + 1, : -tile.shape[1] + 1] - tile[0, 0]) <= 1).all(-1)
    return [
        (y, x)
        for y, x in np.argwhere(corner)
        if np.abs(page[y : y + len(tile), x : x + tile.shape[1]] - tile).max() <= 1
    ]


@pytest.mark.parametrize("shape", [(8, 8), (8, 16), (16, 8)], ids="{0[0]}x{0[1]}".format)
def test_the_vaes_own_pictures_stand_in_rows_win_and_lose(write_cache, inspect, tiny, tmp_path, shape):
    """In their own shape, each pixel as often as a tile of 160 px in width has room for."""
    cache = write_cache(tmp_path / "c", latent_shape=(4, *shape), resolution=tuple(4 * side for side in shape))
    done = inspect("pair", cache, "pair-1-1", "--out", tmp_path / "p.png", "--model", tiny())
    assert done.code == 0, done.out
    page = pixels(tmp_path / "p.png")
    assert (page[:10] == 255).all()
    assert (page[-10:] == 255).all()
    vae = AutoencoderKL.from_pretrained(tiny() / "vae")
    shard = open_cache(str(cache)).shards["s1"]
    found = []
    for side in (0, 1):
        latent = torch.from_numpy(shard.read("x0")[2 + side]).float()
        with torch.no_grad():
            image = vae.decode(latent[None] / 0.18215).sample[0].clamp(-1, 1)
        levels = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)
        times = 160 // levels.shape[1]
        found.append(places(page, levels.repeat(times, 0).repeat(times, 1)))
    (win, *_), (lose, *_) = found
    assert win[1] == lose[1]
    assert lose[0] > win[0] + times * len(levels)


@pytest.mark.parametrize("state", ["healthy", "writing", "lean", "sdxl", "corrupt", "grouped"])
def test_the_first_pair_of_every_kind_of_cache_makes_a_sheet(states, inspect, tmp_path, state):
    out = tmp_path / "folder" / "p.png"
    done = inspect("pair", states(state), "--first", "--out", out)
    assert done.code == 0, done.out
    assert "pair-0-0" in done.out
    page = pixels(out)
    assert page.shape[1] > page.shape[0] > 400
    assert 0.3 < (page == 255).all(-1).mean() < 0.95


def test_a_pair_of_a_chain_shows_its_own_images(states, inspect, tmp_path):
    """pair-0-1 of `grouped` is images 1 and 2 of a group of three."""
    view = find_pair(open_cache(str(states("grouped"))), "pair-0-1", {})
    shard = open_cache(str(states("grouped"))).shards["s0"]
    for name in ("x0", "x_t", "target", "delta", "x0_t", "reference_error"):
        assert np.array_equal(getattr(view, name), shard.read(name)[1:3].astype(np.float32))
    assert view.timestep.tolist() == shard.read("timestep")[0].tolist()
    assert (view.prompt, view.caption_dropped) == ("a red cat", False)
    own = find_pair(open_cache(str(states("grouped"))), "pair-0-2", {})
    assert (own.prompt, own.caption_dropped, own.label) == ("a blue house on the sky", True, 0.75)
    assert inspect("pair", states("grouped"), "pair-0-1", "--out", tmp_path / "p.png").code == 0


def test_damage_elsewhere_hides_no_pair(fresh, inspect, tmp_path):
    """s0's ids are damaged, or its latents, or its commit: s1's pairs are found and shown, and s0 is named."""
    for number, spoil in enumerate(("shards/s0/*/pair/id/c/*", "shards/s0/*/x0/c/**/*", "commits/s0.json")):
        folder = fresh("healthy").rename(tmp_path / f"cache-{number}")
        file = next(path for path in folder.glob(spoil) if path.is_file())
        file.write_bytes(b"{" if file.suffix else b"")
        out = tmp_path / f"{number}.png"
        done = inspect("pair", folder, "pair-1-1", "--out", out)
        assert done.code == 0, done.out
        assert "pair-1-1" in done.out
        first = inspect("pair", folder, "--first", "--out", out)
        assert first.code == 0, first.out
        assert "pair-1-0" in first.out
        assert "cannot be read, left out: s0" in first.out
    nobody = inspect("pair", tmp_path / "cache-0", "nobody", "--out", out)
    assert nobody.code == 1
    assert "unreadable and not searched: s0" in nobody.out


def test_the_first_pair_that_can_be_read_may_be_a_later_one_of_its_shard(write_cache, inspect, tmp_path):
    folder = write_cache(tmp_path / "c", pairs=(2,), latent_shape=(4, 32, 32), resolution=(128, 128))
    (chunk,) = [file for file in (folder / "shards/s0").glob("*/x_t/c/**/*") if file.is_file()]
    data = bytearray(chunk.read_bytes())
    data[5000] ^= 1  # in the first chunk, beyond what the digest of the whole file takes from it
    chunk.write_bytes(data)
    assert inspect("pair", folder, "pair-0-0", "--out", tmp_path / "p.png").code == 1
    done = inspect("pair", folder, "--first", "--out", tmp_path / "p.png")
    assert done.code == 0, done.out
    assert "pair-0-1" in done.out
    assert "cannot be read, left out: s0" in done.out


def test_a_flows_sheet_shows_the_error_of_the_velocity(tiny, inspect, tmp_path):
    folder = precompute(tmp_path, tiny("sd3"))
    cache = open_cache(str(folder))
    view = find_pair(cache, None, {})
    a, s = (level[None, :, None, None, None] for level in (view.a, view.s))
    assert np.abs(a * view.x0[:, None] + s * view.target - view.x_t).max() < 2e-3
    assert np.allclose((view.error_map**2).mean((2, 3)), view.reference_error, rtol=1e-2)
    legend = dict(_legend_lines(view, linear_preview(cache)))
    assert "v = δ − x₀(t)" in legend["|τ − v|"]
    assert inspect("pair", folder, "--first", "--out", tmp_path / "p.png").code == 0
    out = tmp_path / "r.html"
    assert inspect("report", folder, "--out", out).code == 0
    assert "target - (delta - x0(t))" in out.read_text()


def test_what_cannot_be_shown_is_told(states, inspect, tiny, tmp_path):
    out = tmp_path / "p.png"
    assert inspect("pair", states("healthy"), "--out", out).code == 2
    assert inspect("pair", states("healthy"), "pair-0-0", "--first", "--out", out).code == 2
    unknown = inspect("pair", states("healthy"), "nobody", "--out", out)
    assert unknown.code == 1
    assert "No committed pair has the id 'nobody'" in unknown.out
    damaged = inspect("pair", states("corrupt"), "pair-1-0", "--out", out)
    assert damaged.code == 1
    assert "array target of shard s1" in damaged.out
    assert "no committed pair yet" in inspect("pair", states("empty"), "--first", "--out", out).out
    other = inspect("pair", states("healthy"), "--first", "--out", out, "--model", tiny("sdxl"))
    assert other.code == 1
    assert "VAE" in other.out
    assert not out.exists()
