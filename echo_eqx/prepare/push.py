"""A folder of shards onto the Hub: a dataset with a card, one commit for each shard."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
    validate_repo_id,
)

from echo_eqx.errors import EchoError
from echo_eqx.hub import HubDataset, HubOffline, HubUnavailable, hub_errors

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt at what may succeed later."""
_BEGIN, _END = b"<!-- echo_eqx:begin -->", b"<!-- echo_eqx:end -->"
_CARD = "README.md"
# Of JSON that is too deep, too large or not an index at all.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class _Codec:
    """Which codec made the latents, as the index has it."""

    id: str
    sample_rate: int
    hop: int
    latent_dim: int


@dataclass(frozen=True)
class _Holdings:
    """What a folder holds, as its index says; small files are read once, so that what is written
    to the folder meanwhile is not listed without its shards."""

    shards: dict[str, str]
    """SHA-256 by file name, in the order of names."""
    small: dict[str, bytes]
    """Silence, codec and index, in the order they are sent."""
    codec: _Codec
    samples: int
    seconds: float


def push(folder: Path, repo: str, *, say: Callable[[str], object]) -> None:
    """Upload the shards that lie in `folder` to the dataset `repo`, `owner/name`, on the Hub.

    Each shard is a commit, and what is there with the same SHA-256 is not sent again: the same call
    goes on where one broke. Silence, codec, index and card come last, in one commit. Of a card that
    is there, only the block between two markers changes. A dataset that does not exist yet is
    created, private. `say` is told what happens to each shard.

    **Raises**: `EchoError` if `repo` is no such name, the folder has no shards, a shard is not what
    the index beside it says, or the Hub is out of reach or refuses.
    """
    _check_name(repo)
    holds = _read_folder(folder)
    hub = _Hub(repo, say)
    hub.create()
    there = hub.files()
    for number, (name, sha256) in enumerate(holds.shards.items(), 1):
        lfs = there[name].lfs if name in there else None
        if lfs is not None and lfs.sha256 == sha256:
            done = "is already there"
        else:
            _check_sum(folder / name, sha256)
            hub.send({name: folder / name}, f"Add {name}")
            done = "sent"
        say(f"{name} {done} ({number} of {len(holds.shards)})")
    changed: dict[str, Path | bytes] = {
        name: data for name, data in holds.small.items() if not _is_same(there.get(name), data)
    }
    old = hub.read(_CARD)
    card = _card(repo, holds, old)
    if card != old:
        changed[_CARD] = card
    if changed:
        hub.send(changed, "Update index and card")
        say(f"{', '.join(changed)} sent")


class _Hub:
    """One dataset on the Hub. Its methods raise `EchoError` for anything that goes wrong there."""

    def __init__(self, repo: str, say: Callable[[str], object]):
        self._repo, self._say = repo, say
        self._errors = f"cannot push to {repo}"
        self._api = HfApi()

    def create(self) -> None:
        """Create the dataset if it does not exist: private, since publishing cannot be undone."""

        def create() -> None:
            if not self._api.repo_exists(self._repo, repo_type="dataset"):
                self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
                self._say(f"{self._repo} is new, and private until its settings say otherwise")

        self._retry(create)

    def files(self) -> dict[str, RepoFile]:
        """Files in the root of the dataset, by name."""
        with hub_errors(self._errors):
            tree = self._api.list_repo_tree(self._repo, repo_type="dataset")
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def read(self, name: str) -> bytes | None:
        """The content of a file as it is now, None if it does not exist."""
        with hub_errors(self._errors):
            url = HubDataset(self._repo).file_url(name)
            response = http_backoff("GET", url, headers=build_hf_headers())
            if response.status_code == 404:
                return None
            hf_raise_for_status(response)
            return response.content

    def send(self, files: dict[str, Path | bytes], message: str) -> None:
        """Upload files and commit them."""
        with hub_errors(self._errors):
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            self._api.preupload_lfs_files(self._repo, added, repo_type="dataset")
        # The library retries every request of an upload except the commit.
        self._retry(
            lambda: self._api.create_commit(
                self._repo, added, commit_message=message, repo_type="dataset"
            )
        )

    def _retry(self, call: Callable[[], object]) -> None:
        for wait in (*WAITS, None):
            try:
                with hub_errors(self._errors):
                    call()
                return
            except HubOffline:
                raise
            except HubUnavailable as error:
                if wait is None:
                    raise
                wait = max(wait, error.retry_after or 0.0)
                self._say(f"{error}; trying again in {wait:.0f} s")
            time.sleep(wait)


def _check_name(repo: str) -> None:
    with contextlib.suppress(HFValidationError):
        validate_repo_id(repo)
        if repo.count("/") == 1:
            return
    raise EchoError(f"{repo!r} is no name of a dataset on the Hub; wanted owner/name")


