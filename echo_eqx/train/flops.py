"""FLOPs of a training step, and the specifications of chips."""

from dataclasses import dataclass

from echo_eqx.config import DiTConfig, EncoderConfig
from echo_eqx.model.blocks import Remat


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

    Matrix products only: 2 m n k for (m, k) times (k, n). The text's one-hot product is left out.
    """
    d, c = config.model_dim, config.latent_dim
    p, q = _patches(config)
    adaln = config.num_layers * 6 * 2 * d * config.adaln_rank
    conditioner = config.time_embed_dim * d + 4 * d * d
    ends = 2 * config.max_frames * c * d + (p + q) * config.patch_size * c * config.speaker.dim
    return _linear(config) + _attention(config) + 2 * (adaln + conditioner + ends)


def recomputed_flops(config: DiTConfig, remat: Remat) -> int:
    """FLOPs of one sample that the backward pass computes a second time.

    `dots` counts attention as computed without a fused kernel. A fused kernel's two products are
    saved; its backward pass computes the first again, with every `remat`.
    """
    if remat == "none":
        return 0
    if remat == "dots":
        return _attention(config)
    # No gradient needs the output of an encoder layer's last product.
    last = sum(e.num_layers * n * e.dim * e.mlp_dim for e, n in _encoders(config))
    return _linear(config) + _attention(config) - 2 * last


def _patches(config: DiTConfig) -> tuple[int, int]:
    """Number of patches of the reference, and of the latents already generated."""
    generated = config.max_frames // config.patch_size if config.blockwise else 0
    return config.max_speaker_frames // config.patch_size, generated


def _encoders(config: DiTConfig) -> list[tuple[EncoderConfig, int]]:
    """The encoders and the lengths of their inputs."""
    patches = [(config.speaker, length) for length in _patches(config)]
    return [(config.text, config.max_text_bytes), *patches]


def _linear(config: DiTConfig) -> int:
    """FLOPs of the linear layers of all blocks."""
    d, t = config.model_dim, config.max_frames
    block = t * 5 * d * d + 3 * t * d * config.mlp_dim
    block += sum(2 * d * n * e.dim for e, n in _encoders(config))
    encoders = sum(
        e.num_layers * n * (5 * e.dim * e.dim + 3 * e.dim * e.mlp_dim) for e, n in _encoders(config)
    )
    return 2 * (config.num_layers * block + encoders)


def _attention(config: DiTConfig) -> int:
    """FLOPs of `q k^T` and of its softmax times the values, in all blocks."""
    t = config.max_frames
    keys = t + sum(n for _, n in _encoders(config))
    encoders = sum(e.num_layers * 2 * n * n * e.dim for e, n in _encoders(config))
    return 2 * (config.num_layers * 2 * t * keys * config.model_dim + encoders)


def step_flops(config: DiTConfig, batch_size: int) -> int:
    """FLOPs of a training step: the backward pass counts as two forward passes.

    What it recomputes is not counted, as is usual for MFU: see `recomputed_flops`.
    """
    return 3 * batch_size * forward_flops(config)
