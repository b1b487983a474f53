"""Reference recordings: checked, cleaned and normalized in loudness."""

import numpy as np
import pyloudnorm
import pytest
import soundfile as sf
from conftest import DATA

from echo_eqx import EchoError
from echo_eqx.data.audio import load_audio
from echo_eqx.data.reference import (
    check_reference,
    extract_speech,
    load_reference,
    set_loudness,
)


def test_references_without_a_usable_voice_are_rejected_by_name():
    rate = 48_000
    voice = load_audio(DATA / "speech.wav", rate)
    clipped = np.clip(voice * 30, -1, 1)
    for audio, message in (
        (np.zeros(rate, np.float32), "silent"),
        (voice[: rate // 4], "expected at least 0.5 s of speech, got 0.25 s"),
        (clipped, "clipped"),
        (clipped * 0.97, "clipped"),
    ):
        with pytest.raises(EchoError, match=f"ref: {message}|ref is {message}"):
            check_reference(audio, rate, "ref")


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_clipping_is_detected_at_any_rate_and_through_lossy_codecs(tmp_path, rate):
    voice = load_audio(DATA / "speech.wav", rate)
    clipped = np.clip(voice * 12, -1, 1)
    for name in ("clipped.wav", "clipped.mp3", "clipped.flac"):
        sf.write(tmp_path / name, clipped, rate)
        with pytest.raises(EchoError, match=rf"{name} is clipped"):
            load_reference(tmp_path / name, 48_000, 20.0)
    sf.write(tmp_path / "loud.wav", voice / np.abs(voice).max(), rate)
    load_reference(tmp_path / "loud.wav", 48_000, 20.0)


def test_loudness_reaches_its_target_without_clipping():
    rate = 48_000
    voice = 0.3 * load_audio(DATA / "speech.wav", rate)
    quiet = set_loudness(voice, rate, -30.0)
    assert pyloudnorm.Meter(rate).integrated_loudness(quiet) == pytest.approx(-30.0, abs=0.1)
    assert np.abs(set_loudness(voice, rate, 0.0)).max() <= 1.0 + 1e-6
    short = voice[: int(0.39 * rate)]
    assert np.array_equal(set_loudness(short, rate, -30.0), short)


# --- Speech in a recording ----------------------------------------------------------------------

RATE = 16_000


def voice() -> np.ndarray:
    return load_audio(DATA / "speech.wav", RATE)


def noise(seconds: float, level: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (level * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two recordings, one of which may begin up to 0.15 s later."""
    size = min(len(a), len(b)) - RATE // 5
    best = np.correlate(a[: size + RATE // 7], b[:size]).max()
    best = max(best, np.correlate(b[: size + RATE // 7], a[:size]).max())
    return best / (np.linalg.norm(a[:size]) * np.linalg.norm(b[:size]))


def click(seconds: float) -> np.ndarray:
    out = np.zeros(round(seconds * RATE), np.float32)
    out[1000:1300] = 0.9
    return out


CHANGES = {
    "quiet": lambda x: 0.1 * x,
    "very quiet": lambda x: 0.005 * x,
    "louder than full scale": lambda x: 4 * x,
    "silence in front": lambda x: np.pad(x, (40_000, 0)),
    "half a minute of silence in front": lambda x: np.pad(x, (480_000, 0)),
    "noise in front": lambda x: np.concatenate([noise(2.5, 0.01), x]),
    "more noise in front than is searched at first": lambda x: np.concatenate([noise(14, 0.02), x]),
    "loud noise in front": lambda x: np.concatenate([noise(2.5, 0.03), x]),
    "a click and silence in front": lambda x: np.concatenate([click(2.5), x]),
    "offset": lambda x: x + 0.1,
    "offset of the speech alone": lambda x: np.pad(0.5 * x + 0.3, (40_000, 0)),
    "quiet with offset and noise": lambda x: np.concatenate([noise(2, 0.001), 0.1 * x]) + 0.1,
    "one channel empty": lambda x: np.stack([x, 0 * x], axis=1),
    "one channel a constant": lambda x: np.stack([0 * x + 0.4, x], axis=1),
    "channels cancel": lambda x: np.stack([x, -0.97 * x], axis=1),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_same_speech_is_extracted_from_any_recording_of_it(tmp_path, change):
    """Level, offset, channels, and what comes before the speech do not matter."""
    path, changed = tmp_path / "ref.wav", CHANGES[change](voice())
    sf.write(path, changed, RATE, subtype="FLOAT")
    expected, found = extract_speech(voice(), RATE, "x"), load_reference(path, RATE, 1.92)
    assert len(found) == round(1.92 * RATE) and abs(float(found.mean())) < 1e-3
    assert likeness(found, expected) > 0.97


def test_long_pauses_are_shortened_and_short_ones_kept():
    speech = extract_speech(voice(), RATE, "x")
    first, last = speech[:RATE], speech[RATE:]
    paused = np.concatenate([first, np.zeros(5 * RATE, np.float32), last])
    assert abs(len(extract_speech(paused, RATE, "x")) - len(speech)) < 0.6 * RATE
    assert len(speech) > 0.9 * len(voice())


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros(40_000), "silent from 0 to 2.5 s"),
        (np.full(40_000, 0.3), "silent from 0 to 2.5 s"),
        (np.pad(voice()[4000:7000], (0, 40_000)), "silent or steady noise from .* to 2.7 s"),
        (click(2.5), "silent or steady noise from 0.0 to 2.5 s"),
    ],
)
def test_errors_say_which_part_is_silent(audio, message):
    with pytest.raises(EchoError, match=f"ref.* is {message}"):
        extract_speech(audio.astype(np.float32), RATE, "ref")


@pytest.mark.parametrize("gain", [1.0, 2.0, 5.0])
def test_float_recordings_above_full_scale_do_not_count_as_clipped(gain):
    loud = voice() / np.abs(voice()).max() * gain
    check_reference(loud, RATE, "ref")
    with pytest.raises(EchoError, match="clipped"):
        check_reference(np.clip(loud * 12, -gain, gain), RATE, "ref")
