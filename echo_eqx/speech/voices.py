"""Voices as files: `NAME.safetensors` holds the reference latents of a voice, ready to use.

The tensors are `latents` (r, c) and `silence` (c,), the codec's latent of silence, both float32.
The metadata says how the voice was made, see `VoiceInfo`. Latents depend on the codec alone, so any
model of that codec can use the file.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from echo_eqx.codec.codec import Codec
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import expand, write_whole
from echo_eqx.json_data import from_json, parse_json, to_json
from echo_eqx.speech.codec import TOLERANCE, codec_identity, silence_latent
from echo_eqx.weights.native import FORMAT
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.safetensors_writer import save_arrays

SUFFIX = ".safetensors"
KIND = "voice"
MAX_SECONDS = 120.0
"""Longest reference in a voice."""
MAX_BYTES = 2**26
BUILT_IN = Path(__file__).parents[1] / "voice" / "references"
"""Recordings `NAME.flac` of the voices in the package. Any codec can encode them."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NAME_RULE = "1 to 64 letters, digits, dashes and underscores, the first a letter or digit"


@dataclass(frozen=True)
class VoiceInfo:
    """How a voice was made."""

    consent: str
    """Who allowed the use of the voice, and how: free text, never empty."""
    lufs: float | None
    """Integrated loudness the recordings were normalized to; None for as recorded."""
    sample_rate: int
    hop: int
    """Of the codec: a latent is `hop` samples."""
    codec_sha256: str
    """`codec_identity` of the codec."""
    codec: str | None = None
    """The codec, as for `load_codec`."""
    sources: tuple[str, ...] = ()
    """Names of the recordings, without folders."""
    warnings: tuple[str, ...] = ()
    """What was found wrong with the recordings."""
    made: str = ""
    """When, in ISO 8601, UTC."""
    version: str = ""
    """Of echo_eqx."""

    def check(self) -> None:
        """**Raises**: `EchoError` naming the first field that is out of range."""
        consent = " ".join(self.consent.split())
        _expect(0 < len(consent) <= 2000, "consent", "1 to 2000 characters", self.consent)
        _expect(self.lufs is None or -70 <= self.lufs <= 0, "lufs", "-70 to 0", self.lufs)
        rate, hop = self.sample_rate, self.hop
        _expect(1000 <= rate <= 768_000, "sample_rate", "1000 to 768000", rate)
        _expect(1 <= hop <= rate, "hop", "1 to the sample rate", hop)
        digest = self.codec_sha256
        _expect(bool(re.fullmatch("[0-9a-f]{64}", digest)), "codec_sha256", "64 hex digits", digest)
        short = {"codec": self.codec or "", "made": self.made, "version": self.version}
        for field, text in short.items():
            _expect(len(text) < 4096 and text.isprintable(), field, "a short printable text", text)
        for field, texts in (("sources", self.sources), ("warnings", self.warnings)):
            _expect(len(texts) <= 1000, field, "at most 1000", len(texts))
            for text in texts:
                _expect(len(text) <= 2000, field, "at most 2000 characters", text)
        for source in self.sources:
            _expect("/" not in source, "sources", "names without folders", source)


@dataclass(frozen=True)
class Voice:
    """A reference voice."""

    name: str
    latents: Float[np.ndarray, "r c"]
    """Reference latents, float32."""
    silence: Float[np.ndarray, " c"]
    """The codec's `silence_latent`: a codec with another one is not the same codec."""
    info: VoiceInfo

    @property
    def seconds(self) -> float:
        """Length of its speech."""
        return len(self.latents) * self.info.hop / self.info.sample_rate


# --- Names and folders --------------------------------------------------------------------------


