"""Make shards of latents from recordings: the command prepare."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from echo_eqx.cli import on_terminal
from echo_eqx.codec.codec import Codec
from echo_eqx.data.audio import SilentAudioError
from echo_eqx.data.shards import HOLDOUT
from echo_eqx.errors import EchoError, UsageError, printable
from echo_eqx.files import remove_temporary_files
from echo_eqx.prepare.assign import ShardEntry, ShardPlan, plan_shards
from echo_eqx.prepare.clips import list_clips
from echo_eqx.prepare.cut import CUTS, Cuts, count_long_texts, cut_long
from echo_eqx.prepare.encode import ClipEncoder, EncodeSettings, encode_silence
from echo_eqx.prepare.index import PartIndex, write_json
from echo_eqx.prepare.options import (
    Limits,
    hold_out,
    parse_holdout,
    reference_warning,
    with_speakers,
)
from echo_eqx.prepare.write import write_shard, write_silence
from echo_eqx.speech.codec import codec_identity

SILENCE, SILENCE_SECONDS = "silence.safetensors", 30
CODEC = "codec.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    input: str | None = None
    """Recordings: a folder, a manifest (*.jsonl), a table (*.csv, *.tsv, *.txt), tars, Parquet
    files, or hf://datasets/owner/name[@revision]. Without it, only silence.safetensors is made:
    30 s of encoded digital silence, which training pads with."""
    output: Path | None = None
    """Folder for the shards."""
    codec: str = "facebook/dacvae-watermarked"
    """Codec weights to encode with: a file, a folder, a Hub id, or voice."""
    model: str | None = None
    """Preset of the model that will be trained, such as voice: --max_seconds, --max_speaker_seconds
    and the longest text are set to its limits. Clips with longer texts are counted."""
    max_seconds: float | None = None
    """Longest clip; by default the model's limit (768 frames, 30.72 s at 25 frames/s). Longer
    recordings are cut between segments if the transcript has times, else at pauses if a recognizer
    is installed (pip install 'echo_eqx[cutting]'), else left out."""
    max_speaker_seconds: float | None = None
    """Longest reference, joined from other recordings of the speaker; by default the model's limit
    (512 frames, 20.48 s at 25 frames/s)."""
    speaker: str | None = None
    """Speaker of all recordings for which the source names none. By default, if all recordings are
    in a single folder and none has a speaker, one speaker is assumed; '' assigns no speaker."""
    holdout: str | None = None
    """Share (5%) or number of recordings to hold out, in OUTPUT/holdout, for train --eval_data.
    Training on OUTPUT does not read that folder."""
    latents: Literal["mean", "sample"] = "mean"
    """The mean of the bottleneck, or a sample from its normal distribution."""
    lufs: float | None = None
    """Normalize the loudness of every recording, such as to -16, as far as its peak allows."""
    normalize_text: bool = True
    """Normalize texts as infer does for a model: cleaned, with a speaker tag [S1] in front. With
    --no_normalize_text they are written unchanged."""
    shard_samples: int = 256
    """Approximate samples per shard. If the command is killed, you lose at most the shard that was
    being made."""
    batch_size: int | None = None
    """Recordings encoded at once on each device; by default 1 on CPU, 8 elsewhere."""
    part: str = "1/1"
    """Which part of the shards to make, such as 2/8."""
    seed: int = 0
    """Seed of the order of samples and the choice of references."""
    push: str | None = None
    """owner/name of a dataset on the Hub to upload the finished shards to. Without --input: upload
    what is in --output."""
    cache_dir: Path = Path("~/.cache/echo_eqx/recordings")
    """Where datasets from the Hub are kept."""

    def check(self) -> None:
        """**Raises**: `UsageError`."""
        if self.output is None:
            raise UsageError("--output is missing; expected a folder for the shards")
        self.part_of()
        for name in ("max_seconds", "max_speaker_seconds", "shard_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise UsageError(f"--{name}: expected a positive number, got {value}")
        if self.lufs is not None and not -70 <= self.lufs <= 0:
            raise UsageError(f"--lufs: expected -70 to 0, got {self.lufs}")
        if self.holdout is not None:
            parse_holdout(self.holdout)

    def part_of(self) -> tuple[int, int]:
        """The index of the part, from 0, and the number of parts."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--part: expected a part such as 2/8, got {self.part!r}")
        return int(match[1]) - 1, int(match[2])


def make_dataset(config: PrepareConfig, codec: Codec, source: str, output: Path) -> None:
    """Make the shards of `source` in `output`, and those held out in `output/holdout`."""
    part, parts = config.part_of()
    limits = Limits.of(config.model, codec.config, config.max_seconds, config.max_speaker_seconds)
    cuts = _list(config, limits, source, output, part / parts)
    names = ("latents", "lufs", "normalize_text", "shard_samples", "seed", "speaker", "holdout")
    settings = {**{name: getattr(config, name) for name in names}, **vars(limits)}
    output.mkdir(parents=True, exist_ok=True)
    sets = {output: cuts.clips}
    if config.holdout is not None:
        held = hold_out(cuts.clips, parse_holdout(config.holdout), config.seed, output)
        sets[output] = [clip for clip in cuts.clips if clip.metadata["source"] not in held]
        sets[output / HOLDOUT] = [clip for clip in cuts.clips if clip.metadata["source"] in held]
        logger.info("%d recordings are held out in %s", len(held), printable(str(output / HOLDOUT)))
    indexes = {}
    for folder in sets:
        folder.mkdir(exist_ok=True)
        indexes[folder] = PartIndex(folder, part, parts, _codec_info(codec), settings)
    if part == 0:
        describe_codec(codec, *sets)
        indexes[output].cuts = cuts.counts
        indexes[output].skipped["input"] = [vars(item) for item in cuts.skipped]
    batch_size = config.batch_size or (1 if jax.default_backend() == "cpu" else 8)
    encode = ClipEncoder(
        codec, EncodeSettings(config.latents, config.lufs, batch_size, config.seed)
    )
    for folder, clips in sets.items():
        plan = plan_shards(folder, clips, seed=config.seed, per_shard=config.shard_samples)
        _log_changes(plan)
        indexes[folder].save()
        _make_shards(folder, plan, indexes[folder], encode, limits)
        _report(indexes[folder], codec.config.frame_rate)


