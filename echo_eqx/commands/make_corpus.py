"""Record sentences of a grammar with espeak-ng, to train a small voice on.

    echo-eqx make_corpus --output recordings/
    echo-eqx prepare --input recordings/manifest.jsonl --output shards/ --codec WEIGHTS

Run the same command again to continue where it stopped. The same seed gives the same files.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.cli import parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.voice.espeak import MANIFEST, speak_corpus
from echo_eqx.voice.grammar import SMALL_SHARE, random_phrase, training_texts


@dataclass(frozen=True)
class Args:
    output: Path
    """Folder for the recordings and manifest.jsonl."""
    count: int = 6000
    """Number of recordings."""
    seed: int = 0
    """Seed of the texts."""
    small_share: float = SMALL_SHARE
    """Share of texts of the small domain: numbers, dates, times, prices, household commands."""
    max_seconds: float = 5.0
    """Longer recordings are left out and replaced by the next text."""
    max_words: int | None = None
    """Speak random phrases of 1 to this many words instead of sentences; a model learns to read
    from them sooner."""
    workers: int = os.cpu_count() or 1
    """Number of espeak-ng processes at a time."""


def main() -> None:
    args = parse(Args, __doc__)
    if not 0 < args.count < 10**6:
        raise UsageError(f"--count: expected 1 to 999999, got {args.count}")
    if not 1 <= args.max_seconds < 1e9:
        raise UsageError(f"--max_seconds: expected at least 1, got {args.max_seconds}")
    if not 0 <= args.small_share <= 1:
        raise UsageError(f"--small_share: expected 0 to 1, got {args.small_share}")
    if not 1 <= args.workers <= 1000:
        raise UsageError(f"--workers: expected 1 to 1000, got {args.workers}")
    if args.max_words is not None and args.max_words < 1:
        raise UsageError(f"--max_words: expected at least 1, got {args.max_words}")
    texts = training_texts(args.seed, args.small_share)
    if args.max_words is not None:
        rng = random.Random(args.seed)
        texts = (random_phrase(text, rng, args.max_words) for text in texts)
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
