"""The watchdog deletes in order and only as much as needed, and never through links."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from echo_eqx.cli import run
from echo_eqx.commands import watchdog
from echo_eqx.errors import EchoError
from echo_eqx.ops.disk import candidates
from echo_eqx.ops.disk.log import EventLog
from echo_eqx.ops.disk.watchdog import DiskWatchdog, WatchdogArgs

SCRIPT = Path(__file__).parents[1] / "scripts" / "watchdog.py"
PIECE = 2**18
PIECES = "0123456789abcdef-00000.safetensors"
ALL = 8 * 2**20 - 1
"""More than can ever be free on the small disk, so that all goes that may."""
DAY = 86400.0


@contextlib.contextmanager
def mounted(folder: Path):
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk") as folder:
        for name in ("runs", "cache", "hub"):
            (folder / name).mkdir()
        yield folder


@contextlib.contextmanager
def held(path: Path, kind: str = "LOCK_EX"):
    """A real other process holds a lock on `path`."""
    script = (
        "import fcntl, sys; file = open(sys.argv[1]); "
        f"fcntl.flock(file, fcntl.{kind}); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.communicate()


def fill(path: Path, age: float | None = None) -> Path:
    """A file of `PIECE` bytes; `age` in seconds, or None for a modification time of 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(PIECE))
    moment = 0.0 if age is None else time.time() - age
    os.utime(path, (moment, moment))
    return path


def shard(disk: Path, number: int, age: float | None = None, kind: str = "tar") -> Path:
    return fill(disk / "cache" / f"{number:024x}.{PIECE}.{kind}", age)


def step(run_dir: Path, number: int, complete: bool = True) -> Path:
    folder = run_dir / "checkpoints" / f"step_{number:09d}"
    fill(folder / PIECES, 0.0)
    if complete:
        (folder / "manifest.json").write_text("{}")
        fill(folder.with_suffix(".safetensors"), 0.0)
    return folder


def revision(disk: Path, repo: str, commit: str, days: float) -> Path:
    """A revision of one file in the Hub's cache."""
    folder = disk / "hub" / f"models--owner--{repo}"
    blob = fill(folder / "blobs" / f"blob-{commit}", days * DAY)
    snapshot = folder / "snapshots" / (commit * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "weights.bin").symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Watched:
    """A watchdog for the small disk, and its log."""

    def __init__(self, disk: Path, free: int, keep: tuple[int, int] = (1, 0), **args: Any):
        self._log = disk.parent / "log.jsonl"
        self._dog = DiskWatchdog(
            WatchdogArgs(
                free_gb=free / 1e9,
                runs=(disk / "runs",),
                cache_dir=disk / "cache",
                hub_cache=disk / "hub",
                keep_last=keep[0],
                keep_every=keep[1],
                log=self._log,
                **args,
            )
        )

    def check(self) -> bool:
        return self._dog.check()

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def paths(self, *events: str) -> list[Path]:
        return [Path(x["path"]) for x in self.lines if x["event"] in (events or ("deleted",))]


def fill_with_everything(disk: Path) -> tuple[list[Path], list[Path]]:
    """Fill the disk; returns what may be deleted, in order, and what must be kept."""
    runs = disk / "runs"
    stay = [shard(disk, 1, age=9 * DAY), shard(disk, 2, age=60, kind="part")]
    goes = [shard(disk, 3), shard(disk, 4), shard(disk, 5, age=2 * 3600, kind="part")]
    goes.append(revision(disk, "used", "a", days=9))
    stay.append(revision(disk, "used", "b", days=1))
    goes.append(revision(disk, "unused", "c", days=20).parents[1])
    goes.append(step(runs / "one", 10, complete=False))
    goes += [step(runs / "one", 20), step(runs / "two", 5), step(runs / "one", 30)]
    for i, folder in enumerate(goes[-3:]):
        os.utime(folder / "manifest.json", (1000.0 + i, 1000.0 + i))
    stay += [step(runs / "one", n) for n in (25, 40, 50)]
    stay += [step(runs / "two", n) for n in (8, 9)]
    return goes, stay


RULE = 2, 25


def test_deletable_things_are_deleted_in_order_and_nothing_else(disk):
    goes, stay = fill_with_everything(disk)
    watched = Watched(disk, ALL, RULE)
    assert not watched.check()
    assert watched.paths() == goes
    assert not any(os.path.lexists(path) for path in goes)
    assert not goes[-1].with_suffix(".safetensors").exists()
    assert all(path.exists() for path in stay)
    assert (stay[-1].with_suffix(".safetensors")).exists()
    for line in watched.lines[:-1]:
        assert line["free_after"] - line["free_before"] >= line["bytes"] >= PIECE
        assert line["time"].endswith("Z") and line["reason"]
    last = watched.lines[-1]
    assert last["event"] == "check" and last["deleted"] == len(goes) and not last["enough"]
    assert last["bytes"] == sum(line["bytes"] for line in watched.lines[:-1])


