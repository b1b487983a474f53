"""Build the package's small voice from scratch, on a GPU, or in hours on two cores.

    echo-eqx build_voice --work runs/build_voice

espeak-ng speaks the sentences of a grammar; a codec is trained on the recordings and encodes them
into shards; EchoDiT is trained on the shards, first on short phrases, so that it learns to read
sooner, then on sentences. Each step is another command, which is printed. Run this again to
continue where it stopped. Needs espeak-ng, and for the evaluation pip install 'echo_eqx[eval]'.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import echo_eqx
from echo_eqx import voice
from echo_eqx.cli import parse
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS
from echo_eqx.data.audio import save_audio
from echo_eqx.errors import EchoError
from echo_eqx.prepare.clips import list_clips
from echo_eqx.train.codec.standardize import standardize
from echo_eqx.voice.corpus import MANIFEST
from echo_eqx.voice.espeak import REFERENCE_TEXT, VOICES, speak
from echo_eqx.voice.evaluate import generation_config, reference_files

SIZES = ("max_frames", "max_text_bytes", "max_speaker_frames")
STANDARD_CLIPS = 400
"""Recordings used to standardize latents to mean 0 and std 1."""


@dataclass(frozen=True)
class Args:
    work: Path = Path("runs/build_voice")
    """Folder for recordings, shards and runs."""
    output: Path = Path(voice.__file__).parent
    """Folder for weights, references and shards; by default the package."""
    phrases: int = 7000
    """Recordings of one to three words of a sentence."""
    sentences: int = 48_000
    """Recordings of whole sentences, 30 % of the small domain."""
    codec_steps: int = 1500
    """Training steps of the codec, on the phrases."""
    decoder_steps: int = 7000
    """Training steps of the decoder alone, after that."""
    phrase_steps: int = 3000
    """Training steps of EchoDiT on the phrases."""
    sentence_steps: int = 13_000
    """Training steps on the sentences, after that."""
    batch_size: int = 256
    """Batch size of EchoDiT's training."""
    embedded_shards: int = 1
    """Number of shards to put into the package."""


def main() -> None:
    args = parse(Args, __doc__)
    work, rate = args.work, CODEC_PRESETS["24khz"].frame_rate
    sizes = {name: getattr(DIT_PRESETS["voice"], name) for name in SIZES}
    short = dict(zip(SIZES, (44, 40, 32), strict=True))
    phrases, sentences = work / "phrases" / MANIFEST, work / "sentences" / MANIFEST
    command("make_corpus", output=phrases.parent, count=args.phrases, max_words=3, max_seconds=1.6)
    command(
        "make_corpus",
        output=sentences.parent,
        count=args.sentences,
        small_share=0.3,
        max_seconds=sizes["max_frames"] / rate,
    )
    command("train_codec", data=phrases, run_dir=work / "codec", num_steps=args.codec_steps)
    codec = work / "codec.safetensors"
    if not codec.is_file():
        clips, _ = list_clips(str(phrases), max_seconds=30.0, cache=work)
        trained = echo_eqx.load_codec(work / "codec")
        assert isinstance(trained, echo_eqx.DACVAE)
        echo_eqx.save(standardize(trained, clips[:STANDARD_CLIPS]), codec)
    decoder = work / "decoder"  # the encoder is frozen: the same latents, but better sound
    command(
        "train_codec",
        data=phrases,
        run_dir=decoder,
        init_from=codec,
        freeze_encoder=True,
        num_steps=args.decoder_steps,
        # Latents do not encode the phase, so a loss on samples favors silence, and spectral losses
        # leave the pitch undetermined.
        **{"loss.waveform": 0.0, "loss.periodicity": 5.0, "learning_rate": 1e-3},
    )
    first, last = work / "dit_phrases", work / "dit_sentences"
    more = {"init_from": first, "schedule": "wsd", "decay_ratio": 0.4, "ema_decay": 0.998}
    for manifest, run_dir, steps, limits, flags in (
        (phrases, first, args.phrase_steps, short, {}),
        (sentences, last, args.sentence_steps, sizes, more),
    ):
        shards = work / f"shards_{manifest.parent.name}"
        command(
            "prepare",
            input=manifest,
            output=shards,
            codec=codec,
            max_seconds=limits["max_frames"] / rate,
            max_speaker_seconds=limits["max_speaker_frames"] / rate,
            batch_size=8,
        )
        command(
            "train",
            model="voice",
            data=shards,
            run_dir=run_dir,
            num_steps=steps,
            batch_size=args.batch_size,
            sample_every=0,
            codec=decoder,
            **limits,
            **flags,
        )
    pack(decoder, last, work / "shards_sentences", args.output, args.embedded_shards)
    weights = args.output / voice.WEIGHTS.name
    command(
        "eval_voice",
        checkpoint=weights / voice.CHECKPOINT.name,
        codec=weights / voice.CODEC.name,
        references=args.output / voice.REFERENCES.name,
        output=work / "evaluation",
    )


def command(name: str, **flags: object) -> None:
    """Run another command of the package.

    **Raises**: `EchoError` if it fails.
    """
    words = [sys.executable, "-m", "echo_eqx", name]
    for flag, value in flags.items():
        words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    print(shlex.join(words), flush=True)
    code = subprocess.run(words).returncode
    if code:
        raise EchoError(f"{name} exited with code {code}; run this again to continue from there")


def pack(codec: Path, dit: Path, made: Path, output: Path, num_shards: int) -> None:
    """Put the package's files into `output`: float16 weights, a recording of each voice, shards."""
    weights, references, shards = (
        output / path.name for path in (voice.WEIGHTS, voice.REFERENCES, voice.SHARDS)
    )
    for folder in (references, shards):
        folder.mkdir(parents=True, exist_ok=True)
    echo_eqx.save(echo_eqx.load_codec(codec), weights / voice.CODEC.name, dtype="float16")
    for one in VOICES:
        save_audio(references / f"{one.name}.flac", *speak(REFERENCE_TEXT, one))
    file = weights / voice.CODEC.name
    name = "voice" if file.resolve() == voice.CODEC.resolve() else str(file.resolve())
    model = echo_eqx.load_dit(dit)
    generation = generation_config(
        model, echo_eqx.load_codec(file), reference_files(references), name
    )
    target = weights / voice.CHECKPOINT.name
    echo_eqx.save(model, target, dtype="float16", generation=generation)
    names = [path.name for path in sorted(made.glob("*.tar"))][:num_shards]
    for name in [*names, "silence.safetensors", "codec.json"]:
        shutil.copy(made / name, shards / name)
    for path in (*weights.iterdir(), *references.iterdir(), *shards.iterdir()):
        os.chmod(path, 0o644)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
