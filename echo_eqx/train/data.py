"""The data of a training run, checked before anything is downloaded."""

import contextlib
import json
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from jax.sharding import Mesh

from echo_eqx.config import DiTConfig, presets_of_width
from echo_eqx.data import loader
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.records import load_silence
from echo_eqx.data.shards import FRAME_RATE, ShardIndex, frame_rate, list_shards
from echo_eqx.errors import EchoError
from echo_eqx.files import expand
from echo_eqx.hub import HubFileNotFound, hub_errors
from echo_eqx.train.config import TrainConfig
from echo_eqx.train.device_loader import owned_streams
from echo_eqx.weights.native import SafetensorsFile


class TrainData:
    """Shards of a source, checked as far as possible without downloading them."""

    def __init__(self, source: str, config: TrainConfig, sizes: DiTConfig, mesh: Mesh):
        self._config = config
        self._cache_dir = expand(config.cache_dir)
        self.shard_index = list_shards(source, self._cache_dir)
        width = loader.first_width(self.shard_index)
        if width not in (None, sizes.latent_dim):
            names = presets_of_width(width)
            models = f"--model {' or '.join(names)} fits" if names else "no --model fits"
            raise EchoError(
                f"expected latents of {sizes.latent_dim} channels, got {width} in {source} "
                f"(--latent_dim); {models}; --latent_dim {width} makes any model fit"
            )
        self.lengths = loader.SequenceLengths(
            latent_dim=sizes.latent_dim,
            max_frames=sizes.max_frames,
            max_text_bytes=sizes.max_text_bytes,
            max_speaker_frames=sizes.max_speaker_frames,
            patch_size=sizes.patch_size,
        )
        self.silence = _find_silence(config.silence, self.shard_index, sizes.latent_dim)
        streams = loader.choose_num_streams(
            config.batch_size, len(self.shard_index.shards), config.num_streams
        )
        self._num_streams = streams
        self._streams = owned_streams(mesh, config.batch_size, streams)

    def loader(
        self, batch_size: int, *, cursor: dict | None = None, broken_log: Path | None = None
    ) -> loader.DataLoader:
        return loader.DataLoader(
            self.shard_index,
            self.lengths,
            self.silence,
            batch_size=batch_size,
            seed=self._config.seed,
            num_streams=self._num_streams,
            streams=self._streams,
            cache=ShardCache(self._cache_dir, int(self._config.cache_gb * 1e9)),
            cursor=cursor,
            max_broken=self._config.max_broken,
            broken_log=broken_log,
            skip_longer=self._config.skip_longer,
        )

    @property
    def frame_rate(self) -> float:
        """Latent frames per second: from the shards' codec.json, or else the published codec's."""
        with contextlib.suppress(EchoError, OSError):
            codec = find_next_to_shards(self.shard_index, "codec.json")
            return (codec and frame_rate(codec.read_bytes())) or FRAME_RATE
        return FRAME_RATE


def find_next_to_shards(shard_index: ShardIndex, name: str) -> Path | None:
    """The file `name` next to the shards, None if there is none."""
    shard = shard_index.shards[0]
    if shard.path is not None:
        path = shard.path.parents[len(Path(shard.name).parts) - 1] / name
        return path if path.is_file() else None
    try:
        with hub_errors(f"cannot download {name} of {shard_index.source}"):
            options = {"repo_type": "dataset", "revision": shard_index.revision}
            return Path(hf_hub_download(shard_index.dataset.repo, name, **options))
    except HubFileNotFound:
        return None


def _find_silence(flag: str | None, shard_index: ShardIndex, latent_dim: int) -> np.ndarray:
    if flag == "zeros":
        return np.zeros((1, latent_dim), np.float32)
    names = ("silence.safetensors", "silence.npy")
    paths = (
        [expand(Path(flag))]
        if flag is not None
        else [find_next_to_shards(shard_index, name) for name in names]
    )
    for path in paths:
        if path is not None:
            silence = load_silence(path, latent_dim)
            check_codec(path, shard_index)
            return silence
    raise EchoError(
        f"expected {' or '.join(names)} next to the shards of {shard_index.source}, got neither; "
        "give --silence FILE (encoded silence, used as padding) or --silence zeros"
    )


def check_codec(silence: Path, shard_index: ShardIndex) -> None:
    """Check that silence and data are from the same codec, if both name it: one codec's silence is
    noise to another."""
    codec = find_next_to_shards(shard_index, "codec.json")
    if codec is None or silence.suffix != ".safetensors":
        return
    made_silence = SafetensorsFile(silence).metadata.get("codec")
    try:
        made_data = json.loads(codec.read_bytes())["id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoError(f"cannot read the codec's id in {codec}: {error}") from None
    if made_silence is not None and made_silence != made_data:
        raise EchoError(
            f"expected silence of codec {str(made_data)[:16]}, which made the data of "
            f"{shard_index.source}, got {made_silence[:16]} in {silence}"
        )
