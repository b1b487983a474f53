"""Speak a text, in the voice of a recording if one is given.

    echo-eqx infer --text "Hello from a tiny model." --output hello.wav
    echo-eqx infer --checkpoint MODEL --text "Hello." --speaker_ref voice.mp3
    echo-eqx infer --text "Hello." --stream - | aplay -f S16_LE -r 24000

Without --checkpoint the small voice in the package speaks. MODEL and the codec are a file, a
folder, a Hub id owner/name[@revision][:file], or voice, the one in the package. Long texts are
split at the ends of sentences, spoken chunk by chunk in one voice, and joined.
"""

import contextlib
import dataclasses
import logging
import sys
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

import echo_eqx
from echo_eqx import EchoDiT, SamplerSettings
from echo_eqx.cli import CompileClock, StepBar, on_terminal, parse
from echo_eqx.codec.codec import Codec
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.audio import save_audio
from echo_eqx.errors import UsageError
from echo_eqx.generation import Length
from echo_eqx.layers.precision import MatmulPrecision, set_matmul_precision
from echo_eqx.speech.chunks import target_seconds
from echo_eqx.speech.codec import check_latent_dim, codec_mismatch, find_codec, silence_latent
from echo_eqx.speech.continuation import continue_recording
from echo_eqx.speech.metadata import describe_model, describe_speaker, write_metadata
from echo_eqx.speech.pcm import PCMWriter
from echo_eqx.speech.requests import Request, check_outputs, make_requests
from echo_eqx.speech.speaker import describe_reference
from echo_eqx.speech.stream import FIRST_SECONDS
from echo_eqx.speech.voices import voice_file
from echo_eqx.weights.find import SHIPPED
from echo_eqx.weights.load import load_model
from echo_eqx.weights.native import array_dtype

logger = logging.getLogger(__name__)

RECOMMENDED = tyro.conf.arg(help_behavior_hint="(default: what the checkpoint recommends)")
SAMPLER_FLAGS = dataclasses.make_dataclass(
    "SamplerFlags",
    [
        (name, Annotated[hint, RECOMMENDED], getattr(SamplerSettings, name))
        for name, hint in typing.get_type_hints(SamplerSettings, include_extras=True).items()
    ],
    bases=(SamplerSettings,),
    frozen=True,
)
"""`SamplerSettings`, except that `--help` shows no defaults: they depend on the checkpoint."""


