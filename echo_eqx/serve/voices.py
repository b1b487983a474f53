"""The voices that the server offers, by name."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from echo_eqx.serve.errors import ApiError

ALIASES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx"),
    *("sage", "shimmer", "verse"),
)
"""Names that clients have built in. They stand for the voices there are, in turn."""


class Voices:
    """Reference latents by name. `load` reads them at the first use."""

    def __init__(self, recordings: dict[str, Path], load: Callable[[Path], np.ndarray]):
        self._recordings, self._load = recordings, load
        self._latents: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of voices, without aliases."""
        return sorted(self._recordings)

    @property
    def all_names(self) -> list[str]:
        """Names of voices, then aliases."""
        names = self.names
        return names + [alias for alias in ALIASES if names and alias not in names]

    def resolve(self, name: str) -> str:
        """The voice that a name stands for.

        **Raises**: `ApiError` if there is none.
        """
        names = self.names
        if name in names:
            return name
        if name.lower() in ALIASES and names:
            return names[ALIASES.index(name.lower()) % len(names)]
        known = ", ".join(self.all_names)
        raise ApiError(
            400,
            f"voice: expected one of {known}, got {ascii(name)[:60]}",
            param="voice",
            code="voice_not_found",
        )

    def latents(self, name: str) -> np.ndarray:
        """Reference latents (r, c). Runs on the device at the first use of a voice."""
        if name not in self._latents:
            self._latents[name] = self._load(self._recordings[name])
        return self._latents[name]
