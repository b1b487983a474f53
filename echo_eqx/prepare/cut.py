"""Cut recordings that are too long at pauses, dividing their text with a speech recognizer."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError
from echo_eqx.prepare.align import Aligner, installed_recognizer
from echo_eqx.prepare.clips import MIN_SECONDS, Clip
from echo_eqx.prepare.index import write_json
from echo_eqx.prepare.pauses import RATE, find_pauses
from echo_eqx.prepare.records import SkippedInput
from echo_eqx.prepare.segments import Segment, join_segments

CUTS = "cuts"
"""Folder in the output where the cuts of each recording are kept."""
_SPEAKER_TAG = re.compile(r"\[S\d+\]")
logger = logging.getLogger(__name__)


@dataclass
class Cuts:
    """Clips after cutting."""

    clips: list[Clip]
    skipped: list[SkippedInput] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    """For the index: the recognizer, numbers of recordings and pieces, seconds before and after."""


def cut_long(
    clips: Sequence[Clip], *, max_seconds: float, max_text_bytes: int, folder: Path, begin: float
) -> Cuts:
    """Replace clips longer than `max_seconds` by pieces cut at pauses.

    The cuts of each recording are saved to a file in `folder` and never redone, so another version
    of the recognizer does not change them. Machines that share the folder share the work: each
    starts at a different position, the fraction `begin` of the recordings.
    """
    long = [clip for clip in clips if clip.seconds > max_seconds]
    cuts = Cuts([clip for clip in clips if clip.seconds <= max_seconds])
    if not long:
        return cuts
    seconds = sum(clip.seconds for clip in long)
    what = f"{len(long)} recordings ({seconds / 3600:.2f} hours) are longer than {max_seconds:g} s"
    by = installed_recognizer()
    if by is None:
        logger.warning(
            "%s, have no times to cut at, and are left out: give segments with times in a manifest,"
            " install a recognizer (pip install 'echo_eqx[cutting]', English only), or raise "
            "--max_seconds",
            what,
        )
    else:
        logger.info("%s: cutting them at pauses, text divided by %s", what, by)
    found = _cut_all(long, folder, round(begin * len(long)), max_seconds)
    keys = {clip.key for clip in cuts.clips}
    kept = []
    for clip in long:
        for piece in _pieces(clip, found[clip.key], max_seconds, max_text_bytes, keys):
            if isinstance(piece, SkippedInput):
                cuts.skipped.append(piece)
            else:
                kept.append(piece)
                keys.add(piece.key)
    cuts.clips = sorted(cuts.clips + kept, key=lambda clip: clip.key)
    seconds_kept = sum(piece.seconds for piece in kept)
    cuts.counts = {
        "by": sorted({cut["by"] for cut in found.values()} - {None}),
        "recordings": len(long),
        "pieces": len(kept),
        "seconds": round(seconds, 2),
        "seconds_kept": round(seconds_kept, 2),
    }
    if by is not None:
        logger.info(
            "%d pieces, %.0f%% of these recordings kept", len(kept), 100 * seconds_kept / seconds
        )
    return cuts


def _cut_all(
    long: list[Clip], folder: Path, begin: int, max_seconds: float
) -> dict[str, dict[str, Any]]:
    """Cuts by key, from `folder` or made now."""
    found = {}
    align: Aligner | None = None
    for clip in long[begin:] + long[:begin]:
        identity = [clip.key, clip.text, clip.start, clip.stop, round(clip.seconds, 3), max_seconds]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        path = folder / f"{digest[:24]}.json"
        cut = _read(path)
        if cut is None and installed_recognizer() is None:
            cut = {
                "by": None,
                "reason": "it has no segments with times, and no recognizer is installed",
            }
        elif cut is None and clip.language and not re.match(r"en\b|english", clip.language, re.I):
            reason = f"it is in {clip.language}, but the recognizer only knows English"
            cut = {"by": None, "reason": reason}
        elif cut is None and len(set(_SPEAKER_TAG.findall(clip.text))) > 1:
            cut = {"by": None, "reason": "it has the speaker tags of several speakers"}
        elif cut is None:
            align = align or Aligner()
            try:
                cut = _cut(clip, align)
            except EchoError as error:
                cut = {"by": None, "kind": "audio", "reason": str(error)}
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, cut)
        found[clip.key] = cut
    return found


def _cut(clip: Clip, align: Aligner) -> dict[str, Any]:
    """Segments of a clip as JSON, or the reason why there are none."""
    audio = clip.load(RATE)
    text = " ".join(_SPEAKER_TAG.sub(" ", clip.text).split())
    result = align(audio, find_pauses(audio), text)
    if isinstance(result, str):
        return {"by": installed_recognizer(), "reason": result}
    return {
        "by": installed_recognizer(),
        "segments": [[round(s.start, 3), round(s.end, 3), s.text] for s in result.segments],
        "mismatched": [[round(s.start, 3), round(s.end, 3), s.text] for s in result.mismatched],
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        cut = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    is_cut = isinstance(cut, dict) and ("reason" in cut or {"segments", "mismatched"} <= cut.keys())
    return cut if is_cut and "by" in cut else None


def _pieces(
    clip: Clip, cut: dict[str, Any], max_seconds: float, max_bytes: int, keys: set[str]
) -> list[Clip | SkippedInput]:
    """The pieces of a clip according to `cut`, with keys that are not in `keys`, and the parts that
    are skipped."""
    source = clip.metadata["source"]
    if "reason" in cut:
        detail = cut["reason"]
        if cut.get("kind") != "audio":
            detail = f"expected at most {max_seconds:g} s, got {clip.seconds:.2f} s; {detail}"
        return [SkippedInput(cut.get("kind", "long"), source, detail)]
    pieces: list[Clip | SkippedInput] = [
        SkippedInput("alignment", f"{source}[{start:g}-{end:g} s]", f"does not match {text[:60]!r}")
        for start, end, text in cut["mismatched"]
    ]
    segments = [Segment(*segment) for segment in cut["segments"]]
    tag = _SPEAKER_TAG.match(clip.text)
    room = max_bytes - 1 - (len(tag[0]) + 1 if tag else 0)
    for number, part in enumerate(join_segments(segments, 0.0, clip.seconds, max_seconds, room)):
        text = f"{tag[0]} {part.text}" if tag else part.text
        name, seconds = f"{source}[{part.start:g}-{part.end:g} s]", part.end - part.start
        if not MIN_SECONDS <= seconds <= max_seconds:
            detail = f"is {seconds:.2f} s long, without a pause where the text divides reliably"
            kind = "long" if seconds > max_seconds else "short"
            pieces.append(SkippedInput(kind, name, detail))
            continue
        key = f"{clip.key}_{number:03d}"
        if key in keys:
            key += "_" + hashlib.sha256(f"{source} {number}".encode()).hexdigest()[:8]
        start, stop = clip.start + part.start, clip.start + part.end
        pieces.append(replace(clip, key=key, text=text, start=start, stop=stop, seconds=seconds))
    if not pieces:
        detail = f"is {clip.seconds:.2f} s long, and none of its text was recognized"
        pieces.append(SkippedInput("alignment", source, detail))
    return pieces


def count_long_texts(clips: Sequence[Clip], max_text_bytes: int) -> int:
    """Number of clips whose text, with the leading 0 of model inputs, exceeds `max_text_bytes`."""
    return sum(len(clip.text.encode("utf-8", "replace")) >= max_text_bytes for clip in clips)
