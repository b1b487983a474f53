"""Recordings longer than the window, cut at pauses, with their text divided by a recogniser."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole
from echo_eqx.prepare.align import Aligner, aligner
from echo_eqx.prepare.clips import MIN_SECONDS, Clip, SkippedInput
from echo_eqx.prepare.pauses import RATE, detector, find_pauses
from echo_eqx.prepare.segments import Segment, join_segments

WAYS_OUT = (
    "give segments with times in a manifest, install a recogniser "
    "(pip install 'echo_eqx[cutting]', English only), or raise --max_seconds"
)
CUTS = "cuts"
_TAG = re.compile(r"\[S\d+\]")


@dataclass
class Cuts:
    """What became of the long recordings."""

    clips: list[Clip]
    refused: list[SkippedInput] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    """For the index: `by`, and how many recordings, pieces, and seconds in and kept."""


def cut_long(
    clips: Sequence[Clip],
    *,
    max_seconds: float,
    max_text_bytes: int,
    folder: Path,
    begin: float,
    say: Callable[[str], object],
) -> Cuts:
    """`clips` with those longer than `max_seconds` replaced by pieces cut at pauses.

    Cuts are kept in `folder`, one file per recording, and never made twice: a later version of the
    recogniser does not change what an earlier one cut. Machines that share the folder share the
    work, each beginning at the share `begin` of the recordings.
    """
    long = [clip for clip in clips if clip.seconds > max_seconds]
    cuts = Cuts([clip for clip in clips if clip.seconds <= max_seconds])
    if not long:
        return cuts
    hours = sum(clip.seconds for clip in long) / 3600
    what = f"{len(long)} recordings ({hours:.2f} hours) are longer than {max_seconds:g} s"
    by = aligner()
    if by is None:
        say(f"WARNING: {what}, have no times to cut at and are left out: {WAYS_OUT}")
    else:
        say(f"{what}: cutting them at pauses by {detector()}, their text by {by}")
    found = _cut_all(long, folder, round(begin * len(long)), max_seconds)
    keys = {clip.key for clip in cuts.clips}
    kept = pieces = 0
    versions = set()
    for clip in long:
        cut = found[clip.key]
        versions.add(cut["by"])
        parts = _pieces(clip, cut, max_seconds, max_text_bytes, keys)
        keys |= {part.key for part in parts if isinstance(part, Clip)}
        for part in parts:
            if isinstance(part, SkippedInput):
                cuts.refused.append(part)
            else:
                cuts.clips.append(part)
                kept += part.seconds
                pieces += 1
    cuts.clips.sort(key=lambda clip: clip.key)
    seconds = sum(clip.seconds for clip in long)
    cuts.counts = {
        "by": sorted(version for version in versions if version),
        "recordings": len(long),
        "pieces": pieces,
        "seconds": round(seconds, 2),
        "seconds_kept": round(kept, 2),
    }
    if by is not None:
        say(f"{pieces} pieces, {kept / seconds:.0%} of these recordings kept")
        if kept < 0.5 * seconds:
            say(
                "WARNING: most of it is lost: its text does not match, or it has no pauses; give "
                "segments with times in a manifest, or raise --max_seconds"
            )
    return cuts


def _cut_all(
    long: list[Clip], folder: Path, begin: int, max_seconds: float
) -> dict[str, dict[str, Any]]:
    """Cuts by key, from `folder` or made now."""
    found = {}
    align: Aligner | None = None
    for clip in long[begin:] + long[:begin]:
        facts = [clip.key, clip.text, clip.start, clip.stop, round(clip.seconds, 3), max_seconds]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        path = folder / f"{digest[:24]}.json"
        cut = _read(path)
        if cut is None and aligner() is None:
            cut = {"by": None, "reason": "has no segments with times, and no recogniser is there"}
        elif cut is None and clip.language and not re.match(r"en\b|english", clip.language, re.I):
            cut = {"by": None, "reason": f"is in {clip.language}; the recogniser knows English"}
        elif cut is None and len(set(_TAG.findall(clip.text))) > 1:
            cut = {"by": None, "reason": "has speaker tags of several speakers"}
        elif cut is None:
            align = align or Aligner()
            try:
                cut = _cut(clip, align)
            except EchoError as error:
                cut = {"by": None, "kind": "audio", "reason": str(error)}
            else:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(cut, ensure_ascii=False, indent=1) + "\n"
                write_whole(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
        found[clip.key] = cut
    return found


def _cut(clip: Clip, align: Aligner) -> dict[str, Any]:
    audio = clip.load(RATE)
    text = " ".join(_TAG.sub(" ", clip.text).split())
    result = align(audio, find_pauses(audio), text)
    by = f"{detector()}, {aligner()}"
    if isinstance(result, str):
        return {"by": by, "reason": result}
    return {
        "by": by,
        "segments": [[round(s.start, 3), round(s.end, 3), s.text] for s in result.segments],
        "refused": [[round(s.start, 3), round(s.end, 3), s.text] for s in result.refused],
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        cut = json.loads(path.read_bytes())
        return cut if isinstance(cut, dict) and "by" in cut else None
    except (OSError, ValueError):
        return None


def _pieces(
    clip: Clip, cut: dict[str, Any], max_seconds: float, max_bytes: int, keys: set[str]
) -> list[Clip | SkippedInput]:
    source = clip.metadata["source"]
    if "reason" in cut:
        detail = cut["reason"]
        if cut.get("kind") != "audio":
            detail = f"is {clip.seconds:.2f} s long: {detail}; expected at most {max_seconds:g} s"
        return [SkippedInput(cut.get("kind", "long"), source, detail)]
    parts: list[Clip | SkippedInput] = [
        SkippedInput("alignment", f"{source}[{start:g}-{end:g} s]", f"does not match {text[:60]!r}")
        for start, end, text in cut["refused"]
    ]
    segments = [Segment(*segment) for segment in cut["segments"]]
    tag = _TAG.match(clip.text)
    room = max_bytes - 1 - (len(tag[0]) + 1 if tag else 0)
    joined = join_segments(segments, 0.0, clip.seconds, max_seconds, room)
    for number, part in enumerate(joined):
        text = f"{tag[0]} {part.text}" if tag else part.text
        name, seconds = f"{source}[{part.start:g}-{part.end:g} s]", part.end - part.start
        if not MIN_SECONDS <= seconds <= max_seconds:
            detail = f"is {seconds:.2f} s without a pause at which the text can be divided surely"
            parts.append(SkippedInput("long" if seconds > max_seconds else "short", name, detail))
            continue
        key = f"{clip.key}_{number:03d}"
        if key in keys:
            key += "_" + hashlib.sha256(f"{source} {number}".encode()).hexdigest()[:8]
        start, stop = clip.start + part.start, clip.start + part.end
        parts.append(replace(clip, key=key, text=text, start=start, stop=stop, seconds=seconds))
    if not parts:
        detail = f"is {clip.seconds:.2f} s long, and none of its text was recognised in it"
        parts.append(SkippedInput("alignment", source, detail))
    return parts


def too_long_texts(clips: Sequence[Clip], max_text_bytes: int) -> int:
    """Clips whose text, with the leading 0 that models are given, is over `max_text_bytes`."""
    return sum(len(clip.text.encode("utf-8", "replace")) >= max_text_bytes for clip in clips)
