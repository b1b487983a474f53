"""Keep reference voices as files: add, list, show and remove them.

    echo-eqx voice add ann interview.wav letter.mp3 --consent "Ann, by e-mail on 2 May 2026"
    echo-eqx infer --voice ann --text "Hello."
    echo-eqx voice show ann --plot ann.png --output ann.wav

A voice is a file NAME.safetensors with the latents of up to two minutes of speech, which nothing
has to encode again. It belongs to a codec, and serves every model of that codec. Voices are in
$XDG_DATA_HOME/echo_eqx/voices, or else in ~/.local/share/echo_eqx/voices.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, subcommand

from echo_eqx import EchoDiT, load_codec, load_dit, nearest_voice
from echo_eqx.cli import parse
from echo_eqx.codec.codec import Codec
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.audio import audio_kind, save_audio
from echo_eqx.errors import EchoError, UsageError, optional, printable
from echo_eqx.files import write_whole
from echo_eqx.generation import REFERENCE_LUFS
from echo_eqx.speech.codec import check_latent_dim, codec_mismatch, find_codec, silence_latent
from echo_eqx.speech.joining import decode_with_silence
from echo_eqx.speech.make_voice import make_voice
from echo_eqx.speech.speaker import describe_reference, speaker_latents
from echo_eqx.speech.voices import (
    SUFFIX,
    Voice,
    check_codec,
    check_name,
    list_voices,
    load_voice,
    remove_voice,
    save_voice,
    voice_file,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VoiceFolder:
    voices: Path | None = None
    """Folder of the voices; default: see above."""


@dataclass(frozen=True, kw_only=True)
class Add(VoiceFolder):
    """Make a voice from recordings of one speaker. Silence is cut, the level is set, and clipping,
    noise and several speakers are reported."""

    name: Positional[str]
    """Letters, digits, dashes and underscores."""
    recordings: Positional[tuple[Path, ...]]
    """Recordings (wav, flac, ogg, opus, mp3), two minutes of speech in all."""
    consent: str
    """Who allowed the use of the voice, and how. It is kept in the file."""
    checkpoint: str | None = None
    """The model to speak with, as for infer: it names the codec and the level. Default: voice, or
    none if --codec is given."""
    codec: str | None = None
    """Codec weights, as for infer; default: that of the model."""
    speaker_lufs: float | None = None
    """Integrated loudness to normalize the recordings to; default: what the checkpoint recommends,
    or else -23."""
    overwrite: bool = False
    """Replace a voice of this name."""


@dataclass(frozen=True, kw_only=True)
class List(VoiceFolder):
    """List all voices, with those in the package."""


@dataclass(frozen=True, kw_only=True)
class Show(VoiceFolder):
    """Show how a voice was made, plot it, or play it."""

    name: Positional[str]
    """Name of a voice, or path of a file *.safetensors."""
    plot: Path | None = None
    """Plot its waveform and spectrogram to this *.png (pip install 'echo_eqx[plots]')."""
    output: Path | None = None
    """Decode it to this file, *.wav or *.flac."""
    checkpoint: str = "voice"
    """Of the voices that this model knows, the nearest is named."""
    codec: str | None = None
    """Codec to decode it with; default: the one that the voice names, or that of the model."""


@dataclass(frozen=True, kw_only=True)
class Remove(VoiceFolder):
    """Delete the file of a voice."""

    name: Positional[str]
    """Name of a voice."""


def main() -> None:
    args = parse(
        Annotated[Add, subcommand("add")]
        | Annotated[List, subcommand("list")]
        | Annotated[Show, subcommand("show")]
        | Annotated[Remove, subcommand("remove")],
        __doc__,
    )
    match args:
        case Add():
            add(args)
        case List():
            list_all(args.voices)
        case Show():
            show(args)
        case Remove():
            print(f"removed {remove_voice(args.name, args.voices)}")


def add(args: Add) -> None:
    check_name(args.name)
    use_compilation_cache()
    dit, lufs = None, REFERENCE_LUFS
    codec_name = args.codec
    if args.checkpoint is not None or codec_name is None:
        checkpoint = args.checkpoint or "voice"
        dit = load_dit(checkpoint)
        lufs = dit.generation.reference_lufs
        codec_name, codec_file = find_codec(dit, args.codec, checkpoint)
        codec = load_codec(codec_file, pca=checkpoint)
        check_latent_dim(dit, codec)
        if warning := codec_mismatch(dit.generation, silence_latent(codec)):
            logger.warning(f"codec {codec_name}: {warning}")
    else:
        codec = load_codec(codec_name)
    lufs = lufs if args.speaker_lufs is None else args.speaker_lufs
    voice = make_voice(
        args.name,
        args.recordings,
        codec,
        consent=args.consent,
        lufs=lufs,
        codec_name=None if Path(codec_name).exists() else codec_name,  # paths stay private
    )
    for warning in voice.info.warnings:
        logger.warning(printable(warning))
    path = save_voice(voice, args.voices, overwrite=args.overwrite)
    print(f"voice {voice.name}: {voice.seconds:.2f} s of speech at {level_of(voice)}")
    if dit is not None:
        reference = describe_reference(dit, codec, used(dit, voice.latents))
        print(f"{args.checkpoint or 'voice'} uses {reference}")
    folder = "" if args.voices is None else f" --voices {args.voices}"
    print(f"{path}\nnext: echo-eqx infer --voice {voice.name}{folder} --text ...")


def list_all(folder: Path | None) -> None:
    broken = False
    for name, path in list_voices(folder).items():
        if path.suffix != SUFFIX:
            print(f"{name:<20} in the package: {path}")
            continue
        try:
            voice = load_voice(path)
        except EchoError as error:
            broken = True
            print(f"{name:<20} broken: {printable(str(error))}")
            continue
        codec = f", codec {printable(voice.info.codec)}" if voice.info.codec else ""
        print(f"{name:<20} {voice.seconds:.1f} s at {level_of(voice)}{codec}")
    if broken:
        raise SystemExit(1)


def show(args: Show) -> None:
    if args.output is not None:
        audio_kind(args.output)
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise UsageError(f"--plot: expected a *.png, got {args.plot}")
        optional("matplotlib", "plots")
    path = voice_file(args.name, args.voices)
    use_compilation_cache()
    dit = load_dit(args.checkpoint)
    voice = load_voice(path) if path.suffix == SUFFIX else None
    needs_codec = voice is None or args.plot is not None or args.output is not None
    codec = decoding_codec(args, dit, voice) if needs_codec else None
    if voice is not None:
        print("\n".join(as_text(voice, path)))
        latents, is_comparable = voice.latents, is_of(dit, voice)
    else:
        assert codec is not None
        print(f"voice       {args.name}, in the package\nfile        {path}")
        latents, is_comparable = speaker_latents(dit, codec, path), True
    nearest = nearest_voice(dit, used(dit, latents)) if is_comparable else None
    if nearest is not None:
        name, distance = nearest
        likeness = f"{name}, distance {distance:.2f} (a known voice stays below 1)"
        print(f"nearest     {likeness} of the voices that {args.checkpoint} knows")
    if codec is None or (args.output is None and args.plot is None):
        return
    audio = decode_with_silence(codec, latents)
    rate = codec.config.sample_rate
    if args.output is not None:
        save_audio(args.output, audio, rate)
        print(f"{args.output}: {len(audio) / rate:.2f} s")
    if args.plot is not None:
        title = f"{args.name}: {len(audio) / rate:.2f} s"
        plot(audio, rate, title if voice is None else f"{title} at {level_of(voice)}", args.plot)


def decoding_codec(args: Show, dit: EchoDiT, voice: Voice | None) -> Codec:
    """The codec that a voice was made with. If it is not named, it must be that of the model."""
    name = args.codec if voice is None else args.codec or voice.info.codec
    codec = load_codec(find_codec(dit, name, args.checkpoint)[1], pca=args.checkpoint)
    if voice is not None:
        check_codec(voice, codec)
    return codec


def used(dit: EchoDiT, latents: np.ndarray) -> np.ndarray:
    """What `infer` uses of a voice by default."""
    return latents[: dit.config.max_speaker_frames]


def is_of(dit: EchoDiT, voice: Voice) -> bool:
    """Whether the model is known to have been trained on latents of the voice's codec."""
    expected = dit.generation.codec_silence
    is_comparable = expected is not None and len(expected) == len(voice.silence)
    return is_comparable and codec_mismatch(dit.generation, voice.silence) is None


