"""Evaluate whether a small voice is understood, against espeak-ng's speech of the same texts.

The texts are held out of training. Each is spoken in one of the four voices, with a recording of
another text as reference.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from echo_eqx.codec.codec import Codec
from echo_eqx.data.audio import save_audio
from echo_eqx.data.cepstra import mel_cepstra
from echo_eqx.errors import EchoError, optional
from echo_eqx.generation import GenerationConfig, KnownVoice, Length, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.codec import silence_latent
from echo_eqx.speech.speaker import Speaker, encode_padded, speaker_latents
from echo_eqx.speech.synthesize import Utterance, synthesize_all
from echo_eqx.voice import REFERENCE_LUFS, SETTINGS
from echo_eqx.voice.espeak import SILENCE_SECONDS, VOICES, speak
from echo_eqx.voice.grammar import Kind, held_out_texts
from echo_eqx.voice.similarity import (
    DECIBELS,
    dtw_distances,
    identify_voice,
    voice_print,
)


@dataclass(frozen=True)
class Originals:
    """Speech of espeak-ng, by voice and text."""

    texts: list[str]
    audio: dict[str, list[tuple[np.ndarray, int]]]

    @classmethod
    def of(cls, texts: list[str]) -> "Originals":
        return cls(texts, {voice.name: [speak(text, voice) for text in texts] for voice in VOICES})


def voice_of(number: int) -> str:
    """The voice in which text `number` is spoken."""
    return VOICES[number % len(VOICES)].name


def generate(
    dit: EchoDiT,
    codec: Codec,
    texts: Sequence[str],
    references: Mapping[str, Path] | None,
    settings: SamplerSettings,
    seed: int = 0,
    length: Length | None = None,
) -> list[np.ndarray]:
    """Speech (samples,) of each text, cycling through the references; in any voice without them."""
    voices: list[np.ndarray | None] = [None]
    if references is not None:
        voices = [speaker_latents(dit, codec, path) for path in references.values()]
    utterances = [
        Utterance(text, voices[i % len(voices)], seed + i) for i, text in enumerate(texts)
    ]
    return synthesize_all(dit, codec, utterances, length=length, settings=settings, batch_size=16)


def generation_config(
    dit: EchoDiT, codec: Codec, references: Mapping[str, Path], name: str, count: int = 32
) -> GenerationConfig:
    """Generation settings of a small voice: sampler, the pace of its training data, codec `name`,
    and its known voices, each measured on `count` recordings."""
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
    centers = {voice: rows.mean(0) for voice, rows in means.items()}
    residuals = np.concatenate([rows - centers[voice] for voice, rows in means.items()])
    covariance = np.cov(residuals.T)
    # Shrunk towards its diagonal, since it has many entries and is estimated from few recordings.
    values, vectors = np.linalg.eigh(0.8 * covariance + 0.2 * np.diag(np.diag(covariance)))
    whitening = np.round(vectors / np.sqrt(values), 4)
    voices = []
    for voice, center in centers.items():
        distances = np.sqrt(np.mean(np.square((means[voice] - center) @ whitening), axis=1))
        radius = 1.1 * float(distances.max())
        voices.append(KnownVoice(voice, _rounded(center), round(radius, 4)))
    return GenerationConfig(
        sampler=SETTINGS,
        length="auto",
        frames_per_byte=dit.generation.frames_per_byte,
        expand_text=True,
        reference_lufs=REFERENCE_LUFS,
        codec=name,
        codec_silence=_rounded(silence_latent(codec)),
        voices=tuple(voices),
        voice_whitening=tuple(map(_rounded, whitening)),
    )


def _rounded(numbers: np.ndarray) -> tuple[float, ...]:
    return tuple(np.round(numbers.astype(np.float64), 4).tolist())


def reconstruct(codec: Codec, audio: np.ndarray, rate: int) -> np.ndarray:
    """`audio` (samples,) encoded and decoded by the codec, at the codec's rate."""
    audio = soxr.resample(audio, rate, codec.config.sample_rate).astype(np.float32)
    padded = np.pad(audio, (0, -len(audio) % codec.config.hop))
    return np.asarray(codec.decode(encode_padded(codec, padded)))[: len(audio)]


@dataclass(frozen=True)
class Metrics:
    """Results for one kind of text."""

    retrieval_accuracy: float
    """Share of texts whose own original is the nearest of all originals in the same voice."""
    mcd_db: float
    """Median mel-cepstral distortion to the original of the same text in the same voice."""
    codec_mcd_db: float
    """Median distortion from the codec alone."""
    other_voice_mcd_db: float
    """Median distortion between the originals of the same text in two voices."""
    voice_accuracy: float
    """Share for which the voice of the reference is the nearest of four."""
    length_accuracy: float
    """Share whose length is within 25 % of the original's."""


