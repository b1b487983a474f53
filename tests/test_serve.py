"""The speech server as clients use it: one process with the shipped voice, real clients."""

import asyncio
import base64
import io
import json
import os
import random
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile as sf
from conftest import DATA, max_difference
from speech_server import KEY, SpeechServer

import echo_eqx
from echo_eqx import SamplerSettings, UsageError, voice
from echo_eqx.serve.server import bind

TEXT = "Turn off the lights."
LONG = "Good morning to you all. It is raining outside, and I am at home. Turn off the lights."
RATE = 24_000


@pytest.fixture
def client(server):
    return openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0)


def pcm(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2").astype(np.float32) / 32767


def decoded(data: bytes) -> tuple[np.ndarray, int]:
    """By ffmpeg, so that also aac is read."""
    command = ["ffmpeg", "-v", "error", "-i", "pipe:0", "-f", "s16le", "-ac", "1", "-ar", str(RATE)]
    done = subprocess.run([*command, "pipe:1"], input=data, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return pcm(done.stdout), RATE


def events(body: bytes) -> list[dict]:
    """Server-sent events by the rules of the HTML specification, for one field per event."""
    found = []
    for block in body.decode().split("\n\n"):
        lines = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
        found += [text if text == "[DONE]" else json.loads(text) for text in lines]
    return found


# --- Audio --------------------------------------------------------------------------------------


def test_every_format_holds_the_same_speech(server):
    fields = {"voice": "ben", "seed": 5, "length": "auto"}
    plain = pcm(server.speech(TEXT, response_format="pcm", **fields).body)
    assert 0.5 * RATE < len(plain) < 3.3 * RATE and np.abs(plain).max() > 0.05
    kinds = {
        "mp3": "audio/mpeg",
        "opus": "audio/ogg",
        "aac": "audio/aac",
        "flac": "audio/flac",
        "wav": "audio/wav",
    }
    for kind, content_type in kinds.items():
        answer = server.speech(TEXT, response_format=kind, **fields)
        assert answer.status == 200 and answer.headers["content-type"] == content_type
        assert answer.headers["x-accel-buffering"] == "no"
        audio, _ = decoded(answer.body)
        assert abs(len(audio) - len(plain)) < 0.1 * RATE, kind
        level = np.sqrt(np.mean(audio**2)) / np.sqrt(np.mean(plain**2))
        assert 0.9 < level < 1.1, kind
        if kind in ("wav", "flac"):  # whole, with their true sizes
            assert int(answer.headers["content-length"]) == len(answer.body)
            exact, rate = sf.read(io.BytesIO(answer.body), dtype="int16")
            assert rate == RATE and np.array_equal(exact, (plain * 32767).round().astype("<i2"))
        else:
            assert answer.headers["transfer-encoding"] == "chunked"
    stream = server.speech(TEXT, response_format="wav", stream=True, **fields)
    assert stream.body[4:8] == stream.body[40:44] == b"\xff" * 4
    assert np.array_equal(pcm(stream.body[44:]), plain)


@pytest.mark.slow  # compiles what infer compiles
def test_the_server_says_what_synthesize_says(server):
    dit, codec = echo_eqx.load_dit("voice"), echo_eqx.load_codec("voice")
    settings = SamplerSettings(steps=2, cfg_scale=1.5, guidance_every=2, sway=-0.5)
    path = voice.REFERENCES / "anna.flac"
    expected = echo_eqx.synthesize(dit, codec, LONG, path, seed=7, settings=settings)
    fields = {"steps": 2, "cfg_scale": 1.5, "guidance_every": 2, "sway": -0.5}
    fields |= {"length": "auto", "stream": False}
    fields |= {name: getattr(settings, name) for name in ("cfg_min_t", "noise_scale")}
    fields |= {"speaker_scale": settings.speaker_scale, "seed": 7, "response_format": "pcm"}
    audio = pcm(server.speech(LONG, voice="anna", **fields).body)
    assert len(audio) == len(expected) and max_difference(audio, expected) < 2e-3
    free = echo_eqx.synthesize(dit, codec, LONG, seed=7, settings=settings)
    audio = pcm(server.speech(LONG, **fields).body)
    assert len(audio) == len(free) and max_difference(audio, free) < 2e-3


def test_a_request_has_the_same_bits_alone_and_in_a_batch_and_nothing_compiles(server):
    requests = [
        {"input": TEXT, "voice": "ben", "seed": 1},
        {"input": LONG, "voice": "anna", "seed": 2, "steps": 1},
        {"input": "Hello.", "seed": 3, "cfg_scale": 1.0, "cfg_min_t": 0.7},
        {"input": TEXT, "voice": "clara", "guidance": "joint", "steps": 1},
        {"input": TEXT, "voice": "david", "guidance": "alternating", "speed": 1.3},
        {"input": TEXT, "voice": "ben", "seed": 4, "length": "auto", "sway": -1, "steps": 3},
    ]

    def speak(fields: dict) -> bytes:
        answer = server.request("POST", "/v1/audio/speech", fields | {"response_format": "pcm"})
        assert answer.status == 200, answer.body
        return answer.body

    alone = [speak(fields) for fields in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(speak, requests))
    assert alone == together
    assert len(set(alone)) == len(alone)
    recording = base64.b64encode((DATA / "speech.mp3").read_bytes()).decode()
    assert server.speech(TEXT, speaker_ref=recording, steps=1).status == 200
    assert server.metric("compilations_since_ready") == 0


def test_the_first_chunk_of_a_stream_is_short(server):
    """Like `stream`: only as much as its text needs is generated, for what is sent at once."""
    fields = {"voice": "ben", "response_format": "pcm", "trim": False, "steps": 12}
    whole, stream = (
        len(server.speech("Yes.", stream=is_stream, **fields).body) / 2 / RATE
        for is_stream in (False, True)
    )
    assert stream == pytest.approx(1.28, abs=0.1) and whole == pytest.approx(3.2, abs=0.1)


# --- Clients ------------------------------------------------------------------------------------


def test_the_openai_package_speaks(client, server):
    same = {"seed": 3, "length": "auto"}
    whole = client.audio.speech.create(
        model="tts-1", voice="alloy", input=TEXT, response_format="wav", extra_body=same
    )
    audio, rate = sf.read(io.BytesIO(whole.content))
    assert rate == RATE and len(audio) > 0.3 * RATE
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts",
        voice="alloy",
        input=TEXT,
        response_format="pcm",
        instructions="Speak softly.",
        extra_body=same,
    ) as response:
        assert response.headers["echo-unused"] == "instructions"
        assert 0 < float(response.headers["echo-speaker-seconds"]) < 3
        streamed = b"".join(response.iter_bytes())
    assert np.array_equal((audio * 32768).round(), np.frombuffer(streamed, "<i2"))
    names = [model.id for model in client.models.list()]
    assert names[0] == client.models.retrieve(names[0]).id == "voice"
    with pytest.raises(openai.BadRequestError, match="voice: expected one of anna, ben") as caught:
        client.audio.speech.create(model="tts-1", voice="nobody", input=TEXT)
    assert caught.value.param == "voice" and caught.value.code == "voice_not_found"
    with pytest.raises(openai.NotFoundError, match="model: expected one of voice, tts-1"):
        client.audio.speech.create(model="other", voice="alloy", input=TEXT)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_openai_package_speaks_asynchronously(server):
    async def speak() -> list[bytes]:
        client = openai.AsyncOpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{server.port}/v1")

        async def one(name: str) -> bytes:
            async with client.audio.speech.with_streaming_response.create(
                model="tts-1", voice=name, input=TEXT, response_format="pcm"
            ) as response:
                return b"".join([part async for part in response.iter_bytes()])

        return await asyncio.gather(*map(one, ["alloy", "ash", "anna", "ben"]))

    alloy, ash, anna, ben = asyncio.run(speak())
    assert alloy == anna and ash == ben and anna != ben


def test_curl_saves_a_file(server, tmp_path):
    command = ["curl", "-sS", "--fail-with-body", "-o", tmp_path / "speech.mp3"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-d", json.dumps({"input": TEXT})]
    subprocess.run([*command, f"http://127.0.0.1:{server.port}/v1/audio/speech"], check=True)
    audio, rate = sf.read(tmp_path / "speech.mp3")
    assert rate == RATE and len(audio) > 0.3 * RATE


def test_server_sent_events_hold_the_audio_and_say_how_far_it_is(server):
    fields = {"voice": "ben", "response_format": "pcm"}
    answer = server.speech(LONG, stream_format="sse", progress=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.body)
    assert found[-1] == "[DONE]" and found[-2]["type"] == "speech.audio.done"
    deltas = [base64.b64decode(e["audio"]) for e in found[:-2] if "audio" in e]
    assert len(deltas) > 2
    assert b"".join(deltas) == server.speech(LONG, **fields).body
    usage = found[-2]["usage"]
    assert usage["input_tokens"] == len(LONG) and usage["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    steps = [(e["step"], e["total"]) for e in found[:-2] if e["type"] == "speech.progress"]
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]


def test_open_webui(server):
    for path, key in (("/v1/audio/models", "models"), ("/v1/audio/voices", "voices")):
        found = server.request("GET", path, headers={}).json[key]  # without a key
        assert all(isinstance(item["id"], str) for item in found)
    assert {"anna", "alloy", "verse"} <= {item["name"] for item in found}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    headers |= {"X-OpenWebUI-User-Name": "Ann", "X-OpenWebUI-User-Id": "1"}
    body = {"input": TEXT, "voice": "alloy", "model": "tts-1"}
    answer = server.request("POST", "/v1/audio/speech", body, headers)
    assert answer.status == 200 and answer.headers["content-type"] == "audio/mpeg"
    answer = server.request("POST", "/v1/audio/speech", body | {"input": ""}, headers)
    assert answer.status == 400 and answer.error["message"]


def test_silly_tavern(server):
    body = {"input": TEXT, "voice": "nova", "response_format": "mp3", "speed": 1, "model": "tts-1"}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    answer = server.request("POST", "/v1/audio/speech", body | {"instructions": ""}, headers)
    assert answer.status == 200
    assert len(decoded(answer.body)[0]) > 0.3 * RATE


def test_livekit(server):
    for _ in range(3):
        assert server.request("GET", "/", headers={}).status == 200
        assert server.request("HEAD", "/", headers={}).status == 200
    body = {"input": TEXT, "model": "gpt-4o-mini-tts", "voice": "ash", "response_format": "mp3"}
    body |= {"speed": 1.0, "instructions": "", "stream_format": "sse"}
    answer = server.request("POST", "/v1/audio/speech", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    audio = [base64.b64decode(e["audio"]) for e in events(answer.body)[:-2]]
    assert len(decoded(b"".join(audio))[0]) > 0.3 * RATE


def test_pipecat(server):
    body = {"input": TEXT, "model": "gpt-4o-mini-tts", "voice": "coral", "response_format": "pcm"}
    answer = server.request("POST", "/v1/audio/speech", body)
    assert answer.status == 200 and len(answer.body) % 2 == 0
    assert 0.3 * RATE < len(answer.body) / 2 < 4 * RATE


def test_browsers_of_other_sites_may_ask(server):
    headers = {"Origin": "http://example.org", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization,content-type"
    answer = server.request("OPTIONS", "/v1/audio/speech", headers=headers)
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "*"
    allowed = answer.headers["access-control-allow-headers"]
    assert "authorization" in allowed


def test_settings_are_listed_with_their_help(server):
    table = {item["name"]: item for item in server.request("GET", "/v1/settings").json["settings"]}
    assert table["steps"]["default"] == 2 and table["steps"]["max"] == 200
    assert table["guidance"]["choices"] == ["independent", "joint", "alternating"]
    assert set(table) == set(SamplerSettings.__dataclass_fields__)
    assert all(len(item["help"]) > 10 for item in table.values())


# --- Limits and faults --------------------------------------------------------------------------


def test_each_limit_has_its_own_answer(server):
    recording = base64.b64encode(b"x" * 1000).decode()
    cases = [
        ({"input": "a " * 201}, 400, "string_above_max_length", "input"),
        ({"input": TEXT, "pad": "x" * 2**20}, 413, "body_too_large", None),
        ({"input": TEXT, "speaker_ref": recording}, 400, "invalid_reference", "speaker_ref"),
        ({"input": TEXT, "speaker_ref": "?"}, 400, None, "speaker_ref"),
        ({"input": TEXT, "steps": 201}, 400, None, "steps"),
        ({"input": TEXT, "steps": 2.5}, 400, None, "steps"),
        ({"input": TEXT, "seed": -1}, 400, None, "seed"),
        ({"input": TEXT, "speed": 5}, 400, None, "speed"),
        ({"input": TEXT, "duration": 60}, 400, None, "duration"),
        ({"input": TEXT, "response_format": "wma"}, 400, None, "response_format"),
        ({"input": TEXT, "voice": {"id": None}}, 400, None, "voice"),
        ({"input": "..."}, 400, None, "input"),
        ({"voice": "ben"}, 400, "missing_required_parameter", "input"),
    ]
    for body, status, code, param in cases:
        answer = server.request("POST", "/v1/audio/speech", body)
        found = (answer.status, answer.error["code"], answer.error["param"])
        assert found == (status, code, param), (body, answer.body)
        assert set(answer.error) == {"message", "type", "param", "code"}
    assert server.request("GET", "/v1/nothing").status == 404
    assert server.request("GET", "/page/../../../../etc/passwd").status == 404
    assert server.request("GET", "/page/%2e%2e%2fapp.py").status == 404
    assert server.request("GET", "/v1/audio/speech").status == 405


def test_a_full_queue_answers_503_with_retry_after(server):
    def speak(seed: int) -> tuple[int, str | None]:
        answer = server.speech(TEXT, voice="ben", seed=seed, response_format="pcm")
        return answer.status, answer.headers.get("retry-after")

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(speak, range(16)))
    refused = [wait for status, wait in answers if status == 503]
    assert {status for status, _ in answers} == {200, 503}
    assert refused and all(1 <= int(wait) <= 60 for wait in refused)


def test_a_client_that_goes_away_frees_its_place(server):
    before = server.metric("cancelled_total")
    body = {"input": LONG, "voice": "ben", "response_format": "pcm", "steps": 200}
    connection = server.send("POST", "/v1/audio/speech", body)
    while not server.metric("rows"):
        time.sleep(0.01)
    connection.sock.close()
    connection.close()
    while server.metric("requests_in_progress"):
        time.sleep(0.01)
    steps = server.metric("steps")
    time.sleep(0.2)
    assert server.metric("steps") == steps and server.metric("cancelled_total") == before + 1


def test_another_host_needs_a_key():
    with pytest.raises(UsageError, match=r"--host 0.0.0.0 can be reached .* add --api_key"):
        bind("0.0.0.0", 0, None)
    bind("0.0.0.0", 0, "key").close()


def mutated(rng: random.Random) -> tuple[str, str, bytes]:
    """A method, a path and a body, most of them wrong somewhere."""
    fields = {"input": "Yes.", "model": "tts-1", "voice": "ben", "response_format": "pcm"}
    fields |= {"speed": 1, "steps": 1, "duration": 0.2, "stream_format": "audio", "seed": 0}
    values = [None, True, -1, 0, 1e308, 10**40, "", "x", "\0", "\ud800", [], {}, [[]], {"id": 1}]
    values += ["a" * 5000, 0.5, "sse", "aac", "../../etc/passwd", "Yes. " * 5]
    names = [*fields, *SamplerSettings.__dataclass_fields__, "speaker_ref", "progress", "stream"]
    for _ in range(rng.randint(0, 3)):
        fields[rng.choice(names)] = rng.choice(values)
    body = bytearray(json.dumps(fields).encode())
    for _ in range(rng.choice([0, 0, 1, 5])):
        at = rng.randrange(len(body))
        body[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    if rng.random() < 0.1:
        body = bytearray(b"[" * rng.choice([10, 100_000]))
    path = rng.choice(["/v1/audio/speech"] * 8 + ["/v1/models/%00", "/%ff", "/v1/audio/voices"])
    return rng.choice(["POST"] * 9 + ["PUT"]), path, bytes(body)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_requests_are_answered(server, count):
    seed = int(os.environ.get("ECHO_FUZZ_SEED", random.randrange(2**32)))
    print(f"ECHO_FUZZ_SEED={seed}")

    def ask(number: int) -> int:
        method, path, body = mutated(random.Random(seed + number))
        answer = server.request(method, path, body, timeout=60)
        assert answer.status in (200, 400, 404, 405, 413, 422, 503), answer
        if answer.status != 200:
            assert answer.error["message"] and "Traceback" not in answer.body.decode()
        return answer.status

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(ask, range(count)))
    assert {200, 400} <= set(statuses)
    assert server.metric("compilations_since_ready") == 0
    assert server.metric("requests_in_progress") == 0


def test_broken_connections_do_no_harm(server):
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
    body = json.dumps({"input": TEXT, "response_format": "pcm"}).encode()
    sends = [
        b"",
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        head,
        head + b"Content-Length: 99999999999999999999\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 500\r\n\r\n" + body,
        head + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body,
    ]
    sockets = []
    for data in sends:
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(data)
        sockets.append(connection)
    assert server.request("GET", "/health").json == {"status": "ok"}
    for connection in sockets:
        connection.close()
    assert server.speech(TEXT, voice="ben", response_format="pcm").status == 200


def test_voices_are_added_and_removed(server):
    boundary, sample = "xyz", (DATA / "speech.wav").read_bytes()

    def add(name: str, data: bytes = sample):
        head = f"--{boundary}\r\nContent-Disposition: form-data; name="
        parts = f'{head}"name"\r\n\r\n{name}\r\n'.encode()
        parts += f'{head}"audio_sample"; filename="a.wav"\r\n\r\n'.encode() + data
        headers = {"Authorization": f"Bearer {KEY}"}
        headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        body = parts + f"\r\n--{boundary}--\r\n".encode()
        return server.request("POST", "/v1/audio/voices", body, headers)

    added = add("ann")
    assert added.status == 200 and added.json["id"] == "ann" and added.json["seconds"] > 1
    assert {"id": "ann", "name": "ann"} in server.request("GET", "/v1/audio/voices").json["voices"]
    assert server.speech(TEXT, voice="ann", response_format="pcm").status == 200
    assert server.metric("compilations_since_ready") == 0
    for name in ("ann", "ben", "../ann", ""):
        answer = add(name)
        assert answer.status == 400 and answer.error["param"] == "name", answer.body
    assert add("bad", b"RIFF").error["param"] == "audio_sample"
    assert server.request("POST", "/v1/audio/voices", b"x").status == 400
    removed = server.request("DELETE", "/v1/audio/voices/ann")
    assert removed.json == {"id": "ann", "object": "audio.voice.deleted", "deleted": True}
    statuses = [server.request("DELETE", f"/v1/audio/voices/{n}").status for n in ("ann", "ben")]
    assert statuses == [404, 403]
    assert server.speech(TEXT, voice="ann").status == 400


@pytest.mark.slow
def test_a_killed_server_starts_again(tmp_path):
    server = SpeechServer("--steps", 8)
    threads = [
        threading.Thread(target=lambda: _ignore(lambda: server.speech(LONG, voice="ben")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while not server.metric("rows"):
        time.sleep(0.01)
    server.process.kill()
    for thread in threads:
        thread.join()
    again = SpeechServer("--steps", 8, port=server.port)
    assert again.speech(TEXT, voice="ben").status == 200
    again.stop()
    assert again.process.returncode == 0


@pytest.mark.slow
def test_a_reader_that_stops_is_cut_off_and_others_are_spoken_to(server):
    body = json.dumps({"input": LONG * 4, "voice": "ben", "response_format": "pcm"}).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    stopped = socket.socket()
    stopped.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stopped.connect(("127.0.0.1", server.port))
    stopped.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    half_open = socket.create_connection(("127.0.0.1", server.port))
    half_open.sendall(b"POST /v1/audio/speech HTTP/1.1\r\n")
    assert server.speech(TEXT, voice="ben").status == 200
    half_open.settimeout(60)
    assert half_open.recv(1) == b""  # closed by the server
    deadline = time.monotonic() + 120
    while server.metric("requests_in_progress") and time.monotonic() < deadline:
        time.sleep(1)
    assert server.metric("requests_in_progress") == 0


def _ignore(function) -> None:
    try:
        function()
    except (OSError, EOFError):
        pass
    except Exception as error:  # http.client's own errors for a connection that ends
        assert type(error).__module__ == "http.client"