def as_text(voice: Voice, path: Path) -> list[str]:
    info = voice.info
    frames, channels = voice.latents.shape
    return [
        f"voice       {voice.name}",
        f"file        {path}",
        f"speech      {voice.seconds:.2f} s, {frames} latents of {channels} channels",
        f"level       {level_of(voice)}",
        f"codec       {printable(info.codec or 'not named')}, encoder {info.codec_sha256[:12]}",
        f"recordings  {printable(', '.join(info.sources)) or 'not named'}",
        f"consent     {printable(info.consent)}",
        f"made        {info.made or 'unknown'} by echo_eqx {info.version or 'unknown'}",
        *(f"WARNING     {printable(warning)}" for warning in info.warnings),
    ]


def level_of(voice: Voice) -> str:
    lufs = voice.info.lufs
    return "its recorded level" if lufs is None else f"{lufs:g} LUFS"


def plot(audio: np.ndarray, rate: int, title: str, path: Path) -> None:
    """Plot waveform and spectrogram."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    wave, spectrogram = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    wave.plot(np.arange(len(audio)) / rate, audio, linewidth=0.5)
    wave.set(ylabel="amplitude", ylim=(-1, 1), xlim=(0, len(audio) / rate))
    with np.errstate(divide="ignore"):  # digital silence
        *_, image = spectrogram.specgram(
            audio, NFFT=1024, Fs=rate, noverlap=768, vmin=-140, vmax=-40
        )
    spectrogram.set(xlabel="time (s)", ylabel="frequency (Hz)")
    figure.colorbar(image, ax=spectrogram, label="power (dB)")
    figure.suptitle(title)
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    except OSError as error:
        raise EchoError(f"cannot write {path}: {error.strerror}") from None
