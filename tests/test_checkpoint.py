"""Checkpoints: atomic, verified, and resumable on any mesh."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, random_model
from test_sharding import CONFIG

import echo_eqx
from echo_eqx.config import DIT_PRESETS
from echo_eqx.errors import EchoError
from echo_eqx.json_data import to_json
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.mesh import make_mesh
from echo_eqx.sharding.specs import state_shardings
from echo_eqx.train.config import OptimizerConfig, TrainConfig
from echo_eqx.train.restore import _from_weights, init_or_restore, newest_restorable
from echo_eqx.train.run_folder import RunFolder
from echo_eqx.train.state import TrainState, init_train_state, sharded_abstract_state
from echo_eqx.trees import named_leaves
from echo_eqx.weights.checkpoint.reader import (
    TrainingCheckpoint,
    find_checkpoints,
    manifest_checksum,
)
from echo_eqx.weights.checkpoint.retention import Retention
from echo_eqx.weights.checkpoint.writer import (
    CheckpointWriter,
    clean_checkpoints,
    make_missing_export,
    prune_checkpoints,
    restore_state,
)

AVERAGED = OptimizerConfig(ema_decay=0.9)
MESHES = [(1, 4, 1), (2, 2, 2), (1, 2, 4)]


def mesh_of(shape):
    return make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))


@functools.cache
def make_state(shape=(1, 2, 2), seed: int = 0, optimizer=AVERAGED) -> TrainState:
    model = random_model(EchoDiT, CONFIG, seed=seed)
    state = init_train_state(model, optimizer)
    # All tensors differ.
    numbers = iter(range(1, 1000))
    state = jax.tree.map(lambda x: np.asarray(x) + np.asarray(next(numbers), x.dtype), state)
    return jax.device_put(state, state_shardings(state, mesh_of(shape)))


def writer_in(
    folder: Path, launch_id: str = 8 * "0a", retention=None, export=True
) -> CheckpointWriter:
    return CheckpointWriter(
        folder,
        launch_id=launch_id,
        process=0,
        num_processes=1,
        retention=retention or Retention(last=10),
        export=export,
    )


def save(folder: Path, step: int, state: TrainState, **options) -> Path:
    writer = writer_in(folder, **options)
    manifest = {"step": step, "samples_seen": 8 * step, "model": to_json(CONFIG), "seed": 0}
    writer.save(state, manifest, {"0": [0, 1, step]})
    writer.wait()
    return folder / "checkpoints" / f"step_{step:09d}"


def assert_same(a: TrainState, b: TrainState) -> None:
    ours, theirs = named_leaves(a), named_leaves(b)
    assert list(ours) == list(theirs)
    for name, leaf in ours.items():
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[name]).tobytes(), name


@pytest.mark.parametrize("there", MESHES)
@pytest.mark.parametrize("here", MESHES[:2])
def test_a_state_is_the_same_on_any_mesh(tmp_path, here, there):
    state = make_state(here)
    save(tmp_path, 3, state)
    checkpoint = newest_restorable(tmp_path)
    abstract = sharded_abstract_state(CONFIG, AVERAGED, mesh_of(there))
    restored = restore_state(checkpoint, abstract)
    assert_same(state, restored)
    assert restored.model.blocks.mlp.w1.weight.sharding.mesh.shape["data"] == there[0]
    assert checkpoint.manifest["cursor"] == {"0": [0, 1, 3]}
    assert (checkpoint.step, checkpoint.samples_seen) == (3, 24)


def test_each_device_reads_only_its_slices(tmp_path, monkeypatch):
    save(tmp_path, 1, make_state((1, 8, 1)))
    checkpoint = TrainingCheckpoint(tmp_path / "checkpoints" / "step_000000001")
    read = []
    original = TrainingCheckpoint.read
    monkeypatch.setattr(
        TrainingCheckpoint,
        "read",
        lambda self, name, index=None: (
            read.append(original(self, name, index).nbytes) or original(self, name, index)
        ),
    )
    abstract = sharded_abstract_state(CONFIG, AVERAGED, mesh_of((1, 8, 1)))
    restore_state(checkpoint, abstract)
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(abstract.model))
    assert max(read) <= largest / 8


def test_a_missing_ema_starts_from_the_weights(tmp_path):
    state = make_state(optimizer=OptimizerConfig())
    save(tmp_path, 1, state)
    abstract = sharded_abstract_state(CONFIG, AVERAGED, mesh_of((1, 2, 2)))
    restored = restore_state(newest_restorable(tmp_path), abstract)
    assert_same(state.model, restored.ema)


def test_load_dit_reads_checkpoint_export_and_run_folder(tmp_path):
    state = make_state()
    folder = save(tmp_path, 2, state)
    model = echo_eqx.load_dit(folder)
    assert model.config == CONFIG
    assert_same(model, state.ema)  # the EMA is used for generation
    export = folder.with_suffix(".safetensors")
    exported = echo_eqx.load_dit(tmp_path)
    assert_same(exported, echo_eqx.load_dit(export))
    expected = np.asarray(state.ema.in_proj.weight).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(exported.in_proj.weight, expected)
    stacked = np.asarray(state.ema.blocks.mlp.w1.weight).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(exported.blocks.mlp.w1.weight, stacked)
    export.unlink()
    assert_same(echo_eqx.load_dit(tmp_path), state.ema)


def bytes_read(call) -> int:
    """Bytes that `call` reads from files when called again: the first call imports and compiles."""
    call()
    count = lambda: int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # noqa: E731
    before = count()
    call()
    return count() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
def test_loading_a_run_reads_only_its_weights_and_only_once(tmp_path, monkeypatch):
    state = make_state()
    folder = save(tmp_path, 2, state)
    export = folder.with_suffix(".safetensors").stat().st_size
    (pieces,) = folder.glob("*.safetensors")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.ema))
    listed = pieces.stat().st_size - sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    listed += (folder / "manifest.json").stat().st_size
    assert export <= bytes_read(lambda: echo_eqx.load_dit(tmp_path)) < 1.1 * export
    assert weights <= bytes_read(lambda: echo_eqx.load_dit(folder)) < weights + 1.2 * listed
    monkeypatch.setitem(DIT_PRESETS, "small", CONFIG)
    config = TrainConfig(model="small", init_from=str(tmp_path), optimizer=AVERAGED)
    abstract = sharded_abstract_state(CONFIG, AVERAGED, mesh_of((1, 2, 2)))
    read = bytes_read(lambda: _from_weights(str(tmp_path), config, abstract))
    assert weights <= read < weights + 1.2 * listed


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def lose_a_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def break_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def lose_a_piece(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["model.in_proj.weight"]["pieces"].pop()
    rewritten(folder, manifest)


def change_the_cursor(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert '"samples_seen": 16' in text
    (folder / "manifest.json").write_text(text.replace('"samples_seen": 16', '"samples_seen": 17'))


def rewritten(folder: Path, manifest: dict) -> None:
    """Rewrite a manifest so that it is wrong but has a correct checksum."""
    del manifest["crc32"]
    manifest["crc32"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lead_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["model.in_proj.weight"]["pieces"][0]["file"] = "../../x.safetensors"
    rewritten(folder, manifest)


DAMAGES = [truncate, flip_a_bit, lose_a_file, break_the_manifest, lose_a_piece, lead_outside]
DAMAGES += [change_the_cursor]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(tmp_path, damage, capsys):
    state = make_state()
    save(tmp_path, 1, state)
    damage(save(tmp_path, 2, make_state(seed=1)))
    checkpoint = newest_restorable(tmp_path)
    assert checkpoint.step == 1
    said = capsys.readouterr().err
    assert "step_000000002 is damaged" in said and len(said.splitlines()) == 1
    abstract = sharded_abstract_state(CONFIG, AVERAGED, mesh_of((1, 2, 2)))
    assert_same(state, restore_state(checkpoint, abstract))


def damage_export(folder: Path) -> None:
    file = folder.with_suffix(".safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_of_a_run_are_reported_and_the_previous_ones_loaded(
    tmp_path, damage, caplog
):
    state, newer = make_state(), make_state(seed=1)
    save(tmp_path, 1, state, export=False)
    damage(save(tmp_path, 2, newer))
    step_2 = tmp_path / "checkpoints" / "step_000000002"
    exported = echo_eqx.load_dit(step_2.with_suffix(".safetensors"))
    assert_same(echo_eqx.load_dit(tmp_path), exported)  # nothing else of the checkpoint is read
    damage_export(step_2)
    caplog.clear()
    assert_same(echo_eqx.load_dit(tmp_path), state.ema)
    assert f"{step_2}.safetensors" in caplog.text
    assert caplog.text.count("trying the previous one") == 2


def test_if_all_checkpoints_are_damaged_the_run_does_not_start_over(tmp_path):
    flip_a_bit(save(tmp_path, 1, make_state()))
    with pytest.raises(EchoError, match=r"all 1 checkpoints in .* are damaged"):
        newest_restorable(tmp_path)


def test_damaged_later_checkpoints_are_set_aside_and_evict_nothing(tmp_path):
    for step in (1, 4, 6):
        folder = save(tmp_path, step, make_state(seed=step))
        if step > 1:
            flip_a_bit(folder)
    retention = Retention(last=1)
    save(tmp_path, 2, make_state(seed=2), retention=retention)
    assert newest_restorable(tmp_path).step == 2
    clean_checkpoints(tmp_path, newest_restorable(tmp_path))
    assert [step for step, _ in find_checkpoints(tmp_path / "checkpoints")] == [2]
    assert len(list((tmp_path / "checkpoints").glob("damaged_step_*"))) == 2
    exports = list((tmp_path / "checkpoints").glob("*.safetensors"))
    assert [path.stem for path in exports] == ["step_000000002"]


def test_retention_keeps_the_last_and_every_kth(tmp_path):
    state = make_state()
    for step in (2, 3, 5, 6, 7):
        save(tmp_path, step, state, retention=Retention(last=2, every=3))
    kept = [step for step, _ in find_checkpoints(tmp_path / "checkpoints")]
    assert kept == [7, 6, 3]
    exports = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.safetensors"))
    assert exports == [f"step_{step:09d}.safetensors" for step in (3, 6, 7)]


@pytest.fixture(scope="module")
def state() -> TrainState:
    return make_state()


def tree(folder: Path) -> dict[str, object]:
    """Everything below a folder: kind and content of each entry."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def add_foreign_files(checkpoints: Path, home: Path) -> None:
    """Add what a person may leave next to checkpoints, and links to a home folder."""
    for name in (".bashrc", ".ssh/id", "manifest.json", "notes.txt", f"{8 * '0a'}-00000.json"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mine")
    first = checkpoints / "step_000000001"
    for copy in ("step_000000001_backup", "step_1", "Step_000000001", "step_000000001.bak"):
        shutil.copytree(first, checkpoints / copy)
        (checkpoints / copy / "manifest.json").unlink()
    for name in (
        "step_notes.txt",
        "step_best.safetensors",
        "step_000000009.safetensors",  # its checkpoint was deleted by hand to save space
        "step_000000001.safetensors.bak",
        "step_000000001.safetensors.tmp12345",
        ".step_mine",
        ".step_000000001.safetensors.copy",
        ".step_000000001.safetensors.My_copy1",
        "step_000000001.json",
        "STEP_000000002.safetensors",
        "damaged_step_000000001",
    ):
        (checkpoints / name).write_text("mine")
    (checkpoints / "step_000000012").mkdir()  # has one of our names, but none of our files
    (checkpoints / "step_000000012" / "notes.txt").write_text("mine")
    (first / "why.txt").write_text("mine")
    (first / ".hidden").write_text("mine")
    for link in ("step_elsewhere", "step_000000013", "step_000000014.safetensors", ".step_home"):
        (checkpoints / link).symlink_to(home)
    (checkpoints / "step_gone").symlink_to(home / "nowhere")
    (home / "back").symlink_to(checkpoints)


def test_only_what_the_trainer_wrote_is_ever_deleted(tmp_path, state, capsys):
    run, home = tmp_path / "run", tmp_path / "home"
    for step in (1, 2, 3):
        save(run, step, state)
    checkpoints = run / "checkpoints"
    add_foreign_files(checkpoints, home)
    half = checkpoints / "step_000000002"
    (half / "manifest.json").unlink()
    (checkpoints / ".step_000000003.safetensors.ab_12cde").write_text("half")
    before, at_home = tree(checkpoints), tree(home)

    clean_checkpoints(run, newest_restorable(run))
    said = capsys.readouterr().err
    after = tree(checkpoints)
    gone = {name for name in before if name not in after}
    ours = {name for name in before if name.startswith("step_000000002")}
    # A link in the place of a later checkpoint was renamed and still has the same target.
    assert gone - ours == {".step_000000003.safetensors.ab_12cde", "step_000000013"}
    assert "step_000000013 is damaged" in said and len(said.splitlines()) == 1
    assert os.readlink(next(checkpoints.glob("damaged_step_000000013_*"))) == str(home)
    assert tree(home) == at_home

    # Retention: the first checkpoint is deleted, except for the notes in it.
    save(run, 4, state, retention=Retention(last=1))
    clean_checkpoints(run, newest_restorable(run))
    assert [step for step, _ in find_checkpoints(checkpoints)] == [4]
    first, third = checkpoints / "step_000000001", "step_000000003"
    assert sorted(path.name for path in first.iterdir()) == [".hidden", "why.txt"]
    at_end = tree(checkpoints)
    for name, content in after.items():
        ours = name.startswith(("step_000000001/", third)) or name == f"{first.name}.safetensors"
        assert ours or at_end[name] == content, name
    assert tree(home) == at_home


@pytest.mark.parametrize("complete", [True, False])
def test_linked_checkpoints_are_read_but_never_deleted(tmp_path, state, complete):
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2):
        save(other, step, state)
    there = other / "checkpoints" / "step_000000001"
    if not complete:
        (there / "manifest.json").unlink()
    save(run, 3, state)
    (run / "checkpoints" / there.name).symlink_to(there)
    before = tree(other)
    clean_checkpoints(run, newest_restorable(run))
    for step in (4, 5):
        save(run, step, state, retention=Retention(last=1))
    assert tree(other) == before

    # The whole folder is a link to that of another run.
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "checkpoints").symlink_to(other / "checkpoints")
    clean_checkpoints(linked, newest_restorable(linked))
    save(linked, 6, state, retention=Retention(last=1))
    assert before.items() <= tree(other).items()


