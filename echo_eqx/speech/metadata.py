"""The JSON file next to a result: its settings, and which models generated it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.speaker import nearest_voice
from echo_eqx.speech.voices import SUFFIX, load_voice
from echo_eqx.trees import num_parameters
from echo_eqx.weights.checkpoint.reader import MANIFEST

MAX_BYTES = 1_000_000


def describe_model(path: Path, source: str, model: EchoDiT | Codec) -> dict[str, Any]:
    """Where a model came from, its checksum and its sizes."""
    # For a training checkpoint the manifest counts: it lists the checksums of all files.
    with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "source": source,
        "file": str(path.resolve()),
        "sha256": digest,
        "parameters": num_parameters(model),
        "config": asdict(model.config),
    }


def describe_speaker(
    dit: EchoDiT,
    codec: Codec,
    path: Path | None,
    latents: np.ndarray | None,
    lufs: float | None,
) -> dict[str, Any]:
    """How the reference in `path`, with `latents` (r, c), was used. `lufs` is the level asked for,
    None for the model's."""
    if latents is None or path is None:
        return {"speaker_seconds": None, "speaker_lufs": None, "nearest_voice": None}
    if path.suffix == ".npy":
        lufs = None
    elif path.suffix == SUFFIX:
        lufs = load_voice(path).info.lufs
    elif lufs is None:
        lufs = dit.generation.reference_lufs
    nearest = nearest_voice(dit, latents)
    return {
        "speaker_seconds": len(latents) / codec.config.frame_rate,
        "speaker_lufs": lufs,
        "nearest_voice": nearest and {"name": nearest[0], "distance": nearest[1]},
    }


def write_metadata(path: Path, content: dict[str, Any]) -> None:
    """**Raises**: `EchoError` if `path` cannot be written."""
    text = json.dumps(content, indent=2) + "\n"
    try:
        write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))
    except OSError as error:
        raise EchoError(f"cannot write {path}: {error}") from None


def is_replaceable(path: Path) -> bool:
    """Whether `path` does not exist, or is a file that `write_metadata` wrote."""
    if not path.is_file():
        return not (path.exists() or path.is_symlink())
    if path.stat().st_size > MAX_BYTES:
        return False
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    version = found.get("version") if isinstance(found, dict) else None
    expected = {"text", "output", "checkpoint", "codec"}
    return isinstance(version, dict) and "echo_eqx" in version and expected <= found.keys()
