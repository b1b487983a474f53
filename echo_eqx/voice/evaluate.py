"""Whether a small voice is understood: its speech against what espeak-ng says of the same texts.

Texts are held out of training; each is spoken in one of the four voices, whose reference is a
recording of another text.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.errors import EchoError
from echo_eqx.flow.sampler import SamplerSettings
from echo_eqx.generation import GenerationConfig, KnownVoice
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.codec import silence_latent
from echo_eqx.speech.speaker import Speaker, encode_padded, speaker_latents
from echo_eqx.speech.synthesize import Utterance, synthesize_all
from echo_eqx.voice import REFERENCE_LUFS, SETTINGS
from echo_eqx.voice.espeak import SILENCE_SECONDS, VOICES, speak
from echo_eqx.voice.grammar import Kind, held_out_texts
from echo_eqx.voice.similarity import (
    DECIBELS,
    VoicePrint,
    mel_cepstra,
    nearest_voice,
    voice_print,
    warped_distances,
)


@dataclass(frozen=True)
class Originals:
    """What espeak-ng says, by voice and then text."""

    texts: list[str]
    audio: dict[str, list[tuple[np.ndarray, int]]]
    cepstra: dict[str, list[np.ndarray]]

    @classmethod
    def of(cls, texts: list[str]) -> "Originals":
        audio = {voice.name: [speak(text, voice) for text in texts] for voice in VOICES}
        cepstra = {
            name: [mel_cepstra(clip, rate) for clip, rate in clips] for name, clips in audio.items()
        }
        return cls(texts, audio, cepstra)

    def prints(self) -> dict[str, VoicePrint]:
        return {name: voice_print(clips) for name, clips in self.audio.items()}


def voice_of(number: int) -> str:
    """The voice that text `number` is spoken in."""
    return VOICES[number % len(VOICES)].name


def generate(
    dit: EchoDiT,
    codec: DACVAE,
    texts: Sequence[str],
    references: Mapping[str, Path] | None,
    settings: SamplerSettings,
    seed: int = 0,
) -> list[np.ndarray]:
    """(samples,) of each text, with one reference after the other; in any voice without."""
    voices: list[np.ndarray | None] = [None]
    if references is not None:
        voices = [speaker_latents(dit, codec, path) for path in references.values()]
    utterances = [
        Utterance(text, voices[i % len(voices)], seed + i) for i, text in enumerate(texts)
    ]
    return synthesize_all(dit, codec, utterances, settings=settings, batch_size=16)


def generation_config(
    dit: EchoDiT, codec: DACVAE, references: Mapping[str, Path], name: str, count: int = 32
) -> GenerationConfig:
    """What the file of a small voice says: its settings, its codec `name`, and the voices it knows
    by `count` recordings of each."""
    rate = codec.config.sample_rate

    def mean(speaker: Speaker) -> np.ndarray:
        return speaker_latents(dit, codec, speaker, lufs=REFERENCE_LUFS).mean(axis=0)

    originals = Originals.of(held_out_texts("seen", count))
    means = {
        voice: np.stack(
            [mean(references[voice])]
            + [mean(soxr.resample(clip, clip_rate, rate)) for clip, clip_rate in clips]
        )
        for voice, clips in originals.audio.items()
    }
    centres = {voice: rows.mean(0) for voice, rows in means.items()}
    strays = np.concatenate([rows - centres[voice] for voice, rows in means.items()])
    covariance = np.cov(strays.T)
    # Shrunk towards its diagonal: there are few recordings for so many numbers.
    values, vectors = np.linalg.eigh(0.8 * covariance + 0.2 * np.diag(np.diag(covariance)))
    whitening = np.round(vectors / np.sqrt(values), 4)
    voices = []
    for voice, centre in centres.items():
        distances = np.sqrt(np.mean(np.square((means[voice] - centre) @ whitening), axis=1))
        radius = 1.1 * float(distances.max())
        voices.append(KnownVoice(voice, _rounded(centre), round(radius, 4)))
    return GenerationConfig(
        sampler=SETTINGS,
        expand_text=True,
        reference_lufs=REFERENCE_LUFS,
        codec=name,
        codec_silence=_rounded(silence_latent(codec)),
        voices=tuple(voices),
        voice_whitening=tuple(map(_rounded, whitening)),
    )


def _rounded(numbers: np.ndarray) -> tuple[float, ...]:
    return tuple(np.round(numbers.astype(np.float64), 4).tolist())


def through_codec(codec: DACVAE, audio: np.ndarray, rate: int) -> np.ndarray:
    """(samples,) at the codec's rate: what encoding and decoding alone make of it."""
    audio = soxr.resample(audio, rate, codec.config.sample_rate).astype(np.float32)
    padded = np.pad(audio, (0, -len(audio) % codec.config.hop))
    return np.asarray(codec.decode(encode_padded(codec, padded)))[: len(audio)]


