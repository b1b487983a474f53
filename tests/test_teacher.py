"""The natural teacher: its files, speakers, phonemes and texts, and which clips are used."""

import functools
import http.server
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import pyloudnorm
import pytest
import soundfile as sf
from processes import call

from echo_eqx.data.text import normalize_text
from echo_eqx.errors import EchoError
from echo_eqx.voice import kokoro, prose
from echo_eqx.voice.archives import Archive, fetch
from echo_eqx.voice.corpus import HELD_OUT, LEFT_OUT, MANIFEST, BrokenClip, Line, record_corpus
from echo_eqx.voice.grammar import held_out_words
from echo_eqx.voice.phonemes import phonemes
from echo_eqx.voice.speakers import HELD_OUT_VOICES, all_speakers

TEACHER_FILES = Path("~/.cache/echo_eqx/teacher").expanduser()
NOVEL = """
The captain slowly raised his glass. "Is that a sail?" he asked the boy, who was asleep.

It was not a sail at all; it was a cloud, and nobody spoke! They waited for the evening.

""" + "\n\n".join(f"The captain saw {n} ships, and nobody spoke!" for n in range(100))
SPEECH = (
    "My friends, we spent $2.5 million in 1961 -- and 40 percent of it was lost. [Laughter] Why? "
)


# --- Files --------------------------------------------------------------------------------------


def tarball(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content.encode())
            tar.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


