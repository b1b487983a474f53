"""The monitor: what it reads of a growing run, whom it answers, and its page in a real browser."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("plotly")
pytest.importorskip("pyarrow")

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.curves import MAX_BUCKETS, Metrics, read_lines
from echo_eqx.ops.monitor import MonitorServer
from echo_eqx.ops.runs import Run

ROOT = Path(__file__).parent.parent


def line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, "loss": 1 + 1 / step, "learning_rate": 1e-3} | values) + "\n"


def make_run(path: Path, steps: int = 30) -> Path:
    """A run folder as the trainer leaves it."""
    samples = path / "samples" / "step_000000010"
    samples.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model": "tiny", "num_steps": 100}))
    (path / "environment.json").write_text(json.dumps([{"host": "here"}]))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            more: dict[str, Any] = {"gradient_norm": 0.5}
            if step % 10 == 0:
                more |= {
                    "time": time.time() - steps + step,
                    "step_seconds": 1.0,
                    "data_wait": 0.1,
                    "samples_per_second": 8.0,
                    "device_memory_bytes": None,
                    "skipped_updates": 0,
                    "broken_records": 1,
                    "eval_loss": 1.5,
                    "eval_loss_by_time": [1.0, None],
                }
            file.write(line(step, **more))
    tone = 0.1 * np.sin(np.arange(3 * 24000) * 0.05)
    soundfile.write(samples / "0.wav", tone, 24000)
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
    """What a page holds of one file's curves after each refresh."""

    def __init__(self, path: Path):
        self.metrics = Metrics(path)
        self.version, self.curves, self.sent, self.unreadable = 0, {}, 0, 0

    def refresh(self) -> dict[str, Any]:
        while True:
            have = {name: (c["stride"], c["full"]) for name, c in self.curves.items()}
            news = self.metrics.news(self.version, have, 0.05)
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
    assert "device_memory_bytes" not in curves  # null on CPU


def test_a_refresh_brings_only_what_is_new(tmp_path: Path):
    file = make_run(tmp_path / "a") / "metrics.jsonl"
    page = Page(file)
    page.refresh()
    page.refresh()
    assert page.sent == 0
    with file.open("a") as out:
        out.write(line(31) + line(32))
    assert page.refresh()["loss"]["step"] == list(range(1, 33))
    assert page.sent == 2 * 2 * 2  # step and mean of two steps, in loss and learning_rate


def test_a_half_written_line_waits(tmp_path: Path):
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
def test_a_file_that_shrank_is_read_anew(tmp_path: Path, regrown: int):
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


def test_values_that_are_not_finite_are_gaps(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line(s, loss=x) for s, x in enumerate([1.0, np.nan, np.inf, 2.0], 1)))
    curve = Page(file).refresh()["loss"]
    assert curve["mean"] == [1.0, None, None, 2.0]


def test_a_slow_reading_equals_the_fast_one():
    lines = "".join(line(step, eval_loss=None if step % 2 else step) for step in range(1, 40))
    fast, none = read_lines(lines.encode())
    slow, one = read_lines((lines + "nonsense\n").encode())
    assert (none, one) == (0, 1)
    assert fast.keys() == slow.keys()
    for name in fast:
        np.testing.assert_array_equal(fast[name], slow[name])


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


def test_a_long_run_is_previewed_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("echo_eqx.ops.curves._LONG", 10_000)
    monkeypatch.setattr("echo_eqx.ops.curves._CHUNK", 1 << 20)
    file = tmp_path / "metrics.jsonl"
    n = 50_000
    file.write_text("".join(line(step, loss=1 + step / n) for step in range(1, n + 1)))
    metrics = Metrics(file)
    preview = metrics.news(0, {}, 0.0)
    loss = preview["curves"]["loss"]
    assert preview["version"] < 0 and preview["read"] == 0
    assert loss["step"] == sorted(loss["step"]) and loss["step"][-1] == n
    assert loss["step"][0] < n / 100 and len(loss["step"]) > 100
    for step, mean in zip(loss["step"], loss["mean"], strict=True):
        assert mean == pytest.approx(1 + step / n, abs=0.01)
    later = metrics.news(preview["version"], {"loss": (1, 3)}, 0.0)
    assert later["version"] == preview["version"] and later["curves"] == {}
    assert 0 < later["read"] < 1
    whole = metrics.news(preview["version"], {"loss": (1, 3)}, 60.0)
    assert whole["version"] == -preview["version"] and whole["read"] == 1
    assert whole["curves"]["loss"]["start"] == 0
    assert whole["curves"]["loss"] == Page(file).refresh()["loss"]


