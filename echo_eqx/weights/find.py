"""Finding the file that a source names: a path, or `owner/name[@revision][:file]` on the Hub."""

import re
from pathlib import Path
from typing import Literal

import huggingface_hub  # imports its parts on first use

from echo_eqx.errors import EchoError
from echo_eqx.hub import REPO, HubFileNotFound, hub_errors
from echo_eqx.weights.checkpoint.reader import FOLDER, MANIFEST, find_checkpoints
from echo_eqx.weights.sharded import INDEX_SUFFIX, shard_files, weight_map

SUFFIXES = (".safetensors", ".pkl", ".pickle", ".pth", ".pt", ".gguf")
Kind = Literal["dit", "codec"]
_USUAL_NAMES = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "weights.pth",
    f"model{INDEX_SUFFIX}",
)
SHIPPED = {
    "voice": {
        kind: Path(__file__).parents[1] / "voice" / "weights" / f"{kind}.safetensors"
        for kind in ("dit", "codec")
    }
}
"""Models in the package, by name and kind. Write `./voice` for a folder of that name."""

_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")
_HUB_ID = re.compile(
    rf"(?P<repo>{REPO})"
    r"(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
    r"(?::(?P<file>[\w.-]+(?:/[\w.-]+)*))?"
)


def find_weights(source: str | Path, kind: Kind = "dit") -> Path:
    """The file or checkpoint that `find_candidates` lists first."""
    return find_candidates(source, kind)[0]


def find_candidates(source: str | Path, kind: Kind = "dit", *, exports: bool = True) -> list[Path]:
    """Where the weights of `source` are, downloaded once if it is on the Hub. Nothing is verified.

    "voice" is the small voice in the package; `kind` says which of its two models is meant. The
    path of a file or checkpoint is returned as it is. A folder or repository is searched for
    `dit.safetensors` or `codec.safetensors`, depending on `kind`, then for the other usual names,
    then for its only file of weights. A run folder gives all its complete checkpoints, newest
    first, each preceded by the file of weights exported from it, if `exports`.

    **Raises**: `EchoError` if there are no weights, or several files to choose from.
    """
    if not str(source):
        raise EchoError(f"{kind}: expected a file, a folder, a Hub id or voice, got ''")
    if str(source) in SHIPPED:
        return [SHIPPED[str(source)][kind]]
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise EchoError(f"{str(source)[:200]!r} is not a usable path: {error}") from None
    if is_file:
        return [_index_of(path) or path]
    if is_folder and (path / MANIFEST).is_file():
        return [path]
    if is_folder and (checkpoints := find_checkpoints(path / FOLDER)):
        found: list[Path] = []
        for _, folder in checkpoints:
            export = folder.with_name(f"{folder.name}.safetensors")
            found += [export, folder] if exports and export.is_file() else [folder]
        return found
    if is_folder:
        names = [child.name for child in sorted(path.iterdir()) if child.is_file()]
        return [path / _choose(names, kind, f"folder {path}", "give the path of one")]
    match = _HUB_ID.fullmatch(str(source))
    looks_like_path = path.suffix in SUFFIXES and not (match and match["file"])
    if match is None or looks_like_path:
        raise EchoError(
            f"{source} does not exist; expected a file, a folder, owner/name on the Hub, or "
            f"{', '.join(SHIPPED)}, the small voice in the package"
        )
    return [_from_hub(match["repo"], match["revision"], match["file"], kind)]


def find_beside(source: str | Path, name: str) -> Path | None:
    """The file `name` in the folder or the Hub repository of weights, None if it has none.

    **Arguments**: `source` as for `find_weights`.

    **Raises**: `EchoError` if the Hub cannot be asked.
    """
    try:
        path = Path(source).expanduser()
        is_local = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise EchoError(f"{str(source)[:200]!r} is not a usable path: {error}") from None
    if is_local or str(source) in SHIPPED:
        beside = (path if path.is_dir() else path.parent) / name
        return beside if beside.is_file() else None
    match = _HUB_ID.fullmatch(str(source))
    if match is None:
        return None
    repo, revision = match["repo"], match["revision"]
    cached = _cached_snapshot(repo, revision or "main") / name
    if cached.is_file():
        return cached
    try:
        with hub_errors(f"{repo}:{name} is not in the cache, and downloading it failed"):
            return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    except HubFileNotFound:
        return None


def _index_of(path: Path) -> Path | None:
    """The index of a file that is one shard of several."""
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(shard[1] + INDEX_SUFFIX) if shard else None
    return index if index is not None and index.is_file() else None


def _from_hub(repo: str, revision: str | None, file: str | None, kind: Kind) -> Path:
    """The file of weights in a repository.

    A cached file is used without asking the Hub; name a revision to get other weights. The
    repository is listed only if none of the usual names is found.
    """
    where = f"{repo}@{revision}" if revision else repo
    cached = _cached_snapshot(repo, revision or "main")
    names = _files_below(cached)
    for name in [file] if file else _usual_names(kind):
        if name in names and _is_complete(cached / name):
            return cached / name
    if file is None:
        try:
            with hub_errors(f"{where} is not in the cache, and listing it failed"):
                listed = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        except EchoError:
            if len(candidates := _candidates(names)) == 1:
                return cached / candidates[0]
            raise
        file = _choose(listed, kind, f"repository {where}", f"write {where}:FILE")
    with hub_errors(f"{where}:{file} is not in the cache, and downloading it failed"):
        path = Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        if file.endswith(INDEX_SUFFIX):
            folder = file.rpartition("/")[0]
            for part in shard_files(weight_map(path)):
                name = f"{folder}/{part}" if folder else part
                huggingface_hub.hf_hub_download(repo, name, revision=revision)
        return path


def _cached_snapshot(repo: str, revision: str) -> Path:
    """Folder of a revision in the Hub's cache, which may not exist."""
    from huggingface_hub.constants import HF_HUB_CACHE  # not an attribute until it is imported

    root = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reference = root / "refs" / revision
    return root / "snapshots" / (reference.read_text() if reference.is_file() else revision)


def _files_below(folder: Path) -> list[str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files]


def _is_complete(path: Path) -> bool:
    """Whether every shard of an index was downloaded too; True for any other file."""
    if not path.name.endswith(INDEX_SUFFIX):
        return True
    return all((path.parent / part).is_file() for part in shard_files(weight_map(path)))


def _candidates(names: list[str]) -> list[str]:
    """Files of weights, sharded ones by their index."""
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    shards = (_SHARD.fullmatch(name) for name in names)
    listed = {shard[0] for shard in shards if shard and shard[1] + INDEX_SUFFIX in indexes}
    return [name for name in names if name.endswith(SUFFIXES) and name not in listed] + indexes


def _usual_names(kind: Kind) -> list[str]:
    """Usual names of weights files, in order of preference."""
    both = (f"{kind}.safetensors", f"{kind}{INDEX_SUFFIX}")  # of a folder with both models
    return [*both, *_USUAL_NAMES]


def _choose(names: list[str], kind: Kind, where: str, advice: str) -> str:
    for name in _usual_names(kind):
        if name in names:
            return name
    candidates = _candidates(names)
    if not candidates:
        raise EchoError(f"{where}: expected weights (*{', *'.join(SUFFIXES)}), got none")
    if len(candidates) > 1:
        shown = ", ".join(candidates[:6])
        raise EchoError(
            f"{where}: expected one file of weights, got {len(candidates)} ({shown}); {advice}"
        )
    return candidates[0]
