"""Audio is read to the end of its data, whatever its header claims, or rejected with a reason."""

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile as sf
from conftest import DATA, max_difference

from echo_eqx import EchoError
from echo_eqx.data import ogg
from echo_eqx.data.audio import decode_audio, load_audio
from echo_eqx.data.decode import audio_seconds, decode

RATE = 16_000
VOICE, VOICE_RATE = sf.read(DATA / "speech.wav", dtype="float32")
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
ID3V1 = b"TAG" + bytes(125)
ID3V2 = b"ID3\x04\0\0\0\0\x01\0" + bytes(128)
APE = (
    b"APETAGEX" + struct.pack("<4I", 2000, 43, 1, 0xA0000000) + bytes(8)
    + struct.pack("<2I", 2, 0) + b"a\0x"
    + b"APETAGEX" + struct.pack("<4I", 2000, 43, 1, 0x80000000) + bytes(8)
)  # fmt: skip


def encoded(kind: str, subtype: str | None = None, rate: int = VOICE_RATE) -> bytes:
    file = io.BytesIO()
    sf.write(file, VOICE, rate, format=kind, subtype=subtype)
    return file.getvalue()


def given(name: str) -> bytes:
    return (DATA / f"speech.{name}").read_bytes()


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def samples(data: bytes, name: str = "x") -> np.ndarray:
    """The decoded samples, after a check that the length and a part of them agree."""
    audio, rate = decode(data, name, RATE, 0.0, None)
    assert audio_seconds(data, name) == pytest.approx(len(audio) / rate, abs=1e-9)
    for start, stop in ((0.0, 0.5), (1.3, 2.1), (2.5, 99.0)):
        part, _ = decode(data, name, RATE, start, stop)
        assert max_difference(part, audio[round(start * rate) : round(stop * rate)]) < 1e-5
    return audio


def refused(data: bytes, message: str, name: str = "x") -> None:
    with pytest.raises(EchoError, match=f"{name}:? .*{message}"):
        decode_audio(data, name, RATE)


@pytest.mark.parametrize(
    "length",
    [0, 0x7FFFF000, 0x7FFFFFFF, 0x7FFFFFDB, 0x80000000, 0xFFFFFFFF, 0xFFFFFFDB, 0xFFFFFFE0],
)
@pytest.mark.parametrize("total", [0, 36, 0x7FFFF024, 0xFFFFFFFF])
def test_wav_from_a_pipe_is_read_to_its_end(length, total):
    data = given("wav")
    place = data.index(b"data") + 4
    piped = put(put(data, place, struct.pack("<I", length)), 4, struct.pack("<I", total))
    assert np.array_equal(samples(piped), samples(data))