def test_runs_are_the_folder_or_its_sub_folders(tmp_path: Path):
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
        assert get_json(port, "/about.json?run=b")["config"]["num_steps"] == 100
        found = get_json(port, "/samples.json?run=a&step=10")
        assert found["steps"] == [10] and found["samples"][0]["text"] == "Said <b>plainly</b>."
        assert found["samples"][0].keys() == {"index", "text", "wav", "ref"}
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
        "/samples/a/10/2.txt",  # a link within the run, to what is no sample, but beside samples
        "/samples/a/10/weights.wav.safetensors",
        "/samples/a/11/0.txt",  # a folder that is a link
        "/about.json?run=../elsewhere",
        "/data.json?run=/etc",
        "/page/page.js",
        "//etc/passwd",
    ],
)
def test_no_path_leads_outside_the_samples(tmp_path: Path, path: str):
    run = make_run(tmp_path / "runs" / "a")
    (tmp_path / "secret.txt").write_text("secret")
    folder = run / "samples" / "step_000000010"
    (folder / "1.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "2.txt").symlink_to(folder / "missing")
    (folder / "weights.wav.safetensors").write_text("secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.txt").write_text("secret")
    (run / "samples" / "step_000000011").symlink_to(tmp_path / "out")
    with serving(tmp_path / "runs") as port:
        status, _, body = ask(port, path)
    assert status == 404 and b"secret" not in body


def test_files_of_a_run_that_link_outside_are_not_read(tmp_path: Path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "outside").write_text(line(1, secret=1))
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        (run / name).symlink_to(tmp_path / "outside")
    found = Run(run)
    assert found.json("config.json") is None
    assert found.status()["step"] is None
    assert len(found.status()["trouble"]) == 3
    assert Page(run / "metrics.jsonl").refresh() == {}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MOVE"])
def test_only_get_and_head_are_answered(tmp_path: Path, method: str):
    with serving(tmp_path) as port:
        status, headers, _ = ask(port, "/runs.json", method)
    assert status == 405 and headers["Allow"] == "GET, HEAD"


def test_head_has_the_headers_of_get_and_no_body(tmp_path: Path):
    with serving(tmp_path) as port:
        for path in ("/", "/page.js", "/page.css", "/plotly.js"):
            _, expected, body = ask(port, path)
            status, headers, empty = ask(port, path, "HEAD")
            assert (status, empty) == (200, b"")
            assert int(headers["Content-Length"]) == len(body) > 100
            assert headers["X-Content-Type-Options"] == expected["X-Content-Type-Options"]
            assert headers["Content-Security-Policy"].startswith("default-src 'self'")


def test_parts_of_a_recording_can_be_had(tmp_path: Path):
    whole = (make_run(tmp_path / "a") / "samples/step_000000010/0.wav").read_bytes()
    with serving(tmp_path) as port:

        def part(wanted: str) -> tuple[int, str | None, bytes]:
            status, headers, body = ask(port, "/samples/a/10/0.wav", Range=wanted)
            return status, headers["Content-Range"], body

        n = len(whole)
        assert part("bytes=0-") == (206, f"bytes 0-{n - 1}/{n}", whole)
        assert part("bytes=5-9") == (206, f"bytes 5-9/{n}", whole[5:10])
        assert part("bytes=-4") == (206, f"bytes {n - 4}-{n - 1}/{n}", whole[-4:])
        assert part(f"bytes={n}-")[0] == 416
        assert part("lines=1-2") == (200, None, whole)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_without_a_token_other_host_names_are_refused(tmp_path: Path, host: str):
    with serving(tmp_path) as port:
        assert ask(port, "/runs.json", Host=host)[0] == 400
        for own in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert ask(port, "/runs.json", Host=own)[0] == 200


def test_a_token_is_given_once_and_kept_in_a_cookie(tmp_path: Path):
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


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path):
    with pytest.raises(EchoError, match="missing is not a folder"):
        MonitorServer(tmp_path / "missing", "127.0.0.1", 0, None)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(UsageError, match="needs a --token"):
            MonitorServer(tmp_path, host, 0, None)
    with pytest.raises(UsageError, match="70000 is not from"):
        MonitorServer(tmp_path, "127.0.0.1", 70000, None)
    with serving(tmp_path) as port, pytest.raises(EchoError, match=f"port {port} of 127.0.0.1"):
        MonitorServer(tmp_path, "127.0.0.1", port, None)


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(EchoError, match=r"pip install 'echo_eqx\[monitor\]'"):
        MonitorServer(tmp_path, "127.0.0.1", 0, None)


