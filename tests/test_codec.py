"""The codec: parity with the published model, signals of any length, chunks."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import max_difference, random_model

import echo_eqx
from echo_eqx.codec import codec as chunks
from echo_eqx.codec import dacvae
from echo_eqx.codec.residual import sine_squared
from echo_eqx.codec.watermark import add_watermark
from echo_eqx.config import CodecConfig

HOP = 1920


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("row", [0, 1])
def test_moments_equal_golden(golden_codec, codec_cases, case, row):
    mean, stdev = golden_codec.encode(codec_cases[f"audio_{case}"][row])
    assert max_difference(mean, codec_cases[f"mean_{case}"][row]) < 1e-5
    assert max_difference(stdev, codec_cases[f"stdev_{case}"][row]) < 1e-5


@pytest.mark.parametrize("case, row", [(0, 0), (0, 1), (1, 0)])
def test_audio_equals_golden(golden_codec, codec_cases, case, row):
    latents, bits = (codec_cases[f"{name}_{case}"][row] for name in ("latents", "message"))
    assert max_difference(golden_codec.decode(latents), codec_cases[f"clean_{case}"][row]) < 1e-5
    marked = golden_codec.decode(latents, message=bits)
    assert max_difference(marked, codec_cases[f"watermarked_{case}"][row]) < 1e-5


def test_a_codec_in_float16_decodes_nearly_the_same(golden_codec, codec_cases):
    latents = codec_cases["latents_0"][0]
    half = echo_eqx.cast(golden_codec, jnp.float16)
    for message in (None, codec_cases["message_0"][0]):
        expected = np.asarray(golden_codec.decode(latents, message))
        audio = half.decode(latents, message)
        noise = np.asarray(audio, np.float32) - expected
        assert audio.dtype == jnp.float16  # also the watermark is computed in it
        assert 0 < np.sum(noise**2) < 1e-4 * np.sum(expected**2)  # 40 dB


def test_vmap_over_a_batch_equals_single_rows(golden_codec, codec_cases):
    latents, bits = (jnp.asarray(codec_cases[f"{name}_0"]) for name in ("latents", "message"))
    batch = jax.vmap(golden_codec.decode)(latents, bits)
    assert max_difference(batch, codec_cases["watermarked_0"]) < 1e-5


def test_different_messages_give_different_signals(golden_codec, codec_cases):
    latents, bits = codec_cases["latents_0"][0], codec_cases["message_0"][0]
    assert (
        max_difference(golden_codec.decode(latents, bits), golden_codec.decode(latents, 1 - bits))
        > 1e-3
    )


@pytest.mark.parametrize("samples", [1, 2, 5, 500, 960, 1919, 1920, 1921, 2 * HOP + 1, 5000])
def test_any_length_is_reflected_to_whole_frames(golden_codec, samples):
    audio = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    mode = "reflect" if samples > 1 else "edge"
    mirrored = np.pad(audio, (0, -samples % HOP), mode=mode)
    mean, stdev = golden_codec.encode(audio)
    assert mean.shape == stdev.shape == (-(-samples // HOP), 12)
    assert np.isfinite(mean).all()
    assert np.array_equal(mean, golden_codec.encode(mirrored)[0])


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 64 frames, so that signals of several chunks are short."""
    monkeypatch.setattr(chunks, "CHUNK_FRAMES", 64)


# Lengths around one chunk and around several: 64 frames, plus 8 on each side.
@pytest.mark.parametrize(
    "frames", [*(pytest.param(n, marks=pytest.mark.slow) for n in (80, 81)), 136]
)
def test_joined_chunks_equal_a_single_pass(golden_codec, frames, short_chunks):
    rng = np.random.default_rng(frames)
    latents = rng.standard_normal((frames, 12)).astype(np.float32)
    bits = rng.integers(0, 2, 16).astype(np.int32)
    whole = dacvae._decode(golden_codec, jnp.asarray(latents))
    assert max_difference(golden_codec.decode(latents), whole) < 1e-5
    watermark = golden_codec.watermark
    marked, _ = add_watermark(watermark, whole, jnp.asarray(bits), watermark.init_state())
    assert max_difference(golden_codec.decode(latents, bits), marked) < 1e-5

    audio = np.asarray(whole)[: frames * HOP - 77]
    padded = np.pad(audio, (0, 77), mode="reflect")
    mean, stdev = dacvae._encode(golden_codec, jnp.asarray(padded))
    chunked_mean, chunked_stdev = golden_codec.encode(audio)
    assert max_difference(chunked_mean, mean) < 1e-5
    assert max_difference(chunked_stdev, stdev) < 1e-5


def test_all_long_signals_share_a_compiled_program(golden_codec, short_chunks):
    golden_codec.decode(jnp.zeros((100, 12)), np.zeros(16, np.int32))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kwargs: compiled.append((event, kwargs.get("fun_name")))
    )
    golden_codec.decode(jnp.ones((200, 12)), np.ones(16, np.int32))
    names = [str(name) for event, name in compiled if "backend_compile" in event]
    assert not [name for name in names if "_decode" in name or "add_watermark" in name]


def test_odd_and_even_rates_give_whole_frames(short_chunks):
    config = CodecConfig(
        encoder_dim=2,
        encoder_rates=(4, 6, 5, 8),
        hidden_dim=6,
        latent_dim=5,
        decoder_dim=16,
        decoder_rates=(8, 5, 6, 4),
        sample_rate=24_000,
        watermark=None,
    )
    codec = random_model(echo_eqx.DACVAE, config, 0.15)
    mean, _ = codec.encode(jr.normal(jr.key(1), (90 * 960,)))
    assert mean.shape == (90, 5)
    latents = jr.normal(jr.key(2), mean.shape)
    audio = codec.decode(latents)
    assert audio.shape == (90 * 960,) and jnp.std(audio) > 0.01
    assert max_difference(audio, dacvae._decode(codec, latents)) < 1e-5


@pytest.mark.parametrize("shape", [(0,), (2, 100), ()])
def test_audio_with_another_shape_is_rejected(golden_codec, shape):
    # With shape checks on, a wrong rank does not even reach the codec's own check.
    with pytest.raises(Exception, match=r"audio: expected shape|parameter 'audio'"):
        golden_codec.encode(np.zeros(shape, np.float32))


def test_latents_with_another_width_are_rejected(golden_codec):
    with pytest.raises(echo_eqx.EchoError, match=r"expected shape \(frames, 12\).*got \(7, 13\)"):
        golden_codec.decode(np.zeros((7, 13), np.float32))
    with pytest.raises(echo_eqx.EchoError, match="16 bits"):
        golden_codec.decode(np.zeros((7, 12), np.float32), np.zeros(15, np.int32))


def test_messages_with_other_values_are_rejected(golden_codec):
    with pytest.raises(echo_eqx.EchoError, match="0 and 1"):
        golden_codec.decode(np.zeros((7, 12), np.float32), np.full(16, 2))


def test_sine_squared_is_as_accurate_as_sine():
    z = np.linspace(-60, 60, 200_001, dtype=np.float32)
    exact = np.sin(z.astype(np.float64)) ** 2
    assert max_difference(sine_squared(jnp.asarray(z)), exact) < 2e-6
    slope = jax.vmap(jax.grad(sine_squared))(jnp.asarray(z[::100]))
    assert max_difference(slope, np.sin(2 * z[::100].astype(np.float64))) < 1e-4
