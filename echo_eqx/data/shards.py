"""The tar shards of a source: a folder, a glob, one file, or a dataset on the Hub."""

import glob
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from echo_eqx.config import CodecConfig
from echo_eqx.errors import EchoError
from echo_eqx.files import write_json
from echo_eqx.hub import SCHEME, HubDataset, HubUnavailable, hub_errors

FRAME_RATE = CodecConfig().frame_rate
"""Latent frames per second of the published codec, assumed where no codec.json is present."""
HOLDOUT = "holdout"
"""Folder of held-out shards. They are listed only if the source names that folder."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Shard:
    """One tar file, on this machine (`path`) or on the Hub (`url`)."""

    name: str
    """Path relative to the folder or repository."""
    size: int
    """In bytes."""
    path: Path | None = None
    url: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a source, sorted by name."""

    source: str
    revision: str | None
    """Commit on the Hub, None for local files."""
    shards: tuple[Shard, ...]

    @property
    def dataset(self) -> HubDataset:
        """The dataset on the Hub that holds the shards, at the listed commit."""
        return HubDataset.parse(self.source).at(self.revision)

    def digest(self) -> str:
        """SHA-256 of names, sizes and revision, but not of where the folder is mounted."""
        content = [self.revision, [[shard.name, shard.size] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def frame_rate(codec_json: bytes) -> float | None:
    """Latent frames per second from the content of codec.json, None if it gives none."""
    try:
        codec = json.loads(codec_json)
        rate = codec["sample_rate"] / codec["hop"]
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
        return None
    return rate if isinstance(rate, float) and 0 < rate < 1e6 else None


def list_shards(source: str, cache: Path) -> ShardIndex:
    """All *.tar of `source`: a folder (searched recursively), a glob, one file, or
    `hf://datasets/owner/name[@revision][/folder]`. Shards in a subfolder `holdout` are left out.

    A revision on the Hub is resolved to its commit. The result is saved in the folder `cache` and
    used when the Hub cannot be reached.

    **Raises**: `EchoError` if there are none, or the Hub cannot be reached and nothing is saved.
    """
    if source.startswith(SCHEME):
        return _list_hub(source, cache)
    try:
        path = _as_stored(Path(source).expanduser())
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise EchoError(f"{source[:200]!r} is not a usable path: {error}") from None
    if is_file:
        if path.suffix.lower() != ".tar":
            raise EchoError(f"expected a *.tar, a folder, a glob or {SCHEME}..., got {path}")
        return _local(source, path.parent, [path.name])
    if is_folder:
        names = glob.glob("**/*.[tT][aA][rR]", root_dir=path, recursive=True)
        return _local(source, path, names)
    if not glob.has_magic(source):
        raise EchoError(
            f"{source} does not exist; expected a folder, a glob, a *.tar or {SCHEME}..."
        )
    fixed = list(path.parts[:-1])
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    folder = Path(*fixed)
    names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
    return _local(source, folder, [name for name in names if name.lower().endswith(".tar")])


def _as_stored(path: Path) -> Path:
    """`path`, or whichever of its NFC and NFD spellings exists."""
    spellings = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
    return next((found for found in (path, *spellings) if found.exists()), path)


def _no_shards(source: str) -> EchoError:
    return EchoError(f"{source}: expected at least one shard, got no *.tar")


def _is_held_out(name: str) -> bool:
    return HOLDOUT in name.split("/")[:-1]


def _local(source: str, folder: Path, names: list[str]) -> ShardIndex:
    shards = []
    try:
        for name in sorted(names):
            path = folder / name
            if _is_held_out(name):
                continue
            if path.is_file():
                shards.append(Shard(name, path.stat().st_size, path=path.absolute()))
            elif not path.is_dir():
                raise EchoError(
                    f"{path}: expected a file, got a broken link, a pipe or the like; repair or "
                    "remove it"
                )
    except OSError as error:
        raise EchoError(f"cannot read {error.filename}: {error.strerror}") from None
    if not shards:
        raise _no_shards(source)
    return ShardIndex(source, None, tuple(shards))


def _list_hub(source: str, cache: Path) -> ShardIndex:
    dataset = HubDataset.parse(source)
    saved = cache / f"listing-{hashlib.sha256(source.encode()).hexdigest()[:24]}.json"
    known = _read_listing(saved, source)
    if known is not None and dataset.revision and _COMMIT.fullmatch(dataset.revision):
        return known
    try:
        with hub_errors(f"cannot list {source}"):
            commit, files = _ask_hub(dataset)
    except HubUnavailable as error:
        if known is not None:
            return known
        raise EchoError(f"{error}; {cache} has no earlier listing of it either") from None
    if not files:
        raise _no_shards(source)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(saved, {"source": source, "commit": commit, "files": files})
    except OSError as error:
        raise EchoError(f"cannot write {saved}: {error}") from None
    return _listing(source, commit, files)


def _ask_hub(dataset: HubDataset) -> tuple[str, list[Any]]:
    """The commit, and [path, size, SHA-256 or None] of each of its *.tar."""
    api, repo, folder = HfApi(), dataset.repo, dataset.folder
    commit = api.dataset_info(repo, revision=dataset.revision, timeout=30.0).sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise EchoError(f"dataset {repo}: expected a commit of 40 hex digits, got {commit!r}")
    tree = api.list_repo_tree(repo, folder, recursive=True, revision=commit, repo_type="dataset")
    files = []
    for file in tree:
        size = getattr(file, "size", None)  # folders have none
        below = file.path.removeprefix(f"{folder}/") if folder else file.path
        if file.path.endswith(".tar") and size is not None and not _is_held_out(below):
            lfs = getattr(file, "lfs", None)
            files.append([file.path, size, lfs.sha256 if lfs else None])
    return commit, sorted(files)


def _read_listing(saved: Path, source: str) -> ShardIndex | None:
    try:
        listing = json.loads(saved.read_text())
        if listing["source"] == source:
            return _listing(source, listing["commit"], listing["files"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _listing(source: str, commit: str, files: list[Any]) -> ShardIndex:
    dataset = HubDataset.parse(source).at(commit)
    shards = tuple(
        Shard(name, size, url=dataset.file_url(name), sha256=sha256) for name, size, sha256 in files
    )
    return ShardIndex(source, commit, shards)
