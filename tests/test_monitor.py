"""The monitor: reading a growing run, access control, and its page in a real browser."""

import http.client
import itertools
import json
import os
import runpy
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
from browser import start_chrome

pytest.importorskip("plotly")
pytest.importorskip("pyarrow")

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.curves import MAX_BUCKETS, MetricsFile
from echo_eqx.ops.monitor import MonitorServer, _read_plotly
from echo_eqx.ops.runs import MAX_SAMPLES, Run
from echo_eqx.train.run_folder import note_end

ROOT = Path(__file__).parent.parent


def line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, "loss": 1 + 1 / step, "lr": 1e-3} | values) + "\n"


def make_run(path: Path, steps: int = 30) -> Path:
    """A run folder as the trainer leaves it."""
    samples = path / "samples" / "step_000000010"
    samples.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model": "tiny", "num_steps": 100}))
    (path / "environment.json").write_text(json.dumps([{"host": "here"}]))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            more: dict[str, Any] = {"grad_norm": 0.5}
            if step % 10 == 0:
                more |= {
                    "time": time.time() - steps + step,
                    "step_time_s": 1.0,
                    "data_wait_fraction": 0.1,
                    "samples_per_second": 8.0,
                    "peak_memory_bytes": None,
                    "skipped_updates": 0,
                    "broken_records": 1,
                    "eval_loss": 1.5,
                    "eval_loss_by_time": [1.0, None],
                }
            file.write(line(step, **more))
    tone = 0.1 * np.sin(np.arange(3 * 24000) * 0.05)
    soundfile.write(samples / "0.wav", tone, 24000)
    soundfile.write(samples / "0.original.wav", tone, 24000)
    soundfile.write(samples / "0.ref.wav", tone, 24000)
    (samples / "0.txt").write_text("Said <b>plainly</b>.\n")
    return path


@contextmanager
def serving(root: Path, host: str = "127.0.0.1", token: str | None = None) -> Iterator[int]:
    server = MonitorServer(root, host, 0, token)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def get_json(port: int, path: str) -> Any:
    status, headers, body = ask(port, path)
    assert status == 200, body
    assert headers["Cache-Control"] == "no-store"
    return json.loads(body)


class Page:
    """What a page has of one file's curves after each refresh."""

    def __init__(self, path: Path):
        self.metrics = MetricsFile(path)
        self.version, self.curves, self.sent, self.unreadable = 0, {}, 0, 0

    def refresh(self) -> dict[str, Any]:
        while True:
            have = {name: (c["stride"], c["full"]) for name, c in self.curves.items()}
            news = self.metrics.update(self.version, have, 0.05)
            if news["version"] != self.version:
                self.curves = {}
            self.version, self.unreadable = news["version"], news["unreadable"]
            self.sent = 0
            for name, part in news["curves"].items():
                known = self.curves.get(name, {})
                for key in ("step", "mean", "low", "high"):
                    if key in part:
                        self.sent += len(part[key])
                        part[key] = known.get(key, [])[: part["start"]] + part[key]
                self.curves[name] = part
            if news["read"] == 1:
                return self.curves


def test_a_curve_holds_each_value_of_a_short_run(tmp_path: Path):
    curves = Page(make_run(tmp_path / "a") / "metrics.jsonl").refresh()
    assert curves["loss"]["step"] == list(range(1, 31))
    assert curves["loss"]["mean"] == pytest.approx([1 + 1 / step for step in range(1, 31)])
    assert curves["eval_loss"]["step"] == [10, 20, 30]
    assert curves["broken_records"]["mean"] == [1, 1, 1]
    assert "peak_memory_bytes" not in curves  # null on CPU


def test_a_refresh_sends_only_new_data(tmp_path: Path):
    file = make_run(tmp_path / "a") / "metrics.jsonl"
    page = Page(file)
    page.refresh()
    page.refresh()
    assert page.sent == 0
    with file.open("a") as out:
        out.write(line(31) + line(32))
    assert page.refresh()["loss"]["step"] == list(range(1, 33))
    assert page.sent == 2 * 2 * 2  # step and mean of two steps, in loss and lr


