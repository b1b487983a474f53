"""Whatever a file contains, reading it succeeds or gives a one-line error, within seconds.

Small valid files are made here, then changed at random: bits flipped, ends cut off, blocks moved,
numbers and names replaced. The seed is printed; ECHO_FUZZ_SEED repeats a run.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import soundfile as sf
from conftest import GOLDEN, random_model
from safetensors.numpy import load_file, save_file
from shards import make_dataset

import echo_eqx
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig, DiTConfig, EncoderConfig
from echo_eqx.data.audio import load_audio
from echo_eqx.data.records import BrokenRecord, load_silence, read_sample
from echo_eqx.data.tar_index import index_tar
from echo_eqx.errors import EchoError
from echo_eqx.json_data import to_json
from echo_eqx.model.dit import EchoDiT
from echo_eqx.ops.runs import Run
from echo_eqx.prepare.clips import list_clips
from echo_eqx.prepare.write import write_silence
from echo_eqx.train.config import TRAIN_PRESETS
from echo_eqx.train.settings import saved_settings, settings_from_json
from echo_eqx.trees import named_leaves
from echo_eqx.weights.checkpoint.reader import (
    TrainingCheckpoint,
    find_checkpoints,
    manifest_checksum,
    open_verified,
)
from echo_eqx.weights.checkpoint.retention import Retention
from echo_eqx.weights.checkpoint.writer import CheckpointWriter
from echo_eqx.weights.names import to_pytorch

SECONDS = 20.0
"""Of this process's time that a case may take at most; most take milliseconds."""
MEMORY = 4 * 2**30
"""Bytes beyond what is in use that the thorough run may take."""
DIT = DiTConfig(
    model_dim=8,
    num_layers=1,
    num_heads=2,
    mlp_dim=8,
    text=EncoderConfig(4, 1, 2, 4),
    speaker=EncoderConfig(4, 1, 2, 4),
    latent_dim=4,
    time_embed_dim=4,
    adaln_rank=2,
)
CODEC = CodecConfig(
    encoder_dim=2,
    encoder_rates=(2,),
    hidden_dim=4,
    latent_dim=4,
    decoder_dim=4,
    decoder_rates=(2,),
    watermark=None,
)


class State(NamedTuple):
    """The state that checkpoints are made of."""

    step: jax.Array
    model: EchoDiT


class Target(NamedTuple):
    """A reader to test: `make` writes valid files to a folder, `read` reads them."""

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    cases: int
    exact: bool = False
    """Whether damage is always found: what can be read is what was written."""


def make_pytorch(folder: Path) -> None:
    dit = random_model(EchoDiT, DIT)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(dit).items()}
    tensors = {name: leaf.copy() for name, leaf in to_pytorch(leaves, DIT).items()}
    save_file(tensors, folder / "model.safetensors")