class Judge:
    """Compares speech of the texts with the originals, of which it knows the cepstra."""

    def __init__(self, codec: Codec, originals: Originals):
        self._rate, self._audio = codec.config.sample_rate, originals.audio
        self._prints = {name: voice_print(clips) for name, clips in originals.audio.items()}
        self._cepstra = {
            name: [mel_cepstra(*clip) for clip in clips] for name, clips in originals.audio.items()
        }
        self._codec_distances = []
        self._other_distances = []
        for i in range(len(originals.texts)):
            own = [self._cepstra[voice_of(i)][i]]
            coded = mel_cepstra(reconstruct(codec, *self._audio[voice_of(i)][i]), self._rate)
            self._codec_distances.append(dtw_distances(coded, own)[0])
            other = self._cepstra[voice_of(i + 1)][i]
            self._other_distances.append(dtw_distances(other, own)[0])

    def __call__(self, generated: Sequence[np.ndarray]) -> Metrics:
        rows = []
        for i, audio in enumerate(generated):
            name = voice_of(i)
            clip, clip_rate = self._audio[name][i]
            distances = dtw_distances(mel_cepstra(audio, self._rate), self._cepstra[name])
            # Generated speech is trimmed at the end.
            seconds = len(clip) / clip_rate - SILENCE_SECONDS
            rows.append(
                (
                    float(np.argmin(distances) == i),
                    distances[i],
                    float(identify_voice(audio, self._rate, self._prints) == name),
                    float(abs(len(audio) / self._rate / seconds - 1) < 0.25),
                )
            )
        retrieved, own, same_voice, same_length = np.array(rows).T
        distances = (own, self._codec_distances, self._other_distances)
        own_db, codec_db, other_db = (DECIBELS * float(np.median(row)) for row in distances)
        return Metrics(
            retrieval_accuracy=float(retrieved.mean()),
            mcd_db=own_db,
            codec_mcd_db=codec_db,
            other_voice_mcd_db=other_db,
            voice_accuracy=float(same_voice.mean()),
            length_accuracy=float(same_length.mean()),
        )


def measure(
    dit: EchoDiT,
    codec: Codec,
    kind: Kind,
    count: int,
    references: Mapping[str, Path],
    settings: SamplerSettings,
    length: Length | None = None,
) -> tuple[Metrics, Originals, list[np.ndarray]]:
    """Metrics of `count` held-out texts of a kind, espeak-ng's originals, and the speech."""
    originals = Originals.of(held_out_texts(kind, count))
    generated = generate(dit, codec, originals.texts, references, settings, length=length)
    return Judge(codec, originals)(generated), originals, generated


def save_speech(
    folder: Path, originals: Originals, generated: Sequence[np.ndarray], rate: int
) -> None:
    """Write each text with its generated and original speech."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (text, audio) in enumerate(zip(originals.texts, generated, strict=True)):
        name = f"{i:03d}_{voice_of(i)}"
        (folder / f"{name}.txt").write_text(text + "\n")
        save_audio(folder / f"{name}.wav", audio, rate)
        save_audio(folder / f"{name}.espeak.wav", *originals.audio[voice_of(i)][i])


def reference_files(folder: Path) -> dict[str, Path]:
    """A recording of each voice.

    **Raises**: `EchoError` if one is missing.
    """
    files = {voice.name: folder / f"{voice.name}.flac" for voice in VOICES}
    for path in files.values():
        if not path.is_file():
            raise EchoError(f"{path} does not exist; expected a recording of each voice")
    return files


# --- Word errors --------------------------------------------------------------------------------


def word_error_rates(
    originals: Originals, generated: Sequence[np.ndarray], rate: int
) -> dict[str, float]:
    """Word error rates of generated and original speech, and the number of texts they are over.

    Only texts without digits are used, all of whose words are in PocketSphinx's dictionary.

    **Raises**: `EchoError` if PocketSphinx or jiwer is not installed, or no text can be used.
    """
    jiwer, sphinx = optional("jiwer", "eval"), optional("pocketsphinx", "eval")
    decoder = sphinx.Decoder(samprate=16000, loglevel="FATAL", lm=None)
    said: dict[int, str] = {}
    for i, text in enumerate(originals.texts):
        words = re.findall(r"[a-z']+", text.lower().replace("-", " "))
        if not re.search(r"\d", text) and all(map(decoder.lookup_word, words)):
            said[i] = " ".join(words)
    if not said:
        raise EchoError(
            f"expected texts with all words in PocketSphinx's dictionary, got none among "
            f"{len(originals.texts)}; give a larger --count"
        )
    texts = list(said.values())
    grammar = f"#JSGF V1.0;\ngrammar g;\npublic <s> = {' | '.join(texts)};"
    decoder.add_jsgf_string("texts", grammar)
    decoder.activate_search("texts")

    def recognize(audio: np.ndarray, rate: int) -> str:
        audio = soxr.resample(audio, rate, 16_000)
        peak = float(np.abs(audio).max(initial=1e-9))
        samples = (audio * (16_000 / peak)).astype(np.int16)
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else found.hypstr

    recognized = [recognize(generated[i], rate) for i in said]
    original = [recognize(*originals.audio[voice_of(i)][i]) for i in said]
    return {
        "word_error_rate": jiwer.wer(texts, recognized),
        "original_word_error_rate": jiwer.wer(texts, original),
        "word_texts": len(said),
    }
