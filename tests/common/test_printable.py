"""What may leave the process: no secrets, and nothing that a terminal obeys."""

import io
import json
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table

import inpo.common.console as consoles
from inpo.common.cache.store import CacheStore
from inpo.common.errors import DataError, UsageError
from inpo.common.printable import escaped, is_printable, shown, shown_message
from inpo.common.recipe import DataSection, resolve, to_toml
from inpo.common.terminal import escape_streams

ADDRESSES = {
    "http://alice:SECRET@host:80/a.parquet": "http://host:80/a.parquet",
    "https://SECRET@host/a": "https://host/a",
    "s3://KEY-SECRET:with/SECRET@bucket/a@b/c": "s3://b/c",  # which @ ends the login cannot be told: rather too much
    "http://user:SECRET#?SECRET@host/x?k=SECRET": "http://host/x?k=***",
    "http://user:SEC RET'SECRET@host/x": "http://host/x",
    "https://host/x.png?X-Amz-Signature=SECRET&id=SECRET": "https://host/x.png?X-Amz-Signature=***&id=***",
    "https://host/a b.png?sig=SECRET SECRET": "https://host/a b.png?sig=***",
    "https://host/x?SECRET": "https://host/x?***",
    "simplecache::http://u:SECRET@host/x?sig=SECRET": "simplecache::http://host/x?sig=***",
    "abfss://u:SECRET@account/x": "abfss://account/x",
}
HARMLESS = (
    "abfss://container@account.dfs.core.windows.net/x",
    "s3://bucket/a@b/{0000..0003}-?.tar",
    "hf://datasets/owner/name@main/x",
    "http://[::1]:80/x",
    "/data/sig=1/a?b.tar",
    "~/x",
    "owner/name",
)


@pytest.mark.parametrize("address", [*ADDRESSES, *HARMLESS])
def test_an_address_is_shown_without_its_secrets(address: str) -> None:
    expected = ADDRESSES.get(address, address)
    assert shown(address) == expected
    assert shown(expected) == expected


@pytest.mark.parametrize("address", [address for address in ADDRESSES if "a b" not in address])
def test_messages_are_without_them_too(address: str) -> None:
    for text in (
        f"GET {address} failed",
        f"('{address}', 3)",
        str(DataError("no", where=address, got=f"x {address}: y", fix="none")),
    ):
        assert "SECRET" not in shown_message(text)
        assert "SECRET" not in str(DataError("no", where=text, expected=[text], got=text, fix=text))


def test_a_query_alone_is_one() -> None:
    text = "HTTPConnectionPool(host='h'): Max retries exceeded with url: /x?X-Amz-Signature=SECRET&n=SECRET (Caused"
    assert "SECRET" not in shown_message(text)
    assert "SECRET" not in shown_message("refused: Signature=SECRET, token=SECRET")
    assert shown_message("what is a=b? c") == "what is a=b? c"


def test_a_written_configuration_has_no_secrets_and_the_run_has_them() -> None:
    address = "https://alice:SECRET@host/pairs.jsonl?sig=SECRET"
    data = resolve(DataSection, "data", {}, {"pairs": address, "cache": "s3://k:SECRET@bucket/cache"})
    assert data.need("pairs") == address
    assert data.need("cache") == "s3://k:SECRET@bucket/cache"
    assert "SECRET" not in to_toml({"data": data})
    assert 'pairs = "https://host/pairs.jsonl?sig=***"' in to_toml({"data": data})


def test_a_cache_is_named_without_secrets() -> None:
    with pytest.raises(UsageError) as refused:
        CacheStore("memory:///cache?sig=SECRET/")
    assert "SECRET" not in str(refused.value)


UNPRINTABLE = ["\x1b[31m", "\x9b31m", "\0", "\r", "\x7f", "\x08", "\u2028", "\u202e", "\ufeff", "\ud800", "\x85"]


@pytest.mark.parametrize("text", UNPRINTABLE)
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    found = escaped(f"a{text}b")
    assert found == f"a{json.dumps(text)[1:-1]}b".replace("\x7f", "\\u007f").replace("\\r", "\\u000d").replace(
        "\\b", "\\u0008"
    )
    assert is_printable(found)
    assert not is_printable(f"a{text}b")


def test_what_a_script_needs_stays() -> None:
    text = "рыжий кот 赤い猫 🐈 👩\u200d🚀 שָׁלוֹם a\tb\n"
    assert escaped(text) == text
    assert not is_printable("a\nb")
    assert not is_printable("a\tb")


def test_an_error_cannot_be_given_another_line() -> None:
    text = str(DataError("bad id", where="list", got="x\n  to do:    rm\x1b[2K", fix="correct it"))
    assert text.splitlines() == [
        "bad id",
        "  where:    list",
        "  got:      x\\n  to do:    rm\\u001b[2K",
        "  to do:    correct it",
    ]


def test_the_front_door_escapes_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    escape_streams()
    print("a\x1b]0;title\x07", {"é": 1}, flush=True)
    print("\x1b[31mred", file=sys.stderr)
    sys.stderr.writelines(["one\x1b\n", "two\r\n"])
    sys.stderr.write("\rbar 50%")
    assert out.getvalue() == "a\\u001b]0;title\\u0007 {'é': 1}\n"
    assert err.getvalue() == "\\u001b[31mred\none\\u001b\ntwo\\u000d\n\rbar 50%"


def test_a_terminal_of_another_encoding_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    escape_streams()
    print("caf\u00e9 \u732b\u2026")
    assert written.getvalue() == b"caf\xe9 \\u732b\\u2026\n"


def test_richs_own_colours_stay_and_those_of_a_text_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    escape_streams()
    made: list[Console] = []

    def terminal(**options: object) -> Console:
        made.append(Console(force_terminal=True, width=60, color_system="standard", _environ={}))
        return made[-1]

    monkeypatch.setattr(consoles, "Console", terminal)
    console = consoles.console()
    table = Table("head\x1b[5m")
    table.add_row("cell\x1b[2J")
    console.print("[bold]ours[/bold] theirs\x1b[31m", highlight=False)
    console.print(table)
    codes = re.findall(r"\x1b\[([0-9;]*)([A-Za-z])", out.getvalue())
    assert codes
    assert {kind for _, kind in codes} == {"m"}
    assert not {"31", "5"} & {number for number, _ in codes}
    for text in ("theirs\\u001b[31m", "head\\u001b[5m", "cell\\u001b[2J"):
        assert text in out.getvalue()
