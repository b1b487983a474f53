"""Turn recordings and their transcripts into shards of latents to train on.

    echo-eqx prepare --input recordings/ --output shards/ --codec WEIGHTS
    echo-eqx prepare --input clips.jsonl --output shards/ --codec WEIGHTS --part 2/8

The input is a folder of audio with a NAME.txt beside each NAME.wav, a JSONL manifest, a list in
columns (of LJSpeech, Common Voice, F5-TTS, XTTS, VITS and others), tars of audio and json, or a
Hugging Face audio dataset in Parquet. The same command again goes on where it stopped. Several
machines share the work with --part.
"""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

import echo_eqx
from echo_eqx.cli import on_terminal, parse
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.audio import SilentAudioError
from echo_eqx.data.shards import HOLDOUT
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import remove_leftovers
from echo_eqx.prepare.clips import list_clips
from echo_eqx.prepare.cut import CUTS, cut_long, too_long_texts
from echo_eqx.prepare.encode import ClipEncoder, EncodeSettings, codec_identity, encode_silence
from echo_eqx.prepare.holdout import hold_out, parse_holdout
from echo_eqx.prepare.known import Plan, plan_shards
from echo_eqx.prepare.options import Limits
from echo_eqx.prepare.push import push
from echo_eqx.prepare.records import printable
from echo_eqx.prepare.speakers import reference_warning, with_speakers
from echo_eqx.prepare.write import PartIndex, write_json, write_shard, write_silence

logger = logging.getLogger(__name__)

SILENCE, SILENCE_SECONDS = "silence.safetensors", 30
CODEC = "codec.json"


@dataclass(frozen=True)
class Args:
    input: str | None = None
    """Recordings: a folder, a manifest (*.jsonl), a list (*.csv, *.tsv, *.txt), tars, Parquet
    files, or hf://datasets/owner/name[@revision]. Without it only silence.safetensors is made: 30 s
    of encoded digital silence, which training pads with."""
    output: Path | None = None
    """Folder for the shards."""
    codec: str = "facebook/dacvae-watermarked"
    """DACVAE weights that encode: a file, a folder, a Hub id, or voice."""
    model: str | None = None
    """Preset of the model that will be trained, such as voice: sets max_seconds, ref_seconds and
    the longest text to what it can hold. Clips with a longer text are counted."""
    max_seconds: float | None = None
    """Longest recording; 30.72 unless the model says otherwise. A longer one is cut between its
    segments where the transcript has times, else at pauses where a recogniser is installed
    (pip install 'echo_eqx[cutting]'), and left out otherwise."""
    ref_seconds: float | None = None
    """Longest reference, joined from other recordings of the speaker; 20.48 unless the model says
    otherwise."""
    speaker: str | None = None
    """Who speaks in all recordings for which the source names nobody. Without it, recordings that
    lie in one folder, none with a speaker, are taken to be of one; '' leaves them without."""
    holdout: str | None = None
    """Share (5%) or count of recordings to keep apart, in OUTPUT/holdout, for train.py
    --eval_data. Training on OUTPUT leaves that folder out."""
    latents: Literal["mean", "sample"] = "mean"
    """mean of the bottleneck, or a sample with its deviation."""
    lufs: float | None = None
    """Bring every recording to this loudness, such as -16, as far as its peak allows."""
    normalize_text: bool = True
    """Write the text as infer.py gives it to a model: cleaned, with a speaker tag [S1] in front.
    With --no-normalize_text it stays as it is."""
    shard_samples: int = 256
    """Samples in a shard, about. A kill costs at most the shard that was being made."""
    batch_size: int | None = None
    """Recordings encoded at once on each device; by default 1 on CPU, 8 elsewhere."""
    part: str = "1/1"
    """Which share of the shards to make, such as 2/8."""
    seed: int = 0
    """Of the order of samples and the choice of references."""
    push: str | None = None
    """owner/name of a dataset on the Hub to upload to when the shards are made. Without --input:
    upload what is in --output."""
    cache_dir: Path = Path("~/.cache/echo_eqx/recordings")
    """Where datasets from the Hub are kept."""