def _list(config: PrepareConfig, limits: Limits, source: str, output: Path, begin: float) -> Cuts:
    """The clips of `source`, long ones cut, and everything that is skipped."""
    clips, skipped = list_clips(
        source,
        max_seconds=limits.max_seconds,
        cache=config.cache_dir,
        normalize_text=config.normalize_text,
        output=output,
        keep_long=True,
    )
    path = Path(source).expanduser().absolute()
    folder = printable((path if path.is_dir() else path.parent).name) or "speaker"
    clips, note = with_speakers(clips, config.speaker, folder)
    if note:
        logger.info(note)
    cuts = cut_long(
        clips,
        max_seconds=limits.max_seconds,
        max_text_bytes=limits.max_text_bytes,
        folder=output / CUTS,
        begin=begin,
    )
    cuts.skipped = skipped + cuts.skipped
    if not cuts.clips:
        counts = dict(Counter(item.kind for item in cuts.skipped))
        first = "".join(f"; the first: {item.name}: {item.detail}" for item in cuts.skipped[:1])
        raise EchoError(
            f"{printable(source)}: expected at least one usable recording, got none "
            f"({counts} left out{first})"
        )
    if long := count_long_texts(cuts.clips, limits.max_text_bytes):
        logger.warning(
            "%d of %d clips have texts of more than %d bytes, which training cuts at that length",
            *(long, len(cuts.clips), limits.max_text_bytes),
        )
    return cuts


def _make_shards(
    folder: Path, plan: ShardPlan, index: PartIndex, encode: ClipEncoder, limits: Limits
) -> None:
    """Make the shards of this part that do not exist yet."""
    shards = list(enumerate(plan.shards))[index.part :: index.parts]
    # Other machines may be writing the other parts.
    own = {index.path.name, *(_shard_name(number) for number, _ in shards)}
    remove_temporary_files(folder, own | ({SILENCE, CODEC} if index.part == 0 else set()))
    lufs = encode.settings.lufs
    common = {"codec": index.codec["id"][:16]} | ({} if lufs is None else {"lufs": lufs})
    frame_rate = encode.codec.config.frame_rate
    bar = tqdm(total=sum(len(s) for _, s in shards), unit="clip", disable=not on_terminal())
    for number, entries in shards:
        path = folder / _shard_name(number)
        if index.is_done(path):
            bar.update(len(entries))
            continue
        latents, skipped = _encode(entries, plan, encode, bar)
        summary = write_shard(
            path,
            entries,
            latents,
            ref_frames=int(limits.max_speaker_seconds * frame_rate + 1e-6),
            common=common,
            frame_rate=frame_rate,
        )
        index.add(path, summary, skipped)
    bar.close()


def _encode(
    entries: list[ShardEntry], plan: ShardPlan, encode: ClipEncoder, bar: tqdm
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Latents by key, and what is skipped."""
    clips = [entry.clip for entry in entries]
    results = encode([clip for clip in clips if clip.key not in plan.missing], bar.update)
    latents, skipped = {}, []
    for key, result in sorted(results.items()):
        if isinstance(result, EchoError):
            kind = "silent" if isinstance(result, SilentAudioError) else "audio"
            skipped.append({"kind": kind, "name": key, "detail": str(result)})
        else:
            latents[key] = result
    skipped += [
        {"kind": "missing", "name": clip.key, "detail": "listed by an earlier run, but gone now"}
        for clip in clips
        if clip.key in plan.missing
    ]
    return latents, skipped


def _log_changes(plan: ShardPlan) -> None:
    if plan.added:
        logger.info("%d clips are new: adding shards for them; existing shards stay", plan.added)
    changed = "changed (text, times, metadata or audio)"
    for what, keys in (("gone from the input", plan.missing), (changed, plan.changed)):
        if keys:
            examples = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            logger.warning(
                "%d clips are %s since an earlier run (%s): existing shards are not updated; to "
                "make all shards again, give another --output",
                *(len(keys), what, examples),
            )


def _shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _codec_info(codec: Codec) -> dict[str, Any]:
    """Identity and sizes of a codec, as in codec.json and the index."""
    sizes = {name: getattr(codec.config, name) for name in ("sample_rate", "hop", "latent_dim")}
    return {"id": codec_identity(codec), **sizes}


def describe_codec(codec: Codec, *folders: Path) -> None:
    """Write codec.json, which training reads, and the codec's latents of silence to `folders`."""
    info = _codec_info(codec)
    latents = encode_silence(codec, round(SILENCE_SECONDS * codec.config.frame_rate))
    for folder in folders:
        write_silence(folder / SILENCE, latents, info)
        write_json(folder / CODEC, info)


def _report(index: PartIndex, frame_rate: float) -> None:
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
        logger.warning(warning)
    counts = Counter(item["kind"] for items in index.skipped.values() for item in items)
    if counts:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        print(f"left out: {listed} (each is listed in {printable(str(index.path))})")
