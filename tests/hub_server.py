"""A Hub on loopback that speaks the part of its protocol that uploads use."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LFS = (".tar", ".safetensors")


class Hub:
    """Datasets and models in memory. It checks sizes and SHA-256, and that what is committed was
    uploaded.

    `faults` are (what, status): the next request of that kind ("info", "create", "tree",
    "preupload", "batch", "put", "verify", "validate", "commit", "resolve") is answered so.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.put: list[int] = []
        """Bytes of each large file that came."""
        self.commits: list[list[str]] = []
        """Names in each commit."""
        self.commits_to_live = 1_000_000
        self.port = 0
        self.start()

    def start(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format, *args):
                pass

            def do_GET(self):
                parts = self.path.partition("?")[0].strip("/").split("/")
                if parts[0] != "api":
                    parts = parts if parts[0] == "datasets" else ["models", *parts]
                    repo, kind = "/".join(parts[1:3]), "resolve"
                    assert parts[3:5] == ["resolve", "main"]
                else:
                    assert parts[1] in ("datasets", "models")
                    repo, kind = "/".join(parts[2:4]), parts[4] if parts[4:] else "info"
                if self.refused(kind):
                    return
                files = hub.repos.get(repo)
                if files is None:
                    return self.answer(404, {"error": "no such dataset"}, "RepoNotFound")
                if kind == "info":
                    return self.answer(200, {"id": repo, "sha": 40 * "0"})
                if kind == "tree":
                    return self.answer(200, [entry(name, data) for name, data in files.items()])
                if parts[5] not in files:
                    return self.answer(404, {"error": "no such file"}, "EntryNotFound")
                self.answer(200, files[parts[5]])

            def do_PUT(self):
                data = self.body()
                if self.refused("put", signed=True):
                    return
                oid = self.path.strip("/").split("/")[1]
                if hashlib.sha256(data).hexdigest() != oid:
                    return self.answer(422, {"error": "another SHA-256"})
                hub.blobs[oid] = data
                hub.put.append(len(data))
                self.answer(200, {})

            def do_POST(self):
                data = self.body()
                parts = self.path.partition("?")[0].strip("/").split("/")
                if parts[-1] == "batch":
                    kind = "batch"
                elif parts[:2] == ["api", "repos"]:
                    kind = "create"
                elif parts[-1] == "validate-yaml":
                    kind = "validate"
                else:
                    kind = parts[-1] if parts[-1] == "verify" else parts[4]
                if self.refused(kind):
                    return
                repo = "/".join(parts[2:4])
                getattr(self, kind)(repo, data)

            def create(self, _: str, data: bytes):
                wanted = json.loads(data)
                assert wanted.get("type", "model") in ("dataset", "model")
                repo = f"{wanted['organization']}/{wanted['name']}"
                if repo in hub.repos:
                    return self.answer(409, {"error": "You already created this dataset repo"})
                hub.repos[repo] = {".gitattributes": b"*.tar filter=lfs\n"}
                hub.private[repo] = wanted.get("visibility") == "private" or wanted.get("private")
                self.answer(200, {"url": f"{hub.url}/datasets/{repo}"})

            def preupload(self, repo: str, data: bytes):
                files = []
                for file in json.loads(data)["files"]:
                    mode = "lfs" if file["path"].endswith(LFS) else "regular"
                    files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
                self.answer(200, {"files": files})

            def batch(self, _: str, data: bytes):
                wanted, objects = json.loads(data), []
                assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256"
                for item in wanted["objects"]:
                    answer = {"oid": item["oid"], "size": item["size"]}
                    if item["oid"] not in hub.blobs:
                        answer["actions"] = {
                            "upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}},
                            "verify": {"href": f"{hub.url}/lfs/verify", "header": {}},
                        }
                    objects.append(answer)
                self.answer(200, {"transfer": "basic", "objects": objects})

            def verify(self, _: str, data: bytes):
                item = json.loads(data)
                right = len(hub.blobs.get(item["oid"], b"")) == item["size"]
                self.answer(200 if right else 404, {})

            def validate(self, _: str, data: bytes):
                assert json.loads(data)["repoType"] in ("dataset", "model")
                self.answer(200, {"warnings": [], "errors": []})

            def commit(self, repo: str, data: bytes):
                header, *lines = [json.loads(line) for line in data.splitlines()]
                assert header["key"] == "header" and header["value"]["summary"]
                new = {}
                for line in lines:
                    value = line["value"]
                    if line["key"] == "deletedFile":
                        del hub.repos[repo][value["path"]]
                    elif line["key"] == "file":
                        assert value["encoding"] == "base64"
                        new[value["path"]] = base64.b64decode(value["content"])
                    elif value["oid"] in hub.blobs:
                        assert line["key"] == "lfsFile" and value["algo"] == "sha256"
                        new[value["path"]] = hub.blobs[value["oid"]]
                    else:
                        return self.answer(400, {"error": "a file is not there"})
                hub.repos[repo] |= new
                hub.commits.append(list(new))
                if len(hub.commits) >= hub.commits_to_live:
                    hub.stop()
                    return  # and the client waits in vain
                self.answer(200, {"commitUrl": f"{hub.url}/{repo}", "commitOid": 40 * "1"})

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers["Content-Length"]))

            def refused(self, kind: str, signed: bool = False) -> bool:
                hub.requests.append(kind)
                for fault in hub.faults:
                    if fault[0] == kind:
                        hub.faults.remove(fault)
                        self.answer(fault[1], {"error": "as the test wants"})
                        return True
                if signed or self.headers.get("Authorization") == "Bearer hf_right":
                    return False
                self.answer(401, {"error": "Invalid username or password."})
                return True

            def answer(self, status: int, body: object, error: str = ""):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if error:
                    self.send_header("X-Error-Code", error)
                if status == 429:
                    self.send_header("Retry-After", "7")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def entry(name: str, data: bytes) -> dict[str, object]:
    """A file as the Hub lists it."""
    facts = {"type": "file", "path": name, "size": len(data)}
    if name.endswith(LFS):
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 9}
        return {**facts, "oid": 40 * "a", "lfs": lfs}
    return {**facts, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