def test_the_command_reports_errors_in_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "scripts/monitor.py", "--runs", str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: {tmp_path}/missing is not a folder; wanted one with runs, or a run\n"
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("chromium and chromedriver are not on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--mute-audio"):
        options.add_argument(flag)
    options.add_argument("--autoplay-policy=no-user-gesture-required")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver, env={**os.environ, "SE_OFFLINE": "true"})
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


def wait(browser: Any, script: str, seconds: float = 20) -> Any:
    """The value of a JavaScript expression once it is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := browser.execute_script(f"return {script}"):
            return value
        time.sleep(0.05)
    raise AssertionError(f"{script}; the browser says {browser.get_log('browser')}")


def look(browser: Any, port: int, scheme: str = "light", query: str = "") -> Callable[..., Any]:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(f"http://127.0.0.1:{port}/{query}")
    return lambda script, **kwargs: wait(browser, script, **kwargs)


DRAWN = "document.querySelectorAll('#plot-{} .scatterlayer .trace path.js-line').length == {}"
LAST = "document.getElementById('plot-loss').data[0].x.at(-1) == {}"


def test_new_points_arrive_without_a_reload(browser: Any, tmp_path: Path):
    run = make_run(tmp_path / "a")
    with serving(tmp_path) as port:
        until = look(browser, port)
        until(DRAWN.format("loss", 2))  # raw and smoothed
        until(DRAWN.format("eval_loss", 1))
        until(LAST.format(30))
        browser.execute_script("window.untouched = true")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(line(31) + line(32))
        until(LAST.format(32))
        until("document.body.innerText.includes('step 32 of 100')")
        make_run(tmp_path / "b", steps=5)
        until(DRAWN.format("loss", 4))
        browser.execute_script("document.querySelectorAll('.run input')[1].click()")
        until(DRAWN.format("loss", 2))
        assert browser.execute_script("return window.untouched")
    assert [entry for entry in browser.get_log("browser") if "Security" in entry["message"]] == []


def test_samples_play_and_texts_are_no_html(browser: Any, tmp_path: Path):
    make_run(tmp_path / "a")
    with serving(tmp_path) as port:
        until = look(browser, port)
        until("document.querySelectorAll('audio').length == 2")
        text = "document.querySelector('.sample p').textContent"
        assert until(text) == "Said <b>plainly</b>."
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
        until(DRAWN.format("loss", 2))
        ground = "getComputedStyle(document.body).backgroundColor"
        assert until(ground) == "rgb(20, 23, 27)"
        assert until("document.documentElement.scrollWidth") == 390
        assert until("location.href") == f"http://127.0.0.1:{port}/"
        until = look(browser, port, "light")
        assert until(ground) == "rgb(246, 247, 249)"
        until(DRAWN.format("loss", 2))
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_empty_folder_says_so_on_the_page(browser: Any, tmp_path: Path):
    with serving(tmp_path) as port:
        until = look(browser, port)
        until("document.body.innerText.includes('There is no run yet')")
        make_run(tmp_path / "a")
        until(DRAWN.format("loss", 2))
