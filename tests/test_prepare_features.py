"""Speakers, held-out recordings, recordings that are too long, and additions."""

import io
import json
import logging
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import GOLDEN
from test_prepare import samples_of

from echo_eqx import load_codec
from echo_eqx.config import CODEC_PRESETS
from echo_eqx.data.shards import list_shards
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.prepare import align, cut, make, pauses
from echo_eqx.prepare.clips import Clip, list_clips
from echo_eqx.prepare.options import (
    Limits,
    hold_out,
    parse_holdout,
    reference_warning,
    with_speakers,
)
from echo_eqx.prepare.segments import Segment, join_segments

CODEC = GOLDEN / "dacvae_tiny" / "weights.pth"


def write_clip(path: Path, pitch: float, text: str = "A tone.", seconds: float = 0.4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(seconds * 24_000)) / 24_000
    sf.write(path, 0.2 * np.sin(2 * np.pi * pitch * t), 24_000)
    path.with_suffix(".txt").write_text(text, "utf-8")


def run(source: Path, output: Path, **flags) -> None:
    config = make.PrepareConfig(
        input=str(source), output=output, codec=str(CODEC), shard_samples=4, batch_size=1, **flags
    )
    config.check()
    make.make_dataset(config, load_codec(CODEC), str(source), output)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def clip(name: str, speaker: str | None = None, seconds: float = 1.0, text: str = "Hm.") -> Clip:
    key = name.replace("/", "_").removesuffix(".wav")
    return Clip(key, text, Path(name), 0.0, None, seconds, speaker, None, {"source": name})


def test_new_clips_leave_existing_shards_unchanged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source, output = tmp_path / "in", tmp_path / "out"
    for i in range(6):
        write_clip(source / f"{i}.wav", 200 + 20 * i)
    run(source, output, holdout="1")
    assert "assuming that all 6 clips are of one speaker, 'in'" in caplog.text
    before, held = bytes_of(output), samples_of(output / "holdout")
    samples = samples_of(output)
    assert len(samples) == 5 and len(held) == 1 and not samples.keys() & held.keys()
    assert all("ref.npy" in parts for parts in samples.values())
    own = [np.load(io.BytesIO(parts["npy"])) for parts in held.values()]
    for parts in samples.values():
        reference = np.load(io.BytesIO(parts["ref.npy"]))
        assert not any(
            np.array_equal(reference[i : i + len(x)], x)
            for x in own
            for i in range(len(reference) - len(x) + 1)
        )
    assert {shard.name for shard in list_shards(str(output), tmp_path).shards} == before.keys()
    assert list_shards(str(output / "holdout"), tmp_path).shards

    for i in (6, 7):
        write_clip(source / f"{i}.wav", 200 + 20 * i)
    gone = next(iter(sorted(samples)))
    (source / f"{gone}.wav").unlink()
    (source / f"{gone}.txt").unlink()
    other = sorted(samples)[1]
    (source / f"{other}.txt").write_text("Something else.")
    run(source, output, holdout="1")
    said = caplog.text
    assert "2 clips are new" in said
    assert f"1 clips are gone from the input since an earlier run ({gone})" in said
    assert (
        f"1 clips are changed (text, times, metadata or audio) since an earlier run ({other})"
        in said
    )
    after = bytes_of(output)
    assert before.items() <= after.items() and len(after) > len(before)
    assert samples_of(output).keys() == samples.keys() | {"6", "7"}
    assert samples_of(output / "holdout").keys() == held.keys()

    # A run in two parts that was interrupted after planning gives the same bytes.
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(output / "holdout", again / "holdout")
    for path in output.glob("clips-*.json"):
        shutil.copy(path, again)
    write_clip(source / f"{gone}.wav", 200 + 20 * int(gone))
    (source / f"{other}.txt").write_text("A tone.")
    run(source, again, holdout="1", part="2/2")
    run(source, again, holdout="1", part="1/2")
    assert bytes_of(again) == after


