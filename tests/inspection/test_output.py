"""What a command is to write, and what it is told that it cannot use: refused before the work, with what to do."""

import pytest

COMMANDS = {
    "pair": (("--first",), "Could not write the sheet"),
    "report": ((), "Could not write the report"),
    "filter": (("--where", "label > 0"), "Could not write the list"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "words"), [("folder", "Is a directory"), ("file/below/p.png", "Not a directory")])
def test_an_output_that_cannot_be_written_is_told_before_the_cache_is_read(inspect, tmp_path, command, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    options, what = COMMANDS[command]
    done = inspect(command, tmp_path / "no-cache-at-all", *options, "--out", tmp_path / name)
    assert done.code == 1
    for part in (what, words, str(tmp_path / name.split("/")[0]), "choose another path"):
        assert part in done.out
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_above_an_output_are_made(states, inspect, tmp_path):
    out = tmp_path / "new" / "deeper" / "list.txt"
    assert inspect("filter", states("healthy"), "--where", "label > 0", "--out", out).code == 0
    assert len(out.read_text().splitlines()) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_kind_is_not_replaced(states, inspect, tmp_path, command):
    """It may be the user's; what an earlier call wrote is."""
    out, mine = tmp_path / "out", tmp_path / ("mine.png" if command == "pair" else "mine")
    mine.write_text('{"win": "a.png", "lose": "b.png", "prompt": "a list of pairs"}\n')
    before = mine.read_bytes()
    done = inspect(command, states("healthy"), *COMMANDS[command][0], "--out", mine)
    assert done.code == 2
    assert "This file is there already, and is no" in done.out
    assert mine.read_bytes() == before
    if command != "pair":
        for _ in range(2):
            assert inspect(command, states("healthy"), *COMMANDS[command][0], "--out", out).code == 0


def test_a_sheet_is_not_written_under_another_formats_name(states, inspect, tmp_path):
    done = inspect("pair", states("healthy"), "--first", "--out", tmp_path / "p.jpg")
    assert done.code == 2
    for part in ("written as PNG", "*.png", str(tmp_path / "p.jpg"), str(tmp_path / "p.png")):
        assert part in done.out
    assert not list(tmp_path.iterdir())


def test_a_sample_without_a_model_is_not_left_out_silently(states, inspect):
    done = inspect("verify", states("healthy"), "--sample", "5")
    assert done.code == 2
    assert "--sample 5 alone" in done.out
    assert "--model" in done.out