def test_a_checkpoint_is_not_written_through_a_link(tmp_path, state):
    save(tmp_path / "run", 1, state)
    (tmp_path / "home").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_000000002").symlink_to(tmp_path / "home")
    with pytest.raises(EchoError, match=r"step_000000002: expected a folder, got a link"):
        save(tmp_path / "run", 2, state)
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_something_else_in_the_folders_place_is_reported(tmp_path, make):
    make(tmp_path / "checkpoints")
    with pytest.raises(EchoError, match=r"checkpoints: expected a folder, got something else"):
        clean_checkpoints(tmp_path, None)


def test_an_export_missing_after_a_kill_is_made(tmp_path, state):
    folder = save(tmp_path, 2, state)
    export = folder.with_suffix(".safetensors")
    written = export.read_bytes()
    export.unlink()
    make_missing_export(newest_restorable(tmp_path))
    assert export.read_bytes() == written


def test_a_copy_named_like_another_step_is_not_resumed_from(tmp_path, state, capsys):
    folder = save(tmp_path, 2, state)
    shutil.copytree(folder, folder.with_name("step_000000007"))
    assert newest_restorable(tmp_path).path == folder
    assert (
        "step_000000007 is damaged (expected step 7, as its name says, got step 2)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", '{"compilerOptions": {}}'),
        ("config.json", "[" * 9000),
        ("environment.json", "name: base"),
        ("metrics.jsonl", '{"epoch": 1}\n'),
        (".lock", "held by another tool"),
    ],
)
def test_a_run_never_overwrites_foreign_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(EchoError, match=rf"{name}: expected a file of a training run"):
        RunFolder(tmp_path, writes=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EchoError, match="expected a file of a training run"):
        RunFolder(tmp_path, writes=True)


