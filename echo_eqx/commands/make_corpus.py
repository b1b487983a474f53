"""Let espeak-ng speak sentences that a grammar makes up, as recordings to train a small voice on.

    echo-eqx make_corpus --output recordings/
    echo-eqx prepare --input recordings/manifest.jsonl --output shards/ --codec WEIGHTS

The same command again goes on where it stopped, and the same seed gives the same files.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.cli import parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.voice.espeak import MANIFEST, speak_corpus
from echo_eqx.voice.grammar import SMALL_SHARE, cut, endless_training_texts


@dataclass(frozen=True)
class Args:
    output: Path
    """Folder for the recordings and manifest.jsonl."""
    count: int = 6000
    """Recordings to make."""
    seed: int = 0
    """Of the texts."""
    small_share: float = SMALL_SHARE
    """Share of texts of the small domain: numbers, dates, times, prices, household commands."""
    max_seconds: float = 5.0
    """A longer recording is left out, and the next text takes its place."""
    max_words: int | None = None
    """Say no sentences but random runs of 1 to so many words of them, by which a model learns
    sooner to read."""
    workers: int = os.cpu_count() or 1
    """How many espeak-ng run at once."""


def main() -> None:
    args = parse(Args, __doc__)
    if not 0 < args.count < 10**6:
        raise UsageError(f"count is {args.count}; wanted 1 to 999999")
    if not 1 <= args.max_seconds < 1e9:
        raise UsageError(f"max_seconds is {args.max_seconds}; wanted at least 1")
    if not 0 <= args.small_share <= 1:
        raise UsageError(f"small_share is {args.small_share}; wanted 0 to 1")
    if not 1 <= args.workers <= 1000:
        raise UsageError(f"workers is {args.workers}; wanted 1 to 1000")
    if args.max_words is not None and args.max_words < 1:
        raise UsageError(f"max_words is {args.max_words}; wanted at least 1")
    texts = endless_training_texts(args.seed, args.small_share)
    if args.max_words is not None:
        rng = random.Random(args.seed)
        texts = (cut(text, rng, args.max_words) for text in texts)
    try:
        rows = speak_corpus(
            texts,
            args.output,
            count=args.count,
            max_seconds=args.max_seconds,
            workers=args.workers,
        )
    except OSError as error:
        raise EchoError(f"{args.output} cannot be written: {error.strerror}") from None
    hours = sum(row["duration"] for row in rows) / 3600
    print(f"{len(rows)} recordings, {hours:.2f} hours, listed in {args.output / MANIFEST}")
