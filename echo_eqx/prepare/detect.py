"""Detect what kind of recordings a source is, and read them."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.data.text_file import JSON_LINES
from echo_eqx.errors import EchoError, printable
from echo_eqx.hub import SCHEME, HubDataset, hub_errors
from echo_eqx.prepare.archives import Files, read_parquet, read_tars
from echo_eqx.prepare.manifests import read_folder, read_manifest
from echo_eqx.prepare.paths import INDEX, files_below, nfc
from echo_eqx.prepare.records import Recordings, stem
from echo_eqx.prepare.tables import TABLE_SUFFIXES

_KINDS = (
    "a folder, *.tar, *.parquet, *.jsonl, a table (*.csv, *.tsv, *.txt), a glob of tars or Parquet "
    "files, or hf://..."
)


def find_recordings(source: str, cache: Path, output: Path | None = None) -> Recordings:
    """The recordings of `source`, read lazily. Files in the folder `output` are ignored.

    **Raises**: `EchoError` if the kind of source is unknown, and `OSError` while reading.
    """
    shown = printable(source)
    if source.startswith(SCHEME):
        folder = _download(source, cache)
        if files := _with_suffix(folder, files_below(folder)[0], (".parquet",)):
            return read_parquet(files)
        raise EchoError(f"{source}: expected at least one *.parquet, got none")
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise EchoError(f"{shown[:200]!r} is not a usable path: {error}") from None
    if is_file:
        return _read_file(path)
    if is_folder:
        return _read_folder(path, output)
    if not glob.has_magic(source):
        raise EchoError(f"{shown} does not exist; expected {_KINDS}")
    return _read_glob(path, output)


def _download(source: str, cache: Path) -> Path:
    """Download the Parquet files of a dataset on the Hub; returns the folder that has them."""
    dataset = HubDataset.parse(source)
    pattern = f"{dataset.folder}/*.parquet" if dataset.folder else "*.parquet"
    with hub_errors(f"cannot download {source}"):
        root = snapshot_download(
            dataset.repo,
            repo_type="dataset",
            revision=dataset.revision,
            cache_dir=cache,
            allow_patterns=pattern,
        )
    return Path(root) / (dataset.folder or "")


def _read_file(path: Path) -> Recordings:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return read_tars([(path.name, path)])
    if suffix == ".parquet":
        return read_parquet([(path.name, path)])
    if suffix in (*JSON_LINES, *TABLE_SUFFIXES):
        return read_manifest(path)
    raise EchoError(f"{printable(str(path))}: unknown kind of file; expected {_KINDS}")


def _read_glob(path: Path, output: Path | None) -> Recordings:
    fixed = list(path.parts[:-1])
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    folder = Path(*fixed)
    names = sorted(glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True))
    inside = None if output is None else output.resolve()
    own = {n for n in names if inside and (folder / n).resolve().is_relative_to(inside)}
    files = [(name, folder / name) for name in names if name not in own]
    for suffix, read in ((".tar", read_tars), (".parquet", read_parquet)):
        if files and all(name.lower().endswith(suffix) for name, _ in files):
            return read(files)
    ignored = f" (and {len(own)} in --output, which are ignored)" if own else ""
    raise EchoError(
        f"{printable(str(path))}: expected only *.tar or only *.parquet, got {len(files)} files"
        f"{ignored}"
    )


def _read_folder(path: Path, output: Path | None) -> Recordings:
    shown = printable(str(path))
    if output is not None and output.is_dir() and path.samefile(output):
        raise EchoError(
            f"{shown}: expected another folder for --output than --input, got the same; give a new "
            f"one, such as {path / 'shards'}"
        )
    if any(map(INDEX.fullmatch, os.listdir(path))):
        raise EchoError(f"{shown}: expected recordings, got shards made by prepare")
    # Files other than manifests and tables also end in .json and .txt.
    suffixes = tuple({*JSON_LINES, *TABLE_SUFFIXES} - {".json", ".txt"})
    top = sorted(file for file in path.iterdir() if file.name.lower().endswith(suffixes))
    if manifests := [file for file in top if file.stem.lower() == "metadata" and file.is_file()]:
        return read_manifest(_only(shown, manifests))
    names, unreadable = files_below(path, output)
    tars = _with_suffix(path, names, (".tar",))
    tables = _with_suffix(path, names, (".parquet",))
    audios = {nfc(stem(name)) for name in names if name.lower().endswith(AUDIO_SUFFIXES)}
    if bool(tars) + bool(tables) + bool(audios) > 1:
        raise EchoError(f"{shown}: expected one kind of audio files, *.tar or *.parquet, got more")
    if (path / "wav.scp").is_file():
        raise EchoError(
            f"{shown} is a Kaldi folder (wav.scp), which is not supported; give a *.jsonl with "
            "audio, text and speaker in each line"
        )
    texts = {nfc(name[:-4]) for name in names if name.lower().endswith(".txt")}
    if audios and top and audios.isdisjoint(texts):
        return read_manifest(_only(shown, top))

    def recordings() -> Recordings:
        yield from unreadable
        if audios:
            yield from read_folder(path, names)
        else:
            yield from read_tars(tars) if tars else read_parquet(tables)

    if audios or tars or tables:
        return recordings()
    raise EchoError(
        f"{shown}: expected recordings (audio files with *.txt, *.tar or *.parquet), got none"
    )


def _only(folder: str, manifests: Sequence[Path]) -> Path:
    if len(manifests) > 1:
        named = ", ".join(printable(path.name) for path in manifests[:5])
        raise EchoError(
            f"{folder}: expected one manifest or table, got several ({named}); give one of them as "
            "--input"
        )
    return manifests[0]


def _with_suffix(folder: Path, names: Sequence[str], suffixes: tuple[str, ...]) -> Files:
    return [(name, folder / name) for name in names if name.lower().endswith(suffixes)]