def main() -> None:
    args = parse(Args, __doc__)
    part, parts = check_usage(args)
    assert args.output is not None
    use_compilation_cache()
    try:
        if args.input is not None:
            prepare(args, args.input, args.output, part, parts)
        elif args.push is None:
            codec = echo_eqx.load_codec(args.codec)
            args.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(args.output, {SILENCE, CODEC})
            describe_codec(codec, args.output)
            print(f"{printable(str(args.output / SILENCE))}; for shards give --input")
    except OSError as error:
        raise EchoError(f"{args.output} cannot be written: {error.strerror}") from None
    if args.push is not None:
        push(args.output, args.push, say=logger.info)


def check_usage(args: Args) -> tuple[int, int]:
    """What can be refused at once; the part from 0, and how many there are."""
    if args.output is None:
        raise UsageError("--output is missing; wanted a folder for the shards")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", args.part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"part is {args.part!r}; wanted such as 2/8")
    for name in ("max_seconds", "ref_seconds", "shard_samples"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 1e9:
            raise UsageError(f"{name} is {getattr(args, name)}; wanted a positive number")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"batch_size is {args.batch_size}; wanted at least 1")
    if args.lufs is not None and not -70 <= args.lufs <= 0:
        raise UsageError(f"lufs is {args.lufs}; wanted -70 to 0")
    if args.holdout is not None:
        parse_holdout(args.holdout)
    return int(match[1]) - 1, int(match[2])


def prepare(args: Args, source: str, output: Path, part: int, parts: int) -> None:
    codec = echo_eqx.load_codec(args.codec)
    limits = Limits.of(args.model, codec.config, args.max_seconds, args.ref_seconds)
    clips, refused = list_clips(
        source,
        max_seconds=limits.max_seconds,
        cache=args.cache_dir,
        normalise=args.normalize_text,
        output=output,
        keep_long=True,
        say=logger.info,
    )
    clips, said = with_speakers(clips, args.speaker, source_name(source))
    if said:
        logger.info(said)
    cuts = cut_long(
        clips,
        max_seconds=limits.max_seconds,
        max_text_bytes=limits.max_text_bytes,
        folder=output / CUTS,
        begin=part / parts,
        say=logger.info,
    )
    clips, refused = cuts.clips, refused + cuts.refused
    if not clips:
        counts = Counter(refusal.kind for refusal in refused)
        first = f"; the first: {refused[0].name}: {refused[0].detail}" if refused else ""
        raise EchoError(
            f"{printable(source)} holds no recording that can be used ({dict(counts)} left out"
            f"{first})"
        )
    if long := too_long_texts(clips, limits.max_text_bytes):
        logger.warning(
            f"{long} of {len(clips)} clips have a text of more than "
            f"{limits.max_text_bytes} bytes, which training cuts at that length"
        )
    settings = {
        **{name: getattr(args, name) for name in ("latents", "lufs", "normalize_text")},
        **{name: getattr(args, name) for name in ("shard_samples", "seed", "speaker", "holdout")},
        **vars(limits),
    }
    output.mkdir(parents=True, exist_ok=True)
    sets = {output: clips}
    if args.holdout is not None:
        held = hold_out(clips, parse_holdout(args.holdout), args.seed, output)
        sets[output] = [clip for clip in clips if clip.metadata["source"] not in held]
        sets[output / HOLDOUT] = [clip for clip in clips if clip.metadata["source"] in held]
        logger.info(f"{len(held)} recordings are held out in {printable(str(output / HOLDOUT))}")
    made_by = codec_facts(codec)
    batch_size = args.batch_size or (1 if jax.default_backend() == "cpu" else 8)
    encode = ClipEncoder(codec, EncodeSettings(args.latents, args.lufs, batch_size, args.seed))
    indexes = {}
    for folder in sets:
        folder.mkdir(exist_ok=True)
        indexes[folder] = PartIndex(folder, part, parts, made_by, settings)
    if part == 0:
        describe_codec(codec, *sets)
        indexes[output].cuts = cuts.counts
        indexes[output].refused["input"] = [vars(refusal) for refusal in refused]
    for folder, members in sets.items():
        plan = plan_shards(folder, members, seed=args.seed, per_shard=args.shard_samples)
        tell_changes(plan)
        indexes[folder].save()
        make_shards(args, folder, plan, indexes[folder], encode, limits)
        report(indexes[folder], codec.config.frame_rate)


