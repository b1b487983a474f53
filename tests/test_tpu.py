"""Pods and hosts, with fake gcloud and ssh programs whose workers are real local processes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echo_eqx.cli import run
from echo_eqx.commands import tpu
from echo_eqx.ops.pods import gcloud
from echo_eqx.ops.pods.shell import Shell
from echo_eqx.ops.pods.workers import Workers
from echo_eqx.sharding.hosts import code_digest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "tpu.py"
WORKER = ROOT / "echo_eqx" / "ops" / "pods" / "worker.py"

# One pod of several workers. Each has a home folder here, and what is run on it is really run.
STAND_IN = r'''
import fcntl, json, os, shutil, signal, sys, time
from pathlib import Path

ROOT = Path(os.environ["STAND_IN"])
NAME, ARGS = Path(sys.argv[0]).name, sys.argv[1:]
FLAGS = dict(a.partition("=")[::2] for a in ARGS if a.startswith("--"))
lock = (ROOT / "lock").open("a")
fcntl.flock(lock, fcntl.LOCK_EX)
with (ROOT / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([NAME, *ARGS]) + "\n")
PLAY = json.loads((ROOT / "play.json").read_text())
POD = ROOT / "pod.json"


def missing():
    fail(f"ERROR: {what} NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found.")


def fail(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)


def played(key):
    """Whether this is to happen now, which is one time less."""
    left = PLAY.get(key, 0)
    if left > 0:
        PLAY[key] = left - 1
        (ROOT / "play.json").write_text(json.dumps(PLAY))
    return left > 0


def end_processes():
    """As when the machines are gone."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={ROOT / 'homes'}".encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ValueError):
            pass


def remote(home, command):
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HOME": str(home)}
    if "worker.py start " in command and played(f"refuse {home.name}"):
        fail("ssh: connect to host 10.0.0.1 port 22: Connection refused", 255)
    drops = played("drop") if "worker.py status " in command else False
    again = played("again") if drops else False
    fcntl.flock(lock, fcntl.LOCK_UN)
    if drops:
        import subprocess

        # The connection breaks within a line.
        for _ in range(1):
            child = subprocess.Popen(
                ["sh", "-c", command], cwd=home, env=environment, stdout=subprocess.PIPE
            )
            data = b""
            while len(data) < 200 and (more := child.stdout.read1(1)):
                data += more
            os.write(1, data)
            child.kill()
        if again:  # gcloud connects once more by itself
            os.chdir(home)
            os.execve("/bin/sh", ["sh", "-c", command], environment)
        fail("client_loop: send disconnect: Broken pipe", 255)
    os.chdir(home)
    os.execve("/bin/sh", ["sh", "-c", command], environment)


if NAME in ("ssh", "scp"):
    rest = [a for a in ARGS if not a.startswith("-")]
    if NAME == "ssh":
        remote(ROOT / "homes" / rest[0], rest[1])
    host, _, target = rest[1].partition(":")
    (ROOT / "homes" / host).mkdir(parents=True, exist_ok=True)
    shutil.copy(rest[0], ROOT / "homes" / host / target)
    sys.exit()

group, verb, name = ARGS[2:5]
what = f"(gcloud.compute.tpus.{group}.{verb})"
if PLAY.get("logged_out"):
    fail(
        f"ERROR: {what} You do not currently have an active account selected.\n"
        "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials."
    )
pod = json.loads(POD.read_text()) if POD.exists() else None
if verb == "create":
    if pod:
        fail(f"ERROR: {what} ALREADY_EXISTS: Resource '{name}' already exists")
    number = len(list((ROOT / "homes").iterdir()))
    pod = {"name": name, "number": number, "looks": 0, "state": "WAITING"}
    POD.write_text(json.dumps(pod))
    sys.exit()
if verb == "scp":
    name = ARGS[5].partition(":")[0]
if pod is None or pod["name"] != name:
    missing()
if verb == "describe" and group == "tpu-vm":
    pod["looks"] += 1
    if pod["state"] == "WAITING" and pod["looks"] > PLAY.get("waits", 0):
        pod["state"] = "READY"
    POD.write_text(json.dumps(pod))
    if pod["state"] == "WAITING":
        missing()
    print(json.dumps({
        "name": f"projects/p/locations/z/nodes/{name}",
        "state": pod["state"],
        "health": "HEALTHY",
        "networkEndpoints": [{"ipAddress": f"10.0.0.{i}"} for i in range(PLAY.get("workers", 3))],
    }))
