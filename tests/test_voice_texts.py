"""Texts for a small voice, their speech by espeak-ng, and comparing speech."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from zlib import crc32

import numpy as np
import pytest
import soundfile as sf
import soxr

from echo_eqx.data.cepstra import mel_cepstra
from echo_eqx.data.text import normalize_text
from echo_eqx.errors import EchoError
from echo_eqx.prepare.clips import list_clips
from echo_eqx.voice import espeak, similarity
from echo_eqx.voice.corpus import MANIFEST, record_corpus
from echo_eqx.voice.evaluate import Originals, word_error_rates
from echo_eqx.voice.grammar import (
    MAX_BYTES,
    held_out_texts,
    held_out_words,
    inflect,
    lexicon_forms,
    random_phrase,
    training_texts,
    words_of,
)

KINDS = ("small", "seen", "unseen")
needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed"
)


def first_texts(seed: int, count: int) -> list[str]:
    return list(islice(training_texts(seed), count))


@pytest.fixture(scope="module")
def texts():
    return first_texts(0, 10_000)


@pytest.fixture(scope="module")
def held_out():
    return {kind: held_out_texts(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def spoken(held_out):
    """Recordings of the same ten texts in each voice."""
    return {
        voice.name: [espeak.speak(text, voice) for text in held_out["seen"][:10]]
        for voice in espeak.VOICES
    }


def test_texts_are_the_same_everywhere(texts):
    assert crc32("\n".join(texts[:100]).encode()) == 3142156158
    assert texts[:100] == first_texts(0, 100) != first_texts(1, 100)


def test_texts_fit_and_are_unchanged_by_normalization(texts, held_out):
    every = [*texts, *(text for kind in KINDS for text in held_out[kind])]
    for text in every:
        assert text.isascii() and len(text) >= 8
        assert normalize_text(text) == f"[S1] {text}"
        assert len(f"[S1] {text}") <= MAX_BYTES
    assert len(set(every)) == len(every)


def test_held_out_texts_are_never_trained_on(texts, held_out):
    trained = {*texts, *first_texts(1, 2000)}
    for kind in KINDS:
        assert len(held_out[kind]) == 50
        assert held_out[kind] == held_out_texts(kind)
        assert not set(held_out[kind]) & trained


def test_unseen_words_are_never_trained_on(texts, held_out):
    trained = {word for text in texts for word in words_of(text)}
    for text in held_out["unseen"]:
        assert len(held_out_words(text)) >= 2
        assert not held_out_words(text) & trained
    for kind in ("small", "seen"):
        assert not any(held_out_words(text) for text in held_out[kind])


def test_every_other_word_occurs_several_times(texts):
    counts: dict[str, int] = {}
    for text in texts[:6000]:
        for word in words_of(text):
            counts[word] = counts.get(word, 0) + 1
    forms = lexicon_forms()
    trained = {base: words for base, words in forms.items() if not held_out_words(base)}
    assert len(forms) > 2500
    assert 0.04 < 1 - len(trained) / len(forms) < 0.08
    assert min(sum(counts.get(word, 0) for word in words) for words in trained.values()) >= 2


def test_phrases_are_consecutive_words(texts):
    rng = random.Random(0)
    pieces = [(text, random_phrase(text, rng, 3)) for text in texts[:2000]]
    assert all(piece in text and piece.strip('.,!?;:-"') == piece for text, piece in pieces)
    assert {len(piece.split()) for _, piece in pieces} == {1, 2, 3}


def test_words_are_inflected():
    cases = {
        "pl": "box-boxes city-cities day-days knife-knives woman-women photo-photos sheep-sheep",
        "s": "go-goes carry-carries watch-watches play-plays rely_on-relies_on",
        "ed": "stop-stopped visit-visited agree-agreed carry-carried panic-panicked eat-ate",
        "en": "eat-eaten bake-baked admit-admitted wait_for-waited_for",
        "ing": "die-dying make-making see-seeing begin-beginning fix-fixing ski-skiing",
    }
    for form, pairs in cases.items():
        for pair in pairs.split():
            word, wanted = pair.split("-")
            assert inflect(word, form) == wanted.replace("_", " ")


def test_dtw_equals_a_naive_implementation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(17, 13))
    others = [rng.normal(size=(n, 13)) for n in (1, 23, 9, 17, 30, 17, 2, 5, 11)]

    def naive(b: np.ndarray) -> float:
        ways = {(-1, -1): (0.0, 0)}
        for i in range(len(a)):
            for j in range(len(b)):
                before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
                total, steps = min(
                    (ways[place] for place in before if place in ways), key=lambda way: way[0]
                )
                ways[i, j] = (total + float(np.linalg.norm(a[i] - b[j])), steps + 1)
        total, steps = ways[len(a) - 1, len(b) - 1]
        return total / steps

    np.testing.assert_allclose(similarity.dtw_distances(a, others), [naive(b) for b in others])
    slow = np.repeat(a, 3, axis=0)
    assert similarity.dtw_distances(a, [slow])[0] < 1e-6


def test_the_pitch_of_a_tone_is_its_frequency():
    t = np.arange(22_050) / 22_050
    for hertz in (80.0, 133.0, 240.0, 400.0):
        tone = sum(np.sin(2 * np.pi * hertz * k * t) / k for k in range(1, 6))
        assert similarity.median_pitch(np.asarray(tone), 22_050) == pytest.approx(hertz, rel=0.03)
    assert np.isnan(similarity.median_pitch(np.zeros(8000), 8000))


def test_cepstra_ignore_loudness():
    audio = np.random.default_rng(1).normal(size=12_345)
    loud, quiet = (mel_cepstra(audio * gain, 24_000) for gain in (0.5, 0.05))
    assert loud.shape[1] == 13
    np.testing.assert_allclose(loud, quiet, atol=1e-6)


@needs_espeak
def test_noisy_speech_is_nearest_to_its_own_text(spoken):
    rng = np.random.default_rng(2)
    noisy = []
    for audio, rate in spoken["clara"]:
        changed = soxr.resample(audio, rate, 48_000)
        noisy.append(changed + 0.01 * rng.normal(size=len(changed)))
    originals = [mel_cepstra(audio, rate) for audio, rate in spoken["clara"]]
    for i, audio in enumerate(noisy):
        distances = similarity.dtw_distances(mel_cepstra(audio, 48_000), originals)
        assert np.argmin(distances) == i


@needs_espeak
def test_four_voices_are_distinguished(spoken):
    prints = {name: similarity.voice_print(clips[:4]) for name, clips in spoken.items()}
    pitches = sorted(voice.pitch for voice in prints.values())
    assert all(high > 1.2 * low for low, high in pairwise(pitches))
    for name, clips in spoken.items():
        for audio, rate in clips[4:]:
            assert similarity.identify_voice(audio, rate, prints) == name


@needs_espeak
def test_speech_has_the_documented_peak_and_silence(spoken):
    for clips in spoken.values():
        for audio, rate in clips:
            assert audio.dtype == np.float32 and audio.ndim == 1
            assert np.abs(audio).max() == pytest.approx(0.5, abs=1e-6)
            silent = round(0.08 * rate)
            for end in (audio, audio[::-1]):
                assert not end[:silent].any() and end[silent : silent + 10].any()


@needs_espeak
def test_an_interrupted_corpus_is_continued_identically(tmp_path, texts):
    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def record(texts, folder, count, max_seconds=2.5):
        lines, pool = espeak.corpus_lines(texts), ThreadPoolExecutor(2)
        limits = {"count": count, "max_seconds": max_seconds}
        return record_corpus(lines, espeak.speak_as, folder, pool=pool, **limits).rows

    once, twice = tmp_path / "once", tmp_path / "twice"
    rows = record(texts, once, 12)
    record(texts, twice, 5)
    made = (twice / rows[0]["audio"]).stat().st_mtime_ns
    record(texts, twice, 12)
    assert files(once) == files(twice)
    assert (twice / rows[0]["audio"]).stat().st_mtime_ns == made
    # With other texts in the same folder, earlier clips are not kept.
    record(texts[100:], twice, 3, max_seconds=5.0)
    first = json.loads((twice / MANIFEST).read_text().splitlines()[0])
    assert first["text"] == f"[S1] {texts[100]}"

    assert len(rows) == 12 and all(row["duration"] <= 2.5 for row in rows)
    assert {row["speaker"] for row in rows} == {voice.name for voice in espeak.VOICES}
    clips, refused = list_clips(str(once / MANIFEST), max_seconds=5.0, cache=tmp_path)
    assert not refused
    assert [(c.text, c.speaker) for c in clips] == [(r["text"], r["speaker"]) for r in rows]
    assert sf.info(once / rows[0]["audio"]).subtype == "PCM_16"


def test_without_espeak_the_error_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EchoError, match="espeak-ng is not installed"):
        espeak.speak("Hello.", espeak.VOICES[0])


@needs_espeak
def test_a_text_without_speech_is_rejected():
    with pytest.raises(EchoError, match=r"silence|no audio"):
        espeak.speak("", espeak.VOICES[0])


@needs_espeak
def test_word_errors_use_only_texts_in_the_dictionary(spoken, held_out):
    texts = [*held_out["seen"][:10], "It is 5."]
    nothing = [(np.zeros(16_000, np.float32), 16_000)]
    originals = Originals(texts, {name: clips + nothing for name, clips in spoken.items()})
    rates = word_error_rates(originals, [nothing[0][0]] * len(texts), 16_000)
    assert 1 <= rates["word_texts"] <= 10
    assert rates["original_word_error_rate"] < 0.5 < rates["word_error_rate"] <= 1.0