CHANGES = ("replace", "fsync", "mkdir", "unlink", "rmdir", "chmod", "rename")
"""Calls by which a write becomes seen on disk."""


def freeze_at_change(monkeypatch, count: int) -> threading.Event:
    """Block the thread that makes the n-th change forever, as if it were killed there."""
    reached, here = threading.Event(), threading.current_thread()

    def counted(original):
        def call(*args, **kwargs):
            nonlocal count
            if threading.current_thread() is not here:
                count -= 1
                if count == 0:
                    reached.set()
                    threading.Event().wait()
            return original(*args, **kwargs)

        return call

    for name in CHANGES:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return reached


def test_one_checkpoint_is_complete_at_every_stage_of_writing(tmp_path, monkeypatch):
    states = {step: make_state(seed=step) for step in (1, 2)}
    manifest = {"step": 2, "samples_seen": 16, "model": to_json(CONFIG), "seed": 0}
    save(tmp_path / "one", 1, states[1])
    steps = []
    for count in range(1, 100):
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "one", folder)
        with monkeypatch.context() as patch:
            reached = freeze_at_change(patch, count)
            writer = writer_in(folder, retention=Retention(last=1))
            writer.save(states[2], manifest, {"0": [0, 0, 0]})
            while not reached.wait(0.01) and writer._thread.is_alive():
                pass
        checkpoint = newest_restorable(folder)
        for name, leaf in named_leaves(states[checkpoint.step]).items():
            assert checkpoint.read(name).tobytes() == np.asarray(leaf).tobytes(), name
        clean_checkpoints(folder, checkpoint)
        prune_checkpoints(folder, checkpoint.step, Retention(last=1))
        left = [path for path in (folder / "checkpoints").iterdir() if path.is_dir()]
        assert left == [checkpoint.path]
        steps.append(checkpoint.step)
        if not reached.is_set():
            break
    # Until the manifest is written the old checkpoint is the newest, then the new one.
    assert steps == sorted(steps) and 6 <= steps.count(1) <= len(steps) - 3


