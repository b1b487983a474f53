"""Text as bytes, cleaned the way the models were trained, and cut into pieces that fit a window."""

import re
import unicodedata

import numpy as np

from echo_eqx.errors import EchoError

BOS = 0
CHARACTERS_PER_SECOND = 14.0
_REPLACED = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "„": '"',
        "‘": "'",
        "’": "'",
        "…": "...",
        ":": ",",
        ";": ",",
        "—": ",",
        "\n": " ",
        "\r": " ",
        "\t": " ",
    }
)
_TAG = re.compile(r"\[S\d+\]\s*")
_TAGS_AT_END = re.compile(r"(\[S\d+\]\s*)+$")
# What is never cut: a tag, or a character with the marks and joined signs that follow it.
_UNBROKEN = re.compile(
    r"\[S\d+\]\s*|.(?:[\u0300-\u036f\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]|\u200d.)*", re.DOTALL
)
_DEFAULT_TAG = "[S1] "


def normalise_text(text: str) -> str:
    """Text as the community's models saw it in training.

    Quotes are straight, `...` stands for the ellipsis character, colons, semicolons and em dashes
    are commas, and a speaker tag `[S1] ` comes first unless the text has a tag of its own.
    """
    text = " ".join(text.translate(_REPLACED).split())
    if not text.startswith(("[", "(")) and not re.search(r"\bS[12]\b", text):
        text = _DEFAULT_TAG + text
    return text


def check_text(text: str) -> None:
    """Refuse text that cannot be spoken.

    **Raises**: `EchoError` if it is empty, has a NUL, or comes from bytes that are no UTF-8.
    """
    if not _TAG.sub("", text).strip():
        raise EchoError("the text is empty; wanted something to say")
    if "\0" in text:
        raise EchoError(f"the text has a NUL at character {text.index(chr(0))}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EchoError(f"the text is no UTF-8 at character {error.start}") from None


def encode_text(text: str) -> np.ndarray:
    """(s,) int32: a leading 0 and the UTF-8 bytes of `text`."""
    return np.frombuffer(bytes([BOS]) + text.encode("utf-8"), np.uint8).astype(np.int32)


def speaking_width(text: str) -> int:
    """Characters that take time to say, speaker tags not among them.

    The wide ones of Chinese, Japanese and Korean count twice.
    """
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in _TAG.sub("", text))


# After which characters a text may be cut, the best places first.
_BOUNDARIES = [
    re.compile(r"[.!?]+[\"')\]]*\s+|[。！？]+[」』”]*\s*"),
    re.compile(r"[,;:]\s+|[，、；：]\s*|\s[-–]\s"),
    re.compile(r"\s+"),
]


def split_text(text: str, max_bytes: int, max_width: float) -> list[str]:
    """`text` in pieces of at most `max_bytes` of UTF-8 and `max_width` of `speaking_width`.

    It is cut at ends of sentences; where one is too long, at commas, then between words, then
    between characters. Apart from white space at the cuts the pieces joined are the text. Where the
    text has speaker tags, each piece begins with the tag that holds there.
    """
    tags = _TAG.findall(text)
    room = max((len(tag.encode()) + 1 for tag in tags), default=0)
    pieces = []
    holds = ""
    for piece in _split(text, max(max_bytes - room, 4), max(max_width, 2.0)):
        piece = piece.strip()
        if not piece:
            continue
        tagged = piece if _TAG.match(piece) else holds + piece
        tagged = _TAGS_AT_END.sub("", tagged).strip()
        if tagged:
            pieces.append(tagged)
        if found := _TAG.findall(piece):
            holds = found[-1].strip() + " "
    return pieces


def _split(text: str, max_bytes: int, max_width: float, level: int = 0) -> list[str]:
    def fits(part: str) -> bool:
        part = part.strip()
        return len(part.encode("utf-8")) <= max_bytes and speaking_width(part) <= max_width

    if fits(text):
        return [text]
    if level < len(_BOUNDARIES):
        ends = [match.end() for match in _BOUNDARIES[level].finditer(text)]
        starts = [0, *ends]
        parts = [text[a:b] for a, b in zip(starts, [*ends, len(text)], strict=True)]
    else:
        parts = _UNBROKEN.findall(text)
    packed = [""]
    for part in parts:
        if fits(packed[-1] + part):
            packed[-1] += part
        else:
            packed.append(part)
    if level == len(_BOUNDARIES):
        return packed
    pieces = (_split(part, max_bytes, max_width, level + 1) for part in packed if part)
    return [piece for cut in pieces for piece in cut]
