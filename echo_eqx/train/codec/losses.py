"""How far decoded audio is from what was encoded, on spectra of several resolutions.

The mel and magnitude terms are those of multi-resolution spectral losses (Yamamoto et al., 2020,
arXiv:1910.11480; Kumar et al., 2023, arXiv:2306.06546), here on log10 alone.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOWS = (2048, 1024, 512, 256, 128)
"""Samples in a window; the hop is a quarter of it."""
FLOOR = 1e-3
"""Magnitudes below it are alike. White noise of deviation 1 has magnitudes around 1."""
_EXACT = jax.lax.Precision.HIGHEST


def spectrum(audio: Float[Array, " samples"], window: int) -> Float[Array, "frames bins two"]:
    """Short-time spectrum under a Hann window, (frames, window // 2 + 1), its real and imaginary
    parts."""
    hop = window // 4
    blocks = jnp.pad(audio, (0, -audio.shape[0] % hop)).reshape(-1, hop)
    count = blocks.shape[0] - 3
    frames = jnp.concatenate([blocks[i : i + count] for i in range(4)], axis=1)
    hann = np.hanning(window + 1)[:-1].astype(np.float32)
    hann /= np.sqrt(np.sum(hann**2))
    parts = jnp.fft.rfft(frames * hann[None])
    return jnp.stack([parts.real, parts.imag], axis=-1)


def magnitudes(audio: Float[Array, " samples"], window: int) -> Float[Array, "frames bins"]:
    """Size of `spectrum`."""
    # The root has no slope at zero.
    return jnp.sqrt(jnp.sum(jnp.square(spectrum(audio, window)), axis=-1) + 1e-12)


@functools.cache
def mel_filters(sample_rate: int, window: int) -> np.ndarray:
    """(bins, bands) triangles of height 1 at equal distances in mel, 2595 log10(1 + f / 700)."""
    bands = 5 * window // 32

    def mel(hertz: Any) -> Any:
        return 2595 * np.log10(1 + hertz / 700)

    edges = np.linspace(0, mel(np.array(sample_rate / 2)), bands + 2)
    place = mel(np.linspace(0, sample_rate / 2, window // 2 + 1))[:, None]
    rising = (place - edges[None, :-2]) / (edges[1:-1] - edges[:-2])[None]
    falling = (edges[None, 2:] - place) / (edges[2:] - edges[1:-1])[None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_distance(a: Float[Array, "t f"], b: Float[Array, "t f"]) -> Float[Array, ""]:
    """Mean absolute difference of log10."""
    return jnp.mean(jnp.abs(jnp.log10(jnp.maximum(a, FLOOR)) - jnp.log10(jnp.maximum(b, FLOOR))))


def spectral_distances(
    decoded: Float[Array, " samples"], audio: Float[Array, " samples"], sample_rate: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Distances of mel spectra and of spectra, each summed over the windows that fit."""
    mel, linear = jnp.zeros(()), jnp.zeros(())
    for window in WINDOWS:
        if window > audio.shape[0]:
            continue
        ours, theirs = magnitudes(decoded, window), magnitudes(audio, window)
        filters = mel_filters(sample_rate, window)
        mel += log_distance(
            jnp.matmul(ours, filters, precision=_EXACT),
            jnp.matmul(theirs, filters, precision=_EXACT),
        )
        linear += log_distance(ours, theirs)
    return mel, linear


def periodicity_distance(
    decoded: Float[Array, " samples"], audio: Float[Array, " samples"], sample_rate: int
) -> Float[Array, ""]:
    """How differently both resemble themselves a pitch period later: mean absolute difference of
    normalised autocorrelations at the lags of 500 to 60 Hz (Boersma, 1993), over frames of 40 ms or
    a little longer, of which the louder count more; 0 where no frame fits."""
    window = 1 << math.ceil(math.log2(sample_rate / 25))
    if window > audio.shape[0]:
        return jnp.zeros(())
    lags = slice(sample_rate // 500, sample_rate // 60 + 1)

    def products(sound: Float[Array, " samples"]) -> Float[Array, "frames lags"]:
        return jnp.fft.irfft(jnp.sum(jnp.square(spectrum(sound, window)), axis=-1))

    ours, theirs = products(decoded), products(audio)
    alike = [p[:, lags] / (p[:, :1] + FLOOR**2) for p in (ours, theirs)]
    differences = jnp.mean(jnp.abs(alike[0] - alike[1]), axis=1)
    loudness = jnp.sqrt(jnp.maximum(theirs[:, 0], FLOOR**2))
    return jnp.sum(loudness * differences) / jnp.sum(loudness)


def divergence(mean: Float[Array, "t c"], deviation: Float[Array, "t c"]) -> Float[Array, ""]:
    """KL divergence from the standard normal, in nats for each channel of a frame
    (Kingma & Welling, 2014, arXiv:1312.6114)."""
    return jnp.mean(0.5 * (mean**2 + deviation**2 - 1) - jnp.log(deviation))
