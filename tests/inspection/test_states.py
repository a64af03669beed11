"""Every command on a cache in every state: how it ends, and that what is wrong is named while the rest is shown."""

import pytest

COMMANDS = {
    "summary": (),
    "pair": ("--first",),
    "verify": (),
    "clean": ("--yes",),
    "report": (),
    "filter": ("--where", "label > 0"),
    "drift": ("--sample", "5"),
}
# state: {command: (exit code, words that it says)}. Not listed: exit code 0, nothing to look for.
CASES = {
    "healthy": {
        "pair": (0, "pair-0-0"),
        "filter": (0, "5 of 5 pairs"),
        "report": (0, "5 of 5 pairs"),
        "verify": (0, "all sound"),
    },
    "empty": {
        "summary": (0, "Nothing is committed yet"),
        "report": (0, "0 of 0 pairs"),
        "verify": (1, "nothing is committed yet"),
        "pair": (1, "no committed pair yet"),
        "filter": (1, "no committed pair yet"),
        "drift": (1, "no committed pair yet"),
    },
    # Between precompute's two phases: texts are committed, and no pair.
    "texts": {
        "summary": (0, "2 text shards"),
        "report": (0, "0 of 0 pairs"),
        "verify": (1, "no pair is committed yet"),
        "clean": (0, "nothing to remove"),
        "pair": (1, "no committed pair yet"),
        "filter": (1, "no committed pair yet"),
        "drift": (1, "no committed pair yet"),
    },
    "writing": {
        "summary": (0, "being written"),
        "pair": (0, "pair-0-0"),
        "filter": (0, "3 of 3 pairs"),
        "drift": (0, "3 of 3 pairs"),
        "report": (0, "3 of 3 pairs"),
        "clean": (0, "1 younger than an hour"),
    },
    # No writer is waited for: what is left is a list of skipped rows.
    "taken back": {
        "summary": (0, "No pair is committed yet.\n"),
        "verify": (1, "1 shards have nothing but a list of skipped rows (s0): no pair was kept"),
        "clean": (0, "removed 1 leftovers"),
        "pair": (1, "no committed pair yet"),
        "filter": (1, "no committed pair yet"),
        "drift": (1, "no committed pair yet"),
    },
    # One bit of a latent array is flipped: summary and filter read no latent, and need none.
    "corrupt": {
        "summary": (0, "5 (10 records"),
        "pair": (0, "pair-0-0"),
        "filter": (0, "5 of 5 pairs"),
        "verify": (1, "1 bad: s1"),
        "report": (1, "cannot be read: s1"),
        "drift": (1, "shards that cannot be read, left out: s1"),
    },
    "lean": {"summary": (0, "lean"), "verify": (0, "not stored (lean)"), "drift": (0, "5 of 5 pairs")},
    "sdxl": {"summary": (0, "text_encoder_2"), "drift": (0, "5 of 5 pairs"), "report": (0, "5 of 5 pairs")},
    "grouped": {
        "summary": (0, "8 in 3 groups"),
        "verify": (0, "all sound"),
        "filter": (0, "5 of 5 pairs"),
        "drift": (0, "5 of 5 pairs"),
        "report": (0, "5 of 5 pairs"),
    },
    "nothing": {command: (1, "There is no cache here.") for command in COMMANDS},
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", CASES)
def test_how_each_command_ends(fresh, inspect, tiny, tmp_path, state, command):
    code, words = CASES[state].get(command, (0, ""))
    folder = tmp_path if state == "nothing" else fresh(state)
    options = [*COMMANDS[command]]
    options += ["--out", tmp_path / "out"] if command in ("pair", "report", "filter") else []
    options += ["--model", tiny("sdxl" if state == "sdxl" else "sd15")] if command == "drift" else []
    done = inspect(command, folder, *options)
    assert done.code == code, done.out
    assert words in done.out
