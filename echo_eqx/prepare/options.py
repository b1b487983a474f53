"""Interpretation of the options --model, --speaker and --holdout."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from echo_eqx.config import DIT_PRESETS, CodecConfig, DiTConfig, FishConfig, presets_of_width
from echo_eqx.data.shards import HOLDOUT
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.prepare.assign import listed_sources
from echo_eqx.prepare.clips import Clip

MAX_WITHOUT_REFERENCE = 0.2
"""Warn if more than this fraction of samples has no reference."""


def model_preset(model: str | None) -> DiTConfig:
    """The preset called `model`, by default 1.3B.

    **Raises**: `UsageError` if there is no such preset.
    """
    if model is not None and model not in DIT_PRESETS:
        raise UsageError(f"--model: expected one of {', '.join(DIT_PRESETS)}, got {model!r}")
    return DIT_PRESETS[model or "1.3B"]


@dataclass(frozen=True)
class Limits:
    max_seconds: float
    max_speaker_seconds: float
    max_text_bytes: int
    """Of the text with its leading 0."""

    @classmethod
    def of(
        cls,
        model: str | None,
        codec: CodecConfig | FishConfig,
        max_seconds: float | None = None,
        max_speaker_seconds: float | None = None,
    ) -> "Limits":
        """The limits of the preset `model` with latents of `codec`, unless seconds are given.

        **Raises**: `UsageError` if there is no such preset, and `EchoError` if it is for latents
        of another width.
        """
        config = model_preset(model)
        if model is not None and config.latent_dim != codec.latent_dim:
            fit = presets_of_width(codec.latent_dim)
            instead = f"give --model {' or '.join(fit)}, or" if fit else "give"
            raise EchoError(
                f"--model {model}: expected a codec with latents of {config.latent_dim} channels, "
                f"got {codec.latent_dim}; {instead} another --codec"
            )
        return cls(
            max_seconds or config.max_frames / codec.frame_rate,
            max_speaker_seconds or config.max_speaker_frames / codec.frame_rate,
            config.max_text_bytes,
        )


# --- Speakers -----------------------------------------------------------------------------------


def with_speakers(
    clips: Sequence[Clip], speaker: str | None, folder: str
) -> tuple[list[Clip], str | None]:
    """`clips` with their speakers filled in, and a note for the user.

    `speaker` is assigned to all clips that have none; if it is empty, they keep none. If it is
    None, and no clip has a speaker and all are in one folder, one speaker called `folder` is
    assumed.
    """
    named = sum(clip.speaker is not None for clip in clips)
    note = None
    if speaker and named:
        note = (
            f"--speaker {speaker}: {named} of {len(clips)} clips keep the speaker that the source "
            "names (a folder's name counts)"
        )
    elif speaker is None and _is_one_folder(clips):
        speaker = folder
        note = (
            f"assuming that all {len(clips)} clips are of one speaker, {folder!r}: they are in one "
            "folder and no speaker is named; if this is wrong, name speakers (a folder for each, "
            "or a column 'speaker'), or give --speaker '' for unknown speakers"
        )
    return [replace(clip, speaker=clip.speaker or speaker or None) for clip in clips], note


def _is_one_folder(clips: Sequence[Clip]) -> bool:
    """Whether the clips are files, not rows or tar members, in one folder, without speakers."""
    sources = {clip.metadata["source"] for clip in clips}
    are_files = all(isinstance(clip.audio, Path) and clip.speaker is None for clip in clips)
    folders = {PurePosixPath(source).parent for source in sources}
    return are_files and len(sources) > 1 and len(folders) == 1


def reference_warning(samples: int, with_reference: int) -> str | None:
    """A warning about samples without a reference, if there are many."""
    without = samples - with_reference
    if without <= MAX_WITHOUT_REFERENCE * samples:
        return None
    return (
        f"{without} of {samples} samples have no reference, so a model learns little about voices "
        "from them. A reference is another recording of the same speaker: name speakers in the "
        "source (a folder for each, or a column 'speaker'), or give --speaker NAME if all are of "
        "one speaker, then prepare into another --output"
    )


# --- Held-out recordings ------------------------------------------------------------------------


def parse_holdout(given: str) -> float | int:
    """A fraction from 0 to 1, from `5%`, or a number of recordings, from `20`.

    **Raises**: `UsageError` if it is neither.
    """
    match = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)\s*%|(\d{1,9})", given.strip())
    if match is None or not float(match[1] or match[2]) > 0:
        raise UsageError(f"--holdout: expected a share such as 5% or a count, got {given!r}")
    return float(match[1]) / 100 if match[1] else int(match[2])


def hold_out(clips: Sequence[Clip], holdout: float | int, seed: int, output: Path) -> set[str]:
    """Names of the recordings to hold out, a fraction or a number of them.

    Recordings that earlier runs assigned in `output` keep their assignment. Each one is chosen by a
    hash of its name and `seed`, so the choice does not depend on the others. At least one recording
    is held out, and at least one is left.
    """
    training, held = listed_sources(output), listed_sources(output / HOLDOUT)
    sources = {clip.metadata["source"] for clip in clips}
    free = sorted(sources - training - held, key=lambda source: _uniform(source, seed))
    if isinstance(holdout, int):
        chosen = set(free[: max(0, holdout - len(held & sources))])
    else:
        chosen = {source for source in free if _uniform(source, seed) < holdout}
        if not chosen and not held:
            chosen = set(free[:1])
    if not (sources - held - chosen):
        raise UsageError(
            f"--holdout: expected fewer than all {len(sources)} recordings, so that some are left "
            "to train on"
        )
    return chosen | (held & sources)


def _uniform(source: str, seed: int) -> float:
    """A number from 0 to 1, uniform over names."""
    digest = hashlib.sha256(f"holdout {seed} {source}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
