"""The folder of an export: it appears whole or not at all, and replaces only one of its own kind.

`export.json` lists the files with sizes and SHA-256, and says what they were made from. A folder in
which it lists exactly the files that are there is one that this command wrote.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from echo_eqx.cli import on_terminal
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.json_data import MAX_JSON_BYTES, parse_json

LISTING = "export.json"
SPARE_BYTES = 2**24
"""Free space left on the disk, for headers, listings and the card."""
BAR_DELAY = 2.0
"""Seconds before a progress bar is shown."""


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse to write to `folder` unless nothing is there, or an older export and `overwrite`.

    **Raises**: `UsageError` if it exists; with `overwrite`, `EchoError` naming the file that the
    command did not write.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder to write, got a link or a file")
    if not overwrite:
        raise UsageError(f"{folder} exists; give --overwrite to replace an export in it")
    try:
        found = _files_below(folder)
    except OSError as error:
        raise EchoError(f"{folder} cannot be read: {error.strerror}") from None
    listed = listed_files(folder) if LISTING in found else {}
    for name in sorted(found):
        if name != LISTING and listed.get(name) != found[name]:
            state = "was changed" if name in listed else "was not written by this command"
            raise EchoError(f"{folder} is not replaced: {name} in it {state}; move it away")
    if missing := sorted(listed.keys() - found):
        raise EchoError(f"{folder} is not replaced: {missing[0]} is listed, but is not in it")


def _files_below(folder: Path) -> dict[str, int]:
    """Size by name of everything below `folder` but folders; -1 for what is not a regular file."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_size if path.is_file() and not path.is_symlink() else -1
        )
        for path in paths
    }


def listed_files(folder: Path) -> dict[str, int]:
    """Size by name of the files that the listing in `folder` names.

    **Raises**: `EchoError` if the listing cannot be used.
    """
    path = folder / LISTING
    try:
        with path.open("rb") as file:
            return parse_listing(file.read(MAX_JSON_BYTES + 1))
    except OSError as error:
        raise EchoError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise EchoError(f"{path}: expected the listing of an export: {error}") from None


def parse_listing(data: bytes) -> dict[str, int]:
    """Size by name of the files in a listing.

    **Raises**: `ValueError` if it is another file.
    """
    try:
        files = parse_json(data)["files"]
        return {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("it has no files with their bytes") from None


def write_folder(
    folder: Path,
    write: Callable[[Path], object],
    *,
    overwrite: bool,
    needed: int,
    origin: Mapping[str, Any],
) -> None:
    """Let `write` fill a new folder next to `folder`, list its files, and rename it to `folder`.

    **Arguments**: `needed` about how many bytes will be written; `origin` what the listing says
    besides the files. If anything fails, or the process is killed, `folder` is as it was before.

    **Raises**: `EchoError` if the disk has less than `needed` bytes free or cannot be written, and
    as `check_target`.
    """
    check_target(folder, overwrite)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if needed + SPARE_BYTES > free:
            raise EchoError(
                f"{folder} needs {needed / 1e9:.2f} GB; its disk has {free / 1e9:.2f} GB free"
            )
        with _temporary(folder) as temporary:
            with _progress(temporary, needed):
                write(temporary)
                _write_listing(temporary, origin)
            check_target(folder, overwrite)  # minutes may have passed
            _replace(temporary, folder)
    except OSError as error:
        raise EchoError(f"{folder} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new folder next to `folder`, removed at the end if it is still there.

    It is locked meanwhile: those of earlier exports that were killed are not, and are removed.
    """
    for old in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.export-[0-9a-f]{{8}}", old.name):
            with contextlib.suppress(OSError), _locked(old):
                shutil.rmtree(old)
    temporary = folder.with_name(f".{folder.name}.export-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        with _locked(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """**Raises**: `OSError` if another process has locked `folder`."""
    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _write_listing(folder: Path, origin: Mapping[str, Any]) -> None:
    files = {}
    for name, size in sorted(_files_below(folder).items()):
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[name] = {"bytes": size, "sha256": digest}
    with (folder / LISTING).open("w") as file:
        file.write(json.dumps({**origin, "files": files}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _replace(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. An older export there takes the place of `new`, in one step where
    the system can swap two folders."""
    if not folder.exists():
        new.rename(folder)
    elif not _swap(new, folder):
        old = new.with_name(f".{folder.name}.export-{secrets.token_hex(4)}")
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders by Linux's `renameat2`; False where it does not exist."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


@contextlib.contextmanager
def _progress(folder: Path, total: int) -> Iterator[None]:
    """A bar of the bytes in `folder`, on a terminal and if it takes long."""
    if not on_terminal():
        yield
        return
    done = threading.Event()
    bar = tqdm(desc="writing", total=total, unit="B", unit_scale=True, delay=BAR_DELAY)

    def watch() -> None:
        while not done.wait(0.2):
            with contextlib.suppress(OSError):
                bar.update(min(sum(_files_below(folder).values()), total) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        bar.close()