@dataclass(frozen=True)
class Metrics:
    """Of one kind of texts."""

    retrieved: float
    """Share whose own text is the nearest of all, among recordings in the same voice."""
    distance: float
    """Mel-cepstral, to the same text in the same voice, in decibels; medians, like the next two."""
    codec_distance: float
    """What the codec alone causes."""
    other_voice_distance: float
    """Between the same text in two voices of espeak-ng."""
    voices: float
    """Share whose voice is the nearest of four."""
    lengths: float
    """Share whose length is within 25 % of espeak-ng's."""


def measure(
    dit: EchoDiT,
    codec: DACVAE,
    kind: Kind,
    count: int,
    references: Mapping[str, Path],
    settings: SamplerSettings,
) -> tuple[Metrics, Originals, list[np.ndarray]]:
    """Metrics of `count` held-out texts of a kind, the originals, and the speech."""
    originals = Originals.of(held_out_texts(kind, count))
    generated = generate(dit, codec, originals.texts, references, settings)
    rate = codec.config.sample_rate
    prints = originals.prints()
    rows = []
    for i, audio in enumerate(generated):
        name, other = voice_of(i), voice_of(i + 1)
        clip, clip_rate = originals.audio[name][i]
        found = warped_distances(mel_cepstra(audio, rate), originals.cepstra[name])
        coded = mel_cepstra(through_codec(codec, clip, clip_rate), rate)
        own = [originals.cepstra[name][i]]
        seconds = len(clip) / clip_rate - SILENCE_SECONDS  # the silence behind is cut
        rows.append(
            (
                float(np.argmin(found) == i),
                DECIBELS * found[i],
                DECIBELS * warped_distances(coded, own)[0],
                DECIBELS * warped_distances(originals.cepstra[other][i], own)[0],
                float(nearest_voice(audio, rate, prints) == name),
                float(abs(len(audio) / rate / seconds - 1) < 0.25),
            )
        )
    columns = np.array(rows).T
    means, medians = columns.mean(1), np.median(columns, axis=1)
    figures = Metrics(means[0], medians[1], medians[2], medians[3], means[4], means[5])
    return figures, originals, generated


def reference_files(folder: Path) -> dict[str, Path]:
    """A recording of each voice.

    **Raises**: `EchoError` if one is missing.
    """
    files = {voice.name: folder / f"{voice.name}.flac" for voice in VOICES}
    for path in files.values():
        if not path.is_file():
            raise EchoError(f"{path} does not exist; wanted a recording of each voice")
    return files


def recogniser(texts: Sequence[str]) -> tuple[list[int], Callable[[np.ndarray, int], str]]:
    """PocketSphinx with a grammar of those of `texts` that its dictionary can pronounce, and their
    numbers.

    **Raises**: `EchoError` if it is not installed, or can pronounce none.
    """
    try:
        sphinx = importlib.import_module("pocketsphinx")
    except ImportError:
        raise EchoError("PocketSphinx is not installed; try: pip install pocketsphinx") from None
    decoder = sphinx.Decoder(samprate=16000, loglevel="FATAL", lm=None)
    words = {i: spoken_words(text) for i, text in enumerate(texts) if not re.search(r"\d", text)}
    words = {i: said for i, said in words.items() if all(map(decoder.lookup_word, said))}
    if not words:
        raise EchoError(
            f"PocketSphinx can pronounce none of {len(texts)} texts; wanted a larger --count"
        )
    lines = " | ".join(map(" ".join, words.values()))
    decoder.add_jsgf_string("texts", f"#JSGF V1.0;\ngrammar g;\npublic <s> = {lines};")
    decoder.activate_search("texts")

    def recognise(audio: np.ndarray, rate: int) -> str:
        audio = soxr.resample(audio, rate, 16_000)
        peak = float(np.abs(audio).max(initial=1e-9))
        samples = (audio * (16_000 / peak)).astype(np.int16)
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else found.hypstr

    return list(words), recognise


def spoken_words(text: str) -> list[str]:
    """Words of a text without digits, as a pronouncing dictionary has them."""
    return re.findall(r"[a-z']+", text.lower().replace("-", " "))


def word_errors(heard: Sequence[str], said: Sequence[str]) -> int:
    """Words to insert, delete or change (Levenshtein)."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(heard, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]
