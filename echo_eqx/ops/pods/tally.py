"""Hours that the pods of one name have existed, in a file that outlives the supervisor."""

import dataclasses
import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole


@dataclass(frozen=True)
class Tally:
    """What has been used: `hours` by pods that are gone, and the present one `since` Unix time."""

    hours: float = 0.0
    since: float | None = None
    pods: int = 0

    def spent(self) -> float:
        """Hours up to now."""
        present = 0.0 if self.since is None else time.time() - self.since
        return self.hours + max(0.0, present) / 3600

    def begun(self, created: float | None) -> "Tally":
        """A pod is there, since `created` if that is known."""
        since = self.since
        if since is not None and (created is None or abs(created - since) < 1):
            return self
        created = created or time.time()
        # One that came while no one looked: the one before was gone by then.
        before = 0.0 if since is None else max(0.0, created - since) / 3600
        return dataclasses.replace(
            self, hours=self.hours + before, since=created, pods=self.pods + 1
        )

    def ended(self) -> "Tally":
        """The pod is gone, at the latest by now."""
        return dataclasses.replace(self, hours=self.spent(), since=None)


class TallyFile:
    """The tally of one pod's name, written whole at each change.

    **Raises**: `EchoError` if another supervisor has it, or it cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_name(f"{path.name}.lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.now = self._read()
        except BlockingIOError:
            raise EchoError(f"{path} is in use by another supervisor; wanted one a pod") from None
        except OSError as error:
            raise EchoError(f"{path} cannot be used: {error.strerror}") from None

    def _read(self) -> Tally:
        if not self.path.exists():
            return Tally()
        try:
            found = json.loads(self.path.read_bytes())
            tally = Tally(**found)
            numbers = [getattr(tally, field.name) for field in dataclasses.fields(Tally)]
            if not all(n is None or (isinstance(n, int | float) and n >= 0) for n in numbers):
                raise ValueError("a number is none")
            return tally
        except (ValueError, TypeError) as error:
            raise EchoError(
                f"{self.path} holds no tally of hours ({error}); wanted it as it was written, or "
                "deleted, which sets the hours to 0"
            ) from None

    def set(self, tally: Tally) -> None:
        """**Raises**: `EchoError` if it cannot be written: what cannot be counted is not spent."""
        if tally == self.now and self.path.exists():
            return
        try:
            text = json.dumps(dataclasses.asdict(tally), indent=2) + "\n"
            write_whole(self.path, lambda file: file.write_text(text))
        except OSError as error:
            raise EchoError(f"{self.path} cannot be written: {error.strerror}") from None
        self.now = tally

    def forget(self) -> None:
        """The run is done, and its hours are no one's limit any more."""
        self.path.unlink(missing_ok=True)
        self.now = Tally()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