@pytest.fixture
def site(tmp_path):
    """A folder and the address at which a server shows it."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_archives_are_fetched_once_and_checked(site, tmp_path):
    folder, address = site
    with zipfile.ZipFile(folder / "one-1.0.whl", "w") as wheel:
        wheel.writestr("one/part.bin", b"part")
    (folder / "two-2.0.tgz").write_bytes(tarball({"package/a": "A", "package/b": "B"}))
    wheel, tar = (
        Archive(f"{address}/{name}", sha256((folder / name).read_bytes()).hexdigest())
        for name in ("one-1.0.whl", "two-2.0.tgz")
    )
    cache = tmp_path / "cache"
    fetch((wheel, tar), cache)
    shutil.rmtree(folder)
    fetch((wheel, tar), cache)
    assert wheel.read(cache, "one/part.bin") == b"part"
    assert tar.read(cache, "package/a") == b"A"
    assert tar.read_matching(cache, "package/") == {"package/a": b"A", "package/b": b"B"}


def test_what_cannot_be_fetched_is_named_with_what_to_do(site, tmp_path):
    folder, address = site
    cache = tmp_path / "cache"
    for url, reason in ((f"{address}/none.whl", "404"), ("http://127.0.0.1:9/x.whl", "refused")):
        with pytest.raises(EchoError, match=f"{url} cannot .*{reason}.*copy it there") as error:
            fetch([Archive(url, "")], cache)
        assert "\n" not in str(error.value)
        assert not any(cache.iterdir())
    (folder / "other.whl").write_bytes(b"other")
    with pytest.raises(
        EchoError, match=r"other.whl: expected SHA-256 abc, got d9298a.*; delete it"
    ):
        fetch([Archive(f"{address}/other.whl", "abc")], cache)


# --- Speakers, phonemes, texts ------------------------------------------------------------------


def test_speakers_are_the_same_everywhere_and_held_out_voices_are_in_no_mixture():
    speakers = all_speakers().values()
    described = json.dumps([[one.name, one.weights, one.speed] for one in speakers])
    assert crc32(described.encode()) == 2293173132
    mixtures = [one for one in speakers if len(one.weights) > 1]
    assert len({frozenset(one.weights) for one in mixtures}) == len(mixtures) == 236
    assert sum(one.held_out for one in mixtures) == 20
    assert sum(not one.held_out for one in speakers) == 240
    for one in speakers:
        assert sum(one.weights.values()) == pytest.approx(1.0)
        assert all(share > 0 for share in one.weights.values())
        if not one.held_out or len(one.weights) > 1:
            assert not set(one.weights) & set(HELD_OUT_VOICES)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_phonemes_keep_punctuation_and_know_both_accents():
    american = phonemes('He said, "Go away!" No joy...', is_british=False)
    assert american == "hi sˈɛd, “ɡˌO əwˈA!” nˈO ʤˈY…"
    assert phonemes("No joy", is_british=True) == "nˈQ ʤˈY"
    assert phonemes("-v is no option; a bird", is_british=False).endswith(
        "; ɐ bˈɜɹd".replace("ɐ", "ə")
    )


@pytest.fixture
def prose_files(tmp_path):
    """A folder with the archives of the prose, but only a little of it."""
    speeches = {f"package/data/{year}_x.txt": SPEECH for year in (1944, 1945, 2001)}
    for archive, files in (
        (prose.SPEECHES, speeches),
        (prose.NOVEL, {"package/data/data.txt": NOVEL}),
    ):
        (tmp_path / archive.name).write_bytes(tarball(files))
    return tmp_path


def test_prose_is_cut_between_sentences(prose_files):
    found = prose.passages(prose_files, 12.0)
    said = " ".join(found)
    assert said.count("My friends") == 2  # not the one before 1945
    assert "lost. Why?" in said and "1961—and" in said
    assert all(text[0] in 'MTIW"' and text[-1] in '.?!"' for text in found)


def test_lines_are_repeatable_and_the_held_out_apart(prose_files):
    def first(seed: int, count: int) -> list[Line]:
        return list(islice(prose.corpus_lines(prose_files, seed, 12.0), count))

    lines = first(3, 500)
    assert lines[:40] == first(3, 40) != first(4, 40)
    held_out = [line for line in lines if line.held_out]
    assert len(held_out) == 25
    speakers = all_speakers()
    assert all(speakers[line.speaker].held_out == line.held_out for line in lines)
    assert {line.speaker for line in lines} == set(speakers)
    trained = {line.text for line in lines} - {line.text for line in held_out}
    assert not trained & {line.text for line in held_out}
    assert not any(held_out_words(text) for text in trained)
    for line in lines:
        assert normalize_text(line.text) == f"[S1] {line.text}" and "961" not in line.text
    assert any(
        "two point five million dollars in nineteen sixty-one, and" in text for text in trained
    )


# --- Clips --------------------------------------------------------------------------------------


def burst(seconds: float, gain: float = 0.3) -> np.ndarray:
    t = np.arange(round(seconds * kokoro.RATE)) / kokoro.RATE
    return (gain * np.sin(2 * np.pi * 200 * t)).astype(np.float32)


def test_silence_is_cut_and_the_level_set():
    silence = np.zeros(12_000, np.float32)
    audio = np.concatenate([silence, burst(1.0), silence, burst(1.0), silence])
    clip = kokoro.clean_clip(audio, 40.0)
    assert len(clip) / kokoro.RATE == pytest.approx(2.5 + 2 * kokoro.SILENCE_SECONDS, abs=0.03)
    loudness = pyloudnorm.Meter(kokoro.RATE).integrated_loudness(clip)
    assert loudness == pytest.approx(kokoro.LUFS, abs=0.1)


@pytest.mark.parametrize(
    "audio, reason",
    [
        (np.zeros(24_000, np.float32), "silent"),
        (np.full(24_000, np.nan, np.float32), "silent"),
        (np.zeros(0, np.float32), "silent"),
        (np.clip(burst(2.0, 3.0), -1, 1), "clipped"),
        (np.concatenate([burst(1.0), np.zeros(48_000, np.float32), burst(1.0)]), "a long silence"),
        (burst(1.0), "too short for its text"),
        (burst(6.0), "too long for its text"),
    ],
)
def test_broken_clips_are_found(audio, reason):
    with pytest.raises(BrokenClip, match=reason):
        kokoro.clean_clip(audio, 40.0)


def speak_tone(text: str, speaker: str) -> tuple[np.ndarray, int]:
    """A teacher that says each text as a tone, and cannot say some."""
    if "broken" in text:
        raise BrokenClip("silent")
    return burst(len(text) / 20), kokoro.RATE


def test_what_is_left_out_is_listed_and_held_out_clips_are_apart(tmp_path):
    texts = [f"number {n}" + " and more" * (n % 3) + " broken" * (n % 5 == 0) for n in range(100)]
    lines = [Line(text, f"voice{n % 2}", n % 10 == 9) for n, text in enumerate(texts)]

    def record(name, count, workers=2, max_seconds=1.2):
        pool, folder = ThreadPoolExecutor(workers), tmp_path / name
        seconds = {"max_seconds": max_seconds}
        made = record_corpus(
            lines, speak_tone, folder, count=count, pool=pool, workers=workers, **seconds
        )
        return made, {path.name: path.read_bytes() for path in folder.iterdir()}

    corpus, files = record("once", 30)
    assert len(corpus.rows) + len(corpus.held_out) == 30
    assert set(corpus.reasons) == {"silent", "longer than 1.2 s"}
    spoken = {row["audio"] for row in corpus.rows + corpus.held_out}
    assert {name for name in files if name.endswith(".wav")} == spoken
    assert all(int(row["audio"][:6]) % 10 == 9 for row in corpus.held_out)
    for name, rows in (
        (MANIFEST, corpus.rows),
        (HELD_OUT, corpus.held_out),
        (LEFT_OUT, corpus.left_out),
    ):
        assert [json.loads(line) for line in files[name].decode().splitlines()] == rows
    seconds = sum(row["duration"] for row in corpus.rows + corpus.held_out)
    assert corpus.new_seconds == pytest.approx(seconds)
    assert sf.info(tmp_path / "once" / corpus.rows[0]["audio"]).subtype == "PCM_16"

    record("twice", 7, workers=5)
    continued, again = record("twice", 30, workers=1)
    assert again == files and 0 < continued.new_seconds < corpus.new_seconds
    longer, _ = record("twice", 30, max_seconds=5.0)
    assert longer.reasons == {"silent": len(longer.left_out)}


def die(text: str, speaker: str) -> tuple[np.ndarray, int]:
    os._exit(1)


@pytest.mark.slow
def test_a_teacher_that_dies_is_reported(tmp_path):
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.raises(EchoError, match=r"a process of the teacher died.*fewer --workers"):
        record_corpus([Line("Hello.", "ann")] * 3, die, tmp_path, count=2, pool=pool, workers=1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
@pytest.mark.skipif(
    not all((TEACHER_FILES / one.name).is_file() for one in (*kokoro.ARCHIVES, *prose.ARCHIVES)),
    reason=f"{TEACHER_FILES} lacks files that `echo-eqx make_corpus --teacher kokoro` fetches",
)
def test_kokoro_gives_the_same_clips_with_any_number_of_workers(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        flags = ("--teacher", "kokoro", "--count", 3, "--workers", workers)
        done = call("make_corpus", *flags, "--output", tmp_path / name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "3 recordings of 3 speakers" in done.stdout and "CPU seconds per" in done.stdout
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two and {"NOTICE", "speakers.json", MANIFEST, "000000.wav"} <= set(one)
    for row in map(json.loads, one[MANIFEST].decode().splitlines()):
        audio, rate = sf.read(tmp_path / "one" / row["audio"])
        assert rate == 24_000 and len(audio) / rate == pytest.approx(row["duration"], abs=1e-3)