@dataclass(frozen=True)
class Args:
    checkpoint: str = "voice"
    """EchoDiT weights: our safetensors, a run folder of train, a Flax pickle of the published
    trainer, or PyTorch safetensors. A file, a folder, a Hub id owner/name[@revision][:file], or
    voice, the small voice in the package."""
    text: str | None = None
    """The text to speak, in UTF-8."""
    text_file: Path | None = None
    """Instead of --text: a file with one utterance per line, or JSON lines (*.jsonl) with "text"
    and optionally "output", "voice" or "speaker_ref", and "seed". The models are loaded once."""
    output: Path = Path("output.wav")
    """File to write, *.wav or *.flac. Several results are numbered: output_0001.wav ..."""
    stream: Path | None = None
    """Instead of --output: a file or, with -, stdout, which is written while the text is spoken. It
    gets 16-bit little-endian mono samples without a header, at the sample rate of the codec, which
    is 24000 for the small voice and 48000 for the published codec; what is above full scale is
    clipped. All messages go to stderr."""
    first_seconds: float | None = FIRST_SECONDS
    """With --stream: about how long the first chunk of text may take to speak. It is generated in
    as many frames as it needs, so that the first sound comes early. None: chunks as without
    --stream. Block-wise models generate growing blocks instead."""
    speaker_ref: Path | None = None
    """The reference voice: a recording (wav, flac, ogg, opus, mp3) or latents (*.npy)."""
    voice: str | None = None
    """Instead of --speaker_ref: the name of a voice that echo-eqx voice list shows, or the path of
    its file *.safetensors."""
    voices: Path | None = None
    """Folder of the voices; default: $XDG_DATA_HOME/echo_eqx/voices, or else
    ~/.local/share/echo_eqx/voices."""
    block_frames: int | None = None
    """Block-wise models only: generate in blocks of this many latent frames."""
    continue_from: Path | None = None
    """Block-wise models only: continue this recording. --text must be what the recording says,
    and then what to say. The output begins where the recording ends, and --duration counts both."""
    duration: float | None = None
    """Seconds generated for each chunk of text. The model fills them with speech and then silence;
    the pace may change with the duration. By default what the checkpoint recommends, or else 15, or
    the longest the model was trained with if that is shorter."""
    length: Annotated[Length, RECOMMENDED] = "full"
    """full: generate --duration for every chunk. auto: only as much as the text needs, which is
    faster for short texts but changes what is spoken; where speech does not end, full is used."""
    seed: int = 42
    """Seed of the noise, and of the watermark's message."""
    sampler: Annotated[SamplerSettings, tyro.conf.arg(name="", constructor=SAMPLER_FLAGS)] = field(
        default_factory=SamplerSettings
    )
    num_candidates: int = 1
    """Candidates to generate for each utterance, with consecutive seeds."""
    batch_size: int = 8
    """Chunks of text that are sampled together."""
    codec: str | None = None
    """Codec weights: a DACVAE weights.pth, Fish S1-DAC or our safetensors. A file, a folder, a Hub
    id, or voice. By default the codec in the checkpoint's folder, or the one that it names, or else
    that of the published models: facebook/dacvae-watermarked for 128 channels,
    jordand/fish-s1-dac-min for 80."""
    watermark: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: if the codec can)")] = (
        True
    )
    """Embed an inaudible message that marks the audio as generated."""
    message: str | None = None
    """Bits of the watermark, such as 0110...; drawn from the seed by default."""
    trim: bool = True
    """Cut the silence that the model generates after the speech."""
    normalize_text: bool = True
    """Clean the text as in the training of the published models: straight quotes, commas instead of
    colons, a speaker tag [S1] at the start."""
    expand_text: Annotated[bool, RECOMMENDED] = False
    """Write out numbers, dates, money, addresses and abbreviations as they are read in English."""
    speaker_seconds: float | None = None
    """Seconds of the reference's speech to use, up to 120. By default the longest in training."""
    speaker_lufs: float | None = None
    """Integrated loudness to normalize the reference to, such as -16. By default what the
    checkpoint recommends, or else -23."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the model: auto is bfloat16 on GPU and TPU, float32 on CPU."""
    codec_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the codec. float16 is faster on GPU; its error is over 40 dB below the signal."""
    matmul_precision: MatmulPrecision = "highest"
    """Precision of float32 matrix products and convolutions on GPU and TPU: highest is exact, the
    others are faster. CPUs ignore it."""
    json: bool = False
    """Next to each result, write a JSON file with all settings and the models' checksums. An
    existing JSON file that this command did not write is never replaced."""


def main() -> None:
    started = time.perf_counter()
    args = parse(Args, __doc__)
    check_usage(args)
    if args.stream is None:
        speak(args, started, None)
        return
    with contextlib.redirect_stdout(sys.stderr), PCMWriter(args.stream) as pcm:
        speak(args, started, pcm)


def speak(args: Args, started: float, pcm: PCMWriter | None) -> None:
    """Speak to files, or to `pcm`."""
    use_compilation_cache()
    set_matmul_precision(args.matmul_precision)
    clock = CompileClock()
    speaker = args.speaker_ref if args.voice is None else voice_file(args.voice, args.voices)
    base = Request(args.text or "", args.output, speaker, args.seed, args.continue_from)
    requests = make_requests(base, args.text_file, args.num_candidates, args.json, args.voices)
    if pcm is None:
        check_outputs(requests, args.json)

    dtype = args.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if on_terminal():
        logger.info(f"loading {args.checkpoint}")
    dit, checkpoint = load_model(args.checkpoint, "dit", dtype=array_dtype(dtype))
    codec_name, codec_file = find_codec(dit, args.codec, args.checkpoint)
    codec_dtype = array_dtype(args.codec_dtype)
    codec = echo_eqx.load_codec(codec_file, dtype=codec_dtype, pca=args.checkpoint)
    check_latent_dim(dit, codec)
    args = with_recommended(dit, codec)
    duration = target_seconds(dit, codec, args.duration)
    message = message_bits(args, codec)
    if dit.generation.codec_silence is not None:
        if warning := codec_mismatch(dit.generation, silence_latent(codec)):
            logger.warning(f"codec {codec_name}: {warning}")

    speakers: dict[Path | None, np.ndarray | None] = {None: None}
    for path in dict.fromkeys(request.speaker_ref for request in requests):
        if path is not None:
            latents = echo_eqx.speaker_latents(
                dit, codec, path, max_seconds=args.speaker_seconds, lufs=args.speaker_lufs
            )
            speakers[path] = latents
            print(f"reference {path}: {describe_reference(dit, codec, latents)}")
    models = {}
    if args.json:
        models["checkpoint"] = describe_model(checkpoint, args.checkpoint, dit)
        models["codec"] = describe_model(codec_file, codec_name, codec)
    rate, seconds = codec.config.sample_rate, 0.0
    options: dict[str, Any] = {
        "duration": duration,
        "settings": args.sampler,
        "message": message,
        "trim": args.trim,
        "normalize_text": args.normalize_text,
        "expand_text": args.expand_text,
    }
    if pcm is not None:
        blocks = [(args.block_frames, args.sampler.steps)] if args.block_frames else None
        options |= {"blocks": blocks, "first_seconds": args.first_seconds, "seed": base.seed}
        options["length"] = args.length
        voice = speakers[base.speaker_ref]
        for audio in echo_eqx.stream(dit, codec, base.text, voice, **options):
            pcm.write(audio)
            if not seconds:
                print(f"first sound after {time.perf_counter() - started:.2f} s, {rate} Hz")
            seconds += len(audio) / rate
        requests = []
    for start in range(0, len(requests), args.batch_size):  # results are written batch by batch
        batch = requests[start : start + args.batch_size]
        bar = StepBar(f"speaking {start + len(batch)}/{len(requests)}")
        shared = {"block_frames": args.block_frames, "progress": bar if on_terminal() else None}
        if args.continue_from is None:
            audios = echo_eqx.synthesize_all(
                dit,
                codec,
                [echo_eqx.Utterance(r.text, speakers[r.speaker_ref], r.seed) for r in batch],
                length=args.length,
                batch_size=args.batch_size,
                **options,
                **shared,
            )
        else:
            audios = []
            for r in batch:
                voice = speakers[r.speaker_ref]
                audio = continue_recording(
                    dit, codec, r.text, args.continue_from, voice, seed=r.seed, **options, **shared
                )
                audios.append(audio)
        bar.close()
        for request, audio in zip(batch, audios, strict=True):
            save_audio(request.output, audio, rate)
            if args.json:
                settings = effective_settings(args, request, dtype, message) | models
                settings |= {"duration": duration, "sample_rate": rate}
                path, lufs = request.speaker_ref, args.speaker_lufs
                settings |= describe_speaker(dit, codec, path, speakers[path], lufs)
                settings["seconds"] = len(audio) / rate
                write_metadata(request.metadata, settings)
            print(f"{request.output}: {len(audio) / rate:.2f} s")
            seconds += len(audio) / rate
    if message is not None:
        print(f"watermark message: {''.join(map(str, message))}")
    wall = time.perf_counter() - started
    running = wall - clock.seconds
    print(
        f"{seconds:.2f} s of audio in {wall:.2f} s: compiling {clock.seconds:.2f} s, running "
        f"{running:.2f} s, real-time factor {running / seconds:.2f}"
    )
    if args.checkpoint in SHIPPED and speaker is None:
        print("next: choose a voice with --voice ben; echo-eqx voice list shows them")


def check_usage(args: Args) -> None:
    """**Raises**: `UsageError` for flags that are wrong with any model."""
    if (args.text is None) == (args.text_file is None):
        raise UsageError("expected either --text or --text_file")
    if args.voice is not None and args.speaker_ref is not None:
        raise UsageError("expected either --voice or --speaker_ref, got both")
    args.sampler.check()
    for name in ("num_candidates", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"{name}: expected at least 1, got {getattr(args, name)}")
    if args.message is not None and not args.watermark:
        raise UsageError("--message: expected --watermark with it, got --no_watermark")
    if args.continue_from is not None and args.stream is not None:
        raise UsageError("--continue_from: expected --output with it, got --stream")
    if args.stream is not None and (args.text is None or args.num_candidates > 1 or args.json):
        raise UsageError(
            "--stream: expected --text with it, and neither --num_candidates nor --json"
        )


def with_recommended(dit: EchoDiT, codec: Codec) -> Args:
    """The flags parsed again, with the models' recommended settings as defaults."""
    generation = dit.generation
    base = Args(
        length=generation.length,
        sampler=generation.sampler,
        watermark=codec.watermark is not None,
        expand_text=generation.expand_text,
    )
    args = parse(Args, __doc__, default=base)
    sampler = SamplerSettings(**dataclasses.asdict(args.sampler))
    return dataclasses.replace(args, sampler=sampler)


