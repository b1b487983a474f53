"""Evaluate a small voice against espeak-ng's speech of the same held-out texts.

    echo-eqx eval_voice
    echo-eqx eval_voice --checkpoint runs/build_voice/dit --codec runs/build_voice/codec
    echo-eqx eval_voice --count 8 --curve 6 10 16 32 --plot curve.png

For texts of the small domain, unseen sentences of seen words and sentences with unseen words, it
prints how many are nearest to their own original among all originals, and the distance to it.
Instead, --curve compares numbers of steps and ways to save time. Needs espeak-ng and librosa;
--words also pocketsphinx and jiwer (pip install 'echo_eqx[eval]').
"""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

import echo_eqx
from echo_eqx import voice
from echo_eqx.cli import parse
from echo_eqx.codec.codec import Codec
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import UsageError, optional
from echo_eqx.generation import Length
from echo_eqx.model.dit import EchoDiT
from echo_eqx.voice.curve import HEADER, curve, plot, table_row
from echo_eqx.voice.evaluate import measure, reference_files, save_speech, word_error_rates
from echo_eqx.voice.grammar import Kind, held_out_texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Args:
    checkpoint: str = str(voice.CHECKPOINT)
    """EchoDiT weights, as for infer."""
    codec: str = str(voice.CODEC)
    """DACVAE weights."""
    references: Path = voice.REFERENCES
    """Folder with NAME.flac of each voice."""
    count: int = 50
    """Texts of each kind."""
    kinds: tuple[Kind, ...] = ("small", "seen", "unseen")
    """small: the small domain; seen: unseen sentences of seen words; unseen: with unseen words."""
    sampler: Annotated[echo_eqx.SamplerSettings, tyro.conf.arg(name="")] = field(
        default_factory=lambda: voice.SETTINGS
    )
    length: Length | None = None
    """full or auto, as for infer. By default what the checkpoint recommends."""
    curve: tuple[int, ...] = ()
    """Instead of the report: a table with these numbers of steps, each plain, with sway sampling,
    with guidance at every second step, with both, and with the length by the text."""
    plot: Path | None = None
    """With --curve: also draw it to this *.png (pip install 'echo_eqx[plots]')."""
    words: bool = False
    """Also compute the word error rate of PocketSphinx, whose grammar is the texts themselves."""
    output: Path | None = None
    """Folder for the speech, the originals and report.json."""


def main() -> None:
    args = parse(Args, __doc__)
    if not 2 <= args.count <= 10_000:
        raise UsageError(f"--count: expected 2 to 10000, got {args.count}")
    args.sampler.check()
    for steps in args.curve:
        dataclasses.replace(args.sampler, steps=steps).check()
    if args.plot is not None:
        if not args.curve or args.plot.suffix.lower() != ".png":
            raise UsageError(f"--plot: expected --curve and a *.png, got {args.plot}")
        optional("matplotlib", "plots")
    use_compilation_cache()
    references = reference_files(args.references)
    dit, codec = echo_eqx.load_dit(args.checkpoint), echo_eqx.load_codec(args.codec)
    if args.curve:
        return print_curve(args, dit, codec)
    rate, report = codec.config.sample_rate, {}
    for kind in args.kinds:
        metrics, originals, generated = measure(
            dit, codec, kind, args.count, references, args.sampler, args.length
        )
        report[kind] = dataclasses.asdict(metrics)
        if args.words:
            report[kind] |= word_error_rates(originals, generated, rate)
        line = ", ".join(f"{name} {value:.3g}" for name, value in report[kind].items())
        print(f"{kind}: {line}", flush=True)
        if args.output is not None:
            save_speech(args.output / kind, originals, generated, rate)
    if args.output is not None:
        (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        logger.info("speech and report.json are in %s", args.output)


def print_curve(args: Args, dit: EchoDiT, codec: Codec) -> None:
    """Print a row of a Markdown table as soon as it is known."""
    texts = [text for kind in args.kinds for text in held_out_texts(kind, args.count)]
    references, points = reference_files(args.references), []
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for point in curve(dit, codec, texts, references, args.sampler, args.curve, args.words):
        print(f"| {' | '.join(table_row(point))} |", flush=True)
        points.append(point)
    if args.plot is not None:
        plot(points, args.plot)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        report = [dataclasses.asdict(point) for point in points]
        (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
