"""Cut long recordings between the timed segments of their transcript."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_EDGE = 0.5
"""Seconds of a pause, at most, that are kept on each side of a cut; longer pauses may be music."""


@dataclass(frozen=True)
class Segment:
    """Text spoken from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


def read_segments(given: Any) -> tuple[list[Segment], list[Segment]]:
    """Segments {start, end, text} of a manifest, sorted by start, and those of zero length.

    Both lists are empty if `given` is None.

    **Raises**: `ValueError` if `given` has another form.
    """
    if isinstance(given, str):  # a field of a CSV
        given = json.loads(given)
    if given is None:
        return [], []
    try:
        segments = [Segment(float(x["start"]), float(x["end"]), x["text"] or "") for x in given]
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected segments {{start, end, text}}: {error}") from None
    for segment in segments:
        are_times = 0 <= segment.start < math.inf and 0 <= segment.end < math.inf
        if not are_times or not isinstance(segment.text, str):
            raise ValueError(f"bad times or text: segment from {segment.start} to {segment.end} s")
    segments.sort(key=lambda segment: (segment.start, segment.end))
    # Recognizers write segments of zero length for words that they could not place.
    return [s for s in segments if s.end > s.start], [s for s in segments if s.end <= s.start]


def join_segments(
    segments: Sequence[Segment],
    start: float,
    end: float,
    max_seconds: float,
    max_bytes: int = 2**31,
) -> list[Segment]:
    """Join consecutive segments within [start, end) up to `max_seconds` and `max_bytes` of UTF-8.

    Cuts are in the middle of pauses. A segment without text separates its neighbors. A segment that
    is too long by itself is kept as it is.
    """
    inside = [s for s in segments if s.start < end and s.end > start]
    # Running maximum, since segments may overlap.
    ends = list(itertools.accumulate((min(s.end, end) for s in inside), max))
    gaps = [
        inside[0].start - start if inside else 0.0,
        *(b.start - a for a, b in zip(ends, inside[1:], strict=False)),
    ]
    gaps = [gaps[0], *(gap / 2 for gap in gaps[1:]), end - ends[-1] if ends else 0.0]
    edges = [min(gap, MAX_EDGE) for gap in gaps]
    joined: list[Segment] = []
    is_separated = True
    for number, segment in enumerate(inside):
        if not segment.text.strip():
            is_separated = True
            continue
        begin = max(start, segment.start - edges[number])
        stop = min(end, ends[number] + edges[number + 1])
        text = f"{joined[-1].text} {segment.text.strip()}" if joined else ""
        fits = len(text.encode("utf-8", "replace")) <= max_bytes
        if not is_separated and fits and stop - joined[-1].start <= max_seconds:
            joined[-1] = Segment(joined[-1].start, stop, text)
        else:
            if stop - begin > max_seconds:
                begin, stop = max(begin, segment.start), min(stop, ends[number])
            joined.append(Segment(begin, stop, segment.text.strip()))
        is_separated = False
    return joined