def make_parts(folder: Path) -> None:
    make_pytorch(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({f"module.{name}": tensors[name] for name in names[i::2]}, folder / file)
        where |= {f"module.{name}": file for name in names[i::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def make_checkpoint(folder: Path, step: int = 2) -> None:
    writer = CheckpointWriter(
        folder, launch_id="0a" * 8, process=0, num_processes=1, retention=Retention(), export=True
    )
    state = State(jax.device_put(np.int32(step)), random_model(EchoDiT, DIT))
    manifest = {"step": step, "samples_seen": 8, "model": to_json(DIT), "seed": 0, "data": {}}
    writer.save(state, manifest, {"0": [0, 0, step]})
    writer.wait()


def make_list(folder: Path) -> None:
    sf.write(folder / "a.wav", np.sin(np.arange(4000) / 9), 16_000)
    segments = [{"start": 0.0, "end": 0.1, "text": "One."}, {"start": 0.1, "end": 0.2, "text": "2"}]
    fields = {"audio": "a.wav", "text": "One two.", "speaker": "x", "segments": segments}
    lines = [json.dumps(fields), json.dumps({"audio": "a.wav", "text": "Three.", "start": 0.05})]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")


def make_table(folder: Path) -> None:
    make_list(folder)
    (folder / "list.jsonl").unlink()
    (folder / "list.csv").write_text('audio,text,speaker\na.wav,One.,x\na.wav,"Two, three.",y\n')


def make_parquet(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    make_list(folder)
    audio = [{"bytes": (folder / "a.wav").read_bytes(), "path": "a.wav"}]
    for name in ("a.wav", "list.jsonl"):
        (folder / name).unlink()
    parquet.write_table(arrow.table({"audio": audio, "text": ["One."]}), folder / "a.parquet")


def make_monitored(folder: Path) -> None:
    lines = [json.dumps({"step": i, "loss": 1 / (i + 1), "updated": True}) for i in range(9)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text(json.dumps({"num_steps": 9, "run_dir": "x"}))


def make_settings(folder: Path) -> None:
    settings = to_json(TRAIN_PRESETS["tiny"])
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


def make_silence(folder: Path) -> None:
    write_silence(folder / "silence.safetensors", np.zeros((3, 4)), {"id": "0" * 64})
    np.save(folder / "silence.npy", np.zeros((3, 4), np.float16))


def read_list(folder: Path) -> object:
    (path,) = (path for path in folder.iterdir() if path.suffix != ".wav")
    clips, _ = list_clips(str(path), max_seconds=30.0, cache=folder / "cache")
    return [clip.load(8000).shape for clip in clips]


def read_shards(folder: Path) -> object:
    read = 0
    for entry in index_tar(folder / "00000.tar"):
        with (folder / "00000.tar").open("rb") as file, contextlib.suppress(BrokenRecord):
            read += len(read_sample(file.fileno(), entry, 4).latents)
    return read


def read_monitored(folder: Path) -> object:
    run = Run(folder)
    return json.dumps([run.status(), run.text("config.json"), run.metrics.update(0, {}, 1.0)])


def read_settings(folder: Path) -> object:
    return settings_from_json(TRAIN_PRESETS, "1.3B", *saved_settings(folder))


def read_silence(folder: Path) -> object:
    for path in sorted(folder.iterdir()):
        load_silence(path, 4)


def read_audio(folder: Path) -> object:
    (path,) = folder.iterdir()
    return load_audio(path, 16_000)


def one_of_audio(folder: Path) -> None:
    sf.write(folder / "a.flac", np.sin(np.arange(3000) / 9), 16_000)


def rounded_weights(folder: Path) -> Any:
    """Weights in bfloat16: if an export is damaged, the float32 weights it came from are loaded."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), echo_eqx.load_dit(folder))


def export_of(folder: Path) -> Any:
    return echo_eqx.load_dit(folder / "checkpoints" / "step_000000002.safetensors")


def copied(path: Path) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(path, folder)


TARGETS = {
    "dit": Target(
        lambda f: echo_eqx.save(random_model(EchoDiT, DIT), f), echo_eqx.load_dit, 24, exact=True
    ),
    "int8": Target(
        lambda f: echo_eqx.save(random_model(EchoDiT, DIT), f, dtype="int8"),
        echo_eqx.load_dit,
        10,
        exact=True,
    ),
    "codec": Target(
        lambda f: echo_eqx.save(random_model(DACVAE, CODEC), f / "codec.safetensors"),
        echo_eqx.load_codec,
        10,
        exact=True,
    ),
    "pytorch": Target(make_pytorch, echo_eqx.load_dit, 14),
    "parts": Target(make_parts, echo_eqx.load_dit, 14),
    "flax": Target(copied(GOLDEN / "dit_tiny" / "weights_only.pkl"), echo_eqx.load_dit, 16),
    "torch": Target(
        copied(GOLDEN / "dacvae_tiny" / "weights.pth"), echo_eqx.load_codec, 14, exact=True
    ),
    "checkpoint": Target(make_checkpoint, rounded_weights, 20, exact=True),
    "export": Target(make_checkpoint, export_of, 10, exact=True),
    "shard": Target(lambda f: make_dataset(f, 1, 3, latent_dim=4, frames=(2, 9)), read_shards, 20),
    "silence": Target(make_silence, read_silence, 8),
    "audio": Target(one_of_audio, read_audio, 6),
    "list": Target(make_list, read_list, 12),
    "table": Target(make_table, read_list, 6),
    "parquet": Target(make_parquet, read_list, 4),
    "settings": Target(make_settings, read_settings, 6),
    "monitor": Target(make_monitored, read_monitored, 6),
}
TOKENS = [b"[" * 5000, b'{"a":' * 3000, b"1e999", b"NaN", b"-1", b"9" * 401, b'"', b"\0" * 64]
TOKENS += [b"\xff" * 8, b"\xff\xfe", b"null", b"[]", b"{}", b"\n", b"..", b"\x80\x04", b"16777215"]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three random changes, half of them near the start, in the headers."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        end = len(out) if rng.random() < 0.5 else min(len(out), 2000)
        at = rng.randrange(max(end, 1))
        size = rng.choice((1, 2, 8, 64, 500))
        match rng.randrange(7):
            case 0 | 1 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:]
            case 3:
                del out[at : at + size]
            case 4:
                source = rng.randrange(max(len(out), 1))
                out[at : at + size] = out[source : source + size]
            case 5:
                out[at : at + rng.choice((0, 1, size))] = rng.choice(TOKENS)
            case 6:
                digits = [i for i, byte in enumerate(out[:5000]) if chr(byte).isdigit()]
                if digits:
                    place = rng.choice(digits)
                    out[place : place + 1] = rng.choice((b"0", b"9", b"-1", b"99999999", b"1e9"))
    return bytes(out)


def run_cases(target: Target, cases: int, seed: int, valid: Path, work: Path) -> int:
    """Run the cases; returns how many could be read."""
    target.make(valid)
    expected = target.read(valid)
    files = sorted(path.relative_to(valid) for path in valid.rglob("*") if path.is_file())
    read = 0
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        where = f"seed {seed}, case {case}"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(valid, work)
        file = work / rng.choice(files)
        file.write_bytes(mutated(file.read_bytes(), rng))
        started = time.process_time()
        try:
            result = target.read(work)
        except (EchoError, BrokenRecord) as error:
            assert len(str(error)) < 2000, where
        except BaseException as error:
            raise AssertionError(f"{where}: {file.name} raised {type(error).__name__}") from error
        else:
            read += 1
            if target.exact:
                assert same(result, expected), f"{where}: {file.name} is read as other weights"
        assert time.process_time() - started < SECONDS, where
    return read


def same(a: Any, b: Any) -> bool:
    ours, theirs = named_leaves(a), named_leaves(b)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("ECHO_FUZZ_SEED") or random.SystemRandom().randrange(10**6))


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_correctly_or_rejected_in_one_line(name, seed, tmp_path):
    started = time.process_time()
    read = run_cases(
        TARGETS[name], TARGETS[name].cases, seed, fresh(tmp_path / "valid"), tmp_path / "work"
    )
    took = time.process_time() - started
    print(f"{name}: {TARGETS[name].cases} cases of seed {seed}, {read} read, {took:.1f} s")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("name", TARGETS)
def test_thousands_of_damaged_files_are_read_correctly_or_rejected(name, seed, tmp_path):
    cases = 25 * TARGETS[name].cases
    with bounded_memory():
        read = run_cases(TARGETS[name], cases, seed, fresh(tmp_path / "valid"), tmp_path / "work")
    print(f"{name}: {cases} cases of seed {seed}, {read} read")


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_there_are_200_cases_by_default_and_5000_slow_ones():
    assert sum(target.cases for target in TARGETS.values()) == 200


def newest_verified(folder: Path, said: list[str]) -> TrainingCheckpoint | None:
    for step, path in find_checkpoints(folder):
        try:
            return open_verified(step, path)
        except EchoError as error:
            said.append(f"{path}: {error}")
    return None


def test_a_flipped_bit_in_a_pieces_header_falls_back_to_the_previous_checkpoint(tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    (pieces,) = (tmp_path / "checkpoints" / "step_000000004").glob("*.safetensors")
    data = pieces.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    said: list[str] = []
    for place in range(0, header, 211):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        pieces.write_bytes(flipped)
        said.clear()
        found = newest_verified(tmp_path / "checkpoints", said)
        assert found is not None and len(said) == (found.step == 2)
        if found.step == 4:  # the flip is in something that no one reads
            pieces.write_bytes(data)
            expected = TrainingCheckpoint(found.path)
            for name in found.tensors:
                assert np.array_equal(found.read(name), expected.read(name)), (place, name)


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Rewrite a manifest so that it is wrong but has a correct checksum."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    change(manifest)
    manifest["crc32"] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))


WEIGHT = "model.in_proj.weight"
ODD_MANIFESTS: dict[str, Callable[[dict], object]] = {
    "step infinite": lambda m: m.update(step=float("inf")),
    "step of 401 digits": lambda m: m.update(step=10**400),
    "step a float": lambda m: m.update(step=4.0),
    "step true": lambda m: m.update(step=True),
    "step of another": lambda m: m.update(step=3),
    "step negative": lambda m: m.update(step=-4),
    "no step": lambda m: m.pop("step"),
    "no cursor": lambda m: m.pop("cursor"),
    "cursor a list": lambda m: m.update(cursor=[]),
    "cursor of text": lambda m: m.update(cursor={"0": "abc"}),
    "cursor negative": lambda m: m.update(cursor={"0": [0, 0, -1]}),
    "data a list": lambda m: m.update(data=[]),
    "settings a number": lambda m: m.update(settings=5),
    "tensors a list": lambda m: m.update(tensors=[]),
    "no tensors": lambda m: m.update(tensors={}),
    "no weights": lambda m: m["tensors"].pop(WEIGHT) and m["tensors"].update(x=5),
    "shape negative": lambda m: m["tensors"][WEIGHT].update(shape=[-4, -8]),
    "shape huge": lambda m: m["tensors"][WEIGHT].update(shape=[2**40, 2**40]),
    "shape nested": lambda m: m["tensors"][WEIGHT].update(shape=[[4], 8]),
    "dtype": lambda m: m["tensors"][WEIGHT].update(dtype=["float32"]),
    "pieces twice": lambda m: m["tensors"][WEIGHT]["pieces"].extend(m["tensors"][WEIGHT]["pieces"]),
    "box nested": lambda m: m["tensors"][WEIGHT]["pieces"][0].update(box=[[[0], 4], [0, 8]]),
    "file a number": lambda m: m["tensors"][WEIGHT]["pieces"][0].update(file=5),
    "file elsewhere": lambda m: m["tensors"][WEIGHT]["pieces"][0].update(file="../x.safetensors"),
    "kind a list": lambda m: m.update(model_kind=[]),
    "model deep": lambda m: m.update(model={"text": {"dim": {"a": [[]]}}}),
    "version a list": lambda m: m.update(version=[1]),
}


@pytest.mark.parametrize("odd", ODD_MANIFESTS)
def test_an_invalid_manifest_falls_back_to_the_previous_checkpoint(odd, tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    newest = tmp_path / "checkpoints" / "step_000000004"
    change_manifest(newest, ODD_MANIFESTS[odd])
    said: list[str] = []
    found = newest_verified(tmp_path / "checkpoints", said)
    assert found is not None and found.step == 2
    assert len(said) == 1 and "step_000000004" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("text", ["[" * 9000, '{"a":' * 9000, "", "null", "\xff", '{"a":1,"a":2}'])
def test_a_manifest_that_is_not_an_object_is_rejected(text, tmp_path):
    make_checkpoint(tmp_path)
    newest = tmp_path / "checkpoints" / "step_000000002"
    (newest / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(EchoError, match=r"manifest\.json cannot be used"):
        TrainingCheckpoint(newest)