def test_it_stops_as_soon_as_enough_is_free(disk):
    goes, _ = fill_with_everything(disk)
    free = shutil.disk_usage(disk).free
    watched = Watched(disk, free + PIECE + PIECE // 2, RULE)
    assert watched.check()
    assert watched.paths() == goes[:2] and watched.lines[-1]["enough"]
    count = len(watched.lines)
    assert watched.check() and len(watched.lines) == count


def test_a_dry_run_logs_once_and_deletes_nothing(disk):
    goes, stay = fill_with_everything(disk)
    before = shutil.disk_usage(disk).free
    dry = Watched(disk, ALL, RULE, dry_run=True)
    dry.check()
    count = len(dry.lines)
    dry.check()
    assert len(dry.lines) == count
    assert dry.paths("would_delete") == goes and not dry.paths("deleted")
    assert all(path.exists() for path in goes + stay)
    assert shutil.disk_usage(disk).free == before
    wet = Watched(disk, before + 5 * PIECE, RULE)
    dry = Watched(disk, before + 5 * PIECE, RULE, dry_run=True)
    start = len(dry.lines)
    assert dry.check() and wet.check()
    assert dry.lines[start]["free_after"] == before + PIECE
    assert dry.paths("would_delete")[len(goes) :] == wet.paths() == goes[:5]


def test_the_newest_complete_checkpoint_and_newer_ones_are_kept(disk):
    run_dir = disk / "runs" / "one"
    steps = [step(run_dir, n) for n in (1, 2, 3)]
    newer = step(run_dir, 4, complete=False)
    fresh = step(disk / "runs" / "fresh", 7, complete=False)
    checkpoints = run_dir / "checkpoints"
    later = fill(checkpoints / "damaged_step_000000009_0a1b2c" / "manifest.json")
    notes = [fill(checkpoints / "step_000000001_mine" / "notes"), fill(checkpoints / "notes")]
    watched = Watched(disk, ALL)
    assert not watched.check()
    assert watched.paths() == steps[:2]
    assert all(path.exists() for path in (steps[2], newer, fresh, later, *notes))


def test_leftovers_are_kept_while_the_run_is_alive(disk):
    run_dir = disk / "runs" / "one"
    leftovers = [
        step(run_dir, 1, complete=False),
        fill(run_dir / "checkpoints" / "damaged_step_000000002_0a1b2c" / "manifest.json").parent,
        fill(run_dir / "checkpoints" / ".step_000000004.safetensors.x7_yabcd"),
    ]
    old, newest = step(run_dir, 5), step(run_dir, 6)
    (run_dir / ".lock").touch()
    watched = Watched(disk, ALL)
    with held(run_dir / ".lock"):
        watched.check()
        assert watched.paths() == [old]
        assert all(path.exists() for path in leftovers)
    watched.check()
    assert watched.paths() == [old, *leftovers]
    assert newest.is_dir() and newest.with_suffix(".safetensors").exists()


@pytest.mark.parametrize("kind", ["LOCK_SH", "LOCK_EX"])
def test_files_held_by_another_process_are_kept(disk, kind):
    paths = [shard(disk, 1), shard(disk, 2, age=DAY, kind="part")]
    snapshot = revision(disk, "used", "a", days=9)
    revision(disk, "used", "b", days=1)
    lock = disk / "hub" / ".locks" / "models--owner--used" / "etag.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    checkpoint = step(disk / "runs" / "one", 1)
    step(disk / "runs" / "one", 2)
    watched = Watched(disk, ALL)
    with contextlib.ExitStack() as stack:
        for path in (*paths, lock, checkpoint / PIECES):
            stack.enter_context(held(path, kind))
        assert not watched.check()
        assert watched.paths() == [] and all(path.exists() for path in (*paths, checkpoint))
        assert snapshot.is_dir()
    watched.check()
    assert watched.paths() == [*paths, snapshot, checkpoint]


def test_links_are_not_followed(disk, tmp_path):
    outside = tmp_path / "outside"
    runs, cache, hub = disk / "runs", disk / "cache", disk / "hub"
    for n in (1, 2, 3):  # a run elsewhere, linked to in three ways
        step(outside / "run", n)
    links = {runs / "linked": outside / "run"}
    for n in (8, 9):
        step(runs / "own", n)
    links[runs / "own" / "checkpoints" / "step_000000001"] = outside / "run/checkpoints/step_1"
    (runs / "half").mkdir()
    links[runs / "half" / "checkpoints"] = outside / "run" / "checkpoints"
    (outside / "run/checkpoints/step_1").mkdir()
    fill(outside / "run/checkpoints/step_1/manifest.json")
    links[cache / f"{7:024x}.{PIECE}.tar"] = fill(outside / "a.tar")
    revision(disk, "used", "b", days=1)
    out = revision(disk, "used", "a", days=9)
    links[out / "victim"] = fill(outside / "blob", 9 * DAY)
    shutil.copytree(hub / "models--owner--used", outside / "models--o--r", symlinks=True)
    for snapshot in list((outside / "models--o--r" / "snapshots").iterdir()):
        snapshot.rename(snapshot.with_name(snapshot.name.upper()))  # hashes differ by repository
    links[hub / "models--o--r"] = outside / "models--o--r"
    for link, target in links.items():
        link.symlink_to(target)
    before = sorted(outside.rglob("*"))
    watched = Watched(disk, ALL)
    watched.check()
    assert watched.paths() == [runs / "own" / "checkpoints" / "step_000000008"]
    assert sorted(outside.rglob("*")) == before
    assert all(link.is_symlink() for link in links)


def test_an_error_is_logged_once_and_the_next_candidate_deleted(disk, monkeypatch):
    steps = [step(disk / "runs" / "one", n) for n in (1, 2, 3, 4)]
    delete = candidates._delete_checkpoint

    def hindered(path: Path) -> None:
        if path == steps[0]:
            raise PermissionError(13, "Permission denied")
        if path == steps[1]:
            delete(path)  # as if another watchdog were quicker
        delete(path)

    monkeypatch.setattr(candidates, "_delete_checkpoint", hindered)
    watched = Watched(disk, ALL)
    for _ in range(3):
        watched.check()
    assert watched.paths("error") == [steps[0]] and watched.paths() == [steps[2]]
    assert [line["event"] for line in watched.lines] == ["error", "deleted", "check"]


def test_a_log_on_a_full_disk_goes_to_stderr(disk, capfd):
    log = EventLog(disk / "log.jsonl")
    log.write(event="first")
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PIECE))
    log.write(event="second", path="x" * 9000)
    assert json.loads(capfd.readouterr().err)["event"] == "second"
    (disk / "ballast").unlink()
    log.write(event="third")
    lines = (disk / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "third"]


