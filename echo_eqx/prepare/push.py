"""Upload a folder of shards to the Hub: a dataset with a card.

Shards are checked against the SHA-256 in their index before they are sent, and indexes and card
follow in the last commit, so the listing on the Hub is correct at all times. Nothing is written to
the folder, and uploaded files are recognized by their SHA-256, so the same call on any machine
continues an interrupted upload. `HfApi.upload_large_folder` guarantees no order, keeps its state in
the folder and knows nothing of indexes.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from echo_eqx.data.shards import HOLDOUT
from echo_eqx.errors import EchoError
from echo_eqx.hub import REPO, HubDataset, HubOffline, HubUnavailable, hub_errors
from echo_eqx.prepare.index import parse_index

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each retry of a request that may succeed later."""
MAX_COMMITS = 100
"""Most commits of shards in one upload: the Hub limits how many there are in an hour."""
_BEGIN, _END = b"<!-- echo_eqx:begin -->", b"<!-- echo_eqx:end -->"
_CARD = "README.md"
_SMALL = re.compile(r"silence\.safetensors|codec\.json|(index|clips-).*\.json")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Dataset:
    """What to upload. Names are relative to the folder.

    Small files are read once, because an index that is updated meanwhile would list other shards.
    """

    shards: dict[str, dict]
    """The index entry of each shard, sorted by name."""
    small_files: dict[str, bytes]
    """Silence, codec, indexes and lists of clips."""
    codec: dict[str, Any]
    """The codec that made the latents, according to the indexes."""


