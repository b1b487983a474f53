"""Judge whether a small voice is understood, by what espeak-ng says of the same held-out texts.

    echo-eqx eval_voice
    echo-eqx eval_voice --checkpoint runs/build_voice/dit --codec runs/build_voice/codec

It prints, for texts of the small domain, for unseen sentences of seen words and for sentences with
unseen words, how many of the texts are nearest to their own original among all, and how far from it
they are. Needs espeak-ng; word errors also `pip install pocketsphinx`.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import echo_eqx
from echo_eqx import voice
from echo_eqx.cli import parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.audio import save_audio
from echo_eqx.errors import UsageError
from echo_eqx.voice.evaluate import (
    Originals,
    measure,
    recogniser,
    reference_files,
    spoken_words,
    voice_of,
    word_errors,
)
from echo_eqx.voice.grammar import Kind

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    checkpoint: str = str(voice.CHECKPOINT)
    """EchoDiT weights, as infer.py takes them."""
    codec: str = str(voice.CODEC)
    """DACVAE weights."""
    references: Path = voice.REFERENCES
    """Folder with NAME.flac of each voice."""
    count: int = 50
    """Texts of each kind."""
    kinds: tuple[Kind, ...] = ("small", "seen", "unseen")
    """small: the small domain. seen: unseen sentences of seen words. unseen: with unseen words."""
    sampler: Annotated[echo_eqx.SamplerSettings, tyro.conf.arg(name="")] = field(
        default_factory=lambda: voice.SETTINGS
    )
    words: bool = False
    """Also count the word errors of PocketSphinx, whose grammar is the texts themselves."""
    output: Path | None = None
    """Folder for the speech, the originals and report.json."""


def main() -> None:
    args = parse(Args, __doc__)
    if not 2 <= args.count <= 10_000:
        raise UsageError(f"count is {args.count}; wanted 2 to 10000")
    args.sampler.check()
    use_compilation_cache()
    references = reference_files(args.references)
    dit, codec = echo_eqx.load_dit(args.checkpoint), echo_eqx.load_codec(args.codec)
    report = {}
    for kind in args.kinds:
        figures, originals, generated = measure(
            dit, codec, kind, args.count, references, args.sampler
        )
        report[kind] = dataclasses.asdict(figures)
        if args.words:
            report[kind] |= count_words(originals, generated, codec.config.sample_rate)
        line = ", ".join(f"{name} {value:.3g}" for name, value in report[kind].items())
        print(f"{kind}: {line}", flush=True)
        if args.output is not None:
            write(args.output / kind, originals, generated, codec.config.sample_rate)
    if args.output is not None:
        (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        logger.info(f"speech and report.json are in {args.output}")


def count_words(originals: Originals, generated: list[np.ndarray], rate: int) -> dict[str, float]:
    """Word error rates, generated and original, on the texts without digits whose words the
    dictionary has; their number."""
    spoken, recognise = recogniser(originals.texts)
    errors = original_errors = words = 0
    for i in spoken:
        said = spoken_words(originals.texts[i])
        clip, clip_rate = originals.audio[voice_of(i)][i]
        errors += word_errors(recognise(generated[i], rate).split(), said)
        original_errors += word_errors(recognise(clip, clip_rate).split(), said)
        words += len(said)
    return {
        "word_errors": errors / words,
        "original_word_errors": original_errors / words,
        "word_texts": len(spoken),
    }


def write(folder: Path, originals: Originals, generated: list[np.ndarray], rate: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (text, audio) in enumerate(zip(originals.texts, generated, strict=True)):
        name = f"{i:03d}_{voice_of(i)}"
        (folder / f"{name}.txt").write_text(text + "\n")
        save_audio(folder / f"{name}.wav", audio, rate)
        save_audio(folder / f"{name}.espeak.wav", *originals.audio[voice_of(i)][i])
