"""Find files: all files below a folder, and the audio files that a manifest or table names."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.prepare.records import SkippedInput

INDEX = re.compile(r"index-\d{3,}-of-\d{3,}\.json")
"""The shard index that prepare writes next to its shards."""
_AUDIO_FOLDERS = ("", "wavs", "wav", "clips", "audio")
"""Where the audio usually is if a manifest or table gives only a file name."""
_SAMPLE = 200


def nfc(name: str) -> str:
    """`name` in composed Unicode (`é` as one character), so that spellings compare equal."""
    return unicodedata.normalize("NFC", name)


def without_audio_suffix(name: str) -> str:
    """`name` without its `.wav` or the like; other dots are kept."""
    found = next((end for end in AUDIO_SUFFIXES if name.lower().endswith(end)), "")
    return name[: len(name) - len(found)]


def files_below(folder: Path, output: Path | None = None) -> tuple[list[str], list[SkippedInput]]:
    """Sorted relative names of all files below `folder`, and what cannot be read.

    Hidden files and folders, the folder `output`, and folders of shards made by prepare are left
    out. A folder with several links to it is read once.
    """
    names: list[str] = []
    skipped: list[SkippedInput] = []

    def skip(name: str, detail: str) -> None:
        skipped.append(SkippedInput("path", name.rstrip("/") or ".", detail))

    own = None if output is None else os.path.realpath(output)
    seen = {own}
    folders, links = [""], []
    while folders or links:
        inside = folders.pop() if folders else links.pop()
        real = os.path.realpath(folder / inside)
        if real in seen:
            if real != own:
                skip(inside, "links to a folder that has already been read")
            continue
        seen.add(real)
        try:
            found = sorted(os.scandir(folder / inside), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            skip(inside, f"cannot be read: {error.strerror}")
            continue
        if inside and any(INDEX.fullmatch(entry.name) for entry in found):
            continue
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.name.startswith("."):
                continue
            if os.path.isfile(entry.path):
                names.append(name)
            elif os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append(f"{name}/")
            elif name.lower().endswith((*AUDIO_SUFFIXES, ".txt", ".tar", ".parquet")):
                skip(name, "is not a file that can be read")
    return sorted(names), skipped


class AudioFiles:
    """Resolves the paths or ids by which a manifest or table in `folder` names its audio."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._folders_of_ids: set[str] = set()
        self._by_name: dict[str, dict[str, str]] = {}

    def find(self, given: str) -> str | None:
        """The path of `given`, absolute or relative to the folder; None if there is no such file.

        Also tried: `/` for `\\`, composed and decomposed Unicode, another case of the suffix, no
        suffix, and the usual folders of audio.
        """
        spellings = _spellings(given)
        for name in spellings:
            if self._is_file(name):
                return PurePosixPath(name).as_posix()
        for folder in _AUDIO_FOLDERS:
            for name in spellings:
                path = PurePosixPath(folder, name)
                found = self._audio_by_name(path.parent.as_posix()).get(_name_key(path.name))
                if found is not None:
                    if len(path.parts) == 2 and folder.startswith("wav"):
                        self._folders_of_ids.add(folder)
                    return (path.parent / found).as_posix()
        return None

    def count(self, names: Sequence[str]) -> int:
        """How many of `names` are found; if none is, how many are found after `moved`."""
        found = sum(self.find(name) is not None for name in names)
        if not found and (moved := self.moved([name for name in names if name])):
            found = sum(self.find_moved(name, *moved) is not None for name in names)
        return found

    def unused(self, used: Iterable[str]) -> Iterator[str]:
        """Audio that is not among the paths `used`, in the `wavs/` folder where ids were found.

        Other folders may belong to several tables, so their unused files mean nothing.
        """
        known = {nfc(name) for name in used}
        for folder in sorted(self._folders_of_ids):
            for name in _audio_in(self.folder / folder):
                if nfc(f"{folder}/{name}") not in known:
                    yield f"{folder}/{name}"

    def moved(self, missing: Sequence[str]) -> tuple[str, str] | None:
        """The prefix of paths written on another machine, and the folder here that replaces it.

        None unless replacing one prefix finds most of the missing files. Only one is replaced,
        because two could lead to the same file.
        """
        sample = missing[:_SAMPLE]
        votes: Counter[tuple[str, str]] = Counter()
        for given in sample:
            parts = _parts(given)
            for cut in range(1, len(parts)):
                rest = "/".join(parts[cut:])
                for folder in _AUDIO_FOLDERS:
                    if self._is_file(str(PurePosixPath(folder, rest))):
                        votes["/".join(parts[:cut]), folder] += 1
        best = votes.most_common(1)
        return best[0][0] if best and 2 * best[0][1] > len(sample) else None

    def find_moved(self, given: str, prefix: str, folder: str) -> str | None:
        """`find`, with `prefix` replaced by `folder`, as `moved` returns them."""
        path = "/".join(_parts(given))
        if not path.startswith(f"{prefix}/"):
            return None
        return self.find(str(PurePosixPath(folder, path[len(prefix) + 1 :])))

    def _is_file(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # too long, or with a NUL
            return False

    def _audio_by_name(self, folder: str) -> dict[str, str]:
        """Audio files of a folder by name, and by name without the suffix; the first counts."""
        if folder not in self._by_name:
            names = self._by_name[folder] = {}
            for name in _audio_in(self.folder / folder):
                names.setdefault(_name_key(name), name)
                names.setdefault(nfc(without_audio_suffix(name)), name)
        return self._by_name[folder]


def _audio_in(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []
    return [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]


def _name_key(name: str) -> str:
    """The same for all spellings of a file name: composed Unicode, suffix in lower case."""
    short = without_audio_suffix(name)
    return nfc(short) + name[len(short) :].lower()


def _spellings(given: str) -> Iterable[str]:
    names = [given, given.replace("\\", "/")]
    forms = (unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))
    return dict.fromkeys((*names, *forms))


def _parts(given: str) -> tuple[str, ...]:
    """Folders and file name of a path, from this or another operating system."""
    return tuple(part for part in given.replace("\\", "/").split("/") if part not in ("", "."))