@pytest.mark.parametrize(
    ("kind", "field", "lengths"),
    [
        ("AIFF", ("SSND", 4, ">I"), (0, 0x7F000008, 0x7FFFFFFF, 2**32 - 1)),
        ("AU", (".snd", 8, ">I"), (0, 0x7FFFFFFF, 0x80000000, 2**32 - 1)),
        ("CAF", ("data", 4, ">q"), (-1, 4)),
        ("W64", ("data", 16, "<q"), (0, 24, -1, 2**63 - 1)),
        ("RF64", ("ds64", 16, "<q"), (0, -1, 2**63 - 1)),
    ],
)
def test_other_kinds_from_a_pipe_are_read_to_their_end(kind, field, lengths):
    data = encoded(kind)
    name, offset, form = field
    for length in lengths:
        piped = put(data, data.index(name.encode()) + offset, struct.pack(form, length))
        assert np.array_equal(samples(piped), samples(data)), length


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "NIST"])
def test_more_or_less_audio_than_the_header_says_is_rejected(kind):
    data = encoded(kind)
    refused(data[: len(data) * 2 // 3], "truncated")
    refused(data[:-3], "truncated")
    refused(data + data, "bytes after the audio")
    refused(data + VOICE.tobytes()[:9999], "bytes after the audio")
    assert len(samples(data)) == len(VOICE)


def test_tags_and_padding_after_wav_are_not_audio():
    data = given("wav")
    for after in (ID3V1, APE, ID3V2, bytes(512), b"LIST\x04\0\0\0abcd", b"id3 \x03\0\0\0abc\0"):
        assert np.array_equal(samples(data + after), samples(data))
    assert np.array_equal(samples(ID3V2 + data), samples(data))


def flac_of_total(total: int) -> bytes:
    data = given("flac")
    facts = int.from_bytes(data[18:26])
    return put(data, 18, (facts >> 36 << 36 | total).to_bytes(8))


def test_flac_length_comes_from_its_frames():
    whole = samples(given("flac"))
    for total in (0, 1000, len(whole) - 1, 2**36 - 1):
        assert np.array_equal(samples(flac_of_total(total)), whole)
    refused(flac_of_total(len(whole) + 5000), "frames are missing")
    for total in (0, len(whole)):
        refused(flac_of_total(total)[:-100], "truncated|decoded")
    for data in (given("flac") + ID3V1, ID3V2 + given("flac")):
        assert np.array_equal(samples(data), whole)


def without_xing(data: bytes) -> bytes:
    start = data.index(b"\xff\xf3") if b"\xff\xf3" in data[:2000] else data.index(b"\xff\xfb")
    second = data.index(data[start : start + 2], start + 4)
    assert b"Info" in data[start:second] or b"Xing" in data[start:second]
    return data[second:]


def test_mp3_length_comes_from_its_frames(monkeypatch):
    monkeypatch.setenv("PATH", "")
    data = given("mp3")
    whole = samples(data)
    plain = samples(without_xing(data))
    assert len(whole) <= len(plain) < len(whole) + 0.1 * VOICE_RATE
    for around in (ID3V2 + data, data + ID3V1, data + APE + ID3V1, data + bytes(300)):
        assert np.array_equal(samples(around), whole)
    assert len(samples(data + ID3V1 + data + APE + ID3V2 + data)) == 3 * len(whole)
    assert len(samples(without_xing(data) * 2)) > 1.99 * len(plain)


def test_mp3_with_missing_frames_is_rejected():
    data = given("mp3")
    middle = len(data) // 2
    for cut in (data[:-20], without_xing(data)[:-20]):
        refused(cut, "truncated")
    refused(data[:middle] + data[middle + 3000 :], "truncated|damaged")
    refused(without_xing(data)[:middle] + b"noise" * 200 + data[middle:], "damaged")


@pytest.mark.parametrize("kind", ["opus", "ogg", "flac", "mp3"])
def test_joined_files_are_all_read(tmp_path, kind):
    file = io.BytesIO()
    name = {"opus": "OGG", "ogg": "OGG"}.get(kind, kind.upper())
    both = np.stack([VOICE, VOICE], axis=1)
    sf.write(file, both, 3 * VOICE_RATE, format=name, subtype="OPUS" if kind == "opus" else None)
    data, other = given(kind), file.getvalue()
    length = len(samples(data))
    assert max_difference(samples(data + data)[length:], samples(data)) < 1e-6
    assert len(samples(data + other)) == pytest.approx(4 / 3 * length, abs=2000)
    assert samples(other + data).shape[1] == 2
    (tmp_path / f"joined.{kind}").write_bytes(data + other)
    assert len(load_audio(tmp_path / f"joined.{kind}", RATE)) == pytest.approx(4 * RATE, abs=1000)


def last_page(data: bytes) -> int:
    return data.rindex(b"OggS")


@pytest.mark.parametrize("kind", ["opus", "ogg"])
def test_ogg_may_lack_its_end_flag_but_not_its_last_page(kind):
    data = given(kind)
    at = last_page(data)
    page = put(data[at:], 5, bytes((data[at + 5] & ~4,)))
    unflagged = data[:at] + put(page, 22, ogg._checksum(page))
    assert np.array_equal(samples(unflagged), samples(data))
    for cut in (data[:-1], data[: at + 10], unflagged[:-30]):
        refused(cut, "truncated")
    flipped = put(data, len(data) // 2, bytes((data[len(data) // 2] ^ 16,)))
    refused(flipped, "damaged")
    before = data.rindex(b"OggS", 0, at)
    if data.count(b"OggS") > 4:
        refused(data[:before] + data[at:], "pages are missing")


@pytest.mark.parametrize(
    ("kind", "subtype", "rate"),
    [("WAV", "GSM610", 8000), ("AU", "G721_32", 8000), ("AIFF", "DWVW_16", 16_000)],
)
def test_unseekable_kinds_are_read_in_blocks(kind, subtype, rate):
    assert len(samples(encoded(kind, subtype, rate))) == pytest.approx(len(VOICE), abs=400)


def test_sizes_claimed_by_a_header_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("echo_eqx.data.decode.MAX_SAMPLES", 2**24)
    for channels, message in (
        (1024, "expected at most 64 channels, got 1024"),
        (64, "to decode at once"),
    ):
        head = struct.pack("<IHHIIHH", 16, 1, channels, 8000, 16_000 * channels, 2 * channels, 16)
        head = b"RIFF\xff\xff\xff\xffWAVEfmt " + head + b"data\xff\xff\xff\xff"
        path = tmp_path / f"{channels}.wav"
        with path.open("wb") as file:
            file.write(head)
            file.truncate(2**26)
        with pytest.raises(EchoError, match=message):
            load_audio(path, RATE)
    assert audio_seconds(path, "x") == pytest.approx(2**26 / 128 / 8000, rel=1e-3)
    assert len(load_audio(path, RATE, max_seconds=1.0)) == RATE
    with pytest.raises(EchoError, match="to decode at once"):
        load_audio(path, 8_000_000_000)


def test_file_names_that_are_not_utf8_are_read(tmp_path):
    path = tmp_path / b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    path.write_bytes(given("wav"))
    assert np.array_equal(load_audio(path, RATE), load_audio(DATA / "speech.wav", RATE))


@needs_ffmpeg
def test_kinds_that_libsndfile_cannot_read_go_to_ffmpeg(tmp_path, monkeypatch):
    shutil.copy(DATA / "speech.wav", tmp_path / "a.wav")
    made = {}
    for name in ("a.m4a", "a.g722"):
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / name]
        subprocess.run(command, check=True)
        made[name] = (tmp_path / name).read_bytes()
        assert len(samples(made[name], name)) == pytest.approx(len(VOICE), abs=1500)
    refused(made["a.m4a"] * 2, "got several files joined together", "a.m4a")
    refused(made["a.m4a"][:-2000], "cannot be decoded by ffmpeg|truncated", "a.m4a")
    monkeypatch.setenv("PATH", "")
    for name, data in made.items():
        refused(data, "or ffmpeg installed", name)


def test_flac_with_a_gap_is_rejected_not_shortened():
    data = given("flac")
    middle = len(data) // 2
    refused(put(data, middle, bytes(8000)), "is damaged", name="x.flac")
    refused(data[:middle] + data[middle + 8000 :], "is damaged", name="x.flac")


def test_streams_joined_with_cat_are_rejected():
    data = given("wav")
    place = data.index(b"data") + 4
    piped = put(put(data, place, b"\xff" * 4), 4, b"\xff" * 4)
    assert len(samples(piped))
    refused(piped + piped, "got several files joined together")


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["wma", "tta", "flv"])
def test_joined_files_that_ffmpeg_reads_only_in_part_are_rejected(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    command = ["ffmpeg", "-v", "error", "-i", DATA / "speech.wav", "-ar", "44100", path]
    subprocess.run(command, check=True)
    data = path.read_bytes()
    assert audio_seconds(data, path.name) == pytest.approx(3.0, abs=0.1)
    refused(data + data, "got several files joined together", name=path.name)


@needs_ffmpeg
def test_mp3_inside_wav_is_read_whole(tmp_path):
    path = tmp_path / "x.wav"
    command = ["ffmpeg", "-v", "error", "-i", DATA / "speech.wav", "-c:a", "libmp3lame", path]
    subprocess.run(command, check=True)
    assert audio_seconds(path, path.name) == pytest.approx(3.0, abs=0.1)
    assert len(load_audio(path, RATE)) / RATE == pytest.approx(3.0, abs=0.1)
