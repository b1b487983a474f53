"""Reconstruction losses of a codec: multi-resolution spectra, periodicity, KL divergence.

The mel and STFT losses follow Yamamoto et al. (2020, arXiv:1910.11480) and Kumar et al. (2023,
arXiv:2306.06546), but compare log10 magnitudes only.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOWS = (2048, 1024, 512, 256, 128)
"""Window lengths in samples; the hop is a quarter of the window."""
FLOOR = 1e-3
"""Lower bound of magnitudes. White noise of std 1 has magnitudes around 1."""
_EXACT = jax.lax.Precision.HIGHEST


def spectrum(audio: Float[Array, " samples"], window: int) -> Float[Array, "frames bins two"]:
    """STFT with a Hann window, (frames, window // 2 + 1), as real and imaginary parts."""
    hop = window // 4
    blocks = jnp.pad(audio, (0, -audio.shape[0] % hop)).reshape(-1, hop)
    count = blocks.shape[0] - 3
    frames = jnp.concatenate([blocks[i : i + count] for i in range(4)], axis=1)
    half = window // 2
    left, middle, right = frames[:, 1:half], frames[:, half : half + 1], frames[:, :half:-1]
    cosines, sines = _transform(window)
    real = jnp.matmul(jnp.concatenate([left + right, middle], 1), cosines, precision=_EXACT)
    imaginary = jnp.matmul(right - left, sines, precision=_EXACT)
    return jnp.stack([real, imaginary], axis=-1)


@functools.cache
def _transform(window: int) -> tuple[np.ndarray, np.ndarray]:
    """DFT matrices: cosines (window // 2, bins) for the even part of a frame, and sines, with one
    row less, for the odd part; both times a Hann window of norm 1 whose sample 0 is zero."""
    # Not FFTs: on CPU, concurrent FFTs deadlock once they occupy all threads (jaxlib 0.11).
    hann = np.hanning(window + 1)[1 : window // 2 + 1, None]
    hann = hann / np.sqrt(2 * np.sum(hann[:-1] ** 2) + 1)
    bins, rows = np.arange(window // 2 + 1), np.arange(1, window // 2 + 1)
    turns = 2 * np.pi / window * (np.outer(rows, bins) % window)
    cosines, sines = hann * np.cos(turns), hann[:-1] * np.sin(turns[:-1])
    return cosines.astype(np.float32), sines.astype(np.float32)


def magnitudes(audio: Float[Array, " samples"], window: int) -> Float[Array, "frames bins"]:
    """Magnitudes of `spectrum`."""
    # The gradient of the root is infinite at zero.
    return jnp.sqrt(jnp.sum(jnp.square(spectrum(audio, window)), axis=-1) + 1e-12)


@functools.cache
def mel_filters(sample_rate: int, window: int) -> np.ndarray:
    """(bins, bands) triangles of height 1, equally spaced in mel, 2595 log10(1 + f / 700)."""
    bands = 5 * window // 32

    def mel(hertz: Any) -> Any:
        return 2595 * np.log10(1 + hertz / 700)

    edges = np.linspace(0, mel(np.array(sample_rate / 2)), bands + 2)
    centers = mel(np.linspace(0, sample_rate / 2, window // 2 + 1))[:, None]
    rising = (centers - edges[None, :-2]) / (edges[1:-1] - edges[:-2])[None]
    falling = (edges[None, 2:] - centers) / (edges[2:] - edges[1:-1])[None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_distance(a: Float[Array, "t f"], b: Float[Array, "t f"]) -> Float[Array, ""]:
    """Mean absolute difference of log10 magnitudes."""
    return jnp.mean(jnp.abs(jnp.log10(jnp.maximum(a, FLOOR)) - jnp.log10(jnp.maximum(b, FLOOR))))


def spectral_distances(
    decoded: Float[Array, " samples"], audio: Float[Array, " samples"], sample_rate: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mel and STFT distances, each summed over the windows that are not longer than the audio."""
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
    """Mean absolute difference of normalized autocorrelations at the lags of 500 to 60 Hz (Boersma,
    1993), over frames of 40 ms or a little longer, weighted by loudness; 0 if no frame fits."""
    window = 1 << math.ceil(math.log2(sample_rate / 25))
    if window > audio.shape[0]:
        return jnp.zeros(())
    lags = range(sample_rate // 500, sample_rate // 60 + 1)
    cosines = _autocorrelation(window, (0, *lags))

    def products(sound: Float[Array, " samples"]) -> Float[Array, "frames lags"]:
        power = jnp.sum(jnp.square(spectrum(sound, window)), axis=-1)
        return jnp.matmul(power, cosines, precision=_EXACT)

    ours, theirs = products(decoded), products(audio)
    alike = [p[:, 1:] / (p[:, :1] + FLOOR**2) for p in (ours, theirs)]
    differences = jnp.mean(jnp.abs(alike[0] - alike[1]), axis=1)
    loudness = jnp.sqrt(jnp.maximum(theirs[:, 0], FLOOR**2))
    return jnp.sum(loudness * differences) / jnp.sum(loudness)


@functools.cache
def _autocorrelation(window: int, lags: tuple[int, ...]) -> np.ndarray:
    """(bins, lags): maps a power spectrum to the autocorrelation at `lags`."""
    bins = np.arange(window // 2 + 1)
    # All other bins of a real signal's spectrum stand for two.
    sides = np.where((bins == 0) | (bins == window // 2), 1, 2)
    cosines = np.cos(2 * np.pi / window * (np.outer(bins, lags) % window))
    return (sides[:, None] * cosines / window).astype(np.float32)


def kl_divergence(mean: Float[Array, "t c"], std: Float[Array, "t c"]) -> Float[Array, ""]:
    """KL divergence from the standard normal, in nats per channel and frame (Kingma & Welling,
    2014, arXiv:1312.6114)."""
    return jnp.mean(0.5 * (mean**2 + std**2 - 1) - jnp.log(std))
