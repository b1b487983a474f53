"""Align text and speech with the speech recognizer PocketSphinx (English only).

Speech between pauses is recognized with a language model of the text alone, and the recognized
words are matched to the text in order. A cut between two words is trusted only if both were
recognized, one on each side of a pause. Text is never divided by guessing.
"""

import difflib
import importlib.metadata
import importlib.util
import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.prepare.pauses import RATE
from echo_eqx.prepare.segments import Segment

MAX_UNKNOWN = 0.25
"""Largest fraction of words that may be missing from the English dictionary."""
MAX_UNMATCHED = 0.3
"""Largest fraction of a segment's words, spoken or written, that may have no match."""
MAX_RUN = 6
"""Most consecutive words, spoken or written, that may have no match."""
MIN_RUN = 3
"""Fewest consecutive words that count as a match."""
LETTERS_PER_SECOND = (4.0, 30.0)
"""Range of plausible speaking rates."""
_BLOCK = 60.0
"""Seconds of speech that are matched to the text at a time."""
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")


@dataclass(frozen=True)
class _Heard:
    """A recognized word, its times in seconds, and the index of the matching word of the text."""

    word: str
    start: float
    end: float
    index: int | None = None


@dataclass(frozen=True)
class Aligned:
    """The result of an alignment."""

    segments: list[Segment]
    """Speech between trusted cuts, in order; mismatched segments have no text."""
    mismatched: list[Segment]
    """Segments whose speech does not match their text, with that text."""


def installed_recognizer() -> str | None:
    """The installed recognizer with its version, such as `pocketsphinx 5.1.1`, or None."""
    if importlib.util.find_spec("pocketsphinx") is None:
        return None
    return f"pocketsphinx {importlib.metadata.version('pocketsphinx')}"


