"""Sources of recordings: every kind gives the same clips, and broken inputs are skipped by kind."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import DATA, max_difference

from echo_eqx import EchoError
from echo_eqx.data.audio import decode_audio, load_audio
from echo_eqx.data.decode import audio_seconds
from echo_eqx.prepare.clips import Clip, SkippedInput, list_clips
from echo_eqx.prepare.segments import Segment, join_segments

RATE = 16_000
CONTENT = {"ann/one": "First words.", "ann/two words": "Zweite Wörter.", "bo/3.5": "Третьи слова."}
KEYS = ["ann_one", "ann_two_words", "bo_3_5"]
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.3 * np.sin(2 * np.pi * (200 + 50 * seed + 20 * time) * time)


def wav(seconds: float = 1.0, seed: int = 0, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    sf.write(file, tone(seconds, seed), RATE, format=kind)
    return file.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def put_parquet(path: Path, rows: list[dict], group: int = 2) -> Path:
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=group)
    return path


def listed(source, max_seconds: float = 30.0) -> tuple[list[Clip], list[SkippedInput]]:
    clips, skipped = list_clips(str(source), max_seconds=max_seconds, cache=Path("/nonexistent"))
    assert clips == sorted(clips, key=lambda clip: clip.key)
    json.dumps([clip.metadata for clip in clips], allow_nan=False)
    return clips, skipped


def kinds(skipped: list[SkippedInput]) -> Counter:
    return Counter(item.kind for item in skipped)


def make_source(kind: str, root: Path) -> Path:
    audio = {name: wav(1.0 + 0.1 * i, i) for i, name in enumerate(CONTENT)}
    speakers = {name: name.split("/")[0] for name in CONTENT}
    match kind:
        case "folder":
            for name, text in CONTENT.items():
                put(root / f"{name}.wav", audio[name])
                put(root / f"{name}.txt", text + "\n")
            return root
        case "jsonl" | "csv":
            rows = [
                {"audio": f"{name}.wav", "text": text, "speaker": speakers[name]}
                for name, text in CONTENT.items()
            ]
            for name in CONTENT:
                put(root / f"{name}.wav", audio[name])
            if kind == "jsonl":
                return put(root / "list.jsonl", "\n".join(map(json.dumps, rows)))
            lines = ["path,sentence,client_id", *(",".join(row.values()) for row in rows)]
            return put(root / "list.csv", "\ufeff" + "\r\n".join(lines) + "\r\n")
        case "tar":
            members = []
            for name, text in CONTENT.items():
                fields = {"text": text, "speaker": speakers[name]}
                members += [
                    (f"{name}.wav", audio[name]),
                    (f"{name}.json", json.dumps(fields).encode()),
                ]
            return put_tar(root / "shards" / "0.tar", members).parent
        case _:
            rows = [
                {
                    "audio": {"bytes": audio[name], "path": f"{name}.wav"},
                    "transcription": text,
                    "speaker_id": speakers[name],
                }
                for name, text in CONTENT.items()
            ]
            return put_parquet(root / "train.parquet", rows)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "tar", "parquet"])
def test_every_kind_gives_the_same_clips(tmp_path, kind):
    clips, skipped = listed(make_source(kind, tmp_path))
    assert not skipped
    assert [clip.key for clip in clips] == KEYS
    assert [clip.text for clip in clips] == list(CONTENT.values())
    assert [clip.speaker for clip in clips] == ["ann", "ann", "bo"]
    assert [clip.seconds for clip in clips] == pytest.approx([1.0, 1.1, 1.2])
    for seed, clip in enumerate(clips):
        assert max_difference(clip.load(RATE), tone(1.0 + 0.1 * seed, seed)) < 1e-4


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "tar", "parquet"])
def test_clips_do_not_depend_on_where_the_source_is(tmp_path, kind):
    results = []
    for place in ("here", "some/where/else"):
        clips, _ = listed(make_source(kind, tmp_path / place))
        results.append([dataclasses.replace(clip, audio=tmp_path) for clip in clips])
        assert str(tmp_path) not in repr([clip.metadata for clip in clips])
    assert results[0] == results[1]


def test_ljspeech_by_folder_and_by_list(tmp_path):
    for name in ("LJ-1", "LJ-2", "LJ-4"):
        put(tmp_path / "wavs" / f"{name}.wav", wav())
    lines = ["LJ-1|Dr. 1|Doctor one", "LJ-2|raw|", 'LJ-3|"quoted|gone', "LJ-4", "LJ-2|raw|again"]
    put(tmp_path / "metadata.csv", "\n".join(lines))
    for source in (tmp_path, tmp_path / "metadata.csv"):
        clips, skipped = listed(source)
        assert [(clip.key, clip.text) for clip in clips] == [
            ("LJ-1", "Doctor one"),
            ("LJ-2", "raw"),
        ]
        assert kinds(skipped) == {"audio": 1, "manifest": 1, "duplicate": 1, "orphan": 1}


def test_unusable_files_of_a_folder_are_skipped_by_kind(tmp_path):
    for name in ("good", "blank", "nul", "latin", "long", "short", "damaged", "nothing", "rate"):
        put(tmp_path / f"{name}.txt", "words")
        put(tmp_path / f"{name}.wav", wav())
    put(tmp_path / "blank.txt", " \n")
    put(tmp_path / "nul.txt", "wo\0rds")
    put(tmp_path / "latin.txt", "Wörter".encode("latin-1"))
    put(tmp_path / "long.wav", wav(4.0))
    put(tmp_path / "short.wav", wav(0.05))
    put(tmp_path / "damaged.wav", b"hello " * 100)
    put(tmp_path / "nothing.wav", b"")
    data = wav()
    put(tmp_path / "rate.wav", data[:24] + bytes(4) + data[28:])
    put(tmp_path / "alone.wav", wav())
    put(tmp_path / "silent.txt", "words")
    put(tmp_path / "good.flac", wav(kind="FLAC"))
    put(tmp_path / f"{'n' * 220}.wav", wav())
    put(tmp_path / f"{'n' * 220}.txt", "words")
    clips, skipped = listed(tmp_path, 3.0)
    assert [clip.key for clip in clips] == ["good"] and clips[0].speaker is None
    assert {(item.kind, item.name[:12]) for item in skipped} == {
        ("text", "blank.wav"),
        ("utf8", "nul.wav"),
        ("utf8", "latin.wav"),
        ("long", "long.wav"),
        ("short", "short.wav"),
        ("audio", "damaged.wav"),
        ("audio", "nothing.wav"),
        ("audio", "rate.wav"),
        ("audio", "silent.txt"),
        ("orphan", "alone.wav"),
        ("duplicate", "good.wav"),
        ("key", "n" * 12),
    }
    assert str(tmp_path) not in repr(skipped)


def test_broken_samples_are_detected_on_loading(tmp_path):
    samples = tone(1.0).astype(np.float32)
    samples[7] = np.nan
    sf.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    put(tmp_path / "nan.txt", "words")
    put(tmp_path / "cut.flac", wav(2.0, kind="FLAC")[:9000])
    put(tmp_path / "cut.txt", "words")
    (clip,), (item,) = listed(tmp_path)
    assert item.kind == "audio" and "cut.flac is truncated" in item.detail
    with pytest.raises(EchoError, match="not finite"):
        clip.load(RATE)


def test_unusable_manifest_lines_are_skipped(tmp_path):
    put(tmp_path / "a.wav", wav(2.0))
    rows = [
        '{"audio": "a.wav", "text": "words", "age": 30, "odd": NaN, "key": "x"}',
        '{"audio": "a.wav", "text": "words", "key": "x"}',
        '{"audio": "a.wav", "text": "words", "key": ["x"]}',
        '{"audio": "a.wav", "text": "words", "key": ""}',
        '{"audio": "a.wav", "text": 5, "key": "number"}',
        '{"audio": "a.wav", "key": "none"}',
        '{"audio": "a.wav", "text": "\\ud800", "key": "half"}',
        '{"audio": "gone.wav", "text": "words"}',
        '{"text": "words"}',
        '{"audio": "a.wav", "text": "words", "start": 1.5, "end": 1.0, "key": "back"}',
        '{"audio": "a.wav", "text": "words", "start": 9, "key": "late"}',
        '{"audio": "a.wav", "text": "words", "start": "soon", "key": "soon"}',
        '{"audio": "a.wav", "text": "words", "segments": [{"start": 1}], "key": "seg"}',
        '{"audio": "a.wav"',
        "[" * 100_000,
        '{"audio": "a.wav", "text": "words", "key": "deep", "x": ' + "[" * 700 + "]" * 700 + "}",
        '{"audio": "a.wav", "text": "words", "key": "digits", "x": ' + "9" * 5000 + "}",
        '{"audio": "a.wav", "text": "words", "key": "huge", "start": ' + "9" * 400 + "}",
        '{"audio": "a.wav", "text": "words", "key": "late", "offset": 0, "duration": 1e999}',
        '{"audio": "' + "a" * 5000 + '.wav", "text": "words"}',
        "[1]",
        "",
    ]
    clips, skipped = listed(put(tmp_path / "list.jsonl", "\n".join(rows)))
    assert [clip.key for clip in clips] == ["a", "x"]
    assert clips[1].metadata == {"age": 30, "odd": None, "source": "a.wav"}
    assert kinds(skipped) == {
        "duplicate": 1,
        "key": 1,
        "text": 2,
        "utf8": 1,
        "audio": 2,
        "manifest": 12,
    }
    table = 'audio,text\na.wav,words\na.wav\n"a.wav","' + "w" * 200_000 + '"\nb.wav,x\n,x\n'
    clips, skipped = listed(put(tmp_path / "list.csv", table))
    assert [clip.key for clip in clips] == ["a"]
    assert kinds(skipped) == {"manifest": 3, "audio": 1}


def test_times_in_a_manifest_cut_a_recording(tmp_path):
    put(tmp_path / "in" / "a.wav", wav(3.0))
    rows = [
        {"audio": "../in/a.wav", "text": "one", "start": 0.5, "end": 1.25},
        {"audio": str(tmp_path / "in" / "a.wav"), "text": "two", "start": 1.25, "lang": "de"},
        {"audio_filepath": "../in/a.wav", "text": "three", "offset": 2, "duration": 0.5},
    ]
    text = "\n".join(map(json.dumps, rows))
    clips, skipped = listed(put(tmp_path / "lists" / "l.jsonl", text))
    assert not skipped
    keys = {clip.text: clip.key for clip in clips}
    assert keys == {"one": "___in_a_0_5", "two": "a_1_25", "three": "___in_a_2"}
    whole = load_audio(tmp_path / "in" / "a.wav", RATE)
    spans = {"one": (0.5, 1.25), "two": (1.25, 3.0), "three": (2.0, 2.5)}
    for clip in clips:
        start, stop = spans[clip.text]
        assert clip.seconds == stop - start
        expected = whole[round(start * RATE) : round(stop * RATE)]
        assert max_difference(clip.load(RATE), expected) == 0
        assert str(tmp_path) not in repr(clip.metadata)


def test_recordings_outside_the_folder_are_named_relative_to_their_common_folder(tmp_path):
    put(tmp_path / "x" / "1" / "a.wav", wav())
    put(tmp_path / "x" / "2" / "a.wav", wav())
    rows = [{"path": str(tmp_path / f"x/{i}/a.wav"), "text": "words"} for i in (1, 2)]
    source = put(tmp_path / "lists" / "l.jsonl", "\n".join(map(json.dumps, rows)))
    clips, _ = listed(source)
    assert [clip.key for clip in clips] == ["1_a", "2_a"]
    assert [clip.metadata["source"] for clip in clips] == ["1/a.wav", "2/a.wav"]


def test_keys_are_safe_and_collisions_do_not_lose_clips(tmp_path):
    names = ["a/b", "a_b", "a.b", "ünï", "ÜNÏ", "-x y", "...z"]
    rows = [{"audio": "a.wav", "text": name, "id": name} for name in [*names, "a.b"]]
    put(tmp_path / "a.wav", wav())
    results = []
    for order in (rows, rows[::-1]):
        text = "\n".join(map(json.dumps, order))
        clips, skipped = listed(put(tmp_path / "list.jsonl", text))
        assert kinds(skipped) == {"duplicate": 1}
        assert len({clip.key for clip in clips}) == len(names)
        results.append([(clip.key, clip.text) for clip in clips])
    assert results[0] == results[1]
    keys = {text: key for key, text in results[0]}
    assert keys["a.b"] == "a_b" and keys["a/b"].startswith("a_b_") and len(keys["a/b"]) == 12
    assert keys["-x y"] == "-x_y" and keys["...z"] == "___z" and keys["ÜNÏ"] == "_N_"


def test_hostile_tar_members_are_skipped(tmp_path):
    good, text = wav(), b'{"text": "words"}'
    members = [
        ("/etc/abs.wav", good),
        ("/etc/abs.json", text),
        ("../up.wav", good),
        ("a/../../up.json", text),
        ("./good.wav", good),
        ("good.json", text),
        ("good.json", b'{"text": "other"}'),
        ("alone.wav", good),
        ("mute.json", text),
        ("broken.wav", good),
        ("broken.json", b"{"),
        ("plain.flac", wav(kind="FLAC")),
        ("plain.txt", "wörter".encode()),
        ("bytes.wav", good),
        ("bytes.txt", "wörter".encode("latin-1")),
        ("picture.png", b"..."),
        ("more.tar.gz", b"..."),
        ("two.txt", b"one text"),
        ("two.json", text),
        ("both.wav", good),
        ("both.txt", b"not this text"),
        ("both.json", b'{"text": "but this"}'),
    ]
    path = put_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "good.wav")):
            info = tarfile.TarInfo(f"link{kind.decode()}.wav")
            info.type, info.linkname = kind, target
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    clips, skipped = listed(path)
    assert [(clip.key, clip.text) for clip in clips] == [
        ("both", "but this"),
        ("good", "words"),
        ("plain", "wörter"),
    ]
    assert kinds(skipped) == {
        "path": 6,
        "duplicate": 2,
        "orphan": 1,
        "audio": 2,
        "unread": 2,
        "manifest": 1,
        "utf8": 1,
    }
    assert sorted(tmp_path.rglob("*")) == before
    assert len(clips[1].load(RATE)) == RATE


def test_truncated_tars_and_other_files_are_reported(tmp_path):
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in SAMPLE.items()]
    whole = put_tar(tmp_path / "a.tar", members).read_bytes()
    put(tmp_path / "b.tar", whole)
    put(tmp_path / "cut.tar", whole[:100_000])
    put(tmp_path / "text.tar", b"hello " * 1000)
    put(tmp_path / "empty.tar", b"")
    clips, skipped = listed(tmp_path / "*.tar")
    # A sample of the same name in a second tar is another sample.
    assert [clip.metadata["source"] for clip in clips if "_" not in clip.key] == [
        f"a.tar/{i}.wav" for i in range(3)
    ]
    assert len([clip for clip in clips if clip.metadata["source"].startswith("b.tar")]) == 3
    assert {item.name.split("/")[0] for item in skipped} == {
        "cut.tar",
        "text.tar",
        "empty.tar",
    }
    assert kinds(skipped)["manifest"] >= 2


SAMPLE = {"wav": wav(), "txt": b"words"}


def test_long_recordings_are_cut_at_pauses(tmp_path):
    times = [(0.4, 2.0, "a"), (2.4, 3.0, "b"), (3.1, 5.0, "c"), (7.0, 8.0, "d"), (8.0, 9.9, "e")]
    segments = [dict(zip(("start", "end", "text"), part, strict=True)) for part in times]
    put(tmp_path / "a.wav", wav(10.0))
    rows = [
        {"audio": "a.wav", "segments": segments, "speaker": "ann"},
        {"audio": "a.wav", "key": "none", "text": "words"},
        {"audio": "a.wav", "key": "one", "segments": [{"start": 0, "end": 9.0, "text": "x"}]},
        {"audio": "a.wav", "key": "a_000", "text": "words", "end": 1.0},
    ]
    source = put(tmp_path / "list.jsonl", "\n".join(map(json.dumps, rows)))
    clips, skipped = listed(source, 3.5)
    assert kinds(skipped) == {"long": 2}
    cut = [clip for clip in clips if clip.speaker == "ann"]
    spans = [(clip.text, clip.start, clip.stop) for clip in cut]
    expected = [("a b", 0.0, 3.05), ("c", 3.05, 5.5), ("d e", 6.5, None)]
    assert [span[0] for span in spans] == ["a b", "c", "d e"]
    for span, wanted in zip(spans, expected, strict=True):
        assert span[1] == pytest.approx(wanted[1])
        assert span[2] == (wanted[2] and pytest.approx(wanted[2]))
    assert [clip.key for clip in cut[:3]] == ["a_000", "a_001", "a_002"]
    assert len({clip.key for clip in clips}) == 4
    assert len(cut[1].load(RATE)) == pytest.approx(2.45 * RATE, abs=2)
    clips, _ = listed(source, 20.0)
    assert [clip.text for clip in clips if clip.speaker] == ["a b c d e"]


def test_zero_length_segments_are_skipped_but_not_their_recording(tmp_path):
    put(tmp_path / "a.wav", wav(10.0))
    times = [(0.4, 2.0, "a"), (2.0, 2.0, "b"), (3.0, 2.9, "c"), (7.0, 8.0, "d")]
    segments = [dict(zip(("start", "end", "text"), part, strict=True)) for part in times]
    row = json.dumps({"audio": "a.wav", "segments": segments})
    clips, skipped = listed(put(tmp_path / "list.jsonl", row), 3.5)
    assert [clip.text for clip in clips] == ["a", "d"]
    assert kinds(skipped) == {"segment": 2} and "'b'" in skipped[0].detail
    clips, _ = listed(tmp_path / "list.jsonl", 30.0)
    assert [clip.text for clip in clips] == ["a d"]


def test_segments_that_overlap_or_have_no_text_separate_clips():
    parts = [Segment(0.0, 3.0, "a"), Segment(2.0, 2.5, "b"), Segment(2.8, 4.0, "c")]
    assert [s.text for s in join_segments(parts, 0.0, 9.0, 9.0)] == ["a b c"]
    joined = join_segments(parts, 0.0, 9.0, 3.1)
    assert [s.text for s in joined] == ["a b", "c"]
    assert joined[0].end == joined[1].start == pytest.approx(2.9)
    music = [Segment(0.0, 1.0, "a"), Segment(1.0, 2.0, " "), Segment(2.0, 3.0, "b")]
    assert [(s.start, s.end) for s in join_segments(music, 0.0, 3.0, 9.0)] == [(0, 1), (2, 3)]
    assert join_segments([], 0.0, 9.0, 3.0) == []


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac", "opus", "ogg"])
def test_a_section_equals_a_slice_and_bytes_equal_the_file(kind):
    path = DATA / f"speech.{kind}"
    whole = decode_audio(path, "whole", 48_000)
    with path.open("rb") as file:
        for source in (path, path.read_bytes(), file):
            assert audio_seconds(source, kind) == pytest.approx(3.0, abs=0.01)
            assert np.array_equal(decode_audio(source, kind, 48_000), whole)
            for start, stop in ((0.0, 1.0), (0.7, 2.0), (2.5, 99.0)):
                part = decode_audio(source, kind, 48_000, start, stop)
                expected = whole[round(start * 48_000) : round(stop * 48_000)]
                assert len(part) == len(expected)
                assert max_difference(part[2000:-2000], expected[2000:-2000]) < 1e-5
    with pytest.raises(EchoError, match="no samples after 4 s"):
        decode_audio(path, kind, 48_000, 4.0)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["m4a", "aac", "webm", "mka"])
def test_other_kinds_are_decoded_by_ffmpeg(tmp_path, kind):
    put(tmp_path / "a.wav", wav(4.0))
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / f"http:x.{kind}"]
    command[-1] = f"file:{command[-1]}"
    subprocess.run(command, check=True)
    (tmp_path / "a.wav").unlink()
    put(tmp_path / f"http:x.{kind}".replace(kind, "txt"), "words")
    (clip,), skipped = listed(tmp_path)
    assert not skipped and clip.key == "http_x"
    # Without a table of contents a length is an estimate.
    assert clip.seconds == pytest.approx(4.0, rel=0.05)
    audio = clip.load(RATE)
    assert len(audio) / RATE == pytest.approx(4.0, abs=0.15)
    assert np.sqrt(np.mean(audio**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)
    data = (tmp_path / f"http:x.{kind}").read_bytes()
    assert np.array_equal(decode_audio(data, "bytes", RATE), audio)
    part = decode_audio(data, "bytes", RATE, 1.0, 2.5)
    assert len(part) / RATE == pytest.approx(1.5, abs=0.03)
    with pytest.raises(EchoError, match="bytes cannot be decoded"):
        decode_audio(data[: len(data) // 2], "bytes", RATE)


@needs_ffmpeg
def test_a_playlist_cannot_name_other_files(tmp_path):
    put(tmp_path / "secret.wav", wav())
    for name, text in {
        "a.m4a": "ffconcat version 1.0\nfile secret.wav\n",
        "b.webm": f"#EXTM3U\n#EXTINF:1,\nfile:{tmp_path}/secret.wav\n",
    }.items():
        with pytest.raises(EchoError, match=f"{name}: expected a recording .*, got text"):
            load_audio(put(tmp_path / name, text), RATE)


def test_without_ffmpeg_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    put(tmp_path / "a.m4a", b"\0\0\0 ftypM4A " + bytes(200))
    put(tmp_path / "a.txt", "words")
    clips, (item,) = listed(tmp_path)
    assert not clips and item.kind == "audio"
    assert "a.m4a cannot be decoded" in item.detail
    assert "expected wav, flac, ogg, opus or mp3, or ffmpeg installed" in item.detail


def test_unusable_parquet_rows_are_skipped(tmp_path):
    rows = [
        {"id": 7, "audio": {"bytes": wav(), "path": None}, "text": "words", "raw": b"\0", "n": [1]},
        {"id": 7, "audio": {"bytes": wav(), "path": None}, "text": "words", "raw": b"", "n": None},
        {"id": 8, "audio": None, "text": "words", "raw": b"", "n": None},
        {"id": 9, "audio": {"bytes": None, "path": "/x/y.wav"}, "text": "words"},
        {"id": None, "audio": {"bytes": wav(), "path": "/x/y.wav"}, "text": "words"},
        {"id": None, "audio": {"bytes": wav(), "path": None}, "text": "words"},
    ]
    put_parquet(tmp_path / "a.parquet", rows)
    put_parquet(tmp_path / "no_audio.parquet", [{"text": "words"}])
    put(tmp_path / "text.parquet", b"hello " * 100)
    clips, skipped = listed(tmp_path)
    assert [clip.key for clip in clips] == ["7", "a_000005", "y"]
    assert clips[0].metadata == {"raw": None, "n": [1], "source": "a.parquet#0"}
    assert kinds(skipped) == {"duplicate": 1, "audio": 2, "manifest": 2}
    assert len(clips[1].load(RATE)) == RATE


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EchoError, match=r"pyarrow.*pip install 'echo_eqx\[parquet\]'"):
        listed(put(tmp_path / "a.parquet", b"PAR1"))


def test_unknown_kinds_of_sources_give_one_line_errors(tmp_path):
    put(tmp_path / "odd.xyz", "x")
    put(tmp_path / "odd.csv", "name,words\nx,y\n")
    put(tmp_path / "long.csv", "w" * 200_000)
    put(tmp_path / "empty.csv", "")
    put(tmp_path / "both" / "a.wav", wav())
    put(tmp_path / "both" / "a.tar", b"")
    (tmp_path / "none").mkdir()
    for source, message in {
        tmp_path / "gone": "does not exist",
        tmp_path / "odd.xyz": "unknown kind of file",
        tmp_path / "odd.csv": "expected a header",
        tmp_path / "long.csv": "expected a header",
        tmp_path / "empty.csv": "neither",
        tmp_path / "both": "one kind",
        tmp_path / "none": "expected recordings",
        tmp_path / "*.xyz": "got 1 files",
        tmp_path / "*.tar": "got 0 files",
        "hf://models/x": "expected hf://datasets",
        "a\0b": "does not exist",
        "~nobody-here/x": "not a usable path",
    }.items():
        with pytest.raises(EchoError, match=message):
            listed(source)


def test_an_unreachable_hub_dataset_gives_a_one_line_error(tmp_path):
    with pytest.raises(EchoError, match="cannot download hf://datasets/a/b"):
        list_clips("hf://datasets/a/b", max_seconds=30.0, cache=tmp_path)


def test_a_hub_dataset_in_the_cache_is_read_without_the_hub(tmp_path):
    commit = "0123456789" * 4
    repo = tmp_path / "datasets--a--b"
    put(repo / "refs" / "main", commit)
    rows = [{"audio": {"bytes": wav(), "path": "x.wav"}, "sentence": "words"}]
    put_parquet(repo / "snapshots" / commit / "data" / "0.parquet", rows)
    for source in ("hf://datasets/a/b", "hf://datasets/a/b@main/data"):
        (clip,), _ = list_clips(source, max_seconds=30.0, cache=tmp_path)
        assert clip.key == "x" and len(clip.load(RATE)) == RATE


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_spoken_clips_are_listed_and_load(tmp_path):
    for voice, text in {"en": "Good morning.", "de": "Guten Morgen.", "fr": "Bonjour."}.items():
        put(tmp_path / voice / "a.txt", text)
        path = tmp_path / voice / "a.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-w", path, text], check=True)
    clips, skipped = listed(tmp_path)
    assert not skipped and [clip.speaker for clip in clips] == ["de", "en", "fr"]
    assert all(0.05 < np.abs(clip.load(RATE)).max() <= 1.0 for clip in clips)


def test_without_transcripts_recordings_are_listed_where_no_text_is_needed(tmp_path):
    options = {"max_seconds": 30.0, "cache": Path("/nonexistent")}
    sf.write(tmp_path / "alone.wav", tone(0.5), RATE)
    with tarfile.open(tmp_path.parent / "alone.tar", "w") as tar:
        tar.add(tmp_path / "alone.wav", "alone.wav")
    for source in (tmp_path, tmp_path.parent / "alone.tar"):
        clips, skipped = list_clips(str(source), need_text=False, **options)
        assert [(clip.key, clip.text, clip.seconds) for clip in clips] == [("alone", "", 0.5)]
        assert not skipped and len(clips[0].load(RATE)) == RATE // 2
        assert kinds(list_clips(str(source), **options)[1]) == {"orphan": 1}
