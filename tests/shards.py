"""Tar shards of random samples, and a server that serves them."""

import hashlib
import io
import json
import re
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample_parts(
    rng: np.random.Generator, frames: int, latent_dim: int, reference: int = 0, text: str = "Hello."
) -> dict[str, bytes]:
    """Bytes of one random sample by extension; `reference` frames of reference, 0 for none."""
    parts = {
        "npy": npy_bytes(rng.standard_normal((frames, latent_dim)).astype(np.float16)),
        "json": json.dumps({"text": text, "seconds": frames / 25}).encode(),
    }
    if reference:
        latents = rng.standard_normal((reference, latent_dim)).astype(np.float16)
        parts["ref.npy"] = npy_bytes(latents)
    return parts


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write a tar with `{key}.{extension}` for each sample (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def make_dataset(
    folder: Path,
    shards: int = 8,
    per_shard: int = 6,
    latent_dim: int = 8,
    frames: tuple[int, int] = (3, 40),
    reference: tuple[int, int] = (0, 60),
    seed: int = 0,
) -> Path:
    """Make a folder of shards `00000.tar`, ...; lengths in frames are random in [low, high]."""
    rng = np.random.default_rng(seed)
    for shard in range(shards):
        samples = []
        for record in range(per_shard):
            text = f"This is record {record} of shard {shard}, größer."
            lengths = [int(rng.integers(low, high + 1)) for low, high in (frames, reference)]
            parts = sample_parts(rng, lengths[0], latent_dim, lengths[1], text)
            samples.append((f"part/{shard:03d}_{record:04d}", parts))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


class DataServer:
    """A Hub of datasets on loopback: lists and serves `root/owner/name/path`, and misbehaves.

    Each download takes one of `faults` off the list: a status ("503", "429:2" with Retry-After), or
    after N bytes "reset:N", "short:N" (less than announced), "ends:N" (length not announced),
    "stall:N", "norange:N" (all of it by default); or "wrongrange", "corrupt", "longer", and "" for
    none. `slow` is seconds between pieces of 16 KiB.
    """

    def __init__(self, root: Path):
        self.root = root
        self.commit = "c0ffee" + 34 * "0"
        self.faults: list[str] = []
        self.slow = 0.0
        self.requests: list[tuple[str, str]] = []
        """Name and Range of each download asked for."""
        state = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format, *args):
                pass

            def do_GET(self):
                path = self.path.partition("?")[0].strip("/")
                if path.startswith("api/datasets/"):
                    return self.api(path.split("/")[2:])
                _, owner, name, _, _, *rest = path.split("/")
                file = state.root / owner / name / "/".join(rest)
                state.requests.append((file.name, self.headers.get("Range", "")))
                kind, _, number = (state.faults.pop(0) if state.faults else "").partition(":")
                if not file.is_file():
                    kind = "404"
                if kind.isdigit():
                    self.send_response(int(kind))
                    if number:
                        self.send_header("Retry-After", number)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.file(file.read_bytes(), kind, int(number or 0))

            def file(self, data: bytes, kind: str, number: int):
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(wanted[1]) if wanted and kind != "norange" else 0
                self.send_response(206 if wanted and kind != "norange" else 200)
                if wanted and kind != "norange":
                    start = 0 if kind == "wrongrange" else start
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                body = data[start:]
                if kind == "corrupt":
                    body = body[:-9] + bytes([body[-9] ^ 1]) + body[-8:]
                if kind == "longer":
                    body += b"more"
                elif kind != "ends" and not (kind == "norange" and number):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if kind in ("reset", "short", "ends", "stall") or (kind == "norange" and number):
                    body = body[:number]
                for piece in range(0, len(body), 1 << 14):
                    self.wfile.write(body[piece : piece + (1 << 14)])
                    time.sleep(state.slow)
                if kind == "stall":
                    time.sleep(1.0)
                if kind == "reset":
                    time.sleep(0.05)  # so that what was sent is read before
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()

            def api(self, parts: list[str]):
                folder = state.root / "/".join(parts[:2])
                if not folder.is_dir():
                    return self.answer(404, {"error": "no such dataset"}, "RepoNotFound")
                if parts[2:3] != ["tree"]:
                    if parts[3:] and parts[3] not in ("main", "v1", state.commit):
                        return self.answer(404, {"error": "no such revision"}, "RevisionNotFound")
                    return self.answer(200, {"id": "/".join(parts[:2]), "sha": state.commit})
                assert parts[3] == state.commit, "listed at something else than the commit"
                below = folder / "/".join(parts[4:])
                if not below.is_dir():
                    return self.answer(404, {"error": "no such folder"}, "EntryNotFound")
                tree = []
                for path in sorted(below.rglob("*")):
                    entry = {"path": path.relative_to(folder).as_posix(), "oid": "0"}
                    if path.is_dir():
                        tree.append({**entry, "type": "directory"})
                        continue
                    size, digest = path.stat().st_size, sha256(path)
                    lfs = {"oid": digest, "size": size, "pointerSize": 9}
                    tree.append({**entry, "type": "file", "size": size, "lfs": lfs})
                self.answer(200, tree)

            def answer(self, status: int, body: object, error: str = ""):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("X-Error-Code", error)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                pass  # a client that goes away is part of the tests

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
