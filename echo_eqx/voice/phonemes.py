"""English phonemes for Kokoro, from espeak-ng."""

import re

from echo_eqx.voice.espeak import run_espeak

# From the IPA of espeak-ng, with U+200D between the parts of a diphthong or an affricate, to the
# alphabet that the model was trained with, as in the package misaki 0.9 (`misaki/espeak.py`).
_TIE = "\u200d"
_BOTH = {
    "ʔˌn\u0329": "tn",
    "ʔn\u0329": "tn",
    f"a{_TIE}ɪ": "I",
    f"a{_TIE}ʊ": "W",
    f"d{_TIE}ʒ": "ʤ",
    f"e{_TIE}ɪ": "A",
    f"t{_TIE}ʃ": "ʧ",
    f"ɔ{_TIE}ɪ": "Y",
    f"ə{_TIE}l": "ᵊl",
    "ʲo": "jo",
    "ʲə": "jə",
    "ʲ": "",
    "ɚ": "əɹ",
    "r": "ɹ",
    "x": "k",
    "ç": "k",
    "ɐ": "ə",
    "ɬ": "l",
    "\u0303": "",
}
_AMERICAN = {f"o{_TIE}ʊ": "O", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": ""}
_BRITISH = {f"e{_TIE}ə": "ɛː", "iə": "ɪə", f"ə{_TIE}ʊ": "Q"}
_LAST = {"e": "A", "o": "ɔ", "ɾ": "T", "ʔ": "t", _TIE: "", "\u0329": ""}
_LANGUAGE = re.compile(r"\([a-z-]+\)")
"""espeak-ng's mark of a word that it reads in another language."""
_MARKS = re.compile(r"((?:\s*[,.!?;:…—()“”]\s*)+)")


def phonemes(text: str, *, is_british: bool) -> str:
    """`text` as Kokoro reads it: phonemes, with stress, and its punctuation.

    espeak-ng drops punctuation, by which the model pauses and intones. So it speaks the parts
    between the marks.

    **Raises**: `EchoError` if espeak-ng is not installed or fails.
    """
    parts = _MARKS.split(_curly(text.replace("...", "…")))
    said = (_part(part, is_british) if i % 2 == 0 else part for i, part in enumerate(parts))
    return "".join(said).strip()


def _part(text: str, is_british: bool) -> str:
    if not text.strip():
        return text
    arguments = ["-q", "--ipa=3", "-v", "en-gb" if is_british else "en-us"]
    said = " ".join(run_espeak(arguments, text).decode().split())
    said = _LANGUAGE.sub("", said)
    for table in (_BOTH, _BRITISH if is_british else _AMERICAN, _LAST):
        for old, new in table.items():
            said = said.replace(old, new)
    return said


def _curly(text: str) -> str:
    """`text` with straight double quotes opened and closed by turns."""
    pieces = text.split('"')
    marks = ("“" if i % 2 == 0 else "”" for i in range(len(pieces) - 1))
    return "".join(piece + mark for piece, mark in zip(pieces, (*marks, ""), strict=True))
