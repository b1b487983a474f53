"""Which kind of recordings a source is: decided from what is there."""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.data.text_file import JSON_LINES
from echo_eqx.errors import EchoError
from echo_eqx.hub import SCHEME
from echo_eqx.prepare.manifests import read_folder, read_manifest
from echo_eqx.prepare.paths import files_below, has_shards_of_ours, nfc
from echo_eqx.prepare.records import Recordings, printable, stem
from echo_eqx.prepare.tables import LIST_SUFFIXES
from echo_eqx.prepare.tars import Files, download, read_parquet, read_tars

_EXPECTED = (
    "a folder, *.tar, *.parquet, *.jsonl, a list in columns (*.csv, *.tsv, *.txt), a glob of tars "
    "or Parquet files, or hf://..."
)


def find_recordings(
    source: str,
    cache: Path,
    output: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Recordings:
    """The records of `source`, read while they are asked for.

    What lies in the folder `output` is not part of it. `say` is told how a list is read.

    **Raises**: `EchoError` if it is of no known kind, and `OSError` while they are read.
    """
    shown = printable(source)
    if source.startswith(SCHEME):
        folder = download(source, cache)
        if files := _ending(folder, files_below(folder)[0], (".parquet",)):
            return read_parquet(files)
        raise EchoError(f"{source} holds no *.parquet; wanted at least one")
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise EchoError(f"{shown[:200]!r} is no usable path: {error}") from None
    if is_file:
        return _from_file(path, say)
    if is_folder:
        return _from_folder(path, output, say)
    if not glob.has_magic(source):
        raise EchoError(f"{shown} does not exist; wanted {_EXPECTED}")
    fixed = list(path.parts[:-1])
    while any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    folder = Path(*fixed)
    names = sorted(glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True))
    own = set() if output is None else {n for n in names if _is_inside(folder / n, output)}
    files = [(name, folder / name) for name in names if name not in own]
    if files and all(name.lower().endswith(".tar") for name, _ in files):
        return read_tars(files)
    if files and all(name.lower().endswith(".parquet") for name, _ in files):
        return read_parquet(files)
    left = f" besides {len(own)} in --output" if own else ""
    raise EchoError(
        f"{shown} matches {len(files)} files{left}; wanted only *.tar or only *.parquet"
    )


def _from_file(path: Path, say: Callable[[str], object]) -> Recordings:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return read_tars([(path.name, path)])
    if suffix == ".parquet":
        return read_parquet([(path.name, path)])
    if suffix in (*JSON_LINES, *LIST_SUFFIXES):
        return read_manifest(path, say)
    raise EchoError(f"{printable(str(path))} is of no known kind; wanted {_EXPECTED}")


def _from_folder(path: Path, output: Path | None, say: Callable[[str], object]) -> Recordings:
    shown = printable(str(path))
    if output is not None and output.is_dir() and path.samefile(output):
        raise EchoError(
            f"{shown}: expected another folder for --output than --input, got the same; give a new "
            f"one, such as {path / 'shards'}"
        )
    if has_shards_of_ours(path):
        raise EchoError(f"{shown} holds shards that prepare made; expected recordings")
    # Other files than lists also end in .json and .txt.
    suffixes = tuple({*JSON_LINES, *LIST_SUFFIXES} - {".json", ".txt"})
    top = sorted(file for file in path.iterdir() if file.name.lower().endswith(suffixes))
    if lists := [file for file in top if file.stem.lower() == "metadata" and file.is_file()]:
        return read_manifest(_single(shown, lists), say)
    names, unread = files_below(path, output)
    tars = _ending(path, names, (".tar",))
    tables = _ending(path, names, (".parquet",))
    audios = {nfc(stem(name)) for name in names if name.lower().endswith(AUDIO_SUFFIXES)}
    if bool(tars) + bool(tables) + bool(audios) > 1:
        raise EchoError(f"{shown} holds several of audio, *.tar and *.parquet; wanted one kind")
    if (path / "wav.scp").is_file():
        raise EchoError(
            f"{shown} is a Kaldi folder (wav.scp), which is not read; give a *.jsonl with audio, "
            "text and speaker in each line"
        )
    texts = {nfc(name[:-4]) for name in names if name.lower().endswith(".txt")}
    if audios and top and audios.isdisjoint(texts):
        return read_manifest(_single(shown, top), say)

    def records() -> Recordings:
        yield from unread
        if audios:
            yield from read_folder(path, names)
        else:
            yield from read_tars(tars) if tars else read_parquet(tables)

    if audios or tars or tables:
        return records()
    raise EchoError(f"{shown} holds no recordings; wanted audio with *.txt, *.tar or *.parquet")


def _single(folder: str, lists: Sequence[Path]) -> Path:
    if len(lists) > 1:
        named = ", ".join(printable(path.name) for path in lists[:5])
        raise EchoError(f"{folder} holds several lists ({named}); give the one that is meant")
    return lists[0]


def _ending(folder: Path, names: Sequence[str], suffixes: tuple[str, ...]) -> Files:
    return [(name, folder / name) for name in names if name.lower().endswith(suffixes)]


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