def _read_folder(folder: Path) -> _Holdings:
    try:
        files = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
        names = ["silence.safetensors", "codec.json"]
        names += sorted(n for n in files if n.startswith("index") and n.endswith(".json"))
        small = {name: (folder / name).read_bytes() for name in names if name in files}
    except OSError as error:
        raise EchoError(f"{error.filename} cannot be read: {error.strerror}") from None
    shards = sorted(name for name in files if name.endswith(".tar"))
    if not shards:
        raise EchoError(f"{folder} holds no *.tar; wanted at least one shard to push")
    if not names[2:]:
        raise EchoError(f"{folder} holds no index*.json; wanted one that lists its shards")
    listed: dict[str, str] = {}
    codecs: dict[_Codec, str] = {}
    counted: dict[str, tuple[int, float]] = {}
    for name in names[2:]:
        codec, parts = _read_index(folder / name, small[name])
        codecs.setdefault(codec, name)
        for shard, (sha256, shard_samples, shard_seconds) in parts.items():
            if listed.setdefault(shard, sha256) != sha256:
                raise EchoError(
                    f"{folder / shard} is listed in two index*.json with different SHA-256; "
                    "wanted it in one"
                )
            counted[shard] = (shard_samples, shard_seconds)
    if len(codecs) > 1:
        first, second = list(codecs.items())[:2]
        raise EchoError(
            f"{folder / first[1]} names codec {first[0].id} and {second[1]} names {second[0].id}; "
            "wanted shards of one codec"
        )
    for shard in shards:
        if shard not in listed:
            raise EchoError(f"{folder / shard} is in no index*.json beside it; wanted it listed")
    for shard in sorted(listed):
        if shard not in files:
            raise EchoError(f"{folder / shard} does not exist; wanted it, since an index lists it")
    return _Holdings(
        {name: listed[name] for name in shards},
        small,
        next(iter(codecs)),
        sum(samples for samples, _ in counted.values()),
        sum(seconds for _, seconds in counted.values()),
    )


def _read_index(path: Path, data: bytes) -> tuple[_Codec, dict[str, tuple[str, int, float]]]:
    """The codec, and SHA-256, samples and seconds of each shard."""
    try:
        index = json.loads(data)
        if (index["format"], index["kind"]) != ("echo_eqx", "shards"):
            raise ValueError(f"its kind is {index['format']} {index['kind']}")
        codec = index["codec"]
        sizes = [int(codec[name]) for name in ("sample_rate", "hop", "latent_dim")]
        if min(sizes) < 1:
            raise ValueError(f"a size of its codec is {min(sizes)}")
        seconds = sizes[1] / sizes[0]  # of a frame
        shards = {
            name: (str(facts["sha256"]), int(facts["samples"]), int(facts["frames"]) * seconds)
            for name, facts in index["shards"].items()
        }
        return _Codec(str(codec["id"]), *sizes), shards
    except _UNREADABLE as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise EchoError(f"{path} is no index of shards: {reason}") from None


def _check_sum(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EchoError(f"{path} cannot be read: {error.strerror}") from None
    if found != sha256:
        raise EchoError(f"{path} has SHA-256 {found}; wanted {sha256}, as its index says")


def _is_same(remote: RepoFile | None, data: bytes) -> bool:
    """Large files are known by their SHA-256, others by git's hash."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card(repo: str, holds: _Holdings, old: bytes | None) -> bytes:
    """The card; of an old one everything but the block between the markers."""
    block = _BEGIN + b"\n" + _description(repo, holds).encode() + _END
    if old is None:
        return f"{_HEADER}\n# {repo.split('/')[1]}\n\n".encode() + block + b"\n"
    begin = old.rfind(_BEGIN)
    end = old.find(_END, begin)
    if begin == -1 or end == -1:
        return old + (b"\n" if old.endswith(b"\n") else b"\n\n") + block + b"\n"
    return old[:begin] + block + old[end + len(_END) :]


_HEADER = """\
---
# Fill in the license: https://huggingface.co/docs/hub/repositories-licenses
license: other
task_categories:
- text-to-speech
tags:
- audio
- webdataset
- dacvae
- echo_eqx
configs:
- config_name: default
  data_files:
  - split: train
    path: "*.tar"
---
"""


def _description(repo: str, holds: _Holdings) -> str:
    codec = holds.codec
    silence = ""
    if "silence.safetensors" in holds.small:
        silence = "\n`silence.safetensors` holds latents of digital silence by the same codec."
    return f"""\
## Shards

{holds.seconds / 3600:,.2f} hours of speech as latents: {holds.samples:,} samples in \
{len(holds.shards):,} WebDataset shards. Of each sample there are

| file | content |
|---|---|
| `KEY.npy` | latents, float16 (frames, {codec.latent_dim}), \
{codec.sample_rate / codec.hop:g} frames a second |
| `KEY.ref.npy` | latents of other speech by the same speaker, float16 \
(frames, {codec.latent_dim}); not every sample has them |
| `KEY.json` | `text`, and what else is known of the recording |

Latents are those of the codec `{codec.id}`: {codec.sample_rate:,} Hz, {codec.hop:,} audio samples \
a frame, {codec.latent_dim} channels.{silence}
`index*.json` list SHA-256, samples and frames of each shard.

Train on them with echo_eqx:

```
python scripts/train.py --data hf://datasets/{repo}
```
"""
