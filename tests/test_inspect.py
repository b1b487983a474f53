"""The report matches the shards, and nothing broken counts as usable."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import GOLDEN
from processes import SCRIPTS, call, run
from shards import DataServer, make_dataset, npy_bytes, sample_parts, sha256, write_shard

from echo_eqx.config import DIT_PRESETS
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import list_shards
from echo_eqx.errors import EchoError
from echo_eqx.prepare.inspect import Report, find_sample, inspect_shards

SCRIPT = SCRIPTS / "inspect_shards.py"
CODEC = GOLDEN / "dacvae_tiny" / "weights.pth"
WIDTH = 5


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return call("inspect_shards", *args)


def report_of(source: object, tmp_path: Path) -> Report:
    shard_index = list_shards(str(source), tmp_path / "cache")
    cache = ShardCache(tmp_path / "cache", 10**9)
    try:
        return inspect_shards(shard_index, cache)
    finally:
        cache.close()


def parts(frames: int = 7, reference: int = 0, **fields: object) -> dict[str, bytes]:
    rng = np.random.default_rng(frames)
    made = sample_parts(rng, frames, WIDTH, reference)
    return {**made, "json": json.dumps({"text": "Hello.", **fields}).encode()}


def write_index(folder: Path, name: str = "index.json") -> Path:
    shards = {path.name: {"sha256": sha256(path), "samples": 1} for path in folder.glob("*.tar")}
    path = folder / name
    path.write_text(json.dumps({"format": "echo_eqx", "kind": "shards", "shards": shards}))
    return path


def test_the_report_matches_the_records(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["Hi.", "größer, länger", "猫" * 9, "x" * 63, "y" * 64]
    labels = [("anna", "de"), ("ben", "en"), ("anna", "de"), (None, "en"), (None, None)]
    all_latents, samples = [], []
    for i, (text, (speaker, language)) in enumerate(zip(texts, labels, strict=True)):
        latents = (3 + 2 * rng.standard_normal((4 + 9 * i, WIDTH))).astype(np.float16)
        all_latents.append(latents.astype(np.float64))
        fields = {"text": text, "speaker": speaker, "language": language}
        made = {"npy": npy_bytes(latents), "json": json.dumps(fields).encode()}
        if i % 2:
            made["ref.npy"] = npy_bytes(latents[:3])
        samples.append((f"k{i}", made))
    write_shard(tmp_path / "data" / "a.tar", samples[:2])
    write_shard(tmp_path / "data" / "b.tar", samples[2:])
    np.save(tmp_path / "data" / "silence.npy", np.zeros((3, WIDTH), np.float32))
    report = report_of(tmp_path / "data", tmp_path)
    config = replace(DIT_PRESETS["1.3B"], max_frames=31, max_text_bytes=64)

    values = np.concatenate(all_latents)
    lengths = [len(latents) for latents in all_latents]
    assert report.broken == () and report.shards == 2 and report.samples == 5
    assert report.frames.tolist() == lengths
    assert report.text_bytes.tolist() == [len(text.encode()) for text in texts]
    assert report.hours == pytest.approx(sum(lengths) / 25 / 3600, rel=1e-12)
    # The last two recordings are too long, and so is the last text; 63 bytes and the leading 0 fit.
    assert report.fit(config)["fitting"] == 4 and lengths[3] == 31
    assert report.references == 2 and report.speakers == 2 and report.with_speaker == 3
    assert report.languages == {"de": 2, "en": 2}
    np.testing.assert_allclose(report.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(report.std, values.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(report.overall, (values.mean(), values.std()), rtol=1e-12)
    assert report.silence == "silence.npy" and report.indexes == ()


def test_statistics_are_precise_far_from_zero(tmp_path):
    values = np.float32(3e4) + np.arange(40, dtype=np.float32).reshape(20, 2)
    made = {"npy": npy_bytes(values), "json": b'{"text": "a"}'}
    write_shard(tmp_path / "data" / "a.tar", [("a", made), ("b", made)])
    report = report_of(tmp_path / "data", tmp_path)
    np.testing.assert_allclose(report.std, values.astype(np.float64).std(axis=0), rtol=1e-12)


def test_good_shards_give_exit_code_0_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    data = make_dataset(tmp_path / "data", shards=3, per_shard=4)
    write_index(data)
    done = command("--data", data, "--plot", tmp_path / "shards.png")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "samples     12" in done.stdout and "12 of 12 (100.0%) in 768" in done.stdout
    assert "index.json: 3 shards compared" in done.stdout and "broken      0" in done.stdout
    assert (tmp_path / "shards.png").read_bytes().startswith(b"\x89PNG")


def broken_dataset(folder: Path) -> dict[tuple[str, str], str]:
    """The kind of each broken (shard, key), in a dataset with one good sample `good`."""
    nan = np.full((4, WIDTH), np.nan, np.float16)
    no_latents = parts()
    no_latents.pop("npy")
    samples = {
        "good": ("", parts(5)),
        "gone": ("missing", no_latents),
        "whole": ("dtype", {**parts(), "npy": npy_bytes(np.ones((4, WIDTH), np.int32))}),
        "wide": ("shape", {**parts(), "npy": npy_bytes(np.ones((4, 9), np.float16))}),
        "nan": ("nan", {**parts(), "npy": npy_bytes(nan)}),
        "cut": ("json", {**parts(), "json": b'{"text": '}),
        "mute": ("text", parts(text="")),
        "latin": ("utf8", {**parts(), "json": '{"text": "ä"}'.encode("latin-1")}),
        "odd\x1bname": ("text", parts(text=7)),
    }
    write_shard(folder / "a.tar", [(key, made) for key, (_, made) in samples.items()])
    write_shard(folder / "b.tar", [("good", parts(6))])
    damaged = write_shard(folder / "c.tar", [("more", parts(8))])
    damaged.write_bytes(damaged.read_bytes()[:700])
    kinds = {("a.tar", key): kind for key, (kind, _) in samples.items() if kind}
    return kinds | {("b.tar", "good"): "duplicate", ("c.tar", ""): "tar"}


def test_every_kind_of_broken_record_is_reported(tmp_path):
    kinds = broken_dataset(tmp_path / "data")
    report = report_of(tmp_path / "data", tmp_path)
    assert {(one.shard, one.key): one.kind for one in report.broken} == kinds
    assert report.frames.tolist() == [5]

    done = command("--data", tmp_path / "data")
    assert done.returncode == 1 and not done.stderr
    for (shard, key), kind in kinds.items():
        key = key.replace("\x1b", "\\x1b")
        assert f"  {shard} {key}".rstrip() + f": {kind}: " in done.stdout
    assert "\x1b" not in done.stdout and "good: duplicate: a.tar has it too" in done.stdout

    done = command("--data", tmp_path / "data", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 1 and facts["samples"] == 1 and facts["latent_dim"] == WIDTH
    assert {(one["shard"], one["key"]): one["kind"] for one in facts["broken"]} == kinds
    assert facts["kinds"]["text"] == 2 and facts["seconds"]["max"] == 0.2


def test_20_broken_records_are_listed_or_all_on_request(tmp_path):
    samples = [(f"k{i:02}", parts(text="")) for i in range(23)] + [("good", parts())]
    write_shard(tmp_path / "a.tar", samples)
    done = command("--data", tmp_path)
    assert done.stdout.count(": text: ") == 20 and "... 3 more (--all)" in done.stdout
    done = command("--data", tmp_path / "a.tar", "--all")
    assert done.stdout.count(": text: ") == 23 and f"  {WIDTH - 1}  mean" in done.stdout


def test_shards_that_are_all_broken_are_reported(tmp_path):
    write_shard(tmp_path / "a.tar", [("k", {"npy": b"", "json": b"{}"})])
    done = command("--data", tmp_path)
    assert done.returncode == 1 and not done.stderr and "samples     0" in done.stdout
    facts = json.loads(command("--data", tmp_path, "--json").stdout)
    assert facts["mean"] is None and facts["seconds"] is None


def test_the_index_reveals_a_flipped_bit(tmp_path):
    data = make_dataset(tmp_path / "data", shards=3, per_shard=2)
    write_index(data)
    assert report_of(data, tmp_path).broken == ()
    content = bytearray((data / "00001.tar").read_bytes())
    content[512 + 128 + 3] ^= 1  # a value of the first latents, which stays a number
    (data / "00001.tar").write_bytes(content)
    report = report_of(data, tmp_path)
    assert [(one.shard, one.kind) for one in report.broken] == [("00001.tar", "sha256")]
    assert report.compared == 3 and report.samples == 6
    assert [one.kind for one in report_of(data / "0*1.tar", tmp_path).broken] == ["sha256"]
    done = command("--data", data)
    assert done.returncode == 1 and "00001.tar: sha256: " in done.stdout


def test_missing_and_unlisted_shards_are_reported(tmp_path):
    data = make_dataset(tmp_path / "data", shards=3, per_shard=1)
    write_index(data, "index-1-of-2.json")
    (data / "index-2-of-2.json").write_text('{"format": "echo_eqx", "kind": "shards"')
    (data / "index_of_others.json").write_text('{"format": "other", "kind": "shards"}')
    (data / "00002.tar").rename(data / "other.tar")
    (data / "silence.npy").write_bytes(npy_bytes(np.zeros((3, 99), np.float32)))
    make_dataset(data / "without_index", shards=1, per_shard=1, seed=1)
    report = report_of(data, tmp_path)
    kinds = {one.shard: one.kind for one in report.broken if one.kind != "duplicate"}
    assert kinds == {
        "index-2-of-2.json": "index",
        "other.tar": "unlisted",
        "00002.tar": "missing",
        "silence.npy": "silence",
    }
    assert report.indexes == ("index-1-of-2.json",) and report.compared == 2
    kinds = [one.kind for one in report_of(data / "00000.tar", tmp_path).broken]
    assert "missing" not in kinds  # one file was asked for


def test_hub_shards_are_read_like_local_ones(tmp_path):
    server = DataServer(tmp_path / "hub")
    data = make_dataset(server.root / "owner" / "voices" / "train", shards=2, per_shard=3)
    index = write_index(data)
    fields = json.loads(index.read_text())
    fields["shards"]["00001.tar"]["sha256"] = "0" * 64
    index.write_text(json.dumps(fields))
    source = ["--data", "hf://datasets/owner/voices/train", "--cache_dir", tmp_path / "cache"]
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    try:
        done = run(SCRIPT, *source, "--json", **environment)
    finally:
        server.stop()
    assert done.returncode == 1, done.stderr
    facts = json.loads(done.stdout)
    assert facts["unseen"] is None and facts["revision"] == server.commit
    assert facts["indexes"] == ["train/index.json"] and facts["compared"] == 2
    assert [(one["shard"], one["kind"]) for one in facts["broken"]] == [
        ("train/00001.tar", "sha256")
    ]
    here = report_of(data, tmp_path)
    assert facts["samples"] == 6 and facts["channels"]["mean"] == here.mean.tolist()
    assert facts["frames_per_byte"] == here.frames_per_byte > 0


def test_a_sample_is_played_with_its_reference(tmp_path, golden_codec):
    rng = np.random.default_rng(1)
    made = sample_parts(rng, 7, 12, 4)
    write_shard(tmp_path / "data" / "a.tar", [("other", sample_parts(rng, 5, 12))])
    write_shard(tmp_path / "data" / "b.tar", [("part/one", made)])
    output = tmp_path / "out.wav"
    play = ["--data", tmp_path / "data", "--codec", CODEC, "--output", output, "--play"]
    done = command(*play, "part/one")
    assert done.returncode == 0, done.stderr
    audio, rate = sf.read(output)
    reference, _ = sf.read(tmp_path / "out.ref.wav")
    hop = golden_codec.config.hop
    assert rate == 48_000 and len(audio) == 7 * hop and len(reference) == 4 * hop
    latents = np.load(io.BytesIO(made["npy"])).astype(np.float32)
    expected = np.asarray(golden_codec.decode(latents))
    expected = expected / max(1.0, np.abs(expected).max())
    assert np.abs(audio - expected).max() < 1e-4

    done = command(*play, "nobody")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has no record 'nobody'; expected a key such as 'other'" in done.stderr


def test_samples_that_cannot_be_played_give_one_line_errors(tmp_path):
    write_shard(tmp_path / "a.tar", [("mute", parts(text="")), ("fine", parts())])
    shard_index, cache = list_shards(str(tmp_path), tmp_path), ShardCache(tmp_path / "cache", 10**9)
    with pytest.raises(EchoError, match=r"'mute' of a.tar is broken \(text: the text is empty\)"):
        find_sample(shard_index, cache, "mute")
    done = command("--data", tmp_path, "--codec", CODEC, "--play", "fine")
    assert done.returncode == 1 and "of 12 channels for this codec, got 5" in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        ([], 2, "--data is missing"),
        (["--data", "."], 1, "got no *.tar"),
        (["--data", ".", "--max_frames", 0], 2, "--max_frames: expected at least 1, got 0"),
        (["--data", ".", "--cache_gb", 0], 2, "--cache_gb: expected a positive number, got 0.0"),
        (["--data", ".", "--plot", "a.pdf"], 2, "expected a *.png, got a.pdf"),
        (["--data", ".", "--play", "a", "--json"], 2, "--play: expected no --json or --plot"),
    ],
)
def test_unusable_inputs_give_one_line_errors(tmp_path, monkeypatch, flags, code, sentence):
    monkeypatch.chdir(tmp_path)
    done = command(*flags)
    assert done.returncode == code and sentence in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = make_dataset(tmp_path / "data", shards=1, per_shard=1)
    done = command("--data", data, "--plot", tmp_path / "a.png")
    assert done.returncode == 1 and "pip install 'echo_eqx[plots]'" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_members_that_belong_to_no_record_are_listed_with_exit_code_1(tmp_path):
    samples = [("k.1", parts()), ("k.2", parts()), ("K.3", {"NPY": parts()["npy"], "JSON": b"{}"})]
    write_shard(tmp_path / "data" / "a.tar", [*samples, ("good", {**parts(), "flac": b"sound"})])
    done = command("--data", tmp_path / "data")
    assert "samples     3" in done.stdout and "a.tar K.3: text: " in done.stdout
    assert "extras      .flac 1: further files of records" in done.stdout
    write_shard(
        tmp_path / "data" / "a.tar", [("good", {**parts(), "old.npy": b"?"}), ("x", {"b": b""})]
    )
    done = command("--data", tmp_path / "data")
    assert done.returncode == 1 and "samples     1" in done.stdout
    assert "a.tar good.old.npy: member: good is a key as well" in done.stdout
    assert "a.tar x.b: member: expected KEY.npy" in done.stdout


def test_a_model_sets_the_limits_and_must_match_the_width(tmp_path):
    rng = np.random.default_rng(0)
    for key, frames, reference, text in [("a", 80, 48, "x" * 63), ("b", 90, 49, "x" * 64)]:
        sample = sample_parts(rng, frames, 32, reference, text)
        write_shard(tmp_path / "data" / f"{key}.tar", [(key, sample)])
    done = command("--data", tmp_path / "data", "--model", "voice")
    assert done.returncode == 0 and "1 of 2 (50.0%) in 80 frames and 64 bytes" in done.stdout
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 3
    assert "1 of 2 (50.0%) recordings are longer than 80 frames" in warnings[0]
    assert "texts are longer than 64 bytes" in warnings[1]
    assert "references are longer than 48 frames" in warnings[2]
    facts = json.loads(command("--data", tmp_path / "data", "--model", "voice", "--json").stdout)
    assert facts["longer_recordings"] == facts["longer_texts"] == facts["longer_references"] == 1
    assert facts["frames_cut"] == 10
    done = command("--data", tmp_path / "data", "--model", "voice", "--max_frames", 99)
    assert "WARNING     1 of 2 (50.0%) recordings" not in done.stdout
    done = command("--data", tmp_path / "data", "--model", "840M")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "expected latents of 128 channels for --model 840M, got 32; --model voice fits"
        in done.stderr
    )
    assert command("--data", tmp_path / "data", "--model", "none").returncode == 2


def test_many_samples_without_a_reference_give_a_warning(tmp_path):
    write_shard(tmp_path / "a.tar", [("a", parts()), ("b", parts(reference=9))])
    done = command("--data", tmp_path)
    assert "WARNING     1 of 2 samples have no reference" in done.stdout
    write_shard(tmp_path / "a.tar", [("b", parts(reference=9))])
    assert "WARNING" not in command("--data", tmp_path).stdout


def test_hours_use_the_codecs_frame_rate(tmp_path):
    write_shard(tmp_path / "a.tar", [("a", parts(4321))])
    usual = command("--data", tmp_path).stdout
    assert (
        "hours       0.05 (25 latent frames per second, assumed because no codec.json gives it)"
        in usual
    )
    (tmp_path / "codec.json").write_text('{"sample_rate": 24000, "hop": 1920}')
    assert "hours       0.10 (12.5 latent frames per second)" in command("--data", tmp_path).stdout
    facts = json.loads(command("--data", tmp_path, "--json").stdout)
    assert facts["frame_rate"] == 12.5 and facts["seconds"]["max"] == 4321 / 12.5
    (tmp_path / "codec.json").write_text("[]")
    done = command("--data", tmp_path)
    assert done.returncode == 1 and "codec.json: codec: expected sample_rate and hop" in done.stdout


def test_names_with_any_bytes_are_read_and_shown(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfc\x1b"))
    made = {**parts(), "json": b'{"text": "a", "speaker": "\\ud800"}'}
    write_shard(folder / os.fsdecode(b"\xe4\n.tar"), [("ü\udce4", made), ("bad", {"npy": b""})])
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--data", os.fsencode(folder).decode("utf-8", "surrogateescape")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 1 and not done.stderr and "samples     1" in done.stdout
    assert "\\udce4\\n.tar bad: missing: no .json" in done.stdout
