"""Uploading to a repository on the Hugging Face Hub: files by their checksum, and a card."""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from echo_eqx.errors import UsageError
from echo_eqx.hub import REPO, HubOffline, HubUnavailable, hub_errors

CARD = "README.md"
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each retry of a request that may succeed later."""
_BEGIN, _END = b"<!-- echo_eqx:begin -->", b"<!-- echo_eqx:end -->"
logger = logging.getLogger(__name__)


def check_repo(repo: str, kind: str) -> None:
    """**Raises**: `UsageError` if `repo` is not `owner/name`."""
    if re.fullmatch(REPO, repo) is None:
        raise UsageError(f"--push: expected owner/name of a {kind} on the Hub, got {repo!r}")


class Repository:
    """A dataset or model on the Hub, created if it does not exist: private, since publishing cannot
    be undone.

    Methods raise `EchoError` if the Hub cannot be reached or refuses.
    """

    def __init__(self, repo: str, kind: Literal["dataset", "model"]):
        check_repo(repo, kind)
        self.repo, self.kind, self._api = repo, kind, HfApi()
        self._action = f"cannot push to {repo}"
        _retry(self._create, self._action)

    def _create(self) -> None:
        if not self._api.repo_exists(self.repo, repo_type=self.kind):
            self._api.create_repo(self.repo, repo_type=self.kind, private=True, exist_ok=True)
            logger.info("%s is new; it is private until you change its settings", self.repo)

    def files(self) -> dict[str, RepoFile]:
        """The files in the repository, by name."""
        with hub_errors(self._action):
            tree = self._api.list_repo_tree(self.repo, repo_type=self.kind, recursive=True)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def read(self, name: str) -> bytes | None:
        """The current content of a file, None if it does not exist."""
        with hub_errors(self._action):
            url = hf_hub_url(self.repo, name, repo_type=self.kind)
            response = http_backoff("GET", url, headers=build_hf_headers())
            if response.status_code == 404:
                return None
            hf_raise_for_status(response)
            return response.content

    def commit(
        self, files: Mapping[str, Path | bytes], message: str, *, removed: Iterable[str] = ()
    ) -> None:
        """Send files, by name, and remove others, in one commit."""
        with hub_errors(self._action):
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            self._api.preupload_lfs_files(self.repo, added, repo_type=self.kind)
        # The library retries every request of an upload except the commit.
        operations = [*added, *(CommitOperationDelete(name) for name in removed)]
        commit = partial(self._api.create_commit, self.repo, operations, repo_type=self.kind)
        _retry(partial(commit, commit_message=message), self._action)


def _retry(call: Callable[[], object], action: str) -> None:
    for wait in (*WAITS, None):
        try:
            with hub_errors(action):
                call()
            return
        except HubUnavailable as error:
            if wait is None or isinstance(error, HubOffline):
                raise
            wait = max(wait, error.retry_after or 0.0)
            logger.warning("%s; trying again in %.0f s", error, wait)
        time.sleep(wait)


def is_same(remote: RepoFile | None, content: Path | bytes) -> bool:
    """Whether a file on the Hub has this content. Large files are compared by their SHA-256, others
    by git's hash."""
    if remote is None:
        return False
    if remote.lfs is not None and isinstance(content, Path):
        with content.open("rb") as file:
            return remote.lfs.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    data = content.read_bytes() if isinstance(content, Path) else content
    if remote.lfs is not None:
        return remote.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def new_card(header: str, title: str, description: str) -> bytes:
    """A card: `header`, `title`, and `description` between two markers."""
    begin, end = _BEGIN.decode(), _END.decode()
    return f"{header}\n# {title}\n\n{begin}\n{description}{end}\n".encode()


def merged_card(old: bytes | None, new: bytes) -> bytes:
    """`old` with what is between the markers as in `new`; everything else stays, byte for byte."""
    if old is None:
        return new
    block = new[new.rfind(_BEGIN) : new.rfind(_END) + len(_END)]
    begin = old.rfind(_BEGIN)
    end = old.find(_END, begin)
    if begin == -1 or end == -1:
        return old + (b"\n" if old.endswith(b"\n") else b"\n\n") + block + b"\n"
    return old[:begin] + block + old[end + len(_END) :]