def test_a_clip_deleted_before_its_shard_was_made_is_counted(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        write_clip(source / f"{i}.wav", 300 + 20 * i)
    run(source, output)
    (output / "000000.tar").unlink()
    (source / "1.wav").unlink()
    (source / "1.txt").unlink()
    run(source, output)
    index = json.loads((output / "index-000-of-001.json").read_text())
    assert [item["name"] for item in index["skipped"]["000000.tar"]] == ["1"]
    assert index["shards"]["000000.tar"]["samples"] == 2


def test_a_recording_replaced_by_one_of_the_same_size_is_reported(tmp_path, caplog):
    source, output = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        write_clip(source / f"{i}.wav", 300 + 20 * i, seconds=2.0)
    run(source, output)
    before, size = bytes_of(output), (source / "1.wav").stat().st_size
    shutil.copytree(source, tmp_path / "copy" / "in")
    run(tmp_path / "copy" / "in", output)
    assert "changed" not in caplog.text
    write_clip(source / "1.wav", 900, seconds=2.0)
    assert (source / "1.wav").stat().st_size == size
    run(source, output)
    assert "1 clips are changed (text, times, metadata or audio)" in caplog.text
    assert "(1): existing shards are not updated" in caplog.text
    assert bytes_of(output) == before


def test_speakers_come_from_the_source_then_the_user_then_the_layout():
    flat = [clip("a.wav"), clip("b.wav")]
    clips, said = with_speakers(flat, None, "anna")
    assert [c.speaker for c in clips] == ["anna", "anna"] and "--speaker ''" in said
    clips, said = with_speakers(flat, "Eva", "anna")
    assert [c.speaker for c in clips] == ["Eva", "Eva"] and said is None
    assert [c.speaker for c in with_speakers(flat, "", "anna")[0]] == [None, None]
    for unclear in (
        [clip("x/a.wav"), clip("y/b.wav")],
        [clip("a.wav", "Eva"), clip("b.wav")],
        [clip("a.wav"), clip("a.wav")],
    ):
        clips, said = with_speakers(unclear, None, "anna")
        assert clips == unclear and said is None
    clips, said = with_speakers([clip("a.wav", "Ida"), clip("b.wav")], "Eva", "anna")
    assert [c.speaker for c in clips] == ["Ida", "Eva"] and "1 of 2 clips keep" in said


def test_many_samples_without_a_reference_give_a_warning():
    assert reference_warning(10, 8) is None and reference_warning(0, 0) is None
    assert "3 of 10 samples have no reference" in reference_warning(10, 7)


def test_held_out_recordings_do_not_depend_on_the_others(tmp_path):
    clips = [clip(f"{i}.wav") for i in range(400)]
    share = hold_out(clips, parse_holdout("5%"), 0, tmp_path)
    assert 8 <= len(share) <= 35
    more = clips + [clip(f"new{i}.wav") for i in range(400)]
    assert share == {s for s in hold_out(more, parse_holdout("5%"), 0, tmp_path) if s[0] != "n"}
    assert share != hold_out(clips, parse_holdout("5%"), 1, tmp_path)
    assert len(hold_out(clips, 7, 0, tmp_path)) == 7
    assert len(hold_out(clips[:3], parse_holdout("1%"), 0, tmp_path)) == 1
    pieces = [clip(f"{i // 9}.wav") for i in range(90)]
    assert len(hold_out(pieces, 2, 0, tmp_path)) == 2
    with pytest.raises(UsageError, match="some are left to train on"):
        hold_out(clips[:3], 3, 0, tmp_path)


@pytest.mark.parametrize("given", ["0", "0%", "100%", "5 %%", "-1", "x", "nan%", "1e3"])
def test_a_holdout_is_a_fraction_or_a_count(given):
    with pytest.raises(UsageError, match="expected a share such as 5% or a count"):
        parse_holdout(given)


def test_limits_come_from_the_model_and_the_frame_rate():
    codec = CODEC_PRESETS["24khz"]
    assert Limits.of("voice", codec) == Limits(3.2, 1.92, 64)
    assert Limits.of("voice", codec, max_seconds=2.0).max_seconds == 2.0
    assert Limits.of(None, codec) == Limits(30.72, 20.48, 768)
    with pytest.raises(EchoError, match=r"expected a codec with latents of 128 .* --model voice"):
        Limits.of("1.3B", codec)
    with pytest.raises(UsageError, match="expected one of"):
        Limits.of("huge", codec)


def test_texts_longer_than_the_model_are_counted():
    # With the 0 in front, 63 bytes fit into 64.
    texts = ["a" * 63, "a" * 64, "ä" * 32]
    assert cut.count_long_texts([clip("a.wav", text=text) for text in texts], 64) == 2


def test_segments_are_joined_up_to_the_limit_of_their_text():
    segments = [Segment(float(i), i + 0.8, "five!") for i in range(4)]
    assert len(join_segments(segments, 0.0, 4.0, 30.0)) == 1
    assert [s.text for s in join_segments(segments, 0.0, 4.0, 30.0, 11)] == ["five! five!"] * 2


def bursts(*spans: tuple[float, float], seconds: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    audio = 0.002 * rng.standard_normal(int(seconds * pauses.RATE))
    for start, end in spans:
        part = audio[int(start * pauses.RATE) : int(end * pauses.RATE)]
        part += 0.2 * rng.standard_normal(len(part))
    return audio.astype(np.float32)


def test_pauses_are_found_where_it_is_quiet():
    found = pauses.find_pauses(bursts((0.5, 2.0), (2.1, 3.0), (3.5, 5.0), seconds=5.0))
    assert np.allclose(found, [(0.0, 0.5), (3.0, 3.5)], atol=0.04)
    assert pauses.find_pauses(np.zeros(0, np.float32)) == []


def heard(text: str, first: int, start: float) -> list[align._Heard]:
    words = text.lower().split()
    return [
        align._Heard(word, start + 0.3 * i, start + 0.3 * (i + 1), first + i)
        for i, word in enumerate(words)
    ]


def divided(chunks: list[list[align._Heard]], text: str) -> align.Aligned:
    tokens = text.split()
    words = [(word, i) for i, token in enumerate(tokens) for word in align._words(token)]
    return align._divide(chunks, words, tokens)


def test_text_is_divided_only_between_words_heard_on_both_sides_of_a_pause():
    text = "One two three. Four five six. Seven eight nine."
    chunks = [heard("one two three", 0, 0.0), heard("four five six", 3, 2.0)]
    chunks += [heard("seven eight nine", 6, 4.0)]
    whole = divided(chunks, text)
    assert [s.text for s in whole.segments] == [
        "One two three.",
        "Four five six.",
        "Seven eight nine.",
    ]
    assert not whole.mismatched
    # The word after the first pause was not heard: nobody knows on which side it is.
    unsure = divided([chunks[0], chunks[1][1:], chunks[2]], text)
    assert [s.text for s in unsure.segments] == [
        "One two three. Four five six.",
        "Seven eight nine.",
    ]


def test_mismatched_speech_is_rejected_entirely():
    text = "One two three. " + "Something nobody ever said here at all today. " * 2 + "Four five."
    chunks = [heard("one two three", 0, 0.0), heard("four five", 19, 9.0)]
    aligned = divided(chunks, text)
    assert len(aligned.mismatched) == 1 and not any(s.text for s in aligned.segments)
    slow = [heard("one two three", 0, 0.0)]
    slow[0][-1] = align._Heard("three", 60.0, 61.0, 2)
    assert divided(slow, "One two three.").mismatched


def test_without_a_recognizer_long_recordings_are_reported_first(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cut, "installed_recognizer", lambda: None)
    clips = [clip("a.wav", seconds=90.0), clip("b.wav", seconds=5.0)]
    cuts = cut.cut_long(
        clips,
        max_seconds=30.0,
        max_text_bytes=768,
        folder=tmp_path / "c",
        begin=0.0,
    )
    assert [c.key for c in cuts.clips] == ["b"] and not (tmp_path / "c").exists()
    assert [(r.kind, r.name) for r in cuts.skipped] == [("long", "a.wav")]
    assert "1 recordings (0.03 hours) are longer than 30 s" in caplog.text
    assert "segments with times" in caplog.text and "--max_seconds" in caplog.text
    assert (cuts.counts["recordings"], cuts.counts["pieces"]) == (1, 0)


SENTENCES = (
    "The birds sing in the morning.",
    "We walked along the river until evening.",
    "Nobody knows where the old road leads.",
    "She bought three apples and some bread.",
)


@pytest.mark.skipif(align.installed_recognizer() is None, reason="pocketsphinx is not installed")
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_a_long_recording_is_cut_where_its_sentences_end(tmp_path, monkeypatch):
    parts, ends = [], []
    rng = np.random.default_rng(0)
    for sentence in SENTENCES:
        command = ["espeak-ng", "-s", "150", "--stdout", sentence]
        wav = subprocess.run(command, capture_output=True, check=True).stdout
        audio, rate = sf.read(io.BytesIO(wav))
        loud = np.flatnonzero(np.abs(audio) > 1e-3)
        parts += [np.zeros(rate // 2), audio[loud[0] : loud[-1] + 1]]
        ends.append(sum(map(len, parts)) / rate)
    speech = np.concatenate(parts)
    sf.write(tmp_path / "long.wav", speech + 1e-3 * rng.standard_normal(len(speech)), rate)
    (tmp_path / "long.txt").write_text("[S1] " + " ".join(SENTENCES))
    clips, skipped = list_clips(
        str(tmp_path), max_seconds=4.0, cache=tmp_path, normalize_text=True, keep_long=True
    )
    assert len(clips) == 1 and not skipped
    folder = tmp_path / "cuts"
    options = {"max_seconds": 4.0, "max_text_bytes": 768, "folder": folder, "begin": 0.0}
    cuts = cut.cut_long(clips, **options)
    assert [c.text for c in cuts.clips] == [f"[S1] {sentence}" for sentence in SENTENCES]
    assert [c.key for c in cuts.clips] == [f"long_{i:03d}" for i in range(4)]
    for piece, following, end in zip(cuts.clips, cuts.clips[1:], ends, strict=False):
        assert end - 0.1 < piece.stop <= following.start < end + 0.6
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Saved cuts are not made again, whatever the version of the recognizer.
    monkeypatch.setattr(cut, "Aligner", None)
    assert cut.cut_long(clips, **options) == cuts
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_unlisted_shards_are_not_replaced(tmp_path):
    write_clip(tmp_path / "in" / "a.wav", 200)
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "000000.tar"
    mine.write_bytes(b"mine")
    with pytest.raises(EchoError, match=r"000000\.tar would be replaced"):
        run(tmp_path / "in", tmp_path / "out")
    assert mine.read_bytes() == b"mine"
