"""Which kind of recordings a source is: decided from what is there."""

import csv
import glob
import io
from pathlib import Path

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.errors import EchoError
from echo_eqx.prepare.archives import HUB, download, from_parquet, from_tars
from echo_eqx.prepare.formats import (
    AUDIO_FIELDS,
    csv_heading,
    from_folder,
    from_ljspeech,
    from_manifest,
)
from echo_eqx.prepare.recordings import Found, decode

_WANTED = "a folder, *.tar, *.parquet, *.jsonl, *.csv, a glob of tars or Parquet files, or hf://..."


def find_records(source: str, cache: Path) -> Found:
    """The records of `source`, read while they are asked for.

    **Raises**: `EchoError` if it is of no known kind, and `OSError` while they are read.
    """
    if source.startswith(HUB):
        if files := _below(download(source, cache), (".parquet",)):
            return from_parquet(files)
        raise EchoError(f"{source} holds no *.parquet; wanted at least one")
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise EchoError(f"{source[:200]!r} is no usable path: {error}") from None
    if is_folder and (path / "metadata.csv").is_file():
        path, is_file = path / "metadata.csv", True
    if is_file:
        return _from_file(path)
    if is_folder:
        return _from_folder(path)
    if not glob.has_magic(source):
        raise EchoError(f"{source} does not exist; wanted {_WANTED}")
    fixed = list(path.parts[:-1])
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    folder = Path(*fixed)
    names = sorted(glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True))
    files = [(name, folder / name) for name in names]
    if names and all(name.endswith(".tar") for name in names):
        return from_tars(files)
    if names and all(name.endswith(".parquet") for name in names):
        return from_parquet(files)
    raise EchoError(f"{source} matches {len(names)} files; wanted only *.tar or only *.parquet")


def _from_file(path: Path) -> Found:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return from_tars([(path.name, path)])
    if suffix == ".parquet":
        return from_parquet([(path.name, path)])
    if suffix == ".jsonl":
        return from_manifest(path)
    if suffix == ".csv":
        with path.open("rb") as file:
            line = decode(file.readline(2**16))
        if "|" in line:
            return from_ljspeech(path)
        if set(csv_heading(csv.reader(io.StringIO(line, newline="")))) & set(AUDIO_FIELDS):
            return from_manifest(path)
        raise EchoError(
            f"{path} has neither id|raw|normalised nor a heading with one of "
            f"{', '.join(AUDIO_FIELDS)}"
        )
    raise EchoError(f"{path} is of no known kind; wanted {_WANTED}")


def _from_folder(path: Path) -> Found:
    tars, tables = _below(path, (".tar",)), _below(path, (".parquet",))
    audios = _below(path, AUDIO_SUFFIXES)
    if bool(tars) + bool(tables) + bool(audios) > 1:
        raise EchoError(f"{path} holds several of audio, *.tar and *.parquet; wanted one kind")
    if tars:
        return from_tars(tars)
    if tables:
        return from_parquet(tables)
    if audios:
        return from_folder(path)
    raise EchoError(f"{path} holds no recordings; wanted audio with *.txt, *.tar or *.parquet")


def _below(folder: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    names = sorted(glob.glob("**/*", root_dir=folder, recursive=True))
    files = [(Path(name).as_posix(), folder / name) for name in names]
    return [file for file in files if file[0].lower().endswith(suffixes) and file[1].is_file()]
