"""What may leave the process: addresses without their secrets, and text without what a terminal would obey.

    shown(address)         no user, no password, no value of a query
    shown_message(text)    the same for whatever addresses a message has in it
    escaped(text)          control characters as JSON writes them, \\u001b for ESC

Whatever is written beside data (commits, configurations, lists of skipped rows, messages) goes through the first
two; terminal.py escapes what is printed.
"""

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ADDRESS = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://"
    r"(?:[^\s/?#@:]*:(?!\d*(?:[/?#\s]|$))[^@\n]*@)?"  # a login: what follows the colon is no port
    r"[^\s'\"<>|`]*"
)
_QUERY = re.compile(r"(?<=[\w/%.-])\?(?=[\w.~%+-]+=)[^\s'\"<>|`]+")
_SECRET = re.compile(
    r"(?i)(?<![\w/.-])((?:x-(?:amz|goog|ms)-[a-z-]+|sig|signature|token|access_token|api_?key|password|secret)=)"
    r"[^\s&'\"<>|`;,)]+"
)
_ACCOUNT_SCHEMES = ("abfs", "abfss")
"""container@account is a place there, not a login."""
_HIDDEN = "***"
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""All control characters but tab and line feed, line and paragraph separators, what turns the direction of writing, the
byte order mark, and halves of characters."""


def shown(address: str) -> str:
    """An address as it may be shown: without user and password, with *** for each value of a query. A local path is the
    same, and so is an address without secrets: what was stored can be compared with what is given."""
    parts = re.split(r"::(?=[A-Za-z])", address)  # fsspec joins addresses so
    return "::".join(_shown_address(part) if _SCHEME.match(part) else part for part in parts)


def shown_message(text: str) -> str:
    """A message of ours or of a library, with every address in it as it may be shown, also where it is only the end of
    one."""
    text = _QUERY.sub(
        lambda match: "?" + _shown_query(match[0][1:]), _ADDRESS.sub(lambda match: _shown_address(match[0]), text)
    )
    return _SECRET.sub(rf"\1{_HIDDEN}", text)


def _shown_address(address: str) -> str:
    scheme, _, rest = address.partition("://")
    cut = re.search(r"[/?#]", rest)
    authority, path = (rest[: cut.start()], rest[cut.start() :]) if cut else (rest, "")
    if re.search(r":(?!\d*$)", authority) and "@" not in authority and "@" in path:
        # A password with one of /?# in it: what looks like a port is none.
        authority, path = "@", path.rpartition("@")[2]
        cut = re.search(r"[/?#]", path)
        host, path = (path[: cut.start()], path[cut.start() :]) if cut else (path, "")
        authority += host
    login, at, host = authority.rpartition("@")
    if at and not (scheme in _ACCOUNT_SCHEMES and ":" not in login):
        authority = host
    path, question, query = path.partition("?")
    if question and ("=" in query or scheme in ("http", "https")):  # elsewhere ? may be of a pattern
        query = _shown_query(query)
    return f"{scheme}://{authority}{path}{question}{query}"


def _shown_query(query: str) -> str:
    parts = (part.partition("=") for part in query.split("&"))
    return "&".join(f"{name}={_HIDDEN}" if equals else _HIDDEN for name, equals, _ in parts)


def is_printable(text: str) -> bool:
    """Whether `text` is one line that a terminal shows as it is."""
    return _UNPRINTABLE.search(text) is None and "\t" not in text and "\n" not in text


def escaped(text: str, *, line: bool = False) -> str:
    """`text` with \\u001b and the like for what a terminal would obey; line ends and tabs too if it is to be one
    `line`."""
    text = _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if line else text
