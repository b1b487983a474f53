"""Arguments that all ways to speak share."""

from collections.abc import Iterable
from typing import get_args

from echo_eqx.codec.codec import Codec
from echo_eqx.errors import UsageError
from echo_eqx.generation import Length, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.codec import check_latent_dim
from echo_eqx.speech.joining import Message

MAX_SEED = 2**32 - 1


def check_arguments(
    dit: EchoDiT,
    codec: Codec,
    seeds: Iterable[int],
    settings: SamplerSettings | None,
    message: Message,
    length: Length | None = None,
) -> tuple[SamplerSettings, Length]:
    """Settings and length, as the model recommends them where they are None.

    **Raises**: `EchoError` naming the argument that cannot be used, or the codec if its latents are
    not the model's.
    """
    settings = settings or dit.generation.sampler
    settings.check()
    check_latent_dim(dit, codec)
    codec.check_message(message)
    length = length or dit.generation.length
    if length not in get_args(Length):
        raise UsageError(f"length: expected {' or '.join(get_args(Length))}, got {length!r}")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise UsageError(f"seed: expected 0 to {MAX_SEED}, got {seed}")
    return settings, length
