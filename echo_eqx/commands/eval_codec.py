"""Measure what a codec keeps of recordings: spectrum, pitch, periodicity, waveform.

    echo-eqx eval_codec --data recordings/
    echo-eqx eval_codec --codec runs/codec --data held_out.jsonl --plot spectrograms.png

The recordings need no transcripts. Each is encoded, decoded and compared with itself: mel_db and
mcd_db are spectral distances; f0_cents is the error of the pitch; voiced and periodicity are below
1 if voices become hoarse; si_sdr_db is low for codecs that do not keep the phase.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import echo_eqx
from echo_eqx import voice
from echo_eqx.cli import on_terminal, parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.audio import save_audio
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.train.codec.train_codec import find_recordings
from echo_eqx.voice.evaluate import reconstruct
from echo_eqx.voice.reconstruction import NAMES, compare, plot_spectrograms

logger = logging.getLogger(__name__)

PLOTTED = 3


@dataclass(frozen=True)
class Args:
    data: str
    """Recordings, as for prepare: a folder, a manifest, tars, Parquet."""
    codec: str = str(voice.CODEC)
    """DACVAE or Fish S1-DAC weights, as for infer; by default those of the small voice."""
    count: int = 50
    """Recordings to measure, evenly spread over all."""
    max_seconds: float = 20.0
    """Longer recordings are cut to this length."""
    output: Path | None = None
    """Also write NAME.wav and NAME.decoded.wav of each into this folder."""
    plot: Path | None = None
    """Also draw spectrograms of the first three to this *.png (pip install 'echo_eqx[plots]')."""
    json: bool = False
    """Print one JSON object instead of a table: the medians, and the numbers of each recording."""


def main() -> None:
    args = parse(Args, __doc__)
    if args.count < 1 or not 0 < args.max_seconds < math.inf:
        raise UsageError(
            "expected a count of 1 or more and finite max_seconds above 0, got "
            f"{args.count} and {args.max_seconds}"
        )
    if args.output is not None:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EchoError(f"cannot write {args.output}: {error.strerror}") from None
    use_compilation_cache()
    codec = echo_eqx.load_codec(args.codec)
    rate = codec.config.sample_rate
    clips = find_recordings(args.data)
    chosen = np.linspace(0, len(clips) - 1, min(args.count, len(clips))).round().astype(int)
    rows, pairs = {}, []
    for i in tqdm(chosen.tolist(), disable=not on_terminal(), unit="recording"):
        clip = clips[i]
        try:
            stop = clip.start + min(clip.seconds, args.max_seconds)
            audio = dataclasses.replace(clip, stop=stop).load(rate)
        except EchoError as error:
            logger.warning(f"left out: {error}")
            continue
        decoded = reconstruct(codec, audio, rate)
        rows[clip.key] = dataclasses.asdict(compare(decoded, audio, rate))
        if len(pairs) < PLOTTED:
            pairs.append((clip.key, audio, decoded))
        if args.output is not None:
            save_audio(args.output / f"{clip.key}.wav", audio, rate)
            save_audio(args.output / f"{clip.key}.decoded.wav", decoded, rate)
    if not rows:
        raise EchoError(f"no usable recordings in {args.data}: expected speech")
    table = {name: np.array([row[name] for row in rows.values()]) for name in NAMES}
    if args.json:
        medians = {name: percentile(values, 50) for name, values in table.items()}
        report = {"codec": args.codec, "median": medians, "recordings": rows}
        report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # NaN is not JSON
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print("| | " + " | ".join(NAMES) + " |\n|---" + "|---" * len(NAMES) + "|")
        for name, share in (("median", 50), ("10 %", 10), ("90 %", 90)):
            cells = [f"{percentile(values, share):.2f}" for values in table.values()]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print(f"{len(rows)} recordings of {args.data}, codec {args.codec}")
    if args.plot is not None:
        plot_spectrograms(pairs, rate, args.plot)


def percentile(values: np.ndarray, share: int) -> float:
    """Of the numbers that are known; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(np.percentile(known, share)) if len(known) else math.nan
