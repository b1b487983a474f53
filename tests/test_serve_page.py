"""The page of the speech server, in a real browser: one server and one Chromium."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from browser import start_chrome, wait
from speech_server import KEY, Client

from echo_eqx import voice

TEXT = "Yes."
LONG = "Good morning to you all. Turn off the lights."
# What the page hands to the sound card, and what it asks the server.
WATCH = """
window.played = [];
const { start } = AudioBufferSourceNode.prototype;
AudioBufferSourceNode.prototype.start = function (when) {
  played.push([when, Array.from(this.buffer.getChannelData(0), (x) => 32768 * x)]);
  start.call(this, when);
};
window.asked = [];
const ask = window.fetch;
window.fetch = (path, options) => {
  if (typeof options.body == "string") asked.push(JSON.parse(options.body));
  return ask(path, options);
};
"""
NO_STORAGE = """
for (const name of ["indexedDB", "sessionStorage", "localStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("", "SecurityError"); } });
}
"""
NAME = "good-morning-to-you-all-turn"
TALL = {"width": 1280, "height": 1400, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chrome(
    speech_port: int, downloads: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A browser that hears a voice by its microphone. All requests go to the server."""
    heard = tmp_path_factory.mktemp("microphone") / "david.wav"
    sf.write(heard, *sf.read(voice.REFERENCES / "david.flac"))
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    flags += [f"--use-file-for-fake-audio-capture={heard}"]
    chrome = start_chrome(tmp_path_factory.mktemp("profile"), *flags)
    run(chrome, "Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    run(chrome, "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    yield chrome
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {params["request"]["url"] for params in sent}
    assert f"http://127.0.0.1:{speech_port}/v1/audio/speech" in urls
    own = (f"http://127.0.0.1:{speech_port}/", "blob:", "data:", "about:", "chrome:")
    assert not [url for url in urls if not url.startswith(own)]
    chrome.quit()


@pytest.fixture
def browser(chrome: Any) -> Iterator[Any]:
    """A browser whose console must have no errors at the end, but for answers that say no."""
    run(chrome, "Emulation.setDeviceMetricsOverride", **TALL)
    yield chrome
    entries = [e for e in chrome.get_log("browser") if e["source"] != "network"]
    assert [entry["message"] for entry in entries][:3] == []


def run(browser: Any, command: str, **parameters: Any) -> Any:
    return browser.execute_cdp_cmd(command, parameters)


def show(browser: Any, server: Client) -> None:
    """Load the page, and give it the key if it asks."""
    browser.get(f"http://127.0.0.1:{server.port}/")
    wait(browser, "document.querySelector('.setting') || !document.getElementById('key').hidden")
    if browser.find_element("id", "key").is_displayed():
        type_into(browser, "key", KEY + "\n")
    wait(browser, "document.querySelectorAll('.setting').length > 10")
    wait(browser, "document.getElementById('voice').length > 1")


def type_into(browser: Any, id: str, text: object) -> None:
    field = browser.find_element("id", id)
    field.clear()
    field.send_keys(str(text))


def click(browser: Any, id: str) -> None:
    browser.find_element("id", id).click()


def said(browser: Any, id: str) -> str:
    return browser.find_element("id", id).text


def speak(browser: Any) -> None:
    click(browser, "speak")
    wait(browser, "document.querySelector('.card a')")


def answer(server: Client, **fields: Any) -> np.ndarray:
    """The samples of a request made without the page."""
    plain = {"progress": False, "stream_format": "audio"}
    found = server.request("POST", "/v1/audio/speech", {**fields, **plain})
    assert found.status == 200, found.body
    return np.frombuffer(found.body, "<i2")


def played(browser: Any) -> np.ndarray:
    pieces = browser.execute_script("return played")
    return np.concatenate([samples for _, samples in pieces])


def test_the_page_plays_and_saves_the_samples_of_the_server(
    browser: Any, server: Client, downloads: Path
):
    show(browser, server)
    type_into(browser, "text", LONG)
    type_into(browser, "count", 2)
    type_into(browser, "seed", 7)
    click(browser, "speak")
    button = "document.querySelector('.card button').textContent"
    wait(browser, f"document.querySelector('.card') && {button} == 'Pause'")
    wait(browser, "document.querySelectorAll('.card a').length == 2")
    assert browser.execute_script("return asked.map((body) => body.seed)") == [7, 8]
    common = {"input": LONG, "voice": "anna", "response_format": "pcm"}
    expected = [answer(server, **common, seed=seed) for seed in (7, 8)]
    np.testing.assert_array_equal(played(browser), expected[0])
    assert len(browser.execute_script("return played")) > 1  # piece by piece
    links = browser.find_elements("css selector", ".card a")
    for link in links:
        link.click()
    files = [downloads / link.get_attribute("download") for link in links]
    assert [file.name for file in files] == [f"{NAME}-{seed}.wav" for seed in (7, 8)]
    until = time.monotonic() + 20
    while not all(file.exists() for file in files) and time.monotonic() < until:
        time.sleep(0.05)
    for file, samples in zip(files, expected, strict=True):
        saved, rate = sf.read(file, dtype="int16")
        assert rate == 24_000
        np.testing.assert_array_equal(saved, samples)
    wait(browser, "document.getElementById('status').textContent.startsWith('Spoken in')")
    wait(browser, f"{button} == 'Play'")  # at the end
    for kind in ("wave", "spectrogram"):
        ink = f"""const canvas = document.querySelector('.card .{kind}');
        const {{ width, height }} = canvas;
        const {{ data }} = canvas.getContext('2d').getImageData(0, 0, width, height);
        return data.filter((value, i) => i % 4 == 3 && value > 128).length / (width * height)"""
        assert 0.02 < browser.execute_script(ink) < 0.6, kind


def test_the_history_outlives_a_reload_and_can_be_cleared(browser: Any, server: Client):
    show(browser, server)
    type_into(browser, "text", TEXT)
    type_into(browser, "seed", 5)
    speak(browser)
    expected = played(browser)
    wait(browser, "document.querySelector('#history .said').textContent == 'Yes.'")
    show(browser, server)
    assert browser.execute_script("return played.length") == 0
    entry = wait(browser, "document.querySelector('#history li')")
    assert "voice anna, seed 5" in entry.text
    play, _, reuse, _ = entry.find_elements("css selector", ".row > *")
    play.click()
    wait(browser, "played.length")
    np.testing.assert_array_equal(played(browser), expected)
    reuse.click()
    assert browser.execute_script("return [text.value, seed.value]") == ["Yes.", "5"]
    add_many = """
    const done = arguments[0];
    import('/page/history.js').then(async ({ History }) => {
      const history = new History(new EventTarget(), () => {});
      await history.open();
      const settings = { sway: -1 };
      for (let seed = 100; seed < 155; seed++) {
        await history.add({ text: "Many.", voice: "ben", seed, settings, file: new Blob(["x"]) });
      }
      done();
    });
    """
    browser.execute_async_script(add_many)
    show(browser, server)
    entries = wait(
        browser, "[...document.querySelectorAll('#history li')].map((li) => li.innerText)"
    )
    assert len(entries) == 50 and "voice ben, seed 154, sway -1" in entries[0]
    click(browser, "clear")
    assert not browser.find_elements("css selector", "#history li")
    show(browser, server)
    assert "is kept here" in wait(browser, "document.getElementById('history-note').textContent")


def test_pieces_follow_each_other_without_a_gap(browser: Any, server: Client):
    """As rendered by the browser: every sample is one of the sound, in order."""
    show(browser, server)
    script = """
    const done = arguments[0];
    import('/page/sound.js').then(async ({ Player, Sound }) => {
      const context = new OfflineAudioContext(1, 24000, 24000);
      Object.defineProperty(context, "state", { value: "running" }); // it cannot be resumed
      const sound = new Sound();
      new Player(() => context).play(sound);
      for (const length of [1, 127, 2048, 5001, 3]) {
        sound.add(Int16Array.from({ length }, (_, i) => 1000 + sound.length + i));
      }
      done([...(await context.startRendering()).getChannelData(0)].map((x) => 32768 * x));
    });
    """
    heard = np.trim_zeros(np.array(browser.execute_async_script(script)))
    np.testing.assert_array_equal(heard, 1000 + np.arange(1 + 127 + 2048 + 5001 + 3))


def test_stop_and_escape_end_the_request(browser: Any, server: Client):
    show(browser, server)
    click(browser, "settings")
    type_into(browser, "setting-steps", 200)
    type_into(browser, "text", LONG)
    for number, stop in enumerate(("stop", "escape"), 1):
        before = server.metric("cancelled_total")
        type_into(browser, "text", LONG)
        browser.find_element("id", "text").send_keys("\ue009\ue007")  # Ctrl+Enter
        wait(browser, "/step [1-9]/.test(document.querySelector('.card .note')?.textContent)")
        if stop == "stop":
            click(browser, "stop")
        else:
            browser.find_element("id", "text").send_keys("\ue00c")
        wait(browser, "document.getElementById('status').textContent == 'Stopped'")
        assert browser.execute_script("return asked.length") == number
        until = time.monotonic() + 20
        while server.metric("requests_in_progress") and time.monotonic() < until:
            time.sleep(0.02)
        assert server.metric("cancelled_total") == before + 1
        assert said(browser, "error") == ""


def test_a_file_that_is_chosen_or_dropped_is_the_voice(browser: Any, server: Client):
    show(browser, server)
    recording = voice.REFERENCES / "david.flac"
    fields = {"input": TEXT, "seed": 42, "response_format": "pcm"}
    data = base64.b64encode(recording.read_bytes()).decode()
    expected = answer(server, **fields, speaker_ref=data)
    browser.find_element("id", "file").send_keys(str(recording))
    wait(browser, "voice.selectedOptions[0].text == 'recording: david.flac'")
    click(browser, "forget")
    assert browser.execute_script("return voice.value") == "anna"
    drop = """
    const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "dropped.flac"));
    const options = { dataTransfer, bubbles: true, cancelable: true };
    document.body.dispatchEvent(new DragEvent("dragover", options));
    document.body.dispatchEvent(new DragEvent("drop", options));
    """
    browser.execute_script(drop, data)
    type_into(browser, "text", TEXT)
    speak(browser)
    np.testing.assert_array_equal(played(browser), expected)
    assert "voice dropped.flac" in wait(browser, "document.querySelector('#history li').innerText")


def test_a_recording_of_the_microphone_is_the_voice(browser: Any, server: Client):
    show(browser, server)
    type_into(browser, "text", TEXT)
    click(browser, "record")
    wait(browser, "level.value > 0.1")
    wait(browser, "parseFloat(document.getElementById('seconds').textContent) > 1.3")
    click(browser, "record")
    wait(browser, "voice.selectedOptions[0].text.startsWith('recording: microphone')")
    speak(browser)
    (body,) = browser.execute_script("return asked")
    assert body["speaker_ref"].startswith("data:audio/wav;base64,") and "voice" not in body
    sound, rate = sf.read(io.BytesIO(base64.b64decode(body["speaker_ref"].partition(",")[2])))
    assert sound.ndim == 1 and len(sound) / rate > 1.3 and abs(sound).max() > 0.1
    np.testing.assert_array_equal(played(browser), answer(server, **body))


def test_a_recording_is_saved_as_a_voice(browser: Any, server: Client):
    show(browser, server)
    browser.find_element("id", "file").send_keys(str(voice.REFERENCES / "david.flac"))
    type_into(browser, "voice-name", "anna\n")
    wait(browser, "error.textContent.startsWith('Name: expected another one, anna is in')")
    type_into(browser, "voice-name", "bob")
    type_into(browser, "consent", "David, in person")
    click(browser, "save-voice")
    said = wait(browser, "/^Saved bob: .*/.exec(document.getElementById('status').textContent)")
    names = browser.execute_script("return [...voice.options].map((option) => option.text)")
    assert names == ["anna", "ben", "bob", "clara", "david", "the model's own"], said
    assert browser.execute_script("return [voice.value, reference.hidden]") == ["bob", True]
    type_into(browser, "text", TEXT)
    speak(browser)
    expected = answer(server, input=TEXT, voice="bob", response_format="pcm")
    np.testing.assert_array_equal(played(browser), expected)
    assert server.request("DELETE", "/v1/audio/voices/bob").status == 200


def test_errors_are_one_sentence(browser: Any, server: Client):
    show(browser, server)
    click(browser, "speak")  # the browser says that a text is missing
    assert browser.execute_script("return document.activeElement.id") == "text"
    browser.execute_script("text.value = 'Yes. '.repeat(100)")
    click(browser, "speak")
    wait(browser, "error.textContent")
    assert said(browser, "error") == "Text: expected at most 400 characters, got 500."
    type_into(browser, "text", TEXT)
    click(browser, "settings")
    type_into(browser, "setting-cfg_scale", 1000)
    click(browser, "settings")
    click(browser, "speak")  # out of range: the fold opens there
    assert browser.execute_script("return document.activeElement.id") == "setting-cfg_scale"
    click(browser, "defaults")
    file = "new File([new Uint8Array(9)], 'noise.wav')"
    drop = f"""const dataTransfer = new DataTransfer();
    dataTransfer.items.add({file});
    document.body.dispatchEvent(new DragEvent("drop", {{ dataTransfer, bubbles: true }}));"""
    browser.execute_script(drop)
    click(browser, "speak")
    wait(browser, "error.textContent.startsWith('The recording')")
    assert said(browser, "error").count(".") <= 2
    click(browser, "forget")
    large = file.replace("(9)", "(11 * 2 ** 20)")
    browser.execute_script(drop.replace(file, large))
    assert said(browser, "error") == "Expected a recording of at most 0.7 MiB, got 11.0 MiB."
    assert len(browser.execute_script("return asked")) == 2


def test_a_busy_server_is_told_and_the_other_candidates_go_on(browser: Any, server: Client):
    body = {"input": LONG, "voice": "ben", "steps": 200, "response_format": "pcm"}
    others = [server.send("POST", "/v1/audio/speech", body) for _ in range(3)]
    show(browser, server)
    click(browser, "settings")
    type_into(browser, "setting-steps", 200)
    type_into(browser, "count", 4)
    type_into(browser, "text", LONG)
    click(browser, "speak")
    wait(browser, "/^The server is busy; try again in [0-9]+ s.$/.test(error.textContent)")
    for connection in others:
        connection.close()
    notes = "[...document.querySelectorAll('.card h3 .note')].map((note) => note.textContent)"
    wait(browser, f"{notes}.some((note) => note.startsWith('step'))")
    assert browser.execute_script(f"return {notes}").count("failed") == 1
    click(browser, "stop")
    wait(browser, "document.getElementById('status').textContent == 'Stopped'")
    assert sorted(browser.execute_script(f"return {notes}")) == ["failed"] + ["stopped"] * 3


def test_a_wrong_key_is_told_and_no_storage_is_no_problem(browser: Any, server: Client):
    refused = run(browser, "Page.addScriptToEvaluateOnNewDocument", source=NO_STORAGE)
    browser.get(f"http://127.0.0.1:{server.port}/")
    wait(browser, "!document.getElementById('key-row').hidden")
    type_into(browser, "key", "wrong\n")
    wait(browser, "error.textContent == 'The server does not accept this API key.'")
    type_into(browser, "key", KEY + "\n")
    wait(browser, "document.querySelector('.setting') && !error.textContent")
    assert "keeps no history" in said(browser, "history-note")
    type_into(browser, "text", TEXT)
    speak(browser)
    wait(browser, "document.querySelectorAll('#history li').length == 1")
    expected = answer(server, input=TEXT, voice="anna", response_format="pcm")
    np.testing.assert_array_equal(played(browser), expected)
    run(browser, "Page.removeScriptToEvaluateOnNewDocument", **refused)


def test_keyboard_and_names_for_screen_readers(browser: Any, server: Client):
    show(browser, server)
    focus = "return document.activeElement.id"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    reached = []
    for _ in range(9):
        browser.switch_to.active_element.send_keys("\ue004")
        assert browser.execute_script(outline) == "solid"
        reached.append(browser.execute_script(focus))
    assert [id for id in reached if id] == [
        *("text", "voice", "record", "choose", "count", "seed", "dice", "speak", "stop")
    ]
    click(browser, "settings")
    for control in browser.find_elements("css selector", "input, select, textarea, button, a"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    assert browser.find_element("id", "setting-steps").accessible_name == "steps"
    described = browser.find_element("id", "setting-sway-note").text
    assert described.startswith("Sway sampling: 0 spaces the timesteps evenly")


def test_phone_width_and_both_color_schemes(browser: Any, server: Client):
    phone = {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    run(browser, "Emulation.setDeviceMetricsOverride", **phone)
    show(browser, server)
    browser.execute_script("settings.open = true")
    browser.find_element("id", "file").send_keys(str(voice.REFERENCES / "ben.flac"))
    browser.execute_script(f"text.value = {json.dumps(TEXT)}")
    speak(browser)
    wait(browser, "document.querySelector('#history li')")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 320
    ground = "return getComputedStyle(document.body).backgroundColor"
    for scheme, color in (("dark", "rgb(20, 23, 27)"), ("light", "rgb(246, 247, 249)")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        run(browser, "Emulation.setEmulatedMedia", features=features)
        assert browser.execute_script(ground) == color
    run(browser, "Emulation.setEmulatedMedia", features=[])


def test_the_page_can_run_no_script_of_others(server: Client):
    names = ("/", "/page/main.js", "/page/style.css", "/page/recorder.js")
    for answer in (server.request("GET", name, headers={}) for name in names):
        assert answer.status == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
        assert "unsafe" not in policy and answer.headers["x-content-type-options"] == "nosniff"
