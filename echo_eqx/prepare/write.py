"""Shards on disk: a tar appears whole, then the index says so.

A shard that the index of this part lists is done; any other is made anew, with the same bytes.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole
from echo_eqx.prepare.assign import ShardEntry
from echo_eqx.prepare.records import printable
from echo_eqx.weights.safetensors_writer import save_arrays

FORMAT = "echo_eqx"


@dataclass(frozen=True)
class Written:
    """What the index says of a shard."""

    sha256: str
    samples: int
    frames: int
    with_reference: int


class PartIndex:
    """`index-I-of-N.json`: the shards of one part that are done, and how they were made.

    **Raises**: `EchoError` if the folder was prepared in another way.
    """

    def __init__(self, folder: Path, part: int, parts: int, codec: dict[str, Any], made: dict):
        self.part, self.parts, self.codec = part, parts, codec
        self.path = folder / f"index-{part:03d}-of-{parts:03d}.json"
        self._head = {"format": FORMAT, "kind": "shards", "codec": codec, "settings": made}
        self.shards: dict[str, dict[str, Any]] = {}
        self.refused: dict[str, list[dict[str, str]]] = {}
        self.cuts: dict[str, Any] = {}
        indexes = sorted(folder.glob("index-*-of-*.json"))
        if not indexes and not list(folder.glob("clips-*.json")):
            for path in sorted(folder.glob("[0-9]*.tar")):
                if re.fullmatch(r"\d{6}\.tar", path.name):
                    raise EchoError(
                        f"{path} would be replaced, and nothing says that it was made here; "
                        "expected another --output"
                    )
        for path in indexes:
            found = _read(path)
            for name in ("codec", "settings"):
                if found.get(name) != self._head[name]:
                    difference = _difference(found.get(name), self._head[name])
                    raise EchoError(
                        f"{path} was made with other {name} ({difference}); wanted the same, or "
                        "another --output"
                    )
            if path == self.path:
                self.shards = dict(found["shards"])
                self.refused = dict(found["refused"])

    def is_done(self, shard: Path) -> bool:
        listed = self.shards.get(shard.name)
        return listed is not None and (shard.is_file() or not listed["samples"])

    def add(self, shard: Path, written: Written, refused: list[dict[str, str]]) -> None:
        self.shards[shard.name] = vars(written)
        self.refused[shard.name] = refused
        self.save()

    def save(self) -> None:
        content = {**self._head, "shards": self.shards, "refused": self.refused}
        if self.cuts:
            content["cuts"] = self.cuts
        write_json(self.path, content)


def write_shard(
    path: Path,
    dealt: Sequence[ShardEntry],
    latents: dict[str, np.ndarray],
    *,
    ref_frames: int,
    common: dict[str, Any],
    seconds_per_frame: float,
) -> Written:
    """Write the clips of a shard that have latents, each with its reference.

    The fields of `common` go into the JSON of every sample. If no clip has latents, no file is
    written.
    """
    if not latents:
        return Written("", 0, 0, 0)
    frames = with_reference = samples = 0

    def fill(temporary: Path) -> None:
        nonlocal frames, with_reference, samples
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            for place in dealt:
                clip = place.clip
                if clip.key not in latents:
                    continue
                own = latents[clip.key]
                reference = _joined(place, dealt, latents, ref_frames)
                fields = {
                    "text": clip.text,
                    "seconds": round(len(own) * seconds_per_frame, 3),
                    **({"speaker": clip.speaker} if clip.speaker else {}),
                    **({"language": clip.language} if clip.language else {}),
                    **common,
                    **{k: v for k, v in clip.metadata.items() if k not in ("text", "seconds")},
                }
                _add(tar, f"{clip.key}.npy", _npy(own))
                if reference is not None:
                    _add(tar, f"{clip.key}.ref.npy", _npy(reference))
                _add(tar, f"{clip.key}.json", json.dumps(fields, ensure_ascii=False).encode())
                samples += 1
                frames += len(own)
                with_reference += reference is not None

    write_whole(path, fill)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(digest, samples, frames, with_reference)


def _joined(
    place: ShardEntry, dealt: Sequence[ShardEntry], latents: dict[str, np.ndarray], ref_frames: int
) -> np.ndarray | None:
    """Latents of the reference_indices, one behind the other, up to `ref_frames`."""
    parts, total = [], 0
    for reference_index in place.reference_indices:
        other = latents.get(dealt[reference_index].clip.key)
        if other is not None and total < ref_frames:
            parts.append(other[: ref_frames - total])
            total += len(parts[-1])
    return np.concatenate(parts) if parts else None


def write_silence(path: Path, latents: np.ndarray, codec: dict[str, Any]) -> None:
    """Latents of silence, (frames, channels), with the codec that made them."""
    metadata = {"format": FORMAT, "kind": "silence", "codec": codec["id"]}
    tensors = {"silence": np.asarray(latents, np.float16, order="C")}
    write_whole(path, lambda temporary: save_arrays(temporary, tensors, metadata))


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time, no owner: the same bytes every time
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        found = json.loads(path.read_bytes())
        if found["format"] != FORMAT or found["kind"] != "shards":
            raise ValueError("it is of another kind")
        found = {"refused": {}, **found}
        for name, listed in found["shards"].items():
            _check_listed(name, listed)
        for name, refusals in found["refused"].items():
            for refusal in refusals:
                if not all(isinstance(refusal[key], str) for key in ("kind", "name", "detail")):
                    raise ValueError(f"{name[:50]!r} has a refusal that is not text")
        # The indexes of before texts were cleaned do not say so.
        found["settings"] = {"normalize_text": False, **found["settings"]}
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, OSError | ValueError) else "it is damaged"
        raise EchoError(
            f"{path}: expected an index of shards, got another file ({reason}); move it away or "
            "give another --output"
        ) from None


def _check_listed(name: str, listed: Any) -> None:
    """Refuse what no writer of ours says of a shard.

    **Raises**: `ValueError`, `KeyError` or `TypeError`.
    """
    counts = [listed[key] for key in ("samples", "frames", "with_reference")]
    are_counts = all(type(count) is int and 0 <= count < 2**53 for count in counts)
    if not are_counts or not isinstance(listed["sha256"], str):
        raise ValueError(f"what it says of {name[:50]!r} is not a shard")


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                ours, theirs = str(here.get(name))[:100], str(there.get(name))[:100]
                return printable(f"{name[:50]} {theirs} there, {ours} here")
    return "unlike these"