def test_a_half_written_line_is_read_later(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(1) + line(2)[:20])
    page = Page(file)
    assert page.refresh()["loss"]["step"] == [1]
    with file.open("a") as out:
        out.write(line(2)[20:])
    assert page.refresh()["loss"]["step"] == [1, 2]
    assert page.unreadable == 0


BROKEN = ['{"step": 2, "lo', "", "[2]", "nonsense", '{"loss": 1}', '{"step": 2, "loss": "x"}']


@pytest.mark.parametrize("broken", [*BROKEN, '{"step": 2}{"step": 3}', "\0\0", "[" * 100_000])
def test_unreadable_lines_are_counted_and_skipped(tmp_path: Path, broken: str):
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(1) + broken + "\n" + line(3))
    page = Page(file)
    assert page.refresh()["loss"]["step"] == [1, 3]
    assert page.unreadable == 1


@pytest.mark.parametrize("regrown", [0, 40])
def test_a_truncated_file_is_read_again(tmp_path: Path, regrown: int):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line(step) for step in range(1, 31)))
    page = Page(file)
    page.refresh()
    # A resumed run cuts lines off, and may be longer than before at the next look.
    steps = range(1, 11 + regrown)
    file.write_text("".join(line(s, loss=1.0 if s < 11 else 2.0) for s in steps))
    curve = page.refresh()["loss"]
    assert curve["step"] == list(steps)
    assert curve["mean"] == [1.0] * 10 + [2.0] * regrown


