"""Weights from the Hub: a real server on loopback implements the part of its protocol in use."""

import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile as sf
from conftest import GOLDEN
from processes import SCRIPTS, run, run_source
from test_fish import WEIGHTS as FISH
from test_fish import write_base

import echo_eqx
from echo_eqx.errors import EchoError
from echo_eqx.hub import HubDataset
from echo_eqx.weights.find import find_weights

PKL = GOLDEN / "dit_tiny" / "weights_only.pkl"


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub:
    """Repositories in a folder; counts what is downloaded."""

    def __init__(self, root: Path):
        self.root, self.downloads = root, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(send_body=False)

            def do_GET(self):
                self.answer(send_body=True)

            def answer(self, send_body: bool):
                parts = self.path.partition("?")[0].strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    return self.listing("/".join(parts[2:4]), parts[4:])
                repo, revision = "/".join(parts[:2]), parts[3]
                file = hub.root / repo / revision / "/".join(parts[4:])
                if not (hub.root / repo).is_dir():
                    return self.fail("RepoNotFound")
                if not (hub.root / repo / revision).is_dir():
                    return self.fail("RevisionNotFound")
                if not file.is_file():
                    return self.fail("EntryNotFound")
                data = file.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", commit_of(revision))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if send_body:
                    hub.downloads.append(file.name)
                    self.wfile.write(data)

            def listing(self, repo: str, rest: list[str]):
                revision = rest[1] if len(rest) > 1 else "main"
                folder = hub.root / repo / revision
                if not folder.is_dir():
                    return self.fail("RepoNotFound")
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                if rest[:1] == ["tree"]:
                    body = [
                        {
                            "type": "file",
                            "path": str(path.relative_to(folder)),
                            "size": path.stat().st_size,
                            "oid": "0",
                        }
                        for path in files
                    ]
                else:
                    names = [{"rfilename": str(path.relative_to(folder))} for path in files]
                    body = {"id": repo, "sha": commit_of(revision), "siblings": names}
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def fail(self, code: str):
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def put(self, source: Path, repo: str, name: str, revision: str = "main") -> None:
        target = self.root / repo / revision / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.stop()


def knowing(hub: Hub, cache: Path, **environment: str) -> dict[str, str]:
    """The environment of a process that knows this Hub."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }


def load(hub: Hub, cache: Path, source: str, **environment: str) -> str:
    """The outcome of `load_dit(source)` in a process that uses this Hub."""
    script = """
import sys, echo_eqx
try:
    print(echo_eqx.load_dit(sys.argv[1]).config.model_dim)
except echo_eqx.EchoError as error:
    print(error)
"""
    done = run_source(script, source, env=knowing(hub, cache, **environment))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_downloaded_once_and_used_offline(hub, tmp_path, golden_dit):
    echo_eqx.save(golden_dit, tmp_path / "model.safetensors")
    hub.put(tmp_path / "model.safetensors", "owner/voice", "model.safetensors")
    cache = tmp_path / "cache"
    assert load(hub, cache, "owner/voice") == "48"
    assert load(hub, cache, "owner/voice") == "48"
    assert hub.downloads == ["model.safetensors"]
    assert load(hub, cache, "owner/voice", HF_HUB_OFFLINE="1") == "48"
    hub.stop()
    assert load(hub, cache, "owner/voice") == "48"
    offline = load(hub, cache, "other/voice", HF_HUB_OFFLINE="1")
    assert "other/voice is not in the cache" in offline and len(offline.splitlines()) == 1


def test_echo_tts_base_speaks_by_its_name_alone(hub, tmp_path):
    """Its repository has the weights and the principal components, another one the codec."""
    write_base(tmp_path / "base")
    for name in ("pytorch_model.safetensors", "pca_state.safetensors"):
        hub.put(tmp_path / "base" / name, "jordand/echo-tts-base", name)
    hub.put(FISH, "jordand/fish-s1-dac-min", "pytorch_model.safetensors")
    # A model that is fine-tuned from it, and has no components of its own, has those of the base.
    hub.put(tmp_path / "base" / "pytorch_model.safetensors", "owner/tuned", "model.safetensors")
    for name, downloads in (("jordand/echo-tts-base", 3), ("owner/tuned", 4)):
        words = ["--checkpoint", name, "--text", "Hi.", "--steps", 2, "--duration", 0.1]
        env = knowing(hub, tmp_path / "cache")
        done = run(SCRIPTS / "infer.py", *words, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        audio, rate = sf.read(tmp_path / "output.wav")
        assert rate == 44_100 and len(audio) and len(hub.downloads) == downloads


def test_revisions_and_files_are_distinguished(hub, tmp_path, blockwise_dit):
    echo_eqx.save(blockwise_dit, tmp_path / "b.safetensors")
    hub.put(PKL, "owner/voice", "runs/step_9.pkl", revision="v2")
    hub.put(tmp_path / "b.safetensors", "owner/voice", "model.safetensors")
    hub.put(PKL, "owner/many", "a.pkl")
    hub.put(PKL, "owner/many", "b.pkl")
    cache = tmp_path / "cache"
    assert load(hub, cache, "owner/voice") == "24"
    assert load(hub, cache, "owner/voice@v2") == "48"
    assert load(hub, cache, "owner/voice@v2", HF_HUB_OFFLINE="1") == "48"
    assert load(hub, cache, "owner/voice@v2:runs/step_9.pkl") == "48"
    assert load(hub, cache, "owner/many:b.pkl") == "48"
    message = load(hub, cache, "owner/many")
    assert "expected one file of weights, got 2 (a.pkl, b.pkl)" in message and ":FILE" in message
    assert re.search("owner/many:c.pkl .* no such file", load(hub, cache, "owner/many:c.pkl"))
    assert "owner/voice@v3" in load(hub, cache, "owner/voice@v3")
    for message in (load(hub, cache, "owner/none"), load(hub, cache, "owner/voice@v3")):
        assert len(message.splitlines()) == 1


def test_an_empty_name_does_not_mean_the_current_folder():
    with pytest.raises(EchoError, match="got ''"):
        find_weights("")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf://datasets/a/b", ("a/b", None, None)),
        ("hf://datasets/a/b@v1", ("a/b", "v1", None)),
        ("hf://datasets/a/b@refs/pr/3/train/en", ("a/b", "refs/pr/3", "train/en")),
        ("hf://datasets/a/b/train", ("a/b", None, "train")),
    ],
)
def test_dataset_urls_round_trip(source, parts):
    dataset = HubDataset.parse(source)
    assert (dataset.repo, dataset.revision, dataset.folder) == parts and str(dataset) == source
    assert HubDataset.parse(source + "/") == dataset


@pytest.mark.parametrize(
    "source", ["hf://models/a/b", "hf://datasets/a", "hf://datasets/a/b/*.tar"]
)
def test_malformed_dataset_urls_are_rejected(source):
    with pytest.raises(EchoError, match=r"expected hf://datasets/owner/name"):
        HubDataset.parse(source)
