"""A share of the recordings kept apart from training, to evaluate on."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.data.shards import HOLDOUT
from echo_eqx.errors import UsageError
from echo_eqx.prepare.clips import Clip
from echo_eqx.prepare.known import known_sources


@dataclass(frozen=True)
class Holdout:
    """Either a share from 0 to 1 or a count of recordings."""

    share: float | None = None
    count: int = 0


def parse_holdout(given: str) -> Holdout:
    """`5%` or a count of recordings such as `20`.

    **Raises**: `UsageError` if it is neither.
    """
    match = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)\s*%|(\d{1,9})", given.strip())
    if match is None or not float(match[1] or match[2]) > 0:
        raise UsageError(f"--holdout: expected a share such as 5% or a count, got {given!r}")
    return Holdout(float(match[1]) / 100) if match[1] else Holdout(None, int(match[2]))


def hold_out(clips: Sequence[Clip], holdout: Holdout, seed: int, output: Path) -> set[str]:
    """Recordings to hold out; those that earlier runs put on a side, in `output`, stay there.

    Each recording draws a number from its name and `seed`, so that what others are there does not
    matter to a share. At least one is held out, and at least one is left.
    """
    training, held = known_sources(output), known_sources(output / HOLDOUT)
    sources = {clip.metadata["source"] for clip in clips}
    free = sorted(sources - training - held, key=lambda source: _draw(source, seed))
    if holdout.share is None:
        chosen = set(free[: max(0, holdout.count - len(held & sources))])
    else:
        chosen = {source for source in free if _draw(source, seed) < holdout.share}
        if not chosen and not held:
            chosen = set(free[:1])
    if not (sources - held - chosen):
        raise UsageError(
            f"--holdout: expected fewer than the {len(sources)} recordings there are, so that some "
            "are left to train on"
        )
    return chosen | (held & sources)


def _draw(source: str, seed: int) -> float:
    """From 0 to 1, uniform over names."""
    digest = hashlib.sha256(f"holdout {seed} {source}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
