"""Clips of speech with their text, from whichever kind of source a user has."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.data.audio import audio_seconds, decode_audio
from echo_eqx.data.text import check_text, normalize_text
from echo_eqx.errors import EchoError
from echo_eqx.prepare.detect import find_recordings
from echo_eqx.prepare.records import (
    LANGUAGE_FIELDS,
    SPEAKER_FIELDS,
    TEXT_FIELDS,
    Audio,
    Recording,
    SkippedInput,
    opened,
    pop,
    printable,
)
from echo_eqx.prepare.segments import Segment, join_segments, read_segments

__all__ = ["Clip", "SkippedInput", "list_clips"]

MIN_SECONDS = 0.1
MAX_KEY = 200


@dataclass(frozen=True)
class Clip:
    """A stretch of a recording, and what is said in it."""

    key: str
    """Unique in the source, of letters, digits, `_` and `-`."""
    text: str
    audio: Audio
    start: float
    """Seconds within the audio."""
    stop: float | None
    """Seconds within the audio; None is its end."""
    seconds: float
    """Length of the clip, by the header of its audio."""
    speaker: str | None
    language: str | None
    metadata: dict[str, Any]
    """What else came along, as JSON values, and `source`: where it is below the source."""

    def load(self, sample_rate: int) -> np.ndarray:
        """(samples,) float32, mono, at `sample_rate`.

        **Raises**: `EchoError` naming the source of the clip if it cannot be decoded, and
        `SilentAudioError` if it has no sound.
        """
        name = self.metadata["source"]
        try:
            with opened(self.audio) as source:
                return decode_audio(
                    source, name, sample_rate, self.start, self.stop, must_sound=True
                )
        except OSError as error:
            raise EchoError(f"{name} cannot be read: {error.strerror}") from None


def list_clips(
    source: str,
    *,
    max_seconds: float,
    cache: Path,
    normalise: bool = False,
    output: Path | None = None,
    keep_long: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[list[Clip], list[SkippedInput]]:
    """All clips of `source`, sorted by key, and what of it is not used.

    `source` is a folder of audio with transcripts beside it, a list in columns (LJSpeech and the
    lists of other trainers), a manifest (*.jsonl), tars, Parquet files, or
    `hf://datasets/owner/name[@revision][/folder]`, whose Parquet files are kept in `cache`. The
    result is the same wherever the source lies. Recordings longer than `max_seconds` are cut
    between their `segments`, if they have any; what is still longer is refused, or with `keep_long`
    stays a clip, to be cut at its pauses. `normalise` cleans the texts as they are cleaned before
    they are spoken. What lies in the folder `output` is not part of the source. `say` is
    told how a list is read. Only headers are read; what decoding shows is raised by `Clip.load`.

    **Raises**: `EchoError` if it is of no known kind, or cannot be read at all.
    """
    refusals: list[SkippedInput] = []
    records: list[tuple[Recording, list[Clip]]] = []
    try:
        for found in find_recordings(source, cache, output, say):
            if isinstance(found, SkippedInput):
                refusals.append(found)
                continue
            clips: list[Clip] = []
            for piece in _cut(found, max_seconds, keep_long):
                if normalise and isinstance(piece, Clip):
                    piece = _normalised(piece)
                if isinstance(piece, SkippedInput):
                    refusals.append(piece)
                else:
                    clips.append(piece)
            if clips:
                records.append((found, clips))
    except OSError as error:
        place = printable(str(error.filename or source))
        raise EchoError(f"{place} cannot be read: {error.strerror}") from None
    clips, repeated = _with_keys(records)
    refusals = [
        SkippedInput(refusal.kind, printable(refusal.name), printable(refusal.detail))
        for refusal in refusals + repeated
    ]
    return clips, sorted(refusals, key=lambda refusal: (refusal.name, refusal.kind, refusal.detail))


def _cut(record: Recording, max_seconds: float, keep_long: bool) -> Iterator[Clip | SkippedInput]:
    """The clips of a record, still with the key of the record, or why there are none."""
    fields = dict(record.fields)
    text = pop(fields, TEXT_FIELDS)
    speaker, language = pop(fields, SPEAKER_FIELDS), pop(fields, LANGUAGE_FIELDS)
    try:
        start, stop = _limits(fields)
        segments, empty = read_segments(fields.pop("segments", None))
        metadata = {**_plain(fields), "source": printable(record.source)}
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        yield SkippedInput("manifest", record.source, str(error)[:200])
        return
    for segment in empty:
        detail = f"has a segment of no length at {segment.start:g} s: {segment.text[:60]!r}"
        yield SkippedInput("segment", record.source, detail)
    if segments and (not isinstance(text, str) or not text.strip()):
        text = " ".join(segment.text for segment in segments)
    try:
        with opened(record.audio) as source:
            whole = audio_seconds(source, printable(record.source))
    except (EchoError, OSError) as error:
        yield SkippedInput("audio", record.source, str(error))
        return
    end = whole if stop is None else min(stop, whole)
    if start >= whole:
        yield SkippedInput("manifest", record.source, f"starts at {start:g} s of {whole:.2f} s")
        return
    parts = [Segment(start, end, text if isinstance(text, str) else "")]
    is_cut = end - start > max_seconds and bool(segments)
    if is_cut:
        parts = join_segments(segments, start, end, max_seconds)
        if not parts:
            detail = f"is {end - start:.2f} s long and none of its segments has text within them"
            yield SkippedInput("long", record.source, detail)
    for number, part in enumerate(parts):
        name = f"{record.source}[{number}]" if is_cut else record.source
        seconds = part.end - part.start
        if problem := _problem(part.text):
            yield SkippedInput(problem[0], name, problem[1])
        elif seconds < MIN_SECONDS:
            yield SkippedInput(
                "short", name, f"is {seconds:.3f} s long; wanted at least {MIN_SECONDS}"
            )
        elif seconds > max_seconds and not keep_long:
            what = "has no segments with times" if not segments else "is one segment"
            detail = f"is {seconds:.2f} s long and {what}; wanted at most {max_seconds:g} s"
            yield SkippedInput("long", name, detail)
        else:
            yield Clip(
                key=f"{record.key}_{number:03d}" if is_cut else record.key,
                text=part.text.strip(),
                audio=record.audio,
                start=part.start,
                stop=None if part.end == whole else part.end,
                seconds=seconds,
                speaker=_label(speaker),
                language=_label(language),
                metadata=metadata,
            )


def _normalised(clip: Clip) -> Clip | SkippedInput:
    """`clip` with the text that a model is given, or why nothing of it is left."""
    text = normalize_text(clip.text)
    if problem := _problem(text):
        return SkippedInput(problem[0], clip.metadata["source"], f"after cleaning {problem[1]}")
    return replace(clip, text=text)


def _limits(fields: dict[str, Any]) -> tuple[float, float | None]:
    """Start and end in seconds. One common manifest has `offset` and `duration` instead."""
    has_offset = "offset" in fields and "start" not in fields
    start = float(pop(fields, ("start", "offset")) or 0.0)
    end = pop(fields, ("end",))
    if has_offset and end is None and fields.get("duration"):
        end = start + float(fields["duration"])
    stop = float(end) if end is not None else None
    if not (math.isfinite(start) and start >= 0 and (stop is None or start < stop < math.inf)):
        raise ValueError(f"goes from {start} to {stop} s; wanted 0 <= start < end")
    return start, stop


def _problem(text: str) -> tuple[str, str] | None:
    """Kind and detail of what keeps a text from being used."""
    is_utf8 = "\0" not in text and not re.search(r"[\ud800-\udfff]", text)
    try:
        check_text(text)
    except EchoError as error:
        return "text" if is_utf8 else "utf8", str(error)
    return None


def _with_keys(
    records: list[tuple[Recording, list[Clip]]],
) -> tuple[list[Clip], list[SkippedInput]]:
    """Clips under keys that are safe and each there once, and the refusals of the others."""
    kept: dict[str, Clip] = {}
    refusals = []
    names = set()
    for record, clips in sorted(records, key=lambda item: item[0].name):
        if record.name in names:
            detail = f"is the second of {record.name!r}"
            refusals.append(SkippedInput("duplicate", record.source, detail))
            continue
        names.add(record.name)
        for clip in clips:
            key = re.sub(r"[^A-Za-z0-9_-]", "_", clip.key)
            if not 0 < len(key) <= MAX_KEY:
                detail = f"its key has {len(key)} characters; wanted 1 to {MAX_KEY}"
                refusals.append(SkippedInput("key", record.source, detail))
                continue
            if key in kept:
                full = f"{record.name}{clip.key.removeprefix(record.key)}"
                digest = hashlib.sha256(full.encode("utf-8", "surrogateescape")).hexdigest()
                key = f"{key}_{digest[:8]}"
            if key in kept:
                refusals.append(
                    SkippedInput("duplicate", record.source, f"is the second of {key!r}")
                )
                continue
            kept[key] = replace(clip, key=key)
    return [clip for _, clip in sorted(kept.items())], refusals


def _label(value: Any) -> str | None:
    is_label = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return printable(str(value)) if is_label else None


def _plain(value: Any) -> Any:
    """JSON values alone: what has no such form is None."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    is_number = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_number else None
