"""Cleaning text as in training, checking it, and encoding it as bytes."""

import unicodedata
from functools import cache

import numpy as np
import regex

from echo_eqx.errors import EchoError

BOS = 0
TAG = regex.compile(r"\[S[0-9]+\]\s*")
"""Speaker tag, such as `[S1] `: who speaks from here on."""
_DEFAULT_TAG = "[S1] "
_WIDE_TAG = regex.compile(r"［[SＳ]([0-9０-９]+)］")
_REPLACED = {
    **str.maketrans(dict.fromkeys("“”„‟", '"') | dict.fromkeys("‘’‚‛ʼ", "'")),
    **str.maketrans(dict.fromkeys(":;", ",") | dict.fromkeys("‐‑‒−", "-") | {"…": "..."}),
}
_EM_DASH = regex.compile(r"[—―⸺⸻]+")
_LEADING_EM_DASH = regex.compile(r"^((?:\[S[0-9]+\]\s*)?)\s*[—―⸺⸻]+\s*")
# The Greek semicolon is a question mark.
_GREEK_QUESTION = regex.compile(r"(?<=\p{Greek}\p{M}*)[;\u037e](?!\p{L})")
_CJK = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}]")

# Compatibility forms (Unicode Standard Annex 15) that differ only in looks. Super- and subscripts,
# fractions, squares and circled digits are not included: their plain forms mean something else.
_LOOKS = ("wide", "narrow", "small", "vertical", "font", "initial", "medial", "final", "isolated")
_JOINING_SCRIPTS = "".join(
    rf"\p{{{script}}}"
    for script in (
        "Arabic Syriac Mandaic Nko Mongolian Devanagari Bengali Gurmukhi Gujarati Oriya Tamil "
        "Telugu Kannada Malayalam Sinhala Khmer Myanmar Tibetan Balinese Javanese"
    ).split()
)
# Characters with neither sound nor width. Kept: white space, NUL (which `check_text` reports),
# joiners in scripts that are written with them, and joiners of emoji.
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
    """`text` in NFC, without invisible characters, and with ordinary letters.

    Full-width, half-width, mathematical and circled letters, ligatures and Arabic presentation
    forms become ordinary letters; `²`, `½` and `™` stay. Full-width punctuation stays in Chinese,
    Japanese and Korean text.
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

    Curly quotes become straight, the ellipsis character `...`, colons and semicolons commas, and an
    em dash a comma and a space. White space becomes single spaces, and the text starts with a
    speaker tag, `[S1] ` if it has none. `plain_characters` is applied first.
    """
    text = _LEADING_EM_DASH.sub(r"\1", plain_characters(text).strip())
    text = _EM_DASH.sub(", ", text).translate(_REPLACED)
    text = " ".join(text.split())
    return text if TAG.match(text) else _DEFAULT_TAG + text


def says_something(text: str) -> bool:
    """Whether `text` has a letter or digit outside its speaker tags."""
    # Modifier letters alone, such as a length mark, are not enough.
    return _SPOKEN.search(plain_characters(TAG.sub("", text))) is not None


_SPOKEN = regex.compile(r"[\p{Lu}\p{Ll}\p{Lt}\p{Lo}\p{N}]")


def check_text(text: str) -> None:
    """Reject text that cannot be spoken.

    **Raises**: `EchoError` if it is empty, has a NUL, has neither a letter nor a digit, or is not
    valid UTF-8.
    """
    if not isinstance(text, str):
        raise EchoError(f"text: expected a string, got a {type(text).__name__}")
    if not TAG.sub("", text).strip():
        raise EchoError("the text is empty: expected something to say")
    if "\0" in text:
        raise EchoError(f"the text has a NUL at character {text.index(chr(0))}; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EchoError(f"the text is not valid UTF-8 at character {error.start}") from None
    if not says_something(text):
        shown = text.strip() if len(text) <= 40 else text.strip()[:40] + "..."
        raise EchoError(
            f"the text has nothing to say: expected at least one letter or digit, got {shown!a}"
        )


def encode_text(text: str) -> np.ndarray:
    """(s,) int32: a leading 0 and the UTF-8 bytes of `text`."""
    return np.frombuffer(bytes([BOS]) + text.encode("utf-8"), np.uint8).astype(np.int32)