def test_nonfinite_and_huge_values_become_gaps(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    values = enumerate([1.0, np.nan, np.inf, 1e300, 2.0], 1)
    file.write_text("".join(line(s, loss=x) for s, x in values))
    curve = Page(file).refresh()["loss"]
    assert curve["mean"] == [1.0, None, None, None, 2.0]


def test_a_million_lines_become_buckets_with_their_extremes(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    n = 1_000_000
    with file.open("w") as out:
        out.writelines(f'{{"step": {s}, "loss": {1 + s % 7}}}\n' for s in range(1, n - 2))
        out.write(line(n - 2, loss=99.0) + line(n - 1) + line(n))
    page = Page(file)
    curve = page.refresh()["loss"]
    assert MAX_BUCKETS / 2 < len(curve["step"]) <= MAX_BUCKETS
    assert curve["step"][-1] == n and curve["step"] == sorted(set(curve["step"]))
    assert max(curve["high"]) == 99 and min(curve["low"]) == pytest.approx(1, abs=1e-5)
    assert curve["mean"][:100] == pytest.approx([4.0] * 100, abs=0.05)
    with file.open("a") as out:
        out.write(line(n + 1))
    page.refresh()
    assert page.sent <= 10  # the last bucket of two curves


def test_a_long_run_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("echo_eqx.ops.curves._CHUNK_BYTES", 1 << 20)
    file = tmp_path / "metrics.jsonl"
    n = 50_000
    file.write_text("".join(line(step, loss=1 + step / n) for step in range(1, n + 1)))
    metrics = MetricsFile(file)
    first = metrics.update(0, {}, 0.0)
    assert 0 < first["read"] < 1 and first["curves"]["loss"]["step"][0] < n / 100
    second = metrics.update(first["version"], {}, 0.0)
    assert second["version"] == first["version"] and first["read"] < second["read"]
    rest = metrics.update(first["version"], {}, 60.0)
    expected = Page(file).refresh()["loss"]
    assert rest["read"] == 1
    assert all(rest["curves"]["loss"][key] == expected[key] for key in ("step", "mean", "low"))


def test_runs_are_the_folder_or_its_subfolders(tmp_path: Path):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", steps=100)
    make_run(tmp_path / "elsewhere")
    (tmp_path / "runs" / "no_run").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    with serving(tmp_path / "runs") as port:
        overview = get_json(port, "/runs.json")
        assert [run["name"] for run in overview["runs"]] == ["a", "b"]
        assert overview["disk_free_bytes"] > 0
        first = overview["runs"][0]
        assert (first["step"], first["num_steps"]) == (30, 100)
        assert first["every"] == pytest.approx(10, abs=0.5) and first["age"] < 30
        about = get_json(port, "/about.json?run=b")
        assert json.loads(about["config"])["num_steps"] == 100
        found = get_json(port, "/samples.json?run=a&step=10")
        assert found["steps"] == [10] and found["samples"][0]["text"] == "Said <b>plainly</b>."
        assert found["samples"][0].keys() == {"index", "text", "wav", "original", "ref"}
    with serving(tmp_path / "runs" / "a") as port:
        assert [run["name"] for run in get_json(port, "/runs.json")["runs"]] == ["a"]


def test_an_empty_folder_waits_for_its_first_run(tmp_path: Path):
    with serving(tmp_path) as port:
        assert get_json(port, "/runs.json")["runs"] == []
        make_run(tmp_path / "late")
        assert [run["name"] for run in get_json(port, "/runs.json")["runs"]] == ["late"]
        shutil.rmtree(tmp_path / "late")
        assert get_json(port, "/runs.json")["runs"] == []
        assert ask(port, "/data.json?run=late")[0] == 404


@pytest.fixture(scope="module")
def run_with_links_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A run with links out of it and files that the page must not serve."""
    place = tmp_path_factory.mktemp("run_with_links_out")
    run = make_run(place / "runs" / "a")
    (place / "secret.txt").write_text("secret")
    folder = run / "samples" / "step_000000010"
    (folder / "1.txt").symlink_to(place / "secret.txt")
    (folder / "2.txt").symlink_to(folder / "missing")
    (folder / "weights.wav.safetensors").write_text("secret")
    (place / "out").mkdir()
    (place / "out" / "0.txt").write_text("secret")
    (run / "samples" / "step_000000011").symlink_to(place / "out")
    with serving(place / "runs") as port:
        yield port


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/config.json",
        "/samples/a/10/../../config.json",
        "/samples/a/10/..%2f..%2fconfig.json",
        "/samples/a/10/%2e%2e/0.wav",
        "/samples/../10/0.wav",
        "/samples/%2e%2e/10/0.wav",
        "/samples/a/10/0.wav%00.txt",
        "/samples/a/10/1.txt",  # a link that leads outside
        "/samples/a/10/2.txt",  # a link within the run that leads nowhere
        "/samples/a/10/weights.wav.safetensors",
        "/samples/a/11/0.txt",  # a folder that is a link
        "/about.json?run=../elsewhere",
        "/data.json?run=/etc",
        "/page/page.js",
        "//etc/passwd",
    ],
)
def test_no_path_leads_outside_the_samples(run_with_links_out: int, path: str):
    status, _, body = ask(run_with_links_out, path)
    assert status == 404 and b"secret" not in body


def test_files_of_a_run_that_link_outside_are_not_read(tmp_path: Path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "outside").write_text(line(1, secret=1))
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        (run / name).symlink_to(tmp_path / "outside")
    found = Run(run)
    assert found.text("config.json") is None
    assert found.status()["step"] is None
    assert len(found.status()["problems"]) == 3
    assert Page(run / "metrics.jsonl").refresh() == {}


LINE = '{"step": 1, "loss": 1, "time": 1}\n'
DEEP = "[" * 100_000
HUGE = "1" + "0" * 400


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def long_line(path: Path) -> None:
    path.write_bytes(LINE.encode() + b"x" * (5 << 20) + b"\n" + LINE.encode())


def link_out(path: Path) -> None:
    path.symlink_to("/etc")


# File of a run, its content, and the problem that is reported, or else the step that is shown.
ODD: list[tuple[str, str | bytes | Callable[[Path], None], str | int | None]] = [
    ("config.json", DEEP, "cannot read config.json: maximum recursion depth exceeded"),
    ("config.json", '{"a": ' + "[" * 90 + "]" * 90 + "}", 1),
    ("config.json", "[1]", "cannot read config.json: expected a dict, got a list"),
    ("config.json", b'{"a": "\xff"}', "cannot read config.json: 'utf-8' codec can't decode"),
    ("config.json", '{"a": "' + "x" * (5 << 20) + '"}', "cannot read config.json: it is larger"),
    ("config.json", pipe, "cannot read config.json: it is not a regular file"),
    ("config.json", '{"num_steps": 1e999, "a": [NaN, -Infinity]}', 1),
    ("config.json", f'{{"num_steps": {HUGE}, "\\ud800": "\\udfff"}}', 1),
    ("environment.json", DEEP, "cannot read environment.json: maximum recursion depth"),
    ("environment.json", '{"a": 1}', "cannot read environment.json: expected a list, got a dict"),
    ("environment.json", '[1, {"end": 3}]', 1),
    ("metrics.jsonl", pipe, "cannot read metrics.jsonl: it is not a regular file"),
    ("metrics.jsonl", Path.mkdir, "cannot read metrics.jsonl: it is not a regular file"),
    ("metrics.jsonl", link_to_itself, "cannot read metrics.jsonl: "),
    ("metrics.jsonl", link_to_a_device, "cannot read metrics.jsonl: it is a link out of the"),
    ("metrics.jsonl", '{"step": 1, "loss": 1, "time": NaN}\n' + LINE, 1),
    ("metrics.jsonl", LINE + '{"step": 2, "loss": 1, "time": 1e999}\n', 2),
    ("metrics.jsonl", LINE + f'{{"step": 2, "time": {HUGE}}}\n', 2),
    ("metrics.jsonl", f'{{"step": {HUGE}, "loss": 1}}\n', None),
    ("metrics.jsonl", '{"step": 1e999, "loss": 1}\n', None),
    ("metrics.jsonl", '{"step": true, "loss": 1}\n', None),
    ("metrics.jsonl", "".join(f'{{"step": {i}, "loss": 1.7e308}}\n' for i in range(1500)), 1499),
    ("metrics.jsonl", LINE + DEEP + "\n", 1),
    ("metrics.jsonl", long_line, 1),
    ("samples", link_out, "cannot read samples: it is a link out of the run folder"),
    ("samples", "x", "cannot read samples: Not a directory"),
]
NAMES = [b"b\xff", b"b\xfe", b"new\nline", b"a'\"<b>&%2f"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a monitor that shows all broken runs and one good one."""
    root = tmp_path_factory.mktemp("odd")
    for number, (name, content, _) in enumerate(ODD):
        run = root / str(number)
        run.mkdir()
        (run / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text(LINE)
        (run / name).unlink(missing_ok=True)
        if callable(content):
            content(run / name)
        else:
            (run / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in NAMES:
        run = Path(os.fsdecode(os.fsencode(root) + b"/" + name))
        run.mkdir()
        (run / "metrics.jsonl").write_text(LINE)
    make_run(root / "sound")
    with serving(root) as port:
        yield port


def strict_json(port: int, path: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the answer to {path}")

    status, _, body = ask(port, path)
    assert status == 200, (path, body)
    text = body.decode()
    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    return value


def test_a_broken_run_is_reported_without_hiding_others(odd: int):
    runs = {run["name"]: run for run in strict_json(odd, "/runs.json")["runs"]}
    assert len(runs) == len(ODD) + len(NAMES) + 1
    for name in runs:
        for kind in ("data", "about", "samples"):
            strict_json(odd, f"/{kind}.json?run={quote(name)}")
    for number, (file, _, expected) in enumerate(ODD):
        run = runs[str(number)]
        if isinstance(expected, str):
            assert len(run["problems"]) == 1 and run["problems"][0].startswith(expected), file
        else:
            assert (run["problems"], run["step"]) == ([], expected), file
    sound = runs["sound"]
    assert (sound["step"], sound["problems"]) == (30, [])
    loss = strict_json(odd, "/data.json?run=sound")["curves"]["loss"]
    assert len(loss["step"]) == 30


def test_a_line_too_long_to_be_from_the_trainer_is_skipped(odd: int):
    number = [content for _, content, _ in ODD].index(long_line)
    data = strict_json(odd, f"/data.json?run={number}")
    assert data["curves"]["loss"]["step"] == [1, 1] and data["unreadable"]


def test_a_file_replaced_by_a_pipe_while_it_is_followed_blocks_nobody(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(LINE)
    page = Page(file)
    assert page.refresh()["loss"]["step"] == [1]
    file.unlink()
    os.mkfifo(file)
    assert page.refresh() == {}
    file.unlink()
    file.write_text(LINE + line(2))
    assert page.refresh()["loss"]["step"] == [1, 2]


def answers(port: int, *requests: bytes) -> list[bytes]:
    """The first line of the answer to each request; all connections are open at once."""
    connections = [socket.create_connection(("127.0.0.1", port), 30) for _ in requests]
    found = []
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)
    for connection in connections:
        with connection, connection.makefile("rb") as file:
            found.append(file.readline().strip())
    return found


def test_200_connections_at_once_are_all_answered(odd: int):
    request = b"GET /data.json?run=sound HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert answers(odd, *[request] * 200) == [b"HTTP/1.1 200 OK"] * 200


def test_a_stopped_run_is_shown_as_saved(tmp_path: Path):
    run = make_run(tmp_path / "a")
    assert not Run(run).status()["saved"]
    note_end(run, 30)
    assert Run(run).status()["saved"]
    starts = json.loads((run / "environment.json").read_text())
    assert starts[0]["host"] == "here" and starts[0]["end"]["step"] == 30
    (run / "environment.json").write_text(json.dumps([*starts, {"host": "here"}]))  # resumed
    assert not Run(run).status()["saved"]


def test_the_time_left_uses_the_median_step_time(tmp_path: Path):
    moments = [10, 20, 30, 5000, 5010, 5020]  # interrupted after the third report
    file = make_run(tmp_path / "a") / "metrics.jsonl"
    file.write_text("".join(line(10 * n, time=t) for n, t in enumerate(moments, 1)))
    status = Run(tmp_path / "a").status()
    assert (status["step"], status["every"], status["left"]) == (60, 10, 40)


def test_many_samples_are_counted_and_the_first_are_shown(tmp_path: Path):
    folder = make_run(tmp_path / "a") / "samples" / "step_000000010"
    for index in range(1, 100):
        (folder / f"{index}.txt").write_text("x")
    rows, count = Run(tmp_path / "a").samples(10)
    assert [row["index"] for row in rows] == list(range(MAX_SAMPLES)) and count == 100


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MOVE"])
def test_only_get_and_head_are_answered(run_with_links_out: int, method: str):
    assert ask(run_with_links_out, "/runs.json", method)[0] == 501


def test_head_has_the_headers_of_get_and_no_body(tmp_path: Path):
    with serving(tmp_path) as port:
        for path in ("/", "/page.js", "/page.css", "/plotly.js"):
            _, expected, body = ask(port, path)
            status, headers, empty = ask(port, path, "HEAD")
            assert (status, empty) == (200, b"")
            assert int(headers["Content-Length"]) == len(body) > 100
            assert headers["X-Content-Type-Options"] == expected["X-Content-Type-Options"]
            assert headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_range_requests_for_recordings_work(tmp_path: Path):
    whole = (make_run(tmp_path / "a") / "samples/step_000000010/0.wav").read_bytes()
    with serving(tmp_path) as port:

        def part(range: str) -> tuple[int, str | None, bytes]:
            status, headers, body = ask(port, "/samples/a/10/0.wav", Range=range)
            return status, headers["Content-Range"], body

        n = len(whole)
        assert part("bytes=0-") == (206, f"bytes 0-{n - 1}/{n}", whole)
        assert part("bytes=5-9") == (206, f"bytes 5-9/{n}", whole[5:10])
        assert part("bytes=-4") == (206, f"bytes {n - 4}-{n - 1}/{n}", whole[-4:])
        assert part(f"bytes={n}-")[0] == 416
        assert part("lines=1-2") == (200, None, whole)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_without_a_token_other_host_names_are_rejected(tmp_path: Path, host: str):
    with serving(tmp_path) as port:
        assert ask(port, "/runs.json", Host=host)[0] == 400
        for own in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert ask(port, "/runs.json", Host=own)[0] == 200


def test_a_token_is_sent_once_and_kept_in_a_cookie(tmp_path: Path):
    with serving(tmp_path, "0.0.0.0", "a b&ü") as port:
        for path in ("/", "/runs.json", "/plotly.js", "/?token=", "/?token=wrong"):
            status, headers, _ = ask(port, path)
            assert status == 403 and headers["Set-Cookie"] is None
        assert ask(port, "/", Cookie="echo_monitor=a b&")[0] == 403
        status, headers, _ = ask(port, "/?token=a%20b%26%C3%BC", Host="any.example")
        assert status == 200
        cookie, *flags = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
        assert ask(port, "/runs.json", Cookie=cookie)[0] == 200
        assert ask(port, "/runs.json", Cookie=cookie[:-1])[0] == 403


def test_unusable_arguments_give_one_line_errors(tmp_path: Path):
    with pytest.raises(EchoError, match="--runs: expected a folder of runs"):
        MonitorServer(tmp_path / "missing", "127.0.0.1", 0, None)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(UsageError, match="can be reached from other machines; add --token"):
            MonitorServer(tmp_path, host, 0, None)
    with pytest.raises(EchoError, match=r"cannot bind 127.0.0.1:70000 .*port must be 0-65535"):
        MonitorServer(tmp_path, "127.0.0.1", 70000, None)
    with (
        serving(tmp_path) as port,
        pytest.raises(EchoError, match=rf"cannot bind 127.0.0.1:{port} \(.*in use\); try --port"),
    ):
        MonitorServer(tmp_path, "127.0.0.1", port, None)


def test_a_missing_package_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _read_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(EchoError, match=r"pip install 'echo_eqx\[monitor\]'"):
        MonitorServer(tmp_path, "127.0.0.1", 0, None)


def test_the_command_reports_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = str(ROOT / "scripts" / "monitor.py")
    monkeypatch.setattr(sys, "argv", [script, "--runs", str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(script, run_name="__main__")
    said = f"error: --runs: expected a folder of runs, or a run, got {tmp_path}/missing\n"
    assert capsys.readouterr().err == said


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    profile = tmp_path_factory.mktemp("profile")
    chrome = start_chrome(profile, "--autoplay-policy=no-user-gesture-required")
    yield chrome
    chrome.quit()


@pytest.fixture
def browser(chrome: Any) -> Iterator[Any]:
    """A browser whose console must have no errors at the end."""
    yield chrome
    assert [entry["message"] for entry in chrome.get_log("browser")][:3] == []
    chrome.get("about:blank")


def wait(browser: Any, script: str, seconds: float = 20) -> Any:
    """The value of a JavaScript expression once it is true."""
    until = time.monotonic() + seconds
    for look in itertools.count():
        if time.monotonic() > until:
            break
        if look % 5 == 4:  # the page refreshes every two seconds, and when it comes into view
            browser.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
        if value := browser.execute_script(f"return {script}"):
            return value
        time.sleep(0.1)
    raise AssertionError(f"{script}; the browser says {browser.get_log('browser')[:3]}")


def look(browser: Any, port: int, scheme: str = "light", query: str = "") -> Callable[..., Any]:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(f"http://127.0.0.1:{port}/{query}")
    return lambda script, **kwargs: wait(browser, script, **kwargs)


DRAWN = "document.querySelectorAll('#plot-{} .scatterlayer .trace path.js-line').length == {}"
LAST = "document.getElementById('plot-loss').data[0].x.at(-1) == {}"


def test_runs_and_points_arrive_without_a_reload(browser: Any, tmp_path: Path):
    with serving(tmp_path) as port:
        until = look(browser, port)
        until("document.body.innerText.includes('There is no run yet')")
        browser.execute_script("window.untouched = true")
        run = make_run(tmp_path / "a")
        until(DRAWN.format("loss", 2))  # raw and smoothed
        until(DRAWN.format("eval_loss", 1))
        until(LAST.format(30))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(line(31) + line(32))
        make_run(tmp_path / "b", steps=5)
        (tmp_path / "b" / "config.json").write_text(DEEP)
        until(LAST.format(32))
        until("document.body.innerText.includes('step 32 of 100')")
        until(DRAWN.format("loss", 4))
        until("document.querySelectorAll('.problems')[1].innerText.includes('cannot read')")
        browser.execute_script("document.querySelectorAll('.run input')[1].click()")
        until(DRAWN.format("loss", 2))
        assert browser.execute_script("return window.untouched")


def test_samples_play_near_the_top_and_texts_are_not_html(browser: Any, tmp_path: Path):
    note_end(make_run(tmp_path / "a"), 30)
    with serving(tmp_path) as port:
        until = look(browser, port)
        until("document.querySelectorAll('audio').length == 3")
        until("document.body.innerText.includes('stopped and saved, step 30 of 100')")
        text = "document.querySelector('.sample p').textContent"
        assert until(text) == "Said <b>plainly</b>."
        labels = "[...document.querySelectorAll('.players label')].map(x => x.textContent)"
        assert until(labels) == ["by the model", "original", "reference voice"]
        tops = "[...document.querySelectorAll('.players audio')].map(x => x.offsetTop)"
        first, second, _ = until(tops)
        assert first == second < until("document.getElementById('charts').offsetTop")
        until("document.getElementById('config').textContent.includes('tiny')")
        browser.execute_script("document.querySelector('audio').play()")
        until("document.querySelector('audio').currentTime > 0.2")
        browser.execute_script("document.querySelector('audio').currentTime = 2")
        until("document.querySelector('audio').currentTime > 2.1")


def test_dark_and_phone_and_token(browser: Any, tmp_path: Path):
    make_run(tmp_path / "a")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    with serving(tmp_path, token="word") as port:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        until = look(browser, port, "dark", "?token=word")
        ground = "getComputedStyle(document.body).backgroundColor"
        assert until(ground) == "rgb(20, 23, 27)"
        until("document.querySelector('audio')")
        assert until("document.documentElement.scrollWidth") == 390
        assert until("location.href") == f"http://127.0.0.1:{port}/"
        until = look(browser, port, "light")  # by the cookie
        assert until(ground) == "rgb(246, 247, 249)"
        until(DRAWN.format("loss", 2))
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_broken_runs_are_drawn_without_an_error(browser: Any, odd: int):
    until = look(browser, odd)
    number = len(ODD) + len(NAMES) + 1
    until(f"document.querySelectorAll('.run').length == {number}")
    boxes = "document.querySelectorAll('.run input:not(:checked)')"  # the first are checked
    browser.execute_script(f"{boxes}.forEach(box => box.click())")
    until(f"document.querySelectorAll('#plot-loss .trace').length > {number}")
    low, high = until("document.getElementById('plot-loss').layout.yaxis.range")
    assert low < 1 < high < 3
