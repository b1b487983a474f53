"""Reading and writing recordings: formats, damage, loudness."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from conftest import DATA, max_difference

from echo_eqx import EchoError
from echo_eqx.data.audio import (
    SilentAudioError,
    decode_audio,
    load_audio,
    save_audio,
)
from echo_eqx.data.channels import mix_down
from echo_eqx.data.reference import check_reference
from echo_eqx.prepare.clips import list_clips

FORMATS = ["wav", "mp3", "flac", "opus", "ogg"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate", [48_000, 24_000])
def test_formats_rates_and_channels_load(kind, rate):
    audio = load_audio(DATA / f"speech.{kind}", rate)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert len(audio) / rate == pytest.approx(3.0, abs=0.06)
    assert 0.05 < np.abs(audio).max() <= 1.0
    check_reference(audio, rate, kind)


def test_resampling_keeps_a_tone(tmp_path):
    time = np.arange(22_050) / 22_050
    sf.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 22_050, subtype="FLOAT")
    audio = load_audio(tmp_path / "tone.wav", 48_000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    assert max_difference(audio[2000:46_000], expected[2000:46_000]) < 1e-3


def test_only_the_start_is_read_and_channels_are_averaged(tmp_path):
    both = np.stack([np.full(48_000, 0.5), np.full(48_000, -0.1)], axis=1)
    sf.write(tmp_path / "two.wav", both, 16_000, subtype="FLOAT")
    audio = load_audio(tmp_path / "two.wav", 16_000, max_seconds=1.0)
    assert audio.shape == (16_000,)
    assert max_difference(audio, 0.2) < 1e-6


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_truncated_recordings_are_rejected_by_name(tmp_path, kind, share):
    data = (DATA / f"speech.{kind}").read_bytes()
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EchoError, match=rf"cut\.{kind} .*(truncated|decoded)"):
        load_audio(path, 48_000)


def test_wav_written_to_a_pipe_is_read_whole(tmp_path):
    data = bytearray((DATA / "speech.wav").read_bytes())
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "pipe.wav", 16_000)) == 48_000


def test_unusable_files_are_rejected_by_name(tmp_path):
    header = (DATA / "speech.wav").read_bytes()
    header = header[: header.index(b"data") + 4] + bytes(4)
    cases = {
        "missing.wav": (None, "does not exist"),
        "empty.wav": (b"", "is empty"),
        "text.wav": (b"hello " * 100, "expected a recording .*, got text"),
        "song.m4a": (b"\0\0\0 ftypM4A " + bytes(200), "cannot be decoded.*expected"),
        "header.wav": (header, "no samples|cannot be decoded"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(EchoError, match=f"{name}:? .*({message})"):
            load_audio(tmp_path / name, 48_000)
    with pytest.raises(EchoError, match="is not a file"):
        load_audio(tmp_path, 48_000)


def test_nonfinite_samples_are_rejected_by_name(tmp_path):
    audio = np.zeros(48_000, np.float32)
    audio[5] = np.nan
    sf.write(tmp_path / "nan.wav", audio, 48_000, subtype="FLOAT")
    with pytest.raises(EchoError, match=r"nan\.wav .*not finite"):
        load_audio(tmp_path / "nan.wav", 48_000)


def test_nonfinite_audio_is_not_written(tmp_path):
    with pytest.raises(EchoError, match="not finite"):
        save_audio(tmp_path / "out.wav", np.full(10, np.nan, np.float32), 48_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".FLAC"])
def test_written_audio_reads_back(tmp_path, suffix):
    audio = 0.5 * np.sin(np.arange(4800) / 20).astype(np.float32)
    save_audio(tmp_path / f"out{suffix}", audio, 48_000)
    again, rate = sf.read(tmp_path / f"out{suffix}")
    assert rate == 48_000 and max_difference(again, audio) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]
    save_audio(tmp_path / "loud.wav", 3 * audio, 48_000)
    assert np.abs(sf.read(tmp_path / "loud.wav")[0]).max() == pytest.approx(1.0, abs=1e-3)


def test_other_suffixes_and_unwritable_paths_are_rejected(tmp_path):
    audio = np.zeros(10, np.float32)
    with pytest.raises(EchoError, match=r"expected \.wav or \.flac, got '\.mp3'"):
        save_audio(tmp_path / "out.mp3", audio, 48_000)
    with pytest.raises(EchoError, match="cannot write"):
        save_audio(tmp_path / "none" / "out.wav", audio, 48_000)


def test_a_full_disk_leaves_no_partial_file(tmp_path):
    script = f"""