def message_bits(args: Args, codec: Codec) -> list[int] | None:
    """The watermark's message, None for no watermark."""
    if not args.watermark and args.message is None:
        return None
    if codec.watermark is None:
        flag = "--watermark" if args.message is None else "--message"
        raise UsageError(
            f"{flag}: expected a codec that can embed watermarks, got one that cannot; leave "
            f"{flag} out"
        )
    num_bits = codec.watermark.num_bits
    if args.message is None:
        return np.random.default_rng(args.seed).integers(0, 2, num_bits).tolist()
    if len(args.message) != num_bits or set(args.message) - {"0", "1"}:
        raise UsageError(f"--message: expected {num_bits} digits 0 or 1, got {args.message!r}")
    return [int(bit) for bit in args.message]


def effective_settings(
    args: Args, request: Request, dtype: str, message: list[int] | None
) -> dict[str, Any]:
    """All settings of a result, with the defaults filled in."""
    settings = dataclasses.asdict(args)
    settings |= settings.pop("sampler")
    for name in (
        *("text_file", "checkpoint", "codec", "json", "num_candidates", "voice", "voices"),
        *("stream", "first_seconds"),
    ):
        del settings[name]
    return settings | {
        "text": request.text,
        "output": str(request.output),
        "seed": request.seed,
        "dtype": dtype,
        "start_t": args.sampler.first_time,
        "speaker_ref": None if request.speaker_ref is None else str(request.speaker_ref),
        "continue_from": None if args.continue_from is None else str(args.continue_from),
        "watermark": message is not None,
        "message": None if message is None else "".join(map(str, message)),
        "version": {"echo_eqx": echo_eqx.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
