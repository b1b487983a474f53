"""The voices that the server offers, by name."""

import logging
from collections import OrderedDict
from pathlib import Path

from echo_eqx.errors import EchoError
from echo_eqx.serve.errors import ApiError
from echo_eqx.serve.programs import Programs, Reference
from echo_eqx.speech.speaker import longest_reference, speaker_latents
from echo_eqx.speech.voices import (
    SUFFIX,
    built_in_voices,
    list_voices,
    remove_voice,
)

ALIASES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx"),
    *("sage", "shimmer", "verse"),
)
"""Names that clients have built in. They stand for the voices there are, in turn."""
MAX_CACHED = 64
_log = logging.getLogger("echo_eqx.serve")


class Voices:
    """Voices in the package and in a folder, which may change at any time. Those in use are kept on
    the device.

    **Arguments**: `folder` as for `list_voices`.
    """

    def __init__(self, programs: Programs, folder: Path | None):
        self._programs, self.folder = programs, folder
        self._cache: OrderedDict[tuple[str, int], Reference] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Names of voices, without aliases."""
        return sorted(list_voices(self.folder))

    @property
    def all_names(self) -> list[str]:
        """Names of voices, then aliases."""
        names = self.names
        return names + [alias for alias in ALIASES if names and alias not in names]

    def resolve(self, name: str) -> Path:
        """The file of the voice that a name stands for.

        **Raises**: `ApiError` if there is none.
        """
        voices = list_voices(self.folder)
        if name in voices:
            return voices[name]
        if name.lower() in ALIASES and voices:
            names = sorted(voices)
            return voices[names[ALIASES.index(name.lower()) % len(names)]]
        known = ", ".join(self.all_names)
        message = f"voice: expected one of {known}, got {ascii(name)[:60]}"
        raise ApiError(400, message, param="voice", code="voice_not_found")

    def reference(self, path: Path) -> Reference:
        """The voice of a file. Runs on the device if it is not there already.

        **Raises**: `EchoError` if the file cannot be used.
        """
        try:
            key = str(path), path.stat().st_mtime_ns
        except OSError as error:
            raise EchoError(f"voice {path.stem} cannot be read ({error.strerror})") from None
        if key not in self._cache:
            self._cache[key] = self._load(path)
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _load(self, path: Path) -> Reference:
        programs = self._programs
        dit, codec, most = programs.dit, programs.codec, programs.max_speaker_frames
        is_recording = path.suffix != SUFFIX
        seconds = most / codec.config.frame_rate if is_recording else longest_reference(dit, codec)
        latents = speaker_latents(dit, codec, path, max_seconds=seconds)
        if len(latents) > most:
            _log.warning(
                f"voice {path.stem}: only {most / codec.config.frame_rate:.1f} of "
                f"{len(latents) / codec.config.frame_rate:.1f} s are used; see --speaker_seconds"
            )
        return programs.reference(latents)

    def remove(self, name: str) -> None:
        """Delete a voice that was added.

        **Raises**: `ApiError` if there is none, or it is in the package.
        """
        if name in built_in_voices():
            raise ApiError(403, f"{name} is in the package; expected a voice that was added")
        try:
            remove_voice(name, self.folder)
        except EchoError as error:
            raise ApiError(404, str(error), code="voice_not_found") from None