class Aligner:
    """Divides texts by recognition, with the English model that comes with pocketsphinx."""

    def __init__(self) -> None:
        from pocketsphinx import get_model_path  # optional

        self._model = get_model_path("en-us")
        self._decoder: Any = None
        self._entries: dict[str, list[str]] = defaultdict(list)
        """Lines of the dictionary by word."""
        dictionary = Path(self._model) / "cmudict-en-us.dict"
        for line in dictionary.read_text("utf-8").splitlines():
            self._entries[re.sub(r"\(\d+\)$", "", line.split(" ", 1)[0])].append(line)

    def __call__(
        self, audio: np.ndarray, pauses: Sequence[tuple[float, float]], text: str
    ) -> Aligned | str:
        """Divide `text`, spoken in `audio` (samples,) at `RATE`, at `pauses`; or a string with the
        reason why that is not possible."""
        tokens = text.split()
        # Words, each with the index of the token it belongs to.
        words = [(w, i) for i, token in enumerate(tokens) for w in _words(token)]
        unknown = sum(word not in self._entries for word, _ in words)
        if not words or unknown > MAX_UNKNOWN * len(words):
            return f"{unknown} of {len(words)} words are not in the English dictionary"
        self._learn([word for word, _ in words])
        chunks = self._match(audio, _between(pauses, len(audio) / RATE), [w for w, _ in words])
        return _divide(chunks, words, tokens)

    def _learn(self, words: list[str]) -> None:
        """Create a decoder with a language model and dictionary of `words` alone."""
        from pocketsphinx import Decoder
        from pocketsphinx.lm import ArpaBoLM

        known = [word for word in words if word in self._entries]
        model = ArpaBoLM(text=" ".join(known), add_start=True)
        model.compute()
        with tempfile.TemporaryDirectory() as folder:
            grammar, dictionary = Path(folder) / "text.lm", Path(folder) / "text.dict"
            model.write_file(str(grammar))
            entries = (line for word in sorted(set(known)) for line in self._entries[word])
            dictionary.write_text("\n".join(entries) + "\n", "utf-8")
            self._decoder = Decoder(
                hmm=str(Path(self._model) / "en-us"),
                lm=str(grammar),
                dict=str(dictionary),
                samprate=float(RATE),
                loglevel="FATAL",
                bestpath=False,
            )

    def _match(
        self, audio: np.ndarray, chunks: list[tuple[float, float]], words: list[str]
    ) -> list[list[_Heard]]:
        """The words heard in each chunk, with their ascending indices in `words`."""
        pcm = np.clip(audio * 32767, -32768, 32767).astype(np.int16)
        done: list[list[_Heard]] = []
        block: list[list[_Heard]] = []
        begin = since = 0
        for number, (start, end) in enumerate(chunks):
            block.append(self._hear(pcm, start, end))
            is_full = end - chunks[number - len(block) + 1][0] >= _BLOCK
            if not is_full and number + 1 < len(chunks):
                continue
            heard = [word.word for chunk in block for word in chunk]
            since += len(heard)
            window = words[begin : begin + since + since // 4 + 40]
            matcher = difflib.SequenceMatcher(None, heard, window, autojunk=False)
            # One or two words match by chance; longer runs do not.
            runs = [run for run in matcher.get_matching_blocks() if run.size >= MIN_RUN]
            matches = {a + i: begin + b + i for a, b, size in runs for i in range(size)}
            numbers = itertools.count()
            done += [
                [replace(word, index=matches.get(next(numbers))) for word in chunk]
                for chunk in block
            ]
            if matches:
                begin, since = max(matches.values()) + 1, 0
            block = []
        return done

    def _hear(self, pcm: np.ndarray, start: float, end: float) -> list[_Heard]:
        decoder, offset = self._decoder, max(0.0, start - 0.1)
        decoder.start_utt()
        part = pcm[round(offset * RATE) : round((end + 0.1) * RATE)]
        decoder.process_raw(part.tobytes(), full_utt=True)
        decoder.end_utt()
        return [
            _Heard(
                re.sub(r"\(\d+\)$", "", found.word),
                offset + found.start_frame / 100,
                offset + (found.end_frame + 1) / 100,
            )
            for found in (decoder.seg() if decoder.hyp() is not None else ())
            if found.word[0] not in "<[+"
        ]


def _words(token: str) -> list[str]:
    return [word.lower().replace("’", "'") for word in _WORD.findall(token)]


def _between(pauses: Sequence[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """The chunks of speech between pauses."""
    starts = [0.0, *(end for _, end in pauses)]
    ends = [*(start for start, _ in pauses), seconds]
    return [(a, b) for a, b in zip(starts, ends, strict=True) if b - a > 0.05]


def _divide(chunks: list[list[_Heard]], words: list[tuple[str, int]], tokens: list[str]) -> Aligned:
    """Segments between trusted cuts, each checked against its text."""
    chunks = [chunk for chunk in chunks if chunk]
    aligned = Aligned([], [])
    first_word, first_chunk = 0, 0
    for number, chunk in enumerate(chunks):
        last = chunk[-1].index
        following = chunks[number + 1][0].index if number + 1 < len(chunks) else None
        is_end = number + 1 == len(chunks)
        is_cut = last is not None and following == last + 1 and words[last][1] != words[last + 1][1]
        if not is_cut and not is_end:
            continue
        after = len(words) if is_end or last is None else last + 1
        heard = [word for part in chunks[first_chunk : number + 1] for word in part]
        begin = 0 if first_word == 0 else words[first_word][1]
        stop = len(tokens) if after == len(words) else words[after][1]
        text = " ".join(tokens[begin:stop])
        segment = Segment(heard[0].start, heard[-1].end, text)
        if not _is_match(heard, [w for w, _ in words[first_word:after]], first_word):
            aligned.mismatched.append(segment)
            segment = Segment(segment.start, segment.end, "")
        aligned.segments.append(segment)
        first_word, first_chunk = after, number + 1
    return aligned


def _is_match(heard: list[_Heard], words: list[str], first: int) -> bool:
    """Whether the speech in `heard` matches `words`, whose first word has the index `first`."""
    spoken = [word.index is not None for word in heard]
    indices = {word.index for word in heard}
    written = [first + i in indices for i in range(len(words))]
    for matched in (spoken, written):
        longest = max(map(len, "".join("x" if m else "." for m in matched).split("x")), default=0)
        if longest > MAX_RUN or matched.count(False) > MAX_UNMATCHED * len(matched):
            return False
    rate = sum(map(len, words)) / max(heard[-1].end - heard[0].start, 0.01)
    return bool(words) and LETTERS_PER_SECOND[0] <= rate <= LETTERS_PER_SECOND[1]