import resource, signal
import numpy as np
from echo_eqx.data.audio import save_audio
from echo_eqx.errors import EchoError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_audio({str(tmp_path / "out.wav")!r}, np.zeros(48000, np.float32), 48000)
except EchoError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "cannot write" in done.stdout and "out.wav" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def sound(*levels: float) -> np.ndarray:
    """One second of a voice, with one channel per level."""
    voice = load_audio(DATA / "speech.wav", 16_000)[:16_000]
    return np.stack([level * voice for level in levels], axis=1)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((0.4, 0.2), 0.3),
        ((0.5, 0.0), 0.5),
        ((0.0, 0.0, 0.3, 0.0, 0.0, 0.0), 0.3),
        ((0.5, -0.5), 0.5),
        ((0.2, -0.3), -0.3),
        ((0.4, -0.1), 0.15),
    ],
)
def test_channels_that_cancel_are_not_averaged(levels, expected):
    audio = sound(*levels) + 0.1
    mono = mix_down(audio.astype(np.float32))
    assert max_difference(np.abs(mono - 0.1), np.abs(sound(expected)[:, 0])) < 1e-6


def test_a_silent_recording_is_rejected_where_speech_is_expected(tmp_path):
    rate = 16_000
    click = np.zeros(rate, np.float32)
    click[5000:5100] = 0.5
    step = np.full(rate, 0.25, np.float32)
    step[8000:] = -0.25
    cases = {
        "zeros": np.zeros(rate, np.float32),
        "constant": np.full(rate, 0.5, np.float32),
        "step": step,
        "noise": 3e-4 * np.random.default_rng(0).standard_normal(rate).astype(np.float32),
        "click": click,
        "both": np.stack([np.full(rate, 0.3), np.full(rate, -0.3)], axis=1),
    }
    for name, audio in cases.items():
        sf.write(tmp_path / f"{name}.wav", audio, rate)
        with pytest.raises(SilentAudioError, match=rf"{name}\.wav is (constant or )?silent"):
            decode_audio(tmp_path / f"{name}.wav", f"{name}.wav", 48_000, reject_silence=True)
        assert len(load_audio(tmp_path / f"{name}.wav", rate)) == rate
    for name, audio in {"quiet": sound(0.02), "cancels": sound(0.5, -0.5)}.items():
        sf.write(tmp_path / f"{name}.wav", audio + 0.2, rate)
        loaded = decode_audio(tmp_path / f"{name}.wav", name, rate, reject_silence=True)
        assert loaded.std() > 0.001


def test_a_float_file_above_full_scale_is_scaled_not_clipped(tmp_path):
    voice = sound(1.0)[:, 0]
    loaded = []
    for level in (1.0, 3.0, 32_768.0):
        sf.write(
            tmp_path / "loud.wav", level / np.abs(voice).max() * voice, 16_000, subtype="FLOAT"
        )
        loaded.append(load_audio(tmp_path / "loud.wav", 16_000))
    assert max_difference(loaded[0], loaded[1]) < 1e-6
    assert max_difference(loaded[0], loaded[2]) < 1e-6


def test_folders_are_searched_for_every_readable_kind(tmp_path, monkeypatch):
    kinds = {"AU": "au", "CAF": "caf", "RF64": "rf64", "AIFF": "aifc", "NIST": "sph", "W64": "w64"}
    kinds |= {"WAV": "WAV", "FLAC": "flac", "OGG": "oga", "MP3": "mp3"}
    for kind, suffix in kinds.items():
        sf.write(tmp_path / f"{suffix}.{suffix}", sound(0.5), 16_000, format=kind)
    for suffix in ("m4a", "g722", "webm"):
        (tmp_path / f"{suffix}.{suffix}").write_bytes(bytes(range(256)) * 8)
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text("words")
    monkeypatch.setenv("PATH", "")
    clips, refusals = list_clips(str(tmp_path), max_seconds=30.0, cache=tmp_path)
    assert [clip.key for clip in clips] == sorted(kinds.values())
    assert [refusal.name for refusal in refusals] == ["g722.g722", "m4a.m4a", "webm.webm"]
    for refusal in refusals:
        assert refusal.kind == "audio" and "ffmpeg installed" in refusal.detail
    for clip in clips:
        assert len(clip.load(16_000)) == 16_000


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_flac_in_ogg_that_libsndfile_rejects_goes_to_ffmpeg():
    assert len(load_audio(DATA / "flac.oga", 24_000)) > 10_000
