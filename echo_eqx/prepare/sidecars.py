"""Files beside tar shards: indexes with checksums, the codec's facts, latents of silence."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import Shard, ShardIndex, frame_rate
from echo_eqx.errors import EchoError
from echo_eqx.hub import hub_errors

SILENCE = ("silence.safetensors", "silence.npy")
CODEC = "codec.json"
_INDEX = re.compile(r"index[^/]*\.json")


@dataclass(frozen=True)
class Broken:
    """A record, or with an empty `key` a shard or a file beside, that cannot be used.

    `kind` is one of `BrokenRecord`, or duplicate (the key is in an earlier shard, or another member
    of this one has its place); of a member that is in no record, with its name as `key`, member; of
    a shard sha256 (not what its index says), unlisted (not in the index beside it) or lost (listed
    there, but gone); of another file index, codec or silence (unreadable).
    """

    shard: str
    key: str
    kind: str
    detail: str


@contextmanager
def opened(cache: ShardCache, shard: Shard) -> Iterator[int]:
    descriptor = cache.open(shard)
    try:
        yield descriptor
    except OSError as error:
        raise EchoError(f"{shard.name} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def folder_of(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def is_whole(shard_index: ShardIndex) -> bool:
    """Whether the shard_index has all shards of a folder, not a part picked by a glob or name."""
    return shard_index.shards[0].path is None or Path(shard_index.source).expanduser().is_dir()


def files_beside(shard_index: ShardIndex) -> tuple[list[Shard], str | None]:
    """Indexes and silence in the folders of shards and above all, as files the cache can open, and
    why they cannot be listed."""
    folders = sorted({".", *(folder_of(shard.name) for shard in shard_index.shards)})
    first = shard_index.shards[0]
    found = []
    if first.path is not None:
        root = first.path.parents[len(Path(first.name).parts) - 1]
        try:
            for folder in folders:
                for path in sorted((root / folder).iterdir()):
                    if _is_beside(path.name) and path.is_file():
                        name = path.relative_to(root).as_posix()
                        found.append(Shard(name, path.stat().st_size, path=path))
        except OSError as error:
            return [], f"{error.filename} cannot be read: {error.strerror}"
        return found, None
    dataset = shard_index.dataset
    options = {"repo_type": "dataset", "revision": dataset.revision}
    try:
        with hub_errors(f"cannot list {dataset}"):
            for folder in folders:
                path = None if folder == "." else folder
                for file in HfApi().list_repo_tree(dataset.repo, path, **options):
                    size = getattr(file, "size", None)  # folders have none
                    name = file.path
                    if size is None or folder_of(name) != folder or not _is_beside(Path(name).name):
                        continue
                    found.append(Shard(name, size, url=dataset.file_url(name)))
    except EchoError as error:
        return [], str(error)
    return sorted(found, key=lambda file: file.name), None


def _is_beside(name: str) -> bool:
    return name in (*SILENCE, CODEC) or _INDEX.fullmatch(name) is not None


def first_silence(beside: list[Shard]) -> Shard | None:
    """The one that is taken for training: in the folder above all."""
    named = {file.name: file for file in beside}
    return next((named[name] for name in SILENCE if name in named), None)


def find_frame_rate(beside: list[Shard], cache: ShardCache, broken: list[Broken]) -> float | None:
    """Frames a second by the first codec.json, None if there is none that says."""
    for file in beside:
        if PurePosixPath(file.name).name == CODEC:
            if (rate := frame_rate(_content(file, cache))) is not None:
                return rate
            broken.append(Broken(file.name, "", "codec", "it does not say sample_rate and hop"))
    return None


def _content(file: Shard, cache: ShardCache) -> bytes:
    with opened(cache, file) as descriptor, open(descriptor, "rb", closefd=False) as content:
        return content.read()


def read_indexes(
    beside: list[Shard], cache: ShardCache, broken: list[Broken]
) -> tuple[dict[str, str], set[str], tuple[str, ...]]:
    """SHA-256 of each shard that is listed, the folders with an index, and the indexes' names."""
    sums: dict[str, str] = {}
    folders, names = set(), []
    for file in beside:
        if _INDEX.fullmatch(PurePosixPath(file.name).name) is None:
            continue
        try:
            fields = json.loads(_content(file, cache))
            if (fields["format"], fields["kind"]) != ("echo_eqx", "shards"):
                continue
            listed = {str(name): str(facts["sha256"]) for name, facts in fields["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            broken.append(Broken(file.name, "", "index", f"it cannot be read ({reason})"))
            continue
        folder = folder_of(file.name)
        folders.add(folder)
        names.append(file.name)
        sums |= {(PurePosixPath(folder) / name).as_posix(): listed[name] for name in listed}
    return sums, folders, tuple(names)


def sha256(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
