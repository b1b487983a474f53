"""List the clips of speech in a source of recordings, each with its text."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.data.audio import decode_audio
from echo_eqx.data.decode import audio_seconds
from echo_eqx.data.text import check_text, normalize_text
from echo_eqx.errors import EchoError, printable
from echo_eqx.prepare.detect import find_recordings
from echo_eqx.prepare.records import (
    LANGUAGE_FIELDS,
    SPEAKER_FIELDS,
    TEXT_FIELDS,
    AudioLocation,
    Recording,
    SkippedInput,
    open_audio,
    pop,
)
from echo_eqx.prepare.segments import Segment, join_segments, read_segments

MIN_SECONDS = 0.1
MAX_KEY = 200


@dataclass(frozen=True)
class Clip:
    """A section of a recording, and its text."""

    key: str
    """Unique in the source; letters, digits, `_` and `-`."""
    text: str
    audio: AudioLocation
    start: float
    """Seconds from the start of the audio."""
    stop: float | None
    """Seconds from the start of the audio; None is the end."""
    seconds: float
    """Length of the clip."""
    speaker: str | None
    language: str | None
    metadata: dict[str, Any]
    """Other fields as JSON values, and `source`: the path relative to the source."""

    def load(self, sample_rate: int) -> np.ndarray:
        """(samples,) float32, mono, at `sample_rate`.

        **Raises**: `EchoError` naming the clip's source if it cannot be decoded, and
        `SilentAudioError` if it has no sound.
        """
        name = self.metadata["source"]
        try:
            with open_audio(self.audio) as source:
                return decode_audio(
                    source, name, sample_rate, self.start, self.stop, reject_silence=True
                )
        except OSError as error:
            raise EchoError(f"{name} cannot be read: {error.strerror}") from None


def list_clips(
    source: str,
    *,
    max_seconds: float,
    cache: Path,
    normalize_text: bool = False,
    output: Path | None = None,
    keep_long: bool = False,
    need_text: bool = True,
) -> tuple[list[Clip], list[SkippedInput]]:
    """All clips of `source`, sorted by key, and the inputs that were skipped.

    `source` is a folder of audio and transcripts, a table (LJSpeech and others), a manifest
    (*.jsonl), tars, Parquet files, or `hf://datasets/owner/name[@revision][/folder]`, whose Parquet
    files are kept in `cache`. The result does not depend on where the source is.

    Recordings longer than `max_seconds` are cut between their `segments`, if they have any. Clips
    that are still longer are skipped, or kept whole with `keep_long`. `normalize_text` normalizes
    texts as for a model. Recordings without a transcript are skipped unless `need_text` is False.
    Files in the folder `output` are ignored. Audio is only measured here;
    errors found while decoding it are raised by `Clip.load`.

    **Raises**: `EchoError` if the kind of source is unknown, or it cannot be read at all.
    """
    skipped: list[SkippedInput] = []
    recordings: list[tuple[Recording, list[Clip]]] = []
    try:
        for found in find_recordings(source, cache, output):
            if isinstance(found, SkippedInput):
                if need_text or found.recording is None:
                    skipped.append(found)
                    continue
                found = found.recording
            clips: list[Clip] = []
            for clip in _clips_of(found, max_seconds, keep_long, need_text):
                if normalize_text and isinstance(clip, Clip):
                    clip = _normalized(clip)
                if isinstance(clip, SkippedInput):
                    skipped.append(clip)
                else:
                    clips.append(clip)
            if clips:
                recordings.append((found, clips))
    except OSError as error:
        place = printable(str(error.filename or source))
        raise EchoError(f"{place} cannot be read: {error.strerror}") from None
    clips, repeated = _with_keys(recordings)
    skipped = [
        SkippedInput(item.kind, printable(item.name), printable(item.detail))
        for item in skipped + repeated
    ]
    return clips, sorted(skipped, key=lambda item: (item.name, item.kind, item.detail))


def _clips_of(
    recording: Recording, max_seconds: float, keep_long: bool, need_text: bool
) -> Iterator[Clip | SkippedInput]:
    """The clips of a recording, with keys not checked yet, and the inputs that are skipped."""
    fields, source = dict(recording.fields), recording.source
    text = pop(fields, TEXT_FIELDS)
    speaker, language = pop(fields, SPEAKER_FIELDS), pop(fields, LANGUAGE_FIELDS)
    try:
        start, stop = _times(fields)
        segments, empty = read_segments(fields.pop("segments", None))
        metadata = {**_as_json(fields), "source": printable(source)}
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        yield SkippedInput("manifest", source, str(error)[:200])
        return
    for segment in empty:
        detail = f"has a segment of no length at {segment.start:g} s: {segment.text[:60]!r}"
        yield SkippedInput("segment", source, detail)
    if segments and (not isinstance(text, str) or not text.strip()):
        text = " ".join(segment.text for segment in segments)
    try:
        with open_audio(recording.audio) as audio:
            length = audio_seconds(audio, printable(source))
    except (EchoError, OSError) as error:
        yield SkippedInput("audio", source, str(error))
        return
    if start >= length:
        detail = f"starts at {start:g} s, but the audio is {length:.2f} s long"
        yield SkippedInput("manifest", source, detail)
        return
    end = length if stop is None else min(stop, length)
    parts = [Segment(start, end, text if isinstance(text, str) else "")]
    is_cut = end - start > max_seconds and bool(segments)
    if is_cut:
        parts = join_segments(segments, start, end, max_seconds)
        if not parts:
            detail = f"is {end - start:.2f} s long, and no segment with text is within its times"
            yield SkippedInput("long", source, detail)
    for number, part in enumerate(parts):
        name = f"{source}[{number}]" if is_cut else source
        seconds = part.end - part.start
        if need_text and (problem := _text_problem(part.text)):
            yield SkippedInput(problem[0], name, problem[1])
        elif seconds < MIN_SECONDS:
            detail = f"expected at least {MIN_SECONDS} s, got {seconds:.3f} s"
            yield SkippedInput("short", name, detail)
        elif seconds > max_seconds and not keep_long:
            what = "a single segment" if segments else "and no segments with times to cut at"
            detail = f"expected at most {max_seconds:g} s, got {seconds:.2f} s, {what}"
            yield SkippedInput("long", name, detail)
        else:
            yield Clip(
                key=f"{recording.key}_{number:03d}" if is_cut else recording.key,
                text=part.text.strip(),
                audio=recording.audio,
                start=part.start,
                stop=None if part.end == length else part.end,
                seconds=seconds,
                speaker=_label(speaker),
                language=_label(language),
                metadata=metadata,
            )


def _normalized(clip: Clip) -> Clip | SkippedInput:
    """`clip` with normalized text, or the reason if none of the text is left."""
    text = normalize_text(clip.text)
    if problem := _text_problem(text):
        kind, detail = problem
        return SkippedInput(kind, clip.metadata["source"], f"after normalization, {detail}")
    return replace(clip, text=text)


def _times(fields: dict[str, Any]) -> tuple[float, float | None]:
    """Start and end in seconds, from `start` and `end` or (NeMo) `offset` and `duration`."""
    has_offset = "offset" in fields and "start" not in fields
    start = float(pop(fields, ("start", "offset")) or 0.0)
    end = pop(fields, ("end",))
    if has_offset and end is None and fields.get("duration"):
        end = start + float(fields["duration"])
    stop = float(end) if end is not None else None
    if not (math.isfinite(start) and start >= 0 and (stop is None or start < stop < math.inf)):
        raise ValueError(f"expected 0 <= start < end, got start {start} and end {stop}")
    return start, stop


def _text_problem(text: str) -> tuple[str, str] | None:
    """Kind and detail of the reason why a text is unusable, None if it is usable."""
    is_utf8 = "\0" not in text and not re.search(r"[\ud800-\udfff]", text)
    try:
        check_text(text)
    except EchoError as error:
        return "text" if is_utf8 else "utf8", str(error)
    return None


def _with_keys(
    recordings: list[tuple[Recording, list[Clip]]],
) -> tuple[list[Clip], list[SkippedInput]]:
    """Clips with safe and unique keys, and those that cannot have one."""
    kept: dict[str, Clip] = {}
    skipped = []
    names = set()
    for recording, clips in sorted(recordings, key=lambda item: item[0].name):
        source = recording.source
        if recording.name in names:
            detail = f"another recording has the same name: {recording.name!r}"
            skipped.append(SkippedInput("duplicate", source, detail))
            continue
        names.add(recording.name)
        for clip in clips:
            key = re.sub(r"[^A-Za-z0-9_-]", "_", clip.key)
            if not 0 < len(key) <= MAX_KEY:
                detail = f"expected a key of 1 to {MAX_KEY} characters, got {len(key)}"
                skipped.append(SkippedInput("key", source, detail))
                continue
            if key in kept:
                full = f"{recording.name}{clip.key.removeprefix(recording.key)}"
                digest = hashlib.sha256(full.encode("utf-8", "surrogateescape")).hexdigest()
                key = f"{key}_{digest[:8]}"
            if key in kept:
                detail = f"another clip has the same key: {key!r}"
                skipped.append(SkippedInput("duplicate", source, detail))
                continue
            kept[key] = replace(clip, key=key)
    return [clip for _, clip in sorted(kept.items())], skipped


def _label(value: Any) -> str | None:
    is_label = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return printable(str(value)) if is_label else None


def _as_json(value: Any) -> Any:
    """`value` with everything that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        items = ((key, item) for key, item in value.items() if isinstance(key, str))
        return {_as_json(key): _as_json(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    is_number = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_number else None
