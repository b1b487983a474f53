"""Recordings in and out: formats, damage, loudness."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from conftest import DATA, max_difference

from echo_eqx import EchoError
from echo_eqx.data.audio import load_audio, save_audio
from echo_eqx.data.reference import check_reference

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
def test_truncated_recordings_are_named(tmp_path, kind, share):
    data = (DATA / f"speech.{kind}").read_bytes()
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(EchoError, match=rf"cut\.{kind} .*(truncated|decoded)"):
        load_audio(path, 48_000)


def test_wav_written_to_a_pipe_is_whole(tmp_path):
    data = bytearray((DATA / "speech.wav").read_bytes())
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(data)
    assert len(load_audio(tmp_path / "pipe.wav", 16_000)) == 48_000


def test_unusable_files_are_named(tmp_path):
    header = (DATA / "speech.wav").read_bytes()
    header = header[: header.index(b"data") + 4] + bytes(4)
    cases = {
        "missing.wav": (None, "does not exist"),
        "empty.wav": (b"", "is empty"),
        "text.wav": (b"hello " * 100, "cannot be decoded"),
        "song.m4a": (b"\0\0\0 ftypM4A " + bytes(200), "cannot be decoded.*expected"),
        "header.wav": (header, "no samples|cannot be decoded"),
    }
    for name, (data, message) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(EchoError, match=f"{name} .*({message})"):
            load_audio(tmp_path / name, 48_000)
    with pytest.raises(EchoError, match="is not a file"):
        load_audio(tmp_path, 48_000)


def test_samples_that_are_not_finite_are_named(tmp_path):
    audio = np.zeros(48_000, np.float32)
    audio[5] = np.nan
    sf.write(tmp_path / "nan.wav", audio, 48_000, subtype="FLOAT")
    with pytest.raises(EchoError, match=r"nan\.wav .*not finite"):
        load_audio(tmp_path / "nan.wav", 48_000)


def test_audio_that_is_not_finite_is_not_written(tmp_path):
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


def test_other_suffixes_and_places_are_refused(tmp_path):
    audio = np.zeros(10, np.float32)
    with pytest.raises(EchoError, match=r"'\.mp3'; wanted \.wav or \.flac"):
        save_audio(tmp_path / "out.mp3", audio, 48_000)
    with pytest.raises(EchoError, match="cannot be written"):
        save_audio(tmp_path / "none" / "out.wav", audio, 48_000)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
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
    assert "out.wav cannot be written" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
