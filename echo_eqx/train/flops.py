"""FLOPs of a training step, and the specifications of chips."""

from dataclasses import dataclass

from echo_eqx.config import DiTConfig, EncoderConfig


@dataclass(frozen=True)
class Chip:
    """Specifications of one device."""

    kind: str
    """Part of JAX's `device_kind`, in lower case."""
    memory: int
    """Bytes."""
    flops: float
    """Dense bfloat16, FLOP/s."""
    memory_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s to other chips, one way, over all links of a chip."""
    linked: int
    """Number of chips that these links connect, at most; beyond it, a slower network is used."""


# Vendors quote links for both directions together, except for v4. Their GB of memory are GiB,
# except for the H200, whose 141 GB are 143771 MiB according to its driver.
CHIPS: dict[str, Chip] = {
    # cloud.google.com/tpu/docs/v4; six links of 50 GB/s each way: arXiv:2304.01433
    "v4": Chip("v4", 32 * 2**30, 275e12, 1.2e12, 300e9, 4096),
    # cloud.google.com/tpu/docs/v5e
    "v5e": Chip("v5 lite", 16 * 2**30, 197e12, 0.82e12, 200e9, 256),
    # cloud.google.com/tpu/docs/v5p
    "v5p": Chip("v5", 95 * 2**30, 459e12, 2.77e12, 600e9, 8960),
    # cloud.google.com/tpu/docs/v6e
    "v6e": Chip("v6", 32 * 2**30, 918e12, 1.64e12, 400e9, 256),
    # nvidia.com/en-us/data-center/a100: 80 GB, SXM.
    "A100": Chip("a100", 80 * 2**30, 312e12, 2.0e12, 300e9, 8),
    # nvidia.com/en-us/data-center/h100: SXM.
    "H100": Chip("h100", 80 * 2**30, 989e12, 3.35e12, 450e9, 8),
    # nvidia.com/en-us/data-center/h200: SXM.
    "H200": Chip("h200", 143771 * 2**20, 989e12, 4.8e12, 450e9, 8),
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device in bfloat16, None if unknown."""
    kind = device_kind.lower().replace("v5e", "v5 lite")
    return next((chip.flops for chip in CHIPS.values() if chip.kind in kind), None)


def forward_flops(config: DiTConfig) -> int:
    """FLOPs of one forward pass for one sample at the maximum lengths.

    Matrix products only: 2 m n k for (m, k) times (k, n).
    """
    d, c, rank = config.model_dim, config.latent_dim, config.adaln_rank
    t, s = config.max_frames, config.max_text_bytes
    p = config.max_speaker_frames // config.patch_size
    q = t // config.patch_size if config.blockwise else 0  # patches of latents already generated
    text, speaker = config.text.dim, config.speaker.dim

    projections = t * 5 * d * d + 2 * d * (s * text + (p + q) * speaker)
    attention = 2 * t * (t + s + p + q) * d
    mlp = 3 * t * d * config.mlp_dim
    adaln = 6 * 2 * d * rank
    decoder = config.num_layers * (projections + attention + mlp + adaln)

    conditioner = config.time_embed_dim * d + 4 * d * d
    ends = 2 * t * c * d + (p + q) * config.patch_size * c * speaker
    encoders = sum(_encoder(config.speaker, patches) for patches in (p, q))
    encoders += _encoder(config.text, s)
    return 2 * (decoder + conditioner + ends + encoders)


def _encoder(config: EncoderConfig, length: int) -> int:
    e = config.dim
    per_token = 5 * e * e + 3 * e * config.mlp_dim + 2 * length * e
    return config.num_layers * length * per_token


def step_flops(config: DiTConfig, batch_size: int) -> int:
    """FLOPs of a training step: the backward pass counts as two forward passes.

    Rematerialization is not counted, as is usual for MFU.
    """
    return 3 * batch_size * forward_flops(config)
