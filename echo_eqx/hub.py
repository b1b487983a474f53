"""The Hugging Face Hub: parsing `hf://` sources, and turning its errors into one sentence."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from echo_eqx.errors import EchoError

SCHEME = "hf://"
MAX_RETRY_AFTER = 300.0
"""Longest wait, in seconds, that a server can ask for; the Hub counts requests per 300 s."""
REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_DATASET = re.compile(
    rf"hf://datasets/(?P<repo>{REPO})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(?P<folder>[^*?\[]+?))?/?"
)


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub: `hf://datasets/owner/name[@revision][/folder]`."""

    repo: str
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def parse(cls, source: str) -> "HubDataset":
        """**Raises**: `EchoError` if `source` has another form."""
        match = _DATASET.fullmatch(source)
        if match is None:
            raise EchoError(f"expected hf://datasets/owner/name[@revision][/folder], got {source}")
        return cls(**match.groupdict())

    def at(self, revision: str | None) -> "HubDataset":
        return replace(self, revision=revision)

    def file_url(self, name: str) -> str:
        """URL of the file `name` in the repository."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, repo_type="dataset", revision=self.revision)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        folder = f"/{self.folder}" if self.folder else ""
        return f"{SCHEME}datasets/{self.repo}{revision}{folder}"


class HubUnavailable(EchoError):
    """The Hub cannot be reached or is overloaded. The same request may succeed later.

    `retry_after` is the wait in seconds that the server asked for, if it did.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class HubOffline(HubUnavailable):
    """HF_HUB_OFFLINE is set."""


class HubFileNotFound(EchoError):
    """The repository exists, but has no such file."""


@contextlib.contextmanager
def hub_errors(action: str) -> Iterator[None]:
    """Raise any error of `huggingface_hub` as an `EchoError`: "`action`: reason", on one line.

    `action` is what was tried, such as `cannot list hf://datasets/owner/name`. The class tells
    callers what they can do: see `HubUnavailable`, `HubOffline` and `HubFileNotFound`.
    """
    try:
        yield
    except EchoError:
        raise
    except Exception as error:  # each version of the library wraps errors differently
        raise _translate(error, action) from None


def _translate(error: Exception, action: str) -> EchoError:
    from huggingface_hub import errors

    http_error = errors.HfHubHTTPError.__bases__[0]  # of httpx, which is renamed now and then
    cause: BaseException = error
    while not isinstance(cause, http_error) and cause.__cause__ is not None:
        cause = cause.__cause__
    words = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return HubOffline(f"{action}: HF_HUB_OFFLINE is set")
    if isinstance(cause, errors.HfHubHTTPError):
        return _from_status(cause, action)
    if isinstance(cause, json.JSONDecodeError):
        return HubUnavailable(f"{action}: the Hub returned a non-JSON response")
    if isinstance(cause, http_error | ConnectionError):
        words = " ".join(str(cause).split())[:300] or type(cause).__name__
        return HubUnavailable(f"{action}: the Hub cannot be reached ({words})")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubUnavailable(f"{action}: the Hub cannot be reached")
    if isinstance(error, OSError) and error.filename is not None:
        return EchoError(f"{action}: cannot access {error.filename}: {error.strerror}")
    return EchoError(f"{action}: {words}")


def _from_status(error: Any, action: str) -> EchoError:
    """From an error of type `HfHubHTTPError`."""
    from huggingface_hub import errors

    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubFileNotFound(f"{action}: the repository has no such file")
    if isinstance(error, errors.RevisionNotFoundError):
        return EchoError(f"{action}: the repository has no such revision")
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:300]
    reason = f"{action}: the Hub answered {status}" + (f" ({said})" if said else "")
    if status in (408, 412, 429) or status >= 500:  # 412: another commit came in between
        return HubUnavailable(reason, _retry_after(error.response.headers))
    return EchoError(reason + _ADVICE.get(status, ""))


_ADVICE = {
    401: "; check the name, and log in with `hf auth login` or set HF_TOKEN",
    403: "; use a token that has access to it",
    404: "; check the name, and that your token has access to it",
}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, by the header Retry-After or by the Hub's own RateLimit."""
    asked = headers.get("retry-after", "")
    if not asked.isdigit():
        match = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
        asked = match[1] if match else ""
    return min(float(asked), MAX_RETRY_AFTER) if asked else None
