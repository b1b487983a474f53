"""How many latent frames a byte of text takes, by which the length of speech is estimated."""

import numpy as np

from echo_eqx.data.records import BrokenRecord, record_lengths
from echo_eqx.data.shards import ShardIndex
from echo_eqx.data.tar_index import index_tar
from echo_eqx.errors import EchoError

SHARE = 0.95
"""Share of the recordings that are no longer than the estimate."""
MAX_RECORDS = 5000


def frames_per_byte(frames: np.ndarray, text_bytes: np.ndarray) -> float | None:
    """Latent frames per byte that a share of `SHARE` of recordings do not exceed; None without any.

    **Arguments**: lengths in frames, and in bytes of UTF-8, to which the zero that the model reads
    in front of a text is added.
    """
    if not len(frames):
        return None
    return round(float(np.quantile(frames / (text_bytes + 1.0), SHARE)), 4)


def measure_frames_per_byte(shard_index: ShardIndex) -> float | None:
    """`frames_per_byte` of the first 5,000 usable records; None if no shard is on this machine.

    **Raises**: `EchoError` if a shard cannot be read.
    """
    lengths = []
    for shard in shard_index.shards:
        if shard.path is None or len(lengths) >= MAX_RECORDS:
            break
        try:
            with shard.path.open("rb") as file:
                for entry in index_tar(file.fileno())[: MAX_RECORDS - len(lengths)]:
                    try:
                        lengths.append(record_lengths(file.fileno(), entry))
                    except BrokenRecord:
                        continue  # training reports it
        except OSError as error:
            raise EchoError(f"cannot read {shard.path}: {error.strerror}") from None
    return frames_per_byte(*np.array(lengths, np.float64).reshape(-1, 2).T)