def test_pieces_of_a_killed_launch_are_not_reused(tmp_path):
    stale = make_state(seed=1)
    folder = save(tmp_path, 5, stale, launch_id=4 * "dead")
    (folder / "manifest.json").unlink()
    state = make_state(seed=2)
    save(tmp_path, 5, state, launch_id=8 * "0b")
    restored = restore_state(
        newest_restorable(tmp_path), sharded_abstract_state(CONFIG, AVERAGED, mesh_of((1, 2, 2)))
    )
    assert_same(restored, state)


def test_training_resumes_from_a_published_state(monkeypatch, golden_dit, dit_cases):
    path = GOLDEN / "dit_tiny" / "full_state.pkl"
    expected = np.load(GOLDEN / "dit_tiny" / "full_state_expect.npz")
    monkeypatch.setitem(DIT_PRESETS, "golden", golden_dit.config)
    config = TrainConfig(model="golden", resume_from=str(path), optimizer=AVERAGED)
    state, samples_seen, cursor = init_or_restore(config, None, mesh_of((2, 2, 2)))
    assert (int(state.step), int(state.adam.count), samples_seen, cursor) == (3, 3, 768, None)
    assert state.adam.mu.out_proj.weight.sharding == state.model.out_proj.weight.sharding
    mu = np.asarray(state.adam.mu.out_proj.weight)
    np.testing.assert_array_equal(mu, expected["mu_out_proj"])
    assert_same(state.model, state.ema)
    with pytest.raises(EchoError, match="expected an optimizer state in "):
        weights = GOLDEN / "dit_tiny" / "weights_only.pkl"
        config = dataclasses.replace(config, resume_from=str(weights))
        init_or_restore(config, None, mesh_of((2, 2, 2)))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_lack_of_space_is_reported_before_writing(small_disk):
    state = make_state()
    save(small_disk, 1, state)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**20))
    with pytest.raises(EchoError, match=r"expected 0\.00 GiB free in \S+ for a checkpoint, got"):
        save(small_disk, 2, state)
    assert newest_restorable(small_disk).step == 1


def test_a_disk_that_fills_up_while_writing_leaves_older_checkpoints(small_disk, monkeypatch):
    state = make_state()
    save(small_disk, 1, state)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**17))
    monkeypatch.setattr(CheckpointWriter, "_check_room", lambda self, state: None)
    with pytest.raises(EchoError, match=r"No space left on device; earlier .* are untouched"):
        save(small_disk, 2, state)
    assert newest_restorable(small_disk).step == 1
    clean_checkpoints(small_disk, None)
    assert [p.name for p in (small_disk / "checkpoints").iterdir() if p.is_dir()] == [
        "step_000000001"
    ]
