"""Text files that users write, decoded in one place: recipes, lists of pairs, of ids and of prompts.

UTF-8, with or without a byte order mark. Another encoding is an error that names the likely one and the place: guessing
would turn prompts and ids into others without a word.
"""

import codecs
import errno
import re
import unicodedata
from pathlib import Path

from inpo.common.errors import InpoError

_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class TextProblem(ValueError):
    """Bytes that are no UTF-8 text; the message says what they look like and where."""


def refuse_wide(head: bytes) -> None:
    """Raise TextProblem if the beginning of a file is UTF-16 or UTF-32, with or without its mark."""
    if head.startswith(_WIDE_MARKS):
        raise TextProblem("the text is UTF-16, not UTF-8, by its byte order mark")
    if head.count(0) * 4 > len(head):
        raise TextProblem(
            f"{head.count(0)} of the first {len(head)} bytes are zero: UTF-16 without its mark, or no text"
        )


def decode_text(data: bytes) -> str:
    """`data` as text, without a byte order mark, line ends as they are. Raises TextProblem."""
    refuse_wide(data[:4096])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec cuts the mark off before it counts.
        at = error.start + (3 if data.startswith(codecs.BOM_UTF8) else 0)
        line = len(re.findall(rb"\r\n|\r|\n", data[:at])) + 1
        raise TextProblem(
            f"byte 0x{data[at]:02x} at position {at}, line {line}, is not UTF-8: Latin-1 or Windows-1252 perhaps"
        ) from None


def read_text(path: Path, *, what: str, error: type[InpoError], where: object = None, fix: str | None = None) -> str:
    """The text of a local file. Raises `error` with the sentence `what` when it cannot be read or is not UTF-8; `where`
    is the path unless an option is to be named, `fix` says what to do about a file that cannot be opened."""
    try:
        return decode_text(path.read_bytes())
    except OSError as problem:
        is_locked = problem.errno in (errno.EACCES, errno.EPERM)
        fix = fix or ("check the owner and mode of the file" if is_locked else "correct the path")
        raise error(what, where=where or path, got=problem.strerror or problem, fix=fix) from None
    except TextProblem as problem:
        raise error(
            what, where=where or path, expected="UTF-8 text", got=str(problem), fix="save the file as UTF-8"
        ) from None


def text_lines(text: str) -> list[str]:
    """The lines of a text, whatever ends them (LF, CR LF or CR). str.splitlines also cuts at rarer signs such as
    U+2028, which may be part of a prompt or an id."""
    return re.split(r"\r\n|\r|\n", text)


def plain_prompt(prompt: str) -> str:
    """The prompt without what people vary without meaning another one: case, blanks, the way accents are coded."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", prompt).casefold()).split())
