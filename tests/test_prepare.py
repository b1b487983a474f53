"""From recordings to shards: each clip once, and the same bytes when made in parts."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import GOLDEN
from processes import call
from safetensors import safe_open

import echo_eqx
from echo_eqx.data.shards import list_shards
from echo_eqx.data.text import normalize_text
from echo_eqx.errors import EchoError
from echo_eqx.prepare import make
from echo_eqx.prepare.assign import CLUSTER, assign
from echo_eqx.prepare.clips import list_clips
from echo_eqx.prepare.index import PartIndex
from echo_eqx.prepare.push import _read_dataset
from echo_eqx.prepare.write import write_silence
from echo_eqx.speech.codec import codec_identity
from echo_eqx.train.data import check_codec

CODEC = GOLDEN / "dacvae_tiny" / "weights.pth"


def write_clip(path: Path, seconds: float, pitch: float, rate: int = 24_000) -> None:
    """A tone with overtones that comes and goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in (1, 2, 3))
    sf.write(os.fsencode(path), 0.2 * tone * np.sin(np.pi * t / seconds) ** 2, rate)
    path.with_suffix(".txt").write_text(f"A tone of {pitch:.0f} hertz, größer.\n", "utf-8")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    kinds = ("wav", "flac", "ogg", "mp3")
    for speaker in range(3):
        for i in range(10):
            name = f"speaker{speaker}/clip {i}.{kinds[i % 4]}"
            rate = (16_000, 24_000, 44_100)[i % 3]
            write_clip(folder / name, 0.4 + 0.15 * i, 100.0 + 40 * speaker + i, rate)
    write_clip(folder / "alone" / "one.wav", 0.7, 300.0)
    (folder / "alone" / "empty.wav").write_bytes(b"")
    (folder / "alone" / "empty.txt").write_text("Nothing.")
    sf.write(folder / "alone" / "nan.wav", np.full(24_000, np.nan, np.float32), 24_000, "FLOAT")
    (folder / "alone" / "nan.txt").write_text("Not a number.")
    return folder


