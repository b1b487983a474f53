"""Where the files are: all of a folder, and the audio that a list means by a name."""

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.prepare.records import SkippedInput

INDEX = re.compile(r"index-\d{3,}-of-\d{3,}\.json")
"""The index that `prepare` writes beside its shards."""
_FOLDERS = ("", "wavs", "wav", "clips", "audio")
"""Where lists keep the audio that they name without a folder."""
_SAMPLE = 200


def nfc(name: str) -> str:
    """One spelling for names that look the same: `é` as one character, not as two."""
    return unicodedata.normalize("NFC", name)


def bare(name: str) -> str:
    """`name` without a suffix of audio; ids with dots keep them."""
    found = next((end for end in AUDIO_SUFFIXES if name.lower().endswith(end)), "")
    return name[: len(name) - len(found)]


def files_below(folder: Path, output: Path | None = None) -> tuple[list[str], list[SkippedInput]]:
    """Names of all files below `folder`, sorted, and what of it cannot be read.

    Hidden files and folders, `output` and folders with shards that `prepare` made are left out. A
    folder that several links lead to is read once.
    """
    names: list[str] = []
    refusals: list[SkippedInput] = []
    seen = {_identity(output)} if output is not None else set()
    folders, links = [""], []
    while folders or links:
        inside = folders.pop() if folders else links.pop()
        try:
            identity = _identity(folder / inside)
            if identity in seen:
                if output is None or identity != _identity(output):
                    detail = "is a link to a folder that is read already"
                    refusals.append(SkippedInput("path", inside.rstrip("/"), detail))
                continue
            seen.add(identity)
            with os.scandir(folder / inside) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            detail = f"cannot be read: {error.strerror}"
            refusals.append(SkippedInput("path", inside.rstrip("/") or ".", detail))
            continue
        if inside and any(_is_our_index(Path(entry.path)) for entry in found):
            continue
        for entry in found:
            name = f"{inside}{entry.name}"
            if entry.name.startswith("."):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                refusals.append(SkippedInput("path", name, f"cannot be read: {error.strerror}"))
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else folders).append(f"{name}/")
            elif stat.S_ISREG(mode):
                names.append(name)
            elif name.lower().endswith((*AUDIO_SUFFIXES, ".txt", ".tar", ".parquet")):
                refusals.append(SkippedInput("path", name, "is not a regular file"))
    return sorted(names), refusals


def has_shards_of_ours(folder: Path) -> bool:
    """Whether `prepare` made shards in `folder`."""
    try:
        return any(_is_our_index(path) for path in folder.iterdir())
    except OSError:
        return False


def _is_our_index(path: Path) -> bool:
    if not INDEX.fullmatch(path.name) or not path.is_file():
        return False
    with path.open("rb") as file:
        head = b"".join(file.read(200).split())
    return head.startswith(b'{"format":"echo_eqx","kind":"shards"')


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class AudioFiles:
    """The audio files that a list in `folder` names, by paths or by ids."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._with_ids: set[str] = set()
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find(self, given: str) -> str | None:
        """The path of `given`, absolute or below the folder, None if there is no such file.

        Tried are the path itself, `/` for `\\`, the composed and decomposed forms of Unicode, other
        case in the suffix, no suffix, and the folders that lists keep audio in.
        """
        spelled = _spellings(given)
        for name in spelled:
            if self._is_file(name):
                return PurePosixPath(name).as_posix()
        for folder in _FOLDERS:
            for name in spelled:
                path = PurePosixPath(folder, name)
                if (found := self._listed(path)) is not None:
                    if len(path.parts) == 2 and folder.startswith("wav"):
                        self._with_ids.add(folder)
                    return (path.parent / found).as_posix()
        return None

    def count(self, names: Sequence[str]) -> int:
        """How many of `names` are found here, or by another beginning if none is."""
        found = sum(self.find(name) is not None for name in names)
        if not found and (moved := self.moved([name for name in names if name])):
            found = sum(self.find_moved(name, *moved) is not None for name in names)
        return found

    def unused(self, used: Iterable[str]) -> Iterator[str]:
        """What of the `wavs/` in which ids were found is not among the paths `used`.

        Other folders belong to several lists, each of which names its own share.
        """
        known = {nfc(name) for name in used}
        for folder in sorted(self._with_ids):
            for name in _audio_in(self.folder / folder):
                if nfc(f"{folder}/{name}") not in known:
                    yield f"{folder}/{name}"

    def moved(self, missing: Sequence[str]) -> tuple[str, str] | None:
        """How paths begin if they were written elsewhere, and the folder here that has the rest.

        One beginning alone is replaced: two might lead to the same file. None if not most of those
        paths are found by it.
        """
        sample = missing[:_SAMPLE]
        votes: Counter[tuple[str, str]] = Counter()
        for given in sample:
            parts = _parts(given)
            for cut in range(1, len(parts)):
                rest = "/".join(parts[cut:])
                for folder in _FOLDERS:
                    if self._is_file(str(PurePosixPath(folder, rest))):
                        votes["/".join(parts[:cut]), folder] += 1
        best = votes.most_common(1)
        return best[0][0] if best and 2 * best[0][1] > len(sample) else None

    def find_moved(self, given: str, beginning: str, folder: str) -> str | None:
        """`find` after `beginning`, as `moved` gives it, was replaced by `folder`."""
        path = "/".join(_parts(given))
        if not path.startswith(f"{beginning}/"):
            return None
        return self.find(str(PurePosixPath(folder, path[len(beginning) + 1 :])))

    def _is_file(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # too long, or with a NUL
            return False

    def _listed(self, path: PurePosixPath) -> str | None:
        """The file in the folder of `path` with its name, whatever its suffix if it has none."""
        found = self._listing(path.parent.as_posix()).get(_key(path.name))
        return found[0] if found else None

    def _listing(self, folder: str) -> dict[str, list[str]]:
        """Audio files of a folder by name and by id, each sorted."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            for name in _audio_in(self.folder / folder):
                listing.setdefault(_key(name), []).append(name)
                listing.setdefault(nfc(bare(name)), []).append(name)
            self._listings[folder] = listing
        return self._listings[folder]


def _audio_in(folder: Path) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []
    return [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]


def _key(name: str) -> str:
    """A file name without what spellings of it differ in."""
    short = bare(name)
    return nfc(short) + name[len(short) :].lower()


def _spellings(given: str) -> Iterable[str]:
    names = [given, given.replace("\\", "/")]
    forms = (unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))
    return dict.fromkeys((*names, *forms))


def _parts(given: str) -> tuple[str, ...]:
    """Folders and file of a path of this or another system."""
    return tuple(part for part in given.replace("\\", "/").split("/") if part not in ("", "."))
