"""Finding the one file behind a source: a path, or `owner/name[@revision][:file]` on the Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from echo_eqx.errors import EchoError

SUFFIXES = (".safetensors", ".pkl", ".pickle", ".pth", ".pt")
USUAL_NAMES = ("model.safetensors", "pytorch_model.safetensors", "weights.pth")

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
    r"(?::(?P<file>[\w.-]+(?:/[\w.-]+)*))?"
)


def find_weights(source: str | Path) -> Path:
    """The file of weights behind `source`, downloaded once if it is on the Hub.

    A folder or repository is searched for the usual names, then for its only file of weights.

    **Raises**: `EchoError` if there is none, or several to choose from.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        names = [child.name for child in sorted(path.iterdir()) if child.is_file()]
        return path / _choose(names, f"folder {path}", "give the path of one")
    match = _HUB_ID.fullmatch(str(source))
    looks_like_path = path.suffix in SUFFIXES and not (match and match["file"])
    if match is None or looks_like_path:
        raise EchoError(
            f"{source} does not exist; wanted a file, a folder or owner/name on the Hub"
        )
    return _from_hub(match["repo"], match["revision"], match["file"])


def _from_hub(repo: str, revision: str | None, file: str | None) -> Path:
    where = f"{repo}@{revision}" if revision else repo
    for name in [file] if file else USUAL_NAMES:
        try:
            return Path(hf_hub_download(repo, name, revision=revision))
        except EntryNotFoundError:  # also: not in the cache while the Hub cannot be reached
            continue
        except Exception as error:
            raise EchoError(
                f"{where} cannot be loaded from the Hub: {_first_line(error)}"
            ) from None
    if file:
        raise EchoError(f"{where} has no file {file}, on the Hub or in the cache")
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
        name = _choose(names, f"repository {where}", f"write {where}:FILE")
        return Path(hf_hub_download(repo, name, revision=revision))
    except EchoError:
        raise
    except Exception as error:  # the HTTP library's own errors change between versions
        raise EchoError(
            f"{where} is not in the cache and the Hub cannot be reached: {_first_line(error)}"
        ) from None


def _choose(names: list[str], where: str, advice: str) -> str:
    for name in USUAL_NAMES:
        if name in names:
            return name
    candidates = [name for name in names if name.endswith(SUFFIXES)]
    if not candidates:
        raise EchoError(f"{where} holds no weights; wanted a file *{', *'.join(SUFFIXES)}")
    if len(candidates) > 1:
        shown = ", ".join(candidates[:6])
        raise EchoError(f"{where} holds several files of weights ({shown}); {advice}")
    return candidates[0]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