def make_shards(
    args: Args, folder: Path, plan: Plan, index: PartIndex, encode: ClipEncoder, limits: Limits
) -> None:
    """The shards of this part that are not there yet."""
    config = encode.codec.config
    shards = list(enumerate(plan.shards))[index.part :: index.parts]
    # Other machines may be writing the other parts.
    own = {index.path.name, *(shard_name(number) for number, _ in shards)}
    remove_leftovers(folder, own | ({SILENCE, CODEC} if index.part == 0 else set()))
    common = {"codec": index.codec["id"][:16]} | ({} if args.lufs is None else {"lufs": args.lufs})
    bar = tqdm(total=sum(len(s) for _, s in shards), unit="clip", disable=not on_terminal())
    for number, dealt in shards:
        path = folder / shard_name(number)
        if index.is_done(path):
            bar.update(len(dealt))
            continue
        clips = [place.clip for place in dealt]
        results = encode([clip for clip in clips if clip.key not in plan.vanished], bar.update)
        latents = {k: v for k, v in results.items() if not isinstance(v, EchoError)}
        broken = [
            {
                "kind": "silent" if isinstance(error, SilentAudioError) else "audio",
                "name": key,
                "detail": str(error),
            }
            for key, error in sorted(results.items())
            if isinstance(error, EchoError)
        ]
        broken += [
            {"kind": "vanished", "name": clip.key, "detail": "was listed by an earlier run"}
            for clip in clips
            if clip.key in plan.vanished
        ]
        written = write_shard(
            path,
            dealt,
            latents,
            ref_frames=int(limits.ref_seconds * config.frame_rate + 1e-6),
            common=common,
            seconds_per_frame=1 / config.frame_rate,
        )
        index.add(path, written, broken)
    bar.close()


def source_name(source: str) -> str:
    """What one speaker is called whose recordings are all there is: the folder's name."""
    path = Path(source).expanduser().absolute()
    return printable((path if path.is_dir() else path.parent).name) or "speaker"


def tell_changes(plan: Plan) -> None:
    if plan.added:
        logger.info(f"{plan.added} clips are new: shards are made for them, those that exist stay")
    for what, keys in (("gone from the input", plan.vanished), ("changed", plan.changed)):
        if keys:
            named = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            logger.warning(
                f"{len(keys)} clips are {what} since an earlier run ({named}): shards "
                "that exist keep them as they were; to make all anew, give another --output"
            )


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def codec_facts(codec: echo_eqx.DACVAE) -> dict[str, Any]:
    config = codec.config
    return {
        "id": codec_identity(codec),
        "sample_rate": config.sample_rate,
        "hop": config.hop,
        "latent_dim": config.latent_dim,
    }


def describe_codec(codec: echo_eqx.DACVAE, *folders: Path) -> None:
    """Write what training needs to know of the codec, and its silence, into `folders`."""
    facts = codec_facts(codec)
    latents = encode_silence(codec, round(SILENCE_SECONDS * codec.config.frame_rate))
    for folder in folders:
        write_silence(folder / SILENCE, latents, facts)
        write_json(folder / CODEC, facts)


def report(index: PartIndex, frame_rate: float) -> None:
    shards = index.shards.values()
    samples = sum(shard["samples"] for shard in shards)
    hours = sum(shard["frames"] for shard in shards) / frame_rate / 3600
    with_reference = sum(shard["with_reference"] for shard in shards)
    print(
        f"{len(shards)} shards, {samples} samples, {hours:.2f} hours, "
        f"{with_reference} with a reference"
        + (f" (held out, in {HOLDOUT}/)" if index.path.parent.name == HOLDOUT else "")
    )
    if warning := reference_warning(samples, with_reference):
        logger.info(warning)
    refused = [refusal for refusals in index.refused.values() for refusal in refusals]
    if refused:
        counts = Counter(refusal["kind"] for refusal in refused)
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        print(f"left out: {listed} (each is named in {printable(str(index.path))})")
