"""Making a voice from recordings: they are read, checked, set to a level and encoded."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.data.ffmpeg import AudioSource
from echo_eqx.data.quality import find_voice_change, signal_to_noise
from echo_eqx.data.reference import Reference, read_reference
from echo_eqx.errors import UsageError
from echo_eqx.generation import REFERENCE_LUFS
from echo_eqx.speech.codec import codec_identity, silence_latent
from echo_eqx.speech.speaker import encode_speech
from echo_eqx.speech.voices import MAX_SECONDS, Voice, VoiceInfo, check_name

LEAST_SNR = 25.0
"""In dB. Clean recordings of 61 voices, 4 of them people's, had 36 or more."""
FEW_SECONDS = 3.0


def make_voice(
    name: str,
    recordings: Sequence[Path | tuple[str, AudioSource]],
    codec: Codec,
    *,
    consent: str,
    lufs: float | None = REFERENCE_LUFS,
    codec_name: str | None = None,
) -> Voice:
    """A voice from one or several recordings, of which the first 120 s of speech are used.

    Silence at the start and the end is cut, and long pauses are shortened, see `extract_speech`.
    What is wrong with the recordings, but can be used, is in `info.warnings`: a little clipping,
    noise, several voices, more speech than is used, or very little. `find_voice_change` says which
    voices it cannot tell apart.

    **Arguments**:
    - `recordings`: files; or names and bytes of files.
    - `consent`: who allowed the use of the voice, and how.
    - `lufs`: integrated loudness to set each recording to; None for as recorded.
    - `codec_name`: the codec, as for `load_codec`, to be named in the file; better no local path.

    **Raises**: `EchoError` naming the recording that cannot be used, as it has no speech or is
    clipped; `UsageError` if there is none, or the name, the consent or the level cannot be used.
    """
    check_name(name)
    if not consent.strip():
        raise UsageError("consent: expected who allowed the use of this voice, and how; got ''")
    if not recordings:
        raise UsageError("recordings: expected at least one, got none")
    if lufs is not None and not -70 <= lufs <= 0:
        raise UsageError(f"loudness of the voice: expected -70 to 0 LUFS, got {lufs}")
    rate, left = codec.config.sample_rate, MAX_SECONDS
    names, references, unused = [], [], []
    for recording in recordings:
        file, source = (recording.name, recording) if isinstance(recording, Path) else recording
        names.append(Path(file).name)
        if left < 1 / codec.config.frame_rate:
            unused.append(names[-1])
            continue
        shown = str(recording) if isinstance(recording, Path) else file
        reference = read_reference(source, shown, rate, left)
        references.append(reference)
        left -= len(reference.speech) / rate
    latents = [encode_speech(codec, reference.speech, lufs) for reference in references]
    info = VoiceInfo(
        consent=consent.strip(),
        lufs=lufs,
        sample_rate=rate,
        hop=codec.config.hop,
        codec_sha256=codec_identity(codec),
        codec=codec_name,
        sources=tuple(names[: len(references)]),
        warnings=tuple(_warnings(names, references, unused, rate)),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("echo_eqx"),
    )
    info.check()
    return Voice(name, np.concatenate(latents), silence_latent(codec), info)


def _warnings(
    names: list[str], references: list[Reference], unused: list[str], rate: int
) -> list[str]:
    found = []
    for name, reference in zip(names, references, strict=False):
        if reference.clipped_share:
            found.append(
                f"{name}: {reference.clipped_share:.1%} of its samples are at its ceiling, so it "
                "may be clipped; record at a lower level"
            )
        snr = signal_to_noise(reference.speech, rate)
        if snr < LEAST_SNR:
            found.append(
                f"{name}: the noise is only {snr:.0f} dB below the speech, and the voice will have "
                f"it too; expected {LEAST_SNR:.0f} dB or more"
            )
    speech = [reference.speech for reference in references]
    change = find_voice_change(speech, rate)
    if change is not None:
        one, other = (
            f"{names[i]} at {start:.0f} to {end:.0f} s of speech"
            for i, (start, end) in zip(change.recordings, change.spans, strict=True)
        )
        found.append(
            f"{one} and {other} sound like different voices or microphones; expected one speaker "
            "in one room"
        )
    seconds = sum(map(len, speech)) / rate
    if seconds < FEW_SECONDS:
        found.append(f"expected {FEW_SECONDS:.0f} s of speech or more, got {seconds:.1f} s")
    rest = [
        name for name, reference in zip(names, references, strict=False) if not reference.is_whole
    ]
    for name in itertools.chain(rest, unused):
        found.append(
            f"{name} is {'only partly' if name in rest else 'not'} used: a voice holds "
            f"{MAX_SECONDS:.0f} s of speech"
        )
    return found
