"""Write shards and the latents of silence. Files appear complete or not at all."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.files import write_whole
from echo_eqx.prepare.assign import ShardEntry
from echo_eqx.prepare.index import FORMAT
from echo_eqx.weights.safetensors_writer import save_arrays


def write_shard(
    path: Path,
    entries: Sequence[ShardEntry],
    latents: dict[str, np.ndarray],
    *,
    ref_frames: int,
    common: dict[str, Any],
    frame_rate: float,
) -> dict[str, Any]:
    """Write the clips of a shard that have latents, each with its reference, and return the shard's
    entry in the index.

    The fields of `common` go into the JSON of every sample. If no clip has latents, no file is
    written.
    """
    counts = dict.fromkeys(("samples", "frames", "with_reference"), 0)
    if not latents:
        return {"sha256": "", **counts}

    def fill(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            for entry in entries:
                clip = entry.clip
                if clip.key not in latents:
                    continue
                own = latents[clip.key]
                reference = _reference(entry, entries, latents, ref_frames)
                fields = {
                    "text": clip.text,
                    "seconds": round(len(own) / frame_rate, 3),
                    **({"speaker": clip.speaker} if clip.speaker else {}),
                    **({"language": clip.language} if clip.language else {}),
                    **common,
                    **{k: v for k, v in clip.metadata.items() if k not in ("text", "seconds")},
                }
                _add(tar, f"{clip.key}.npy", _npy(own))
                if reference is not None:
                    _add(tar, f"{clip.key}.ref.npy", _npy(reference))
                _add(tar, f"{clip.key}.json", json.dumps(fields, ensure_ascii=False).encode())
                counts["samples"] += 1
                counts["frames"] += len(own)
                counts["with_reference"] += reference is not None

    write_whole(path, fill)
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), **counts}


def _reference(
    entry: ShardEntry,
    entries: Sequence[ShardEntry],
    latents: dict[str, np.ndarray],
    ref_frames: int,
) -> np.ndarray | None:
    """The latents of the reference clips, concatenated, up to `ref_frames`."""
    parts, total = [], 0
    for index in entry.reference_indices:
        other = latents.get(entries[index].clip.key)
        if other is not None and total < ref_frames:
            parts.append(other[: ref_frames - total])
            total += len(parts[-1])
    return np.concatenate(parts) if parts else None


def write_silence(path: Path, latents: np.ndarray, codec: dict[str, Any]) -> None:
    """Write latents of silence, (frames, channels), and the identity of the codec."""
    metadata = {"format": FORMAT, "kind": "silence", "codec": codec["id"]}
    tensors = {"silence": np.asarray(latents, np.float16, order="C")}
    write_whole(path, lambda temporary: save_arrays(temporary, tensors, metadata))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # without time and owner, so that the bytes are reproducible
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
