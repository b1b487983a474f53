"""Who speaks, where the source does not say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from echo_eqx.prepare.clips import Clip

MAX_WITHOUT_REFERENCE = 0.2
"""Share of samples without a reference above which a warning is due."""


def with_speakers(
    clips: Sequence[Clip], speaker: str | None, folder: str
) -> tuple[list[Clip], str | None]:
    """`clips` with a speaker each where one can be told, and what to tell the user about it.

    `speaker` is given to all that have none; empty, it leaves them as they are. Without it,
    recordings that all lie in one folder, where no speaker is named at all, are taken to be of one
    speaker, called `folder`.
    """
    unnamed = [clip for clip in clips if clip.speaker is None]
    if speaker is not None:
        if len(unnamed) < len(clips) and speaker:
            named = len(clips) - len(unnamed)
            note = (
                f"--speaker {speaker}: {named} of {len(clips)} clips keep the speaker that the "
                "source names (a folder's name counts)"
            )
        else:
            note = None
        return [_said_by(clip, speaker or None) for clip in clips], note
    if not _is_one_folder(clips):
        return list(clips), None
    note = (
        f"assumed: all {len(clips)} clips are of one speaker, {folder!r}, since they lie in one "
        "folder and no speaker is named; otherwise name speakers (a folder for each, or a column "
        "'speaker'), or give --speaker '' for unknown speakers"
    )
    return [_said_by(clip, folder) for clip in clips], note


def _said_by(clip: Clip, speaker: str | None) -> Clip:
    return clip if clip.speaker is not None else replace(clip, speaker=speaker)


def _is_one_folder(clips: Sequence[Clip]) -> bool:
    """Whether files, not rows or members of archives, lie in one folder, nobody named."""
    folders = {PurePosixPath(clip.metadata["source"]).parent for clip in clips}
    is_plain = all(isinstance(clip.audio, Path) and clip.speaker is None for clip in clips)
    several = len({clip.metadata["source"] for clip in clips}) > 1
    return is_plain and several and len(folders) == 1


def reference_warning(samples: int, with_reference: int) -> str | None:
    """What to do about samples without a reference, if there are many."""
    without = samples - with_reference
    if without <= MAX_WITHOUT_REFERENCE * samples:
        return None
    return (
        f"WARNING: {without} of {samples} samples have no reference, so a model learns little "
        "about voices from them. A reference is another recording of the same speaker: name "
        "speakers in the source (a folder for each, or a column 'speaker'), or give --speaker NAME "
        "if all are of one speaker, then prepare into another --output"
    )
