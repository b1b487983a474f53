"""How the quality of a small voice depends on the number of steps, for each way to save time."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.data.cepstra import mel_cepstra
from echo_eqx.errors import EchoError, optional
from echo_eqx.files import write_whole
from echo_eqx.flow.euler import computes_guidance
from echo_eqx.flow.sampler import trace_settings
from echo_eqx.generation import Length, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.voice.evaluate import Judge, Originals, generate, word_error_rates
from echo_eqx.voice.similarity import DECIBELS, dtw_distances

CONVERGED_STEPS = 256
VARIANTS: dict[str, tuple[dict[str, float], Length]] = {
    "plain": ({}, "full"),
    "sway -1": ({"sway": -1.0}, "full"),
    "guidance every 2nd": ({"guidance_every": 2}, "full"),
    "both": ({"sway": -1.0, "guidance_every": 2}, "full"),
    "length auto": ({}, "auto"),
}
"""Changes of the settings, and the length, by what the table calls them."""


@dataclass(frozen=True)
class Point:
    """The quality of one variant with one number of steps."""

    variant: str
    steps: int
    evaluations: int
    """Evaluations of the model for an utterance: one per step, and one for each branch of new
    guidance."""
    seconds: float
    """Seconds to generate an utterance, decoding included, compilation not."""
    converged_mcd_db: float
    """Median mel-cepstral distortion to the same utterance with plain steps, 256 of them."""
    mcd_db: float
    """Median distortion to espeak-ng's speech of the text, as `Metrics` has it, and so on."""
    retrieval_accuracy: float
    voice_accuracy: float
    length_accuracy: float
    word_error_rate: float | None


def curve(
    dit: EchoDiT,
    codec: Codec,
    texts: list[str],
    references: Mapping[str, Path],
    settings: SamplerSettings,
    steps: Sequence[int],
    words: bool,
) -> Iterator[Point]:
    """A point for each number of steps and each of `VARIANTS`, as soon as it is known, and first
    one with `CONVERGED_STEPS`. All have the same texts and seeds."""
    originals, rate = Originals.of(texts), codec.config.sample_rate
    judge = Judge(codec, originals)
    converged: list[np.ndarray] = []
    compiled: set[Length] = set()
    rows = [("plain", CONVERGED_STEPS)] + [(name, count) for count in steps for name in VARIANTS]
    for name, count in rows:
        changes, length = VARIANTS[name]
        changed = dataclasses.replace(settings, **changes, steps=count)
        if length not in compiled:
            once = dataclasses.replace(changed, steps=1)
            generate(dit, codec, texts, references, once, length=length)
            compiled.add(length)
        started = time.perf_counter()
        generated = generate(dit, codec, texts, references, changed, length=length)
        seconds = (time.perf_counter() - started) / len(texts)
        cepstra = [mel_cepstra(audio, rate) for audio in generated]
        converged = converged or cepstra
        distances = [dtw_distances(a, [b])[0] for a, b in zip(cepstra, converged, strict=True)]
        metrics = judge(generated)
        errors = word_error_rates(originals, generated, rate) if words else {}
        yield Point(
            variant=name,
            steps=count,
            evaluations=num_evaluations(changed),
            seconds=seconds,
            converged_mcd_db=DECIBELS * float(np.median(distances)),
            mcd_db=metrics.mcd_db,
            retrieval_accuracy=metrics.retrieval_accuracy,
            voice_accuracy=metrics.voice_accuracy,
            length_accuracy=metrics.length_accuracy,
            word_error_rate=errors.get("word_error_rate"),
        )


def num_evaluations(settings: SamplerSettings) -> int:
    """Evaluations of the model for an utterance with a reference."""
    branches = 2 if settings.guidance == "independent" else 1
    steps, numbers = jnp.arange(settings.steps), trace_settings(settings, num_layers=1)
    rows = {name: jnp.broadcast_to(number, len(steps)) for name, number in numbers.items()}
    is_new = computes_guidance(steps, rows)
    return settings.steps + branches * int(is_new.sum())


def table_row(point: Point) -> list[str]:
    """The cells of a row: those of `HEADER`."""
    numbers = [
        f"{point.seconds:.2f}",
        f"{point.converged_mcd_db:.2f}",
        f"{point.mcd_db:.2f}",
        f"{point.retrieval_accuracy:.1%}",
        f"{point.voice_accuracy:.1%}",
        f"{point.length_accuracy:.1%}",
        "" if point.word_error_rate is None else f"{point.word_error_rate:.3f}",
    ]
    return [point.variant, str(point.steps), str(point.evaluations), *numbers]


HEADER = [
    *("variant", "steps", "evaluations", "s each", "dB to 256 steps", "dB to original"),
    *("retrieved", "voice", "length", "word errors"),
]


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw both distortions against the evaluations of the model.

    **Raises**: `EchoError` if matplotlib is not installed, or `path` cannot be written.
    """
    figure = optional("matplotlib.figure", "plots").Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for variant in VARIANTS:
        line = [point for point in points if point.variant == variant]
        line = [point for point in line if point.steps < CONVERGED_STEPS]
        for axis, name in zip(axes, ("converged_mcd_db", "mcd_db"), strict=True):
            evaluations = [point.evaluations for point in line]
            axis.plot(evaluations, [getattr(p, name) for p in line], marker="o", label=variant)
    for axis, title in zip(axes, ("dB to 256 steps", "dB to espeak-ng"), strict=True):
        axis.set(xlabel="evaluations of the model", ylabel=title)
        axis.legend()
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    except OSError as error:
        raise EchoError(f"cannot write {path}: {error.strerror}") from None