def prepare(recordings: Path, output: Path, *flags: str, code: int = 0) -> str:
    where = ["--input", recordings, "--output", output, "--codec", CODEC, "--shard_samples", "10"]
    done = call("prepare", *where, *flags)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared(recordings, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards")
    said = prepare(recordings, output)
    assert "31 samples" in said and "left out: 2 audio" in said
    return output


def prepare_here(source: Path, output: Path, **flags: object) -> dict:
    """Run `prepare` in this process; returns its index."""
    config = make.PrepareConfig(codec=str(CODEC), **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SILENCE_SECONDS", 1)
        make.make_dataset(config, echo_eqx.load_codec(CODEC), str(source), output)
    return json.loads((output / "index-000-of-001.json").read_text())


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                assert kind not in samples.get(key, {}), f"{member.name} twice"
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return samples


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}


def latents(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def test_every_clip_occurs_once_with_its_text_and_speaker(prepared):
    samples = samples_of(prepared)
    assert len(samples) == 31
    for key, parts in samples.items():
        fields = json.loads(parts["json"])
        assert fields["text"].startswith("[S1] A tone of")
        assert fields["text"].endswith("hertz, größer.")
        assert fields["speaker"] == key.split("_")[0]
        own = latents(parts["npy"])
        assert own.dtype == np.float16 and own.shape[1] == 12
        assert fields["seconds"] == pytest.approx(len(own) / 25)
    assert "ref.npy" not in samples["alone_one"]


def test_a_reference_never_contains_its_own_sample(prepared):
    samples = samples_of(prepared)
    own = {key: latents(parts["npy"]) for key, parts in samples.items()}
    for key, parts in samples.items():
        if "ref.npy" not in parts:
            continue
        reference = latents(parts["ref.npy"])
        assert len(reference) <= 512
        at, used = 0, []
        while at < len(reference):
            rest = reference[at:]
            names = [n for n, x in own.items() if np.array_equal(rest[: len(x)], x[: len(rest)])]
            assert len(names) == 1
            used += names
            at += len(own[names[0]])
        assert key not in used and len(set(used)) == len(used)
        assert {name.split("_")[0] for name in used} == {key.split("_")[0]}


def test_parts_together_equal_the_whole(recordings, prepared, tmp_path):
    for part in ("2/2", "1/2"):
        prepare(recordings, tmp_path, "--part", part)
    assert bytes_of(tmp_path) == bytes_of(prepared)
    assert len(list(tmp_path.glob("index-*-of-002.json"))) == 2


def test_shards_decode_to_the_audio(recordings, prepared, tmp_path):
    codec = echo_eqx.load_codec(CODEC)
    clips, _ = list_clips(str(recordings), max_seconds=30.0, cache=tmp_path)
    clip = next(clip for clip in clips if clip.key == "speaker1_clip_5")
    audio = clip.load(codec.config.sample_rate)
    padded = np.zeros(-(-len(audio) // 1920) * 1920, np.float32)
    padded[: len(audio)] = audio
    mean, _ = codec.encode(np.concatenate([padded, np.zeros(1920 * 40, np.float32)]))
    kept = latents(samples_of(prepared)["speaker1_clip_5"]["npy"])
    assert np.abs(kept - np.asarray(mean[: len(kept)])).max() < 2e-3
    direct, again = codec.decode(mean[: len(kept)]), codec.decode(kept.astype(np.float32))
    assert np.abs(np.asarray(direct) - np.asarray(again)).max() < 2e-2


def test_training_rejects_silence_of_another_codec(prepared, tmp_path):
    with safe_open(prepared / "silence.safetensors", "numpy") as file:
        identity = file.metadata()["codec"]
        assert file.get_tensor("silence").shape == (750, 12)
    assert identity == codec_identity(echo_eqx.load_codec(CODEC))
    listing = list_shards(str(prepared), tmp_path)
    check_codec(prepared / "silence.safetensors", listing)
    shutil.copytree(prepared, tmp_path / "other")
    facts = json.loads((prepared / "codec.json").read_text())
    (tmp_path / "other" / "codec.json").write_text(json.dumps(facts | {"id": "f" * 64}))
    with pytest.raises(EchoError, match=r"expected silence of codec .*, got "):
        other = list_shards(str(tmp_path / "other"), tmp_path)
        check_codec(prepared / "silence.safetensors", other)


def test_the_codec_id_does_not_depend_on_the_file_format(tmp_path):
    codec = echo_eqx.load_codec(CODEC)
    echo_eqx.save(codec, tmp_path / "codec.safetensors")
    again = echo_eqx.load_codec(tmp_path / "codec.safetensors")
    assert codec_identity(again) == codec_identity(codec)


def test_other_settings_in_the_same_folder_are_rejected(recordings, prepared):
    said = prepare(recordings, prepared, "--latents", "sample", code=1)
    assert "latents was mean, is sample now" in said and len(said.splitlines()) == 1


def test_batches_and_loudness_and_samples(recordings, prepared, tmp_path):
    speaker = recordings / "speaker0"
    prepare_here(speaker, tmp_path / "batched", batch_size=4)
    ours, theirs = samples_of(tmp_path / "batched"), samples_of(prepared)
    assert len(ours) == 10
    for key in ours:
        difference = latents(ours[key]["npy"]) - latents(theirs[f"speaker0_{key}"]["npy"])
        assert np.abs(difference).max() < 2e-2, key
    prepare_here(speaker, tmp_path / "loud", lufs=-16.0, latents="sample")
    fields = json.loads(samples_of(tmp_path / "loud")["clip_9"]["json"])
    assert fields["lufs"] == -16.0


def test_bad_usage_gives_one_line_errors(recordings, tmp_path):
    cases = [
        (["--part", "3/2"], 2, "--part: expected a part such as 2/8, got '3/2'"),
        (["--shard_samples", "0"], 2, "--shard_samples: expected a positive number, got 0"),
        (["--lufs", "3"], 2, "--lufs: expected -70 to 0, got 3.0"),
        (["--codec", str(tmp_path / "none.pth")], 1, "does not exist"),
        (["--input", str(tmp_path / "none")], 1, "none"),
    ]
    for flags, code, said in cases:
        message = prepare(recordings, tmp_path / "out", *flags, code=code)
        assert said in message and len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_gives_a_one_line_error_and_no_broken_shard(recordings, prepared, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        said = prepare(recordings, disk, code=1)
        assert said.startswith("error: ") and "No space left on device" in said
        whole = bytes_of(prepared)
        assert bytes_of(disk).items() <= whole.items()
        assert not [path for path in disk.iterdir() if path.name.startswith(".")]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_speakers_clips_share_a_shard(recordings, tmp_path):
    clips, _ = list_clips(str(recordings), max_seconds=30.0, cache=tmp_path)
    shards = assign(clips, seed=0, per_shard=10)
    keys = [place.clip.key for shard in shards for place in shard]
    assert sorted(keys) == sorted(clip.key for clip in clips)
    for shard in shards:
        for i, place in enumerate(shard):
            assert i not in place.reference_indices
            voices = {shard[other].clip.speaker for other in place.reference_indices}
            assert voices <= {place.clip.speaker}
            assert len(place.reference_indices) < 2 * CLUSTER
    other = assign(clips, seed=1, per_shard=10)
    assert [place.clip.key for shard in other for place in shard] != keys


TYPED = "\u201cHi\u201d \u2014 it\u2019s\u2026\nme: you; we"
NAMES = (b"good", b"K\xe4se", b"K\xf6se", b"two\nlines", b"red\x1b[31m", "\u4f60.\u597d".encode())


@pytest.fixture(scope="module")
def oddly_named(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for name in NAMES:
        below = os.fsencode(folder) + b"/" + name
        os.mkdir(below)
        for number in (b"1", b"2"):
            path = Path(os.fsdecode(below + b"/" + name + number + b".wav"))
            write_clip(path, 0.4, 200.0)
            path.with_suffix(".txt").write_text(TYPED, "utf-8")
    (folder / "good" / "good1.txt").write_text("[S1] [S2]")
    prepare_here(folder, folder / "shards" / "a")
    return folder


def test_texts_are_normalized_and_the_index_records_it(oddly_named, tmp_path):
    output = oddly_named / "shards" / "a"
    index = json.loads((output / "index-000-of-001.json").read_text())
    texts = [json.loads(parts["json"])["text"] for parts in samples_of(output).values()]
    assert set(texts) == {normalize_text(TYPED)} and len(texts) == 11
    assert index["settings"]["normalize_text"] is True
    assert [item["kind"] for item in index["skipped"]["input"]] == ["text"]
    index = prepare_here(oddly_named, tmp_path / "raw", normalize_text=False)
    texts = [json.loads(parts["json"])["text"] for parts in samples_of(tmp_path / "raw").values()]
    assert set(texts) == {TYPED} and index["settings"]["normalize_text"] is False
    with pytest.raises(EchoError, match="normalize_text was False, is True now"):
        prepare_here(oddly_named, tmp_path / "raw")


def test_what_prepare_writes_can_be_pushed(oddly_named):
    dataset = _read_dataset(oddly_named / "shards" / "a")
    listed = list(dataset.shards.values())
    assert sum(x["samples"] for x in listed) == 11 and sum(x["frames"] for x in listed) == 11 * 10
    assert "clips-000.json" in dataset.small_files


def test_names_with_any_bytes_stay_distinct(oddly_named):
    output = oddly_named / "shards" / "a"
    samples = [json.loads(parts["json"]) for parts in samples_of(output).values()]
    assert len({fields["speaker"] for fields in samples}) == len(NAMES)
    assert len({fields["source"] for fields in samples}) == len(samples)
    assert all(value.isprintable() for fields in samples for value in map(str, fields.values()))


def test_an_output_inside_the_input_resumes_and_leaves_no_temporary_files(oddly_named, tmp_path):
    output = oddly_named / "shards" / "a"
    first = json.loads((output / "index-000-of-001.json").read_text())
    expected = bytes_of(output)
    leftovers = [".000000.tar.ab_3x9zq", ".index-000-of-001.json.abcdefgh"]
    kept = [
        ".000000.tar.backup",
        ".000001.tar.abcdefgh",
        ".notes.abcdefgh",
        "x.000000.tar.abcdefgh",
    ]
    for name in leftovers + kept:
        (output / name).write_text("x")
    (output / ".silence.safetensors.abcdefgh").symlink_to(oddly_named / "good" / "good1.txt")
    (output / ".codec.json.abcdefgh").mkdir()
    assert prepare_here(oddly_named, output) == first and bytes_of(output) == expected
    assert not [name for name in leftovers if (output / name).exists()]
    assert all((output / name).exists() for name in kept)
    assert (output / ".silence.safetensors.abcdefgh").is_symlink()
    assert (output / ".codec.json.abcdefgh").is_dir()
    # With another output, recordings inside the old output are recordings like any other.
    for name, other, count in ((".", "x", 11), ("good", ".", 1)):
        source, output_here = oddly_named / name, oddly_named / other
        clips, _ = list_clips(str(source), max_seconds=30.0, cache=tmp_path, output=output_here)
        assert len(clips) == count
    for source, message in (
        (output, "expected recordings, got shards made by prepare"),
        (oddly_named, "expected another folder for --output"),
    ):
        with pytest.raises(EchoError, match=message):
            list_clips(str(source), max_seconds=30.0, cache=tmp_path, output=oddly_named)


def test_saved_files_are_reproducible(tmp_path):
    codec = echo_eqx.load_codec(CODEC)
    written = set()
    for _ in range(5):  # with metadata in a random order, all five agree once in 1,296 times
        write_silence(tmp_path / "silence.safetensors", np.zeros((4, 8)), {"id": "x"})
        echo_eqx.save(codec, tmp_path / "codec.safetensors")
        files = ("silence.safetensors", "codec.safetensors")
        written.add(tuple((tmp_path / name).read_bytes() for name in files))
    assert len(written) == 1


HEAD = '{"format": "echo_eqx", "kind": "shards", "codec": {}, "settings": {}, "shards": '
SHARD = '{"a.tar": {"sha256": "", "samples": %s, "frames": 1, "with_reference": 0}}}'


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        HEAD + "[" * 100_000,
        HEAD + SHARD % ("9" * 5000),
        HEAD + SHARD % ("9" * 400),
        HEAD + SHARD % "1e999",
        HEAD + SHARD % "NaN",
        HEAD + '{"a.tar": null}}',
        HEAD + "[]}",
        HEAD + '{}, "skipped": {"input": [1]}}',
        HEAD + '{}, "skipped": [1]}',
        '{"format": "echo_eqx", "kind": "silence", "shards": {}}',
        "\0" * 100,
        "null",
    ],
    ids=range(13),
)
def test_a_foreign_index_gives_a_one_line_error(tmp_path, text):
    (tmp_path / "index-000-of-001.json").write_text(text)
    with pytest.raises(EchoError, match="expected an index of shards, got another") as caught:
        PartIndex(tmp_path, 0, 1, {}, {})
    assert len(str(caught.value)) < 600