def check_name(name: str) -> None:
    """**Raises**: `UsageError` unless `name` can be the name of a voice. It is never a path."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"name of a voice: expected {_NAME_RULE}, got {ascii(name)[:100]}")


def default_folder() -> Path:
    """Where the user's voices are: `echo_eqx/voices` in `$XDG_DATA_HOME`, or else in
    `~/.local/share`.

    **Raises**: `EchoError` for a user without a home folder.
    """
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
    if not data.is_absolute():  # the XDG specification says to ignore such a variable
        data = Path("~/.local/share")
    return expand(data) / "echo_eqx" / "voices"


def built_in_voices() -> dict[str, Path]:
    """Recordings of the voices in the package, by name."""
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.flac"))}


def list_voices(folder: Path | None = None) -> dict[str, Path]:
    """Files of all voices by name: those in `folder`, and those in the package.

    None is `default_folder`, which need not exist. The files are not read. A file that has the name
    of a voice in the package is left out.

    **Raises**: `EchoError` if `folder` cannot be read.
    """
    if folder is None:
        folder = default_folder()
        if not folder.exists():
            return built_in_voices()
    try:
        found = {
            path.stem: path
            for path in sorted(folder.iterdir())
            if path.suffix == SUFFIX and _NAME.fullmatch(path.stem) and path.is_file()
        }
    except OSError as error:
        raise EchoError(
            f"{folder}: expected a folder of voices, got {error.strerror or error}"
        ) from None
    return found | built_in_voices()


def find_voice(name: str, folder: Path | None = None) -> Path:
    """The file of the voice `name`: in the package, or `NAME.safetensors` in `folder`.

    **Raises**: `UsageError` if `name` cannot be one, `EchoError` if there is no such voice.
    """
    check_name(name)
    built_in = built_in_voices()
    if name in built_in:
        return built_in[name]
    folder = default_folder() if folder is None else folder
    path = folder / f"{name}{SUFFIX}"
    if not path.is_file():
        raise EchoError(
            f"there is no voice {name} in {folder}; expected {', '.join(list_voices(folder))}"
            if folder.is_dir()
            else f"there is no voice {name}: expected {', '.join(built_in)}, or a voice in "
            f"{folder}, which does not exist"
        )
    return path


def voice_file(voice: str, folder: Path | None = None) -> Path:
    """`find_voice`, or the path of a file `*.safetensors` as it is. For a server, use `find_voice`:
    its clients may not name paths.

    **Raises**: as `find_voice`; for a path, only if `~` cannot be expanded.
    """
    return expand(Path(voice)) if voice.endswith(SUFFIX) else find_voice(voice, folder)


# --- Files --------------------------------------------------------------------------------------


def save_voice(voice: Voice, folder: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a voice to `NAME.safetensors` in `folder`, atomically, and return the path.

    **Raises**: `EchoError` if there is a voice of this name already and `overwrite` is false, if
    the file to replace is not a voice, or if it cannot be written; `UsageError` if the voice cannot
    have this name.
    """
    check_name(voice.name)
    if voice.name in built_in_voices():
        raise UsageError(f"name of a voice: expected another one, {voice.name} is in the package")
    voice.info.check()
    folder = default_folder() if folder is None else folder
    path = folder / f"{voice.name}{SUFFIX}"
    metadata = {"format": FORMAT, "kind": KIND, KIND: json.dumps(to_json(voice.info))}
    arrays = {"latents": voice.latents, "silence": voice.silence}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite and path.exists():
            _check_kind(SafetensorsFile(path))
        write_whole(path, lambda file: save_arrays(file, arrays, metadata), replace=overwrite)
    except FileExistsError:
        raise EchoError(
            f"{path} exists already; give another name, or overwrite it with --overwrite"
        ) from None
    except OSError as error:
        raise EchoError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def load_voice(path: str | Path) -> Voice:
    """Read a voice from a file of which any byte may be wrong. Its name is that of the file.

    **Raises**: `EchoError` naming the file if it is not a voice, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise EchoError(f"{path} does not exist; expected a voice, NAME{SUFFIX}")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise EchoError(f"{path}: expected a voice of at most {MAX_BYTES} bytes, got a larger file")
    file = SafetensorsFile(path)
    _check_kind(file)
    try:
        info = from_json(VoiceInfo, parse_json(file.metadata.get(KIND, "").encode()))
        info.check()
    except (EchoError, ValueError) as error:
        raise EchoError(f"{path} is not a readable voice: {error}") from None
    shapes = file.shapes()
    latents, silence = shapes.get("latents", ()), shapes.get("silence", ())
    most = MAX_SECONDS * info.sample_rate / info.hop + 1
    if (
        set(shapes) != {"latents", "silence"}
        or len(latents) != 2
        or not 0 < latents[0] <= most
        or latents[1] < 1
        or silence != latents[1:]
        or not all(file.holds(name, np.dtype(np.float32), shape) for name, shape in shapes.items())
    ):
        raise EchoError(
            f"{path}: expected float32 latents (frames, channels) of 1 to {most:.0f} frames and "
            f"silence (channels,), got {ascii(shapes)[:200]}"
        )
    voice = Voice(path.stem, file["latents"], file["silence"], info)
    for name, array in (("latents", voice.latents), ("silence", voice.silence)):
        if not np.isfinite(array).all():
            raise EchoError(f"{path}: expected finite {name}, got NaN or infinity")
    return voice


def remove_voice(name: str, folder: Path | None = None) -> Path:
    """Delete the file of a voice in `folder`, and return its path.

    **Raises**: `EchoError` if there is none, it is in the package, it is not a voice, or it cannot
    be deleted; `UsageError` if `name` cannot be one.
    """
    path = find_voice(name, folder)
    if path.parent == BUILT_IN:
        raise EchoError(f"{name} is in the package; expected a voice that was added")
    _check_kind(SafetensorsFile(path))
    try:
        path.unlink()
    except OSError as error:
        raise EchoError(f"{path} cannot be deleted: {error.strerror}") from None
    return path


# --- Codecs -------------------------------------------------------------------------------------


def check_codec(voice: Voice, codec: Codec) -> None:
    """Check that `voice` consists of latents of `codec`.

    The same encoder is recognized by its digest. One with other numbers, such as rounded ones, is
    accepted if it has nearly the same latent of silence.

    **Raises**: `EchoError` naming the voice otherwise.
    """
    name, named = f"voice {voice.name}", voice.info.codec
    hint = "" if named is None else f" ({named})"
    found = codec.config.latent_dim, codec.config.sample_rate, codec.config.hop
    expected = voice.latents.shape[1], voice.info.sample_rate, voice.info.hop
    if found != expected:
        raise EchoError(
            f"{name}: expected the codec it was made with{hint}, of {_sizes(*expected)}, got one "
            f"of {_sizes(*found)}; make the voice again with this codec"
        )
    if voice.info.codec_sha256 == codec_identity(codec):
        return
    rms = float(np.sqrt(np.mean(np.square(silence_latent(codec) - voice.silence))))
    if not rms < TOLERANCE:
        raise EchoError(
            f"{name}: expected the codec it was made with{hint}, got another one: its silence "
            f"latent differs by {rms:.2f} RMS; make the voice again with this codec"
        )


def _sizes(channels: int, sample_rate: int, hop: int) -> str:
    return f"{channels} channels at {sample_rate} Hz / {hop}"


def _check_kind(file: SafetensorsFile) -> None:
    metadata = file.metadata
    if (metadata.get("format"), metadata.get("kind")) != (FORMAT, KIND):
        raise EchoError(f"{file.path}: expected a voice, made by echo-eqx voice add, got another")


def _expect(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise EchoError(f"{name}: expected {expected}, got {ascii(got)[:50]}")