def test_sigterm_stops_it_and_a_shortage_is_logged_once(disk):
    old = step(disk / "runs" / "one", 1)
    step(disk / "runs" / "one", 2)
    flags = ["--free_gb", "0.0083", "--runs", disk / "runs", "--keep_last", "1", "--every", "0.05"]
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = [json.loads(process.stdout.readline()) for _ in range(2)]
        time.sleep(0.5)
        process.terminate()
        rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and rest == ""
    assert [line["event"] for line in first] == ["deleted", "check"]
    assert first[0]["path"] == str(old) and not first[1]["enough"]


@pytest.fixture
def command(monkeypatch, capfd):
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            run(watchdog.main)
        return ended.value.code, *capfd.readouterr()  # pyright: ignore[reportReturnType]

    return call


def test_the_exit_code_of_once_says_whether_enough_is_free(command, disk):
    consumed = shard(disk, 1)
    code, out, _ = command("--free_gb", "0.008388", "--cache_dir", disk / "cache", "--once")
    assert code == 0 and not consumed.exists()
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["deleted", "check"]
    shard(disk, 2, age=60)
    code, out, _ = command("--free_gb", "0.008388", "--cache_dir", disk / "cache", "--once")
    assert code == 1 and json.loads(out)["deleted"] == 0


def test_bad_input_gives_one_line_errors(command, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for flags, code, said in [
        ([], 2, "expected --runs, --cache_dir or --hub_cache, got none of them"),
        (
            ["--runs", tmp_path / "none"],
            1,
            f"--runs {tmp_path / 'none'}: expected a folder, got no",
        ),
        (["--cache_dir", SCRIPT], 1, f"--cache_dir {SCRIPT}: expected a folder, got a file"),
        (["--hub_cache", link], 1, f"--hub_cache {link}: expected a folder, got a link"),
        (["--runs", tmp_path, "--free_gb", "0"], 2, "--free_gb: expected a positive number, got 0"),
        (["--runs", tmp_path, "--free_gb", "nan"], 2, "--free_gb: expected a positive number, got"),
        (["--runs", tmp_path, "--free_gb", "1e9"], 2, "--free_gb: expected less than "),
        (["--runs", tmp_path, "--keep_last", "0"], 2, "--keep_last: expected at least 1, got 0"),
        (["--runs", tmp_path, "--every", "0"], 2, "--every: expected a positive number, got 0.0"),
        (["--runs", tmp_path, "--log", tmp_path / "no" / "log"], 1, "cannot write the log"),
    ]:
        found, out, err = command(*flags)
        assert (found, out) == (code, "") and err.startswith(f"error: {said}"), err
        assert len(err.splitlines()) == 1


def test_an_unwritable_log_is_rejected(tmp_path):
    with pytest.raises(EchoError, match=r"cannot write the log .*: Is a directory"):
        EventLog(tmp_path)
