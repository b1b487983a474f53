"""Files next to tar shards: indexes with checksums, codec.json, and latents of silence."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import Shard, ShardIndex, frame_rate
from echo_eqx.errors import EchoError
from echo_eqx.hub import hub_errors
from echo_eqx.prepare.index import parse_index

_SIDECAR = re.compile(r"index[^/]*\.json|codec\.json|silence\.(safetensors|npy)")


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used; if `key` is empty, a whole shard or a file next to it.

    `kind` is one of the kinds of `BrokenRecord`, or

    - duplicate: an earlier shard has the key, or another member of the record has the same role;
    - member: the member `key` belongs to no record;
    - sha256, unlisted, missing: the shard differs from its index, is not in it, or does not exist;
    - index, codec, silence: that file is unreadable.
    """

    shard: str
    key: str
    kind: str
    detail: str


@contextmanager
def open_shard(cache: ShardCache, shard: Shard) -> Iterator[int]:
    descriptor = cache.open(shard)
    try:
        yield descriptor
    except OSError as error:
        raise EchoError(f"{shard.name} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def folder_of(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def list_sidecars(shard_index: ShardIndex) -> tuple[list[Shard], str | None]:
    """The files next to the shards and in the top folder, or why they cannot be listed."""
    folders = {".", *(folder_of(shard.name) for shard in shard_index.shards)}
    first, found = shard_index.shards[0], []
    try:
        if first.path is not None:
            root = first.path.parents[len(Path(first.name).parts) - 1]
            for path in (path for folder in folders for path in (root / folder).iterdir()):
                if path.is_file():
                    name = path.relative_to(root).as_posix()
                    found.append(Shard(name, path.stat().st_size, path=path))
        else:
            dataset = shard_index.dataset
            options = {"repo_type": "dataset", "revision": dataset.revision}
            with hub_errors(f"cannot list {dataset}"):
                for file in HfApi().list_repo_tree(dataset.repo, recursive=True, **options):
                    if isinstance(file, RepoFile) and folder_of(file.path) in folders:
                        found.append(Shard(file.path, file.size, url=dataset.file_url(file.path)))
    except OSError as error:
        return [], f"{error.filename} cannot be read: {error.strerror}"
    except EchoError as error:
        return [], str(error)
    found = [file for file in found if _SIDECAR.fullmatch(PurePosixPath(file.name).name)]
    return sorted(found, key=lambda file: (folder_of(file.name), file.name)), None


def find_frame_rate(sidecars: list[Shard], cache: ShardCache, broken: list[Broken]) -> float | None:
    """Frames per second from the first valid codec.json, or None."""
    for file in sidecars:
        if PurePosixPath(file.name).name == "codec.json":
            if (rate := frame_rate(_content(file, cache))) is not None:
                return rate
            broken.append(Broken(file.name, "", "codec", "expected sample_rate and hop"))
    return None


def _content(file: Shard, cache: ShardCache) -> bytes:
    with open_shard(cache, file) as descriptor, open(descriptor, "rb", closefd=False) as content:
        return content.read()


def read_indexes(
    sidecars: list[Shard], cache: ShardCache, broken: list[Broken]
) -> tuple[dict[str, str], set[str], tuple[str, ...]]:
    """SHA-256 of each listed shard, the folders that have an index, and the indexes' names."""
    sums: dict[str, str] = {}
    folders, names = set(), []
    for file in sidecars:
        if not PurePosixPath(file.name).name.startswith("index"):
            continue
        try:
            index = parse_index(_content(file, cache))
        except ValueError as error:
            broken.append(Broken(file.name, "", "index", f"cannot be read: {str(error)[:100]}"))
            continue
        if index is None:
            continue
        folder = folder_of(file.name)
        folders.add(folder)
        names.append(file.name)
        for name, listed in index["shards"].items():
            if listed["sha256"]:  # else it has no samples, and no file
                sums[(PurePosixPath(folder) / name).as_posix()] = listed["sha256"]
    return sums, folders, tuple(names)


def sha256(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
