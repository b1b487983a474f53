"""Text cleaned the way the models were trained, checked, and turned into bytes."""

import unicodedata
from functools import cache

import numpy as np
import regex

from echo_eqx.errors import EchoError

BOS = 0
TAG = regex.compile(r"\[S[0-9]+\]\s*")
"""Who speaks from here on, such as `[S1] `."""
_DEFAULT_TAG = "[S1] "
_WIDE_TAG = regex.compile(r"［[SＳ]([0-9０-９]+)］")
_REPLACED = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "„": '"',
        "‟": '"',
        "‘": "'",
        "’": "'",
        "‚": "'",
        "‛": "'",
        "ʼ": "'",
        "…": "...",
        ":": ",",
        ";": ",",
        "‐": "-",
        "‑": "-",
        "‒": "-",
        "−": "-",
    }
)
_EM_DASH = regex.compile(r"[—―⸺⸻]+")
_LEADING_EM_DASH = regex.compile(r"^((?:\[S[0-9]+\]\s*)?)\s*[—―⸺⸻]+\s*")
# In Greek a semicolon asks.
_GREEK_QUESTION = regex.compile(r"(?<=\p{Greek}\p{M}*)[;\u037e](?!\p{L})")
_CJK = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}]")

# Compatibility forms (Unicode Standard Annex 15) that only look different. Not among them: super-
# and subscripts, fractions, squares and circled digits, whose plain form means something else.
_LOOKS = ("wide", "narrow", "small", "vertical", "font", "initial", "medial", "final", "isolated")
_JOINING_SCRIPTS = "".join(
    rf"\p{{{script}}}"
    for script in (
        "Arabic Syriac Mandaic Nko Mongolian Devanagari Bengali Gurmukhi Gujarati Oriya Tamil "
        "Telugu Kannada Malayalam Sinhala Khmer Myanmar Tibetan Balinese Javanese"
    ).split()
)
# What has neither a sound nor a width. Kept: white space, NUL (which `check_text` names), joiners
# after letters of scripts that are written with them, and what holds an emoji together.
_INVISIBLE = regex.compile(
    rf"""
    (?<=[{_JOINING_SCRIPTS}])[\u200c\u200d](*SKIP)(*FAIL)
    | (?<=[\p{{Extended_Pictographic}}\p{{EMod}}\ufe0f])\u200d
        (?=\p{{Extended_Pictographic}})(*SKIP)(*FAIL)
    | (?<=\p{{Extended_Pictographic}})\ufe0f(*SKIP)(*FAIL)
    | (?<=[0-9\#*])\ufe0f(?=\u20e3)(*SKIP)(*FAIL)
    | \U0001f3f4[\U000e0020-\U000e007f]+(*SKIP)(*FAIL)
    | (?<=\p{{Mongolian}})[\u180b-\u180f](*SKIP)(*FAIL)
    | \p{{Default_Ignorable_Code_Point}}
    | [^\P{{Cc}}\s\0]
    """,
    regex.VERBOSE,
)


def plain_characters(text: str) -> str:
    """`text` in NFC without invisible characters; letters that only look different are plain.

    Full-width, half-width, mathematical and circled letters, ligatures and Arabic presentation
    forms become ordinary letters; `²`, `½` and `™` stay. Full-width punctuation stays next to
    Chinese, Japanese and Korean, where it is at home.
    """
    if text.isascii() and text.isprintable():
        return text
    is_cjk = _CJK.search(text) is not None
    text = _WIDE_TAG.sub(lambda m: f"[S{unicodedata.normalize('NFKC', m[1])}]", text)
    text = _GREEK_QUESTION.sub("?", text)
    text = "".join([char if char.isascii() else _plain(char, is_cjk) for char in text])
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text))


@cache
def _plain(char: str, is_cjk: bool) -> str:
    kind = unicodedata.decomposition(char).partition(">")[0].removeprefix("<")
    plain = unicodedata.normalize("NFKC", char)
    if kind in _LOOKS:
        keeps_width = is_cjk and kind in ("wide", "small", "vertical") and not plain.isalnum()
        return char if keeps_width else plain
    is_ligature = kind == "compat" and (
        regex.fullmatch(r"\p{Latin}+", plain) or "\ufb13" <= char <= "\ufb17"
    )
    is_circled_letter = kind == "circle" and regex.fullmatch(r"[A-Za-z]", plain)
    return plain if is_ligature or is_circled_letter else char


def normalize_text(text: str) -> str:
    """Text as the community's models saw it in training.

    Quotes are straight, `...` stands for the ellipsis character, colons and semicolons are commas,
    an em dash is a comma and a space, and a speaker tag `[S1] ` comes first unless the text begins
    with a tag of its own. Characters are those of `plain_characters`, and white space is single
    spaces.
    """
    text = _LEADING_EM_DASH.sub(r"\1", plain_characters(text).strip())
    text = _EM_DASH.sub(", ", text).translate(_REPLACED)
    text = " ".join(text.split())
    return text if TAG.match(text) else _DEFAULT_TAG + text


def says_something(text: str) -> bool:
    """Whether `text` has a letter or digit outside of its speaker tags."""
    # Modifier letters, such as a lone sign of length, are not enough.
    return _SPOKEN.search(plain_characters(TAG.sub("", text))) is not None


_SPOKEN = regex.compile(r"[\p{Lu}\p{Ll}\p{Lt}\p{Lo}\p{N}]")


def check_text(text: str) -> None:
    """Refuse text that cannot be spoken.

    **Raises**: `EchoError` if it is empty, has a NUL, has neither a letter nor a digit, or is not
    valid UTF-8.
    """
    if not isinstance(text, str):
        raise EchoError(f"the text is a {type(text).__name__}; expected a string")
    if not TAG.sub("", text).strip():
        raise EchoError("the text is empty: expected something to say")
    if "\0" in text:
        raise EchoError(f"the text has a NUL at character {text.index(chr(0))}; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EchoError(f"the text is no UTF-8 at character {error.start}") from None
    if not says_something(text):
        shown = text.strip() if len(text) <= 40 else text.strip()[:40] + "..."
        raise EchoError(
            f"the text has nothing to say: expected at least one letter or digit, got {shown!a}"
        )


def encode_text(text: str) -> np.ndarray:
    """(s,) int32: a leading 0 and the UTF-8 bytes of `text`."""
    return np.frombuffer(bytes([BOS]) + text.encode("utf-8"), np.uint8).astype(np.int32)
