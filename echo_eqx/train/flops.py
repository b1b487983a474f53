"""Arithmetic of a training step, counted from the sizes, and what chips can do."""

from echo_eqx.config import DiTConfig, EncoderConfig

PEAK_FLOPS = {
    # Dense bfloat16, one device, by a word in JAX's name of it. Makers' data sheets:
    # cloud.google.com/tpu/docs/system-architecture-tpu-vm, nvidia.com/en-us/data-center.
    "v6": 918e12,
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5": 459e12,
    "v4": 275e12,
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak rate of a device in FLOP/s, None if it is not known."""
    kind = device_kind.lower()
    return next((rate for word, rate in PEAK_FLOPS.items() if word in kind), None)


def forward_flops(config: DiTConfig) -> int:
    """Multiplications and additions of one velocity, for one sample at the trained lengths.

    Matrix products only: 2 m n k for a product (m, k) (k, n).
    """
    d, c, rank = config.model_dim, config.latent_dim, config.adaln_rank
    t, s = config.max_frames, config.max_text_bytes
    p = config.max_speaker_frames // config.patch_size
    text, speaker = config.text.dim, config.speaker.dim

    projections = t * 5 * d * d + 2 * d * (s * text + p * speaker)
    attention = 2 * t * (t + s + p) * d
    mlp = 3 * t * d * config.mlp_dim
    adaln = 6 * 2 * d * rank
    decoder = config.num_layers * (projections + attention + mlp + adaln)

    conditioner = config.time_embed_dim * d + 4 * d * d
    ends = 2 * t * c * d + p * config.patch_size * c * speaker
    encoders = _encoder(config.text, s) + _encoder(config.speaker, p)
    return 2 * (decoder + conditioner + ends + encoders)


def _encoder(config: EncoderConfig, length: int) -> int:
    e = config.dim
    per_token = 5 * e * e + 3 * e * config.mlp_dim + 2 * length * e
    return config.num_layers * length * per_token


def step_flops(config: DiTConfig, batch_size: int) -> int:
    """Of a training step: the backward pass is twice the forward pass.

    What checkpointing computes a second time is not counted, as is usual for MFU.
    """
    return 3 * batch_size * forward_flops(config)