def push(folder: Path, repo: str) -> None:
    """Upload the shards in `folder` and `folder/holdout` to the dataset `repo`, `owner/name`.

    Shards on the Hub with the same SHA-256 are not sent again, so the same call continues an
    interrupted upload. Silence, codec, indexes, lists of clips and the card come last, in one
    commit. Of an existing card, only the block between two markers changes. A dataset that does not
    exist is created, private.

    **Raises**: `EchoError` if `repo` is not such a name, the folder has no shards, a shard differs
    from its index, or the Hub cannot be reached or refuses.
    """
    if re.fullmatch(REPO, repo) is None:
        raise EchoError(f"--push: expected owner/name of a dataset on the Hub, got {repo!r}")
    dataset = _read_dataset(folder)
    api, action = HfApi(), f"cannot push to {repo}"

    def send(files: Mapping[str, Path | bytes], message: str) -> None:
        with hub_errors(action):
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            api.preupload_lfs_files(repo, added, repo_type="dataset")
        # The library retries every request of an upload except the commit.
        commit = partial(api.create_commit, repo, added, repo_type="dataset")
        _retry(partial(commit, commit_message=message), action)

    _retry(lambda: _create(api, repo), action)
    with hub_errors(action):
        tree = api.list_repo_tree(repo, repo_type="dataset", recursive=True)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    total, missing = len(dataset.shards), []
    for number, (name, listed) in enumerate(dataset.shards.items(), 1):
        lfs = remote[name].lfs if name in remote else None
        if lfs is not None and lfs.sha256 == listed["sha256"]:
            logger.info("%s is already there (%d of %d)", name, number, total)
        else:
            missing.append((number, name))
    size = max(1, -(-len(missing) // MAX_COMMITS))
    for batch in (missing[i : i + size] for i in range(0, len(missing), size)):
        for _, name in batch:
            _check_sum(folder / name, dataset.shards[name]["sha256"])
        send({name: folder / name for _, name in batch}, f"Add {batch[0][1]}")
        for number, name in batch:
            logger.info("%s sent (%d of %d)", name, number, total)
    with hub_errors(action):
        old = _read(repo, _CARD)
    files = {**dataset.small_files, _CARD: _card(repo, dataset, old)}
    changed = {name: data for name, data in files.items() if not _is_same(remote.get(name), data)}
    if changed:
        send(changed, "Update index and card")
        logger.info("%s sent", ", ".join(changed))


def _create(api: HfApi, repo: str) -> None:
    """Create the dataset if it does not exist: private, since publishing cannot be undone."""
    if not api.repo_exists(repo, repo_type="dataset"):
        api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        logger.info("%s is new; it is private until you change its settings", repo)


def _read(repo: str, name: str) -> bytes | None:
    """The current content of a file, None if it does not exist."""
    response = http_backoff("GET", HubDataset(repo).file_url(name), headers=build_hf_headers())
    if response.status_code == 404:
        return None
    hf_raise_for_status(response)
    return response.content


def _retry(call: Callable[[], object], action: str) -> None:
    for wait in (*WAITS, None):
        try:
            with hub_errors(action):
                call()
            return
        except HubUnavailable as error:
            if wait is None or isinstance(error, HubOffline):
                raise
            wait = max(wait, error.retry_after or 0.0)
            logger.warning("%s; trying again in %.0f s", error, wait)
        time.sleep(wait)


def _read_dataset(folder: Path) -> _Dataset:
    """**Raises**: `EchoError` if shards and indexes do not fit together."""
    small_files: dict[str, bytes] = {}
    shards: dict[str, dict] = {}
    codecs: list[tuple[dict[str, Any], str]] = []
    found: set[str] = set()
    try:
        for prefix in ("", f"{HOLDOUT}/"):
            if prefix and not (folder / prefix).is_dir():
                continue
            for path in sorted((folder / prefix).iterdir()):
                if not path.is_file() or path.is_symlink():
                    continue
                if path.suffix == ".tar":
                    found.add(prefix + path.name)
                if not _SMALL.fullmatch(path.name):
                    continue
                data = small_files[prefix + path.name] = path.read_bytes()
                if not path.name.startswith("index"):
                    continue
                codec, summaries = _read_index(path, data)
                codecs.append((codec, prefix + path.name))
                for name, listed in summaries.items():
                    known = shards.setdefault(prefix + name, listed)
                    if known["sha256"] != listed["sha256"]:
                        raise EchoError(
                            f"{path.parent / name}: two index*.json list it with different SHA-256"
                        )
    except OSError as error:
        raise EchoError(f"{error.filename} cannot be read: {error.strerror}") from None
    if not found:
        raise EchoError(f"{folder}: expected at least one shard (*.tar), got none")
    if not codecs:
        raise EchoError(f"{folder}: expected an index*.json that lists the shards, got none")
    first, one = codecs[0]
    for other, name in codecs:
        if other != first:
            raise EchoError(
                f"{folder}: expected shards of one codec, but {one} names {first['id']} and {name} "
                f"names {other['id']}"
            )
    for name in sorted(found - shards.keys()):
        raise EchoError(f"{folder / name} is in no index*.json; move it away or list it")
    for name in sorted(shards.keys() - found):
        if shards[name]["samples"]:  # prepare lists a shard without samples, but writes no file
            raise EchoError(f"{folder / name} does not exist, but an index lists it")
    return _Dataset({n: shards[n] for n in sorted(found)}, small_files, first)


def _read_index(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, dict]]:
    """The codec, and the entry of each shard."""
    try:
        index = parse_index(data, ("samples", "frames"))
        if index is None:
            raise ValueError("it is of another kind")
        codec = {name: int(index["codec"][name]) for name in ("sample_rate", "hop", "latent_dim")}
        if min(codec.values()) < 1:
            raise ValueError(f"a size of its codec is {min(codec.values())}")
        return codec | {"id": str(index["codec"]["id"])}, index["shards"]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise EchoError(f"{path}: expected an index of shards: {reason}") from None


def _check_sum(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EchoError(f"{path} cannot be read: {error.strerror}") from None
    if found != sha256:
        raise EchoError(f"{path}: expected SHA-256 {sha256} as in its index, got {found}")


def _is_same(remote: RepoFile | None, data: bytes) -> bool:
    """Large files are compared by their SHA-256, others by git's hash."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card(repo: str, dataset: _Dataset, old: bytes | None) -> bytes:
    """The card. An old card is kept byte for byte, except for the block between the markers."""
    block = _BEGIN + b"\n" + _description(repo, dataset).encode() + _END
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


def _description(repo: str, dataset: _Dataset) -> str:
    rate, hop, width = (dataset.codec[x] for x in ("sample_rate", "hop", "latent_dim"))
    shards = [listed for name, listed in dataset.shards.items() if "/" not in name]
    samples, frames = (sum(listed[x] for listed in shards) for x in ("samples", "frames"))
    hours = frames * hop / rate / 3600
    extra = ""
    if count := sum(listed["samples"] for listed in dataset.shards.values()) - samples:
        extra += f"\n`{HOLDOUT}/` holds {count:,} more samples to evaluate on."
    if "silence.safetensors" in dataset.small_files:
        extra += "\n`silence.safetensors` holds latents of digital silence by the same codec."
    return f"""\
## Shards

{hours:,.2f} hours of speech as latents: {samples:,} samples in {len(shards):,} WebDataset shards. \
Each sample has

| file | content |
|---|---|
| `KEY.npy` | latents, float16 (frames, {width}), {rate / hop:g} frames a second |
| `KEY.ref.npy` | latents of other speech by the same speaker, float16 \
(frames, {width}); not every sample has them |
| `KEY.json` | `text`, and what else is known of the recording |

The latents are from the codec `{dataset.codec["id"]}`: {rate:,} Hz, {hop:,} audio samples \
a frame, {width} channels.{extra}
`index*.json` list SHA-256, samples and frames of each shard.

Train on them with echo_eqx:

```
echo-eqx train --data hf://datasets/{repo}
```
"""