elif verb == "describe":
    states = {"WAITING": "WAITING_FOR_RESOURCES", "READY": "ACTIVE", "PREEMPTED": "SUSPENDED"}
    state = states[pod["state"]]
    error = {"failedData": {"error": {"message": "no capacity"}}} if state == "FAILED" else {}
    print(json.dumps({"name": name, "state": {"state": state, **error}}))
elif verb == "delete":
    if group == "queued-resources" and PLAY.get("no_queue"):
        missing()
    end_processes()
    POD.unlink()
else:
    if pod["state"] != "READY":
        fail(f"ERROR: {what} This TPU has terminal state {pod['state']}, so it cannot be used")
    home = ROOT / "homes" / f"pod{pod['number']}-{FLAGS['--worker']}"
    if verb == "scp":
        home.mkdir(parents=True, exist_ok=True)
        if played(f"refuse copy {home.name}"):
            fail("ssh: connect to host 10.0.0.1 port 22: Connection refused", 255)
        shutil.copy(ARGS[4], home / ARGS[5].partition(":")[2])
    else:
        remote(home, FLAGS["--command"])
'''

# In place of scripts/train.py: counts steps in a file, and does none of the arithmetic. The n-th
# start of a worker pauses at the n-th number in `pauses`. It exits with the code in `crash HOME`.
TRAIN = r"""
import os, signal, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
root, home = Path(os.environ["STAND_IN"]), Path.home()
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
saved = home / "saved"
step = int(saved.read_text()) if saved.exists() else 0
print("began after step", step, "as", *sys.argv[1:])
starts = root / f"starts {home.name[-1]}"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
pauses = [int(n) for n in (root / "pauses").read_text().split()]
count = len(starts.read_text())
pause = pauses[count - 1] if count <= len(pauses) else 10**9
crash = root / f"crash {home.name}"
if crash.exists():
    print("error: the data are broken")
    sys.exit(int(crash.read_text()))
while step < int(flags["--num_steps"]):
    if stopping:
        saved.write_text(str(step))
        print("saved at step", step)
        sys.exit(76)
    time.sleep(0.02)
    if step < pause:
        step += 1
        print("step", step)
"""

PYTHON = r"""#!/bin/sh
case "$*" in
*worker.py\ versions) cat "$HOME/versions.json" 2>/dev/null || echo '{"jax": "1"}' ;;
"-m echo_eqx"*) shift 3; exec REAL -uS "$STAND_IN/train.py" "$@" ;;
*) exec REAL -S "$@" ;;
esac
"""

UV = r"""#!/bin/sh
echo "$@" >>uv.log
if [ "$1" = venv ]; then mkdir -p echo_eqx/venv/bin; cp "$STAND_IN/python" echo_eqx/venv/bin; fi
"""


class World:
    """The folder of the fake programs, the command under test, and the calls made."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any):
        self.root, self._monkeypatch, self._capfd = root, monkeypatch, capfd
        self.run_dir = root / "shared" / "run"
        for name in ("bin", "homes", "me"):
            (root / name).mkdir(parents=True)
        self.play()
        self.write("train.py", TRAIN)
        self.write("pauses", "")
        self.write("python", PYTHON.replace("REAL", sys.executable), executable=True)
        self.write("bin/uv", UV, executable=True)
        for name in ("gcloud", "ssh", "scp"):
            self.write(f"bin/{name}", f"#!{sys.executable} -SE\n{STAND_IN}", executable=True)
        monkeypatch.setenv("STAND_IN", str(root))
        monkeypatch.setenv("HOME", str(root / "me"))
        monkeypatch.setenv("PATH", f"{root / 'bin'}:/usr/bin:/bin")

    def write(self, name: str, text: str, executable: bool = False) -> None:
        path = self.root / name
        path.write_text(text)
        path.chmod(0o755 if executable else 0o644)

    def play(self, **what: Any) -> None:
        self.write("play.json", json.dumps(what))

    def __call__(self, text: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `tpu.py` with these arguments."""
        arguments = [str(SCRIPT), *shlex.split(text.format(run=self.run_dir))]
        self._monkeypatch.setattr(sys, "argv", arguments)
        code = 0
        try:
            run(tpu.main)
        except SystemExit as ended:
            code = ended.code or 0
        return code, *self._capfd.readouterr()  # pyright: ignore[reportReturnType]

    def ok(self, text: str) -> str:
        code, out, err = self(text)
        assert code == 0, out + err
        return out + err

    @property
    def calls(self) -> list[list[str]]:
        path = self.root / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, *words: str) -> int:
        return sum(all(word in shlex.join(call) for word in words) for call in self.calls)

    def pod(self, state: str = "READY") -> None:
        """A pod that exists, with the package on its workers."""
        pod = {"name": "echo", "number": 0, "looks": 0, "state": state}
        self.write("pod.json", json.dumps(pod))
        for worker in range(3):
            self.home(f"pod0-{worker}")

    def home(self, name: str) -> Path:
        home = self.root / "homes" / name
        (home / "echo_eqx" / "venv" / "bin").mkdir(parents=True)
        (home / "echo_eqx" / "source").symlink_to(ROOT)
        shutil.copy(self.root / "python", home / "echo_eqx" / "venv" / "bin" / "python")
        return home

    def status(self, home: str, name: str = "echo") -> dict[str, Any]:
        command = [sys.executable, "-S", str(WORKER), "status", name, "-100"]
        environment = {**os.environ, "HOME": str(self.root / "homes" / home)}
        return json.loads(subprocess.check_output(command, env=environment))

    def statuses(self) -> list[dict[str, Any]]:
        return [self.status(f"pod0-{worker}") for worker in range(3)]

    def until(self, condition: Callable[[], Any], seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.02)

    def end_processes(self) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"HOME={self.root / 'homes'}".encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                pass


@pytest.fixture
def world(tmp_path, monkeypatch, capfd):
    world = World(tmp_path / "world", monkeypatch, capfd)
    yield world
    world.end_processes()


QUICK = "--settle 0 --poll 0.1 --pause 0.05 --tries 3"
LAUNCH = f"launch --name echo {QUICK} -- --data d --run_dir {{run}} --num_steps"


def test_create_requests_a_queued_resource_and_prints_the_command(world):
    flags = "--name echo --zone us-central2-b --project p --accelerator_type v4-64"
    more = "--spot --valid_until 6h --create_flags='--network=mine --labels=a=b'"
    out = world.ok(f"create {flags} {more}")
    (call,) = world.calls
    assert call == (
        "gcloud compute tpus queued-resources create echo --node-id=echo "
        "--accelerator-type=v4-64 --runtime-version=tpu-ubuntu2204-base --spot "
        "--valid-until-duration=6h --network=mine --labels=a=b --zone=us-central2-b --project=p "
        "--quiet"
    ).split(" ")
    assert out == shlex.join(call) + "\n"


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_tpu_generation_has_an_image(kind, image):
    args = gcloud.CreateArgs(name="echo", accelerator_type=kind)
    assert gcloud.runtime_version(args) == image


DRY = {
    "create --name echo --accelerator_type v4-8": ["queued-resources create echo"],
    "setup --name echo --before 'mount x'": [
        "scp",
        "mount x",
        "uv pip install",
        "worker.py versions",
    ],
    "launch --name echo -- --data d": ["start echo", "-m echo_eqx train --data d"],
    "status --name echo": ["status echo"],
    "logs --name echo": ["status echo"],
    "logs --name echo --follow": ["status echo"],
    "stop --name echo": ["end echo TERM"],
    "stop --name echo --now": ["end echo KILL"],
    "delete --name echo": ["queued-resources delete echo --force"],
    "launch --name echo --hosts a,b -- --data d": ["ssh", "--process_id 0", "--process_id 1"],
}


@pytest.mark.parametrize("command", DRY)
def test_a_dry_run_prints_and_calls_nothing(world, command):
    before, dashes, flags = command.partition(" -- ")
    code, out, _ = world(f"{before} --dry_run{dashes}{flags}")
    assert code == 0 and world.calls == []
    assert not (world.root / "me" / ".echo_eqx").exists()
    place = 0
    for said in DRY[command]:
        assert said in out[place:], out
        place = out.index(said, place)
    if "--hosts" not in command and "slurm" not in command:
        assert "--worker=all" in out or "--worker" not in out


def test_setup_copies_installs_and_compares(world):
    world.pod()
    shutil.rmtree(world.root / "homes")
    (world.root / "homes").mkdir()
    world.play(**{"refuse copy pod0-1": 2})
    said = world.ok("setup --name echo --pause 0 --before 'touch mounted'")
    assert "3 workers of echo have the same versions: jax 1" in said
    assert "copying the package on worker 1 of echo: ssh: connect to host" in said
    for worker in range(3):
        home = world.root / "homes" / f"pod0-{worker}"
        log = (home / "uv.log").read_text()
        assert "venv --quiet --python >=3.11,<3.14 echo_eqx/venv" in log
        assert "--python echo_eqx/venv/bin/python -e echo_eqx/source[tpu]" in log
        assert (home / "mounted").exists() and not list(home.glob("*.tar.gz"))
        source = home / "echo_eqx" / "source"
        assert (source / "scripts/train.py").read_bytes() == (
            ROOT / "scripts/train.py"
        ).read_bytes()
        assert (source / "echo_eqx/ops/page/page.js").exists()
        assert not list(source.rglob("__pycache__"))
    first = next(shlex.join(call) for call in world.calls if "scp" in call)
    assert "--worker=0" in first  # alone, since it may make the key
    world.ok("setup --name echo --pause 0")  # running it again is harmless


def test_setup_reports_the_worker_that_differs(world):
    world.pod()
    for home in (world.root / "homes").iterdir():
        (home / "echo_eqx" / "source").unlink()
    (world.root / "homes/pod0-2/versions.json").write_text('{"jax": "0.9"}')
    code, _, err = world("setup --name echo")
    assert code == 1
    assert err == (
        "error: worker 2 of echo: expected jax 1, as on worker 0, got 0.9; run setup again\n"
    )


def test_the_code_version_is_a_digest():
    found = json.loads(subprocess.check_output([sys.executable, "-P", str(WORKER), "versions"]))
    assert found["code of echo_eqx"] == code_digest() and found["jax"]


def test_a_run_lives_on_all_workers_until_it_is_stopped(world):
    world.pod()
    world.write("pauses", "9 9")
    said = world.ok(f"{LAUNCH} 1000")
    assert "the run is alive on 3 workers of echo" in said
    marks = {status["launch"] for status in world.statuses()}
    assert len(marks) == 1 and all(status["alive"] for status in world.statuses())
    calls = [call for call in world.calls if "worker.py start" in shlex.join(call)]
    assert len(calls) == 3 and all(shlex.join(call) in said for call in calls)

    code, _, err = world(f"{LAUNCH} 1000")
    assert code == 1 and "error: a run is alive on worker 0 of echo; stop it first" in err
    assert {status["launch"] for status in world.statuses()} == marks

    said = world.ok("status --name echo")
    assert "pod echo: READY" in said and said.count(": alive; ") == 3
    world.until(lambda: world.status("pod0-1")["lines"][-1] == "step 9")
    said = world.ok("logs --name echo --lines 2 --worker 1")
    assert "1| step 8\n1| step 9\n" in said and "\n0| " not in said

    code, _, err = world("setup --name echo")
    assert code == 1 and "a run is alive on worker 0 of echo; stop it first" in err
    code, _, err = world("delete --name echo")
    assert code == 1 and "a run is alive on worker 0 of echo; stop it first, or add --now" in err
    assert "worker 2: ended with code 76" in world.ok("stop --name echo --poll 0.05")
    for status in world.statuses():
        assert not status["alive"] and status["code"] == 76
        assert re.fullmatch(r"saved at step \d+", status["lines"][-1])
    world.ok("stop --name echo")  # nothing is left to stop

    world.ok(f"{LAUNCH} 100000")  # goes on
    assert "began after step" in world.ok("logs --name echo --lines 1000")
    assert "ended with code 137" in world.ok("stop --name echo --now --poll 0.05")
    world.ok("delete --name echo")
    assert not (world.root / "pod.json").exists()


def test_if_one_worker_fails_to_start_all_are_restarted(world):
    world.pod()
    world.play(**{"refuse pod0-2": 1})
    world.write("pauses", "9 9")
    said = world.ok(f"{LAUNCH} 1000")
    assert "worker 2 of echo did not start: ssh: connect to host 10.0.0.1 port 22" in said
    statuses = world.statuses()
    assert all(status["alive"] for status in statuses)
    assert len({status["launch"] for status in statuses}) == 1
    starts = [sum(line.startswith("--- ") for line in status["lines"]) for status in statuses]
    assert starts == [2, 2, 1]


def test_a_worker_that_never_starts_is_reported_and_nothing_stays_alive(world):
    world.pod()
    world.play(**{"refuse pod0-1": 9})
    code, _, err = world(f"{LAUNCH} 1000".replace("--tries 3", "--tries 2"))
    assert code == 1 and "worker 1 of echo did not start: ssh: connect to" in err.splitlines()[-1]
    assert "(2 tries); the run was stopped on the others" in err
    assert world.count("worker.py start", "--worker=1") == 2
    assert not any(status["alive"] for status in world.statuses())


def test_a_run_that_crashes_on_start_is_not_retried(world):
    world.pod()
    world.write("crash pod0-1", "1")
    code, _, err = world(f"{LAUNCH} 1000".replace("--settle 0", "--settle 90"))
    assert code == 1 and "1| error: the data are broken" in err
    assert "the run on worker 1 of echo ended with code 1 right after its start" in err
    assert world.count("worker.py start") == 3
    assert not any(status["alive"] for status in world.statuses())
    (world.root / "crash pod0-1").unlink()
    assert "the run is alive" in world.ok(f"{LAUNCH} 1")  # finishing at once is not an error


@pytest.mark.parametrize("again", [0, 1])
def test_followed_logs_print_each_line_once_despite_broken_connections(world, again):
    world.pod()
    world.play(drop=4, again=again)
    world.ok(f"{LAUNCH} 20")
    code, out, err = world("logs --name echo --follow --lines 1000 --poll 0.05")
    assert code == 0 and "worker 2 has ended with code 0" in err
    for worker in range(3):
        found = [line for line in out.splitlines() if line.startswith(f"{worker}| ")]
        log = (world.root / f"homes/pod0-{worker}/echo_eqx_runs/echo/log").read_text()
        assert found == [f"{worker}| {line}" for line in log.splitlines()]


def test_a_pod_without_a_queue_is_deleted_too(world):
    world.pod()
    world.play(no_queue=True)
    out = world.ok("delete --name echo")
    assert "gcloud compute tpus tpu-vm delete echo --quiet" in out
    assert not (world.root / "pod.json").exists()


def test_hosts_are_reached_by_ssh_and_get_the_coordinator(world):
    for host in ("a", "me@b"):
        world.home(host)
    hosts = "--name echo --hosts a,me@b"
    more = f"{QUICK} -- --data d --run_dir {{run}} --num_steps 100000"
    said = world.ok(f"launch {hosts} {more}")
    assert "the run is alive on 2 workers of echo" in said
    for worker, host in enumerate(("a", "me@b")):
        status = world.status(host, f"echo-{worker}")
        together = f"--coordinator a:8476 --num_processes 2 --process_id {worker}"
        assert status["alive"] and together in status["lines"][1]
    assert world.ok(f"status {hosts}").count(": alive; ") == 2
    assert "worker 1: ended with code 76" in world.ok(f"stop {hosts} --poll 0.05")
    code, out, _ = world(f"logs {hosts} --follow --lines 1 --poll 0.05")
    assert code == 0 and re.search(r"^1\| saved at step \d+$", out, re.M)
    assert "2 workers of echo have the same versions" in world.ok(
        f"setup {hosts} --extra ''".replace("a,me@b", "c,d")
    )
    assert "-e echo_eqx/source\n" in (world.root / "homes/d/uv.log").read_text()
    assert {call[0] for call in world.calls} == {"ssh", "scp"}


BAD = [
    ("create --name Echo --accelerator_type v4-8", 2, "--name: expected a letter, then up to"),
    (
        "create --name echo --accelerator_type v5e-16",
        2,
        "--accelerator_type: expected one of v2, v3, v4, v5litepod, v5p, v6e, such as v4-64, got ",
    ),
    (
        "create --name echo --accelerator_type v4-8 --create_flags '\"'",
        2,
        "cannot split --create",
    ),
    ("launch --name echo", 2, "expected the flags of train after --, got none"),
    ("launch --name echo --tries 0 -- --data d", 2, "--tries: expected at least 1, got 0"),
    ("launch --name echo --settle -1 -- --data d", 2, "--settle: expected at least 0, got -1.0"),
    ("launch --name echo -- --run_dir x", 2, "--data is missing; expected a folder of tar shards"),
    ("launch --name echo -- --data d --batch_size 0", 2, "batch_size: expected at least 1, got 0"),
    ("launch --name echo -- --data d --process-id=1", 2, "--process-id=1 is set on each worker"),
    ("launch --name echo -- --config x.json", 2, "--config is a file on this machine"),
    ("status --name echo -- --data d", 2, "expected no flags of train for this command, got -- --"),
    ("status --name echo --timeout 0", 2, "--timeout: expected a positive number, got 0.0"),
    ("status --name echo --timeout nan", 2, "--timeout: expected at least 0, got nan"),
    ("status --name echo --hosts a,,b", 2, "--hosts: expected names such as a,me@b,c, got ''"),
    ("status --name echo --hosts a,-oX", 2, "--hosts: expected names such as a,me@b,c, got '-oX'"),
    ("status --name echo --hosts a,a", 2, "--hosts: expected each host once, got a,a"),
    (
        "status --name echo --hosts a --coordinator b",
        2,
        "--coordinator: expected HOST:PORT, got",
    ),
    ("status --name echo --coordinator b:1", 2, "--coordinator needs --hosts"),
    ("logs --name echo --worker 3", 2, "--worker: expected 0 to 2, got 3"),
    ("status --name other", 1, "pod other does not exist; create it first"),
    ("stop --name other --zone z", 1, "pod other in z does not exist; create it first"),
    ("delete --name other", 1, "pod other does not exist; create it first"),
    ("logs --name echo --follow", 1, "worker 0 of echo has had no run"),
    (
        "stop --name echo --hosts fresh",
        1,
        "worker 0 of echo has no echo_eqx/source/echo_eqx/ops/po",
    ),
]


@pytest.mark.parametrize(("command", "code", "said"), BAD, ids=[said for _, _, said in BAD])
def test_bad_input_gives_one_line_errors(world, command, code, said):
    world.pod()
    found, out, err = world(command)
    lines = [line for line in err.splitlines() if not line.startswith("warning: --run_dir")]
    assert (found, len(lines)) == (code, 1) and lines[0].startswith(f"error: {said}"), out + err
    assert (world.root / "pod.json").exists() and "start echo" not in out


def test_a_missing_gcloud_or_account_gives_a_one_line_error(world, monkeypatch):
    for command in ("status --name echo", "create --name echo --accelerator_type v4-8"):
        world.play(logged_out=True)
        code, _, err = world(command)
        assert code == 1 and err.count("\n") == 1
        assert err.endswith(": gcloud is not logged in; run gcloud auth login\n")
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(world.root / "homes"))
            code, _, err = world(command)
        assert code == 1 and err.count("\n") == 1
        assert err.startswith("error: gcloud is not on PATH; install the Google Cloud CLI (https")


def test_a_pod_that_is_not_ready_is_not_launched_on(world):
    world.pod("PREEMPTED")
    code, _, err = world(f"{LAUNCH} 1")
    assert code == 1 and "expected pod echo to be READY, got PREEMPTED, queue: SUSPENDED" in err
    assert "pod echo: PREEMPTED, queue: SUSPENDED" in world.ok("status --name echo")


def test_a_run_dir_on_a_workers_own_disk_gives_a_warning(world):
    world.pod()
    for place, warned in [("runs/x", 1), ("/home/me/x", 1), ("/mnt/x", 0), ("/gcs/bucket/x", 0)]:
        said = world.ok(f"launch --name echo --dry_run -- --data d --run_dir {place}")
        assert said.count(f"warning: --run_dir {place} looks like a worker's own disk") == warned


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_the_real_gcloud_accepts_these_flags(tmp_path):
    pod = gcloud.CreateArgs(
        name="echo",
        zone="us-central2-b",
        project="mine",
        accelerator_type="v4-64",
        spot=True,
        valid_until="6h",
        create_flags="--network=n --service-account=a@b.c",
    )
    workers = Workers(Shell(), pod, ("0",), ("--internal-ip",), 9.0)
    commands = [
        pod.create_command(),
        pod.delete_command(),
        pod.describe_command("tpu-vm"),
        pod.describe_command("queued-resources"),
        pod.command("tpu-vm", "delete", "echo"),
        workers.command("1", ["sh", "-c", "echo $HOME"]),
        workers.copy_command("1", tmp_path / "a.tar.gz", "b.tar.gz"),
    ]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": shlex.join(command)} for command in commands]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        capture_output=True,
        text=True,
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "no_account")},
    )
    found = json.loads(done.stdout)
    assert [item["error_message"] for item in found] == [None] * len(commands)
