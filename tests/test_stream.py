"""Speech in pieces: as they become known, and together the same as in one go."""

import equinox as eqx
import jax
import numpy as np
import pytest
from conftest import GOLDEN, max_difference, random_model

import echo_eqx
from echo_eqx import EchoError
from echo_eqx.config import CodecConfig, WatermarkConfig
from echo_eqx.speech.joining import decode_with_silence
from echo_eqx.speech.pieces import FIRST_PIECE, PieceDecoder
from echo_eqx.weights import fish

MESSAGE = [0, 1] * 8


@pytest.fixture(scope="module")
def codec():
    """A small codec with the frame rate and the watermark's strides of the published one."""
    config = CodecConfig(
        encoder_dim=2,
        encoder_rates=(2, 4, 5, 8),
        hidden_dim=12,
        latent_dim=20,
        decoder_dim=32,
        decoder_rates=(8, 5, 4, 2),
        sample_rate=8000,
        watermark=WatermarkConfig(dim=2, bottleneck_dim=8),
    )
    return random_model(echo_eqx.DACVAE, config, 0.12)


@pytest.fixture(scope="module")
def fish_codec():
    folder = GOLDEN / "fish_tiny"
    return echo_eqx.load_codec(folder / "weights.safetensors", pca=folder / fish.PCA_FILE)


def random_latents(codec, frames: int) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.standard_normal((frames, codec.config.latent_dim)).astype(np.float32)


def decode(codec, latents, message=None, cuts=()) -> np.ndarray:
    decoder = PieceDecoder(codec, message)
    pieces = [piece for part in np.split(latents, cuts) for piece in decoder.push(part)]
    return np.concatenate([piece.read() for piece in [*pieces, *decoder.finish()]])


@pytest.mark.parametrize("frames", [1, 22, 300])
def test_pieces_of_audio_equal_one_go(codec, fish_codec, frames):
    rng = np.random.default_rng(frames)
    for each, message in ((codec, MESSAGE), (codec, None), (fish_codec, None)):
        latents = random_latents(each, frames)
        cuts = np.unique(rng.integers(1, max(frames, 2), 6)) if frames > 1 else ()
        audio, whole = decode(each, latents, message, cuts), decode(each, latents, message)
        if each is codec:
            assert np.array_equal(audio, whole)  # bit for bit, however it is cut
        assert max_difference(audio, whole) < 1e-5
        assert max_difference(audio, decode_with_silence(each, latents, message)) < 1e-5


def test_audio_is_given_once_it_depends_on_no_unknown_frame(codec):
    latents, decoder = random_latents(codec, 300), PieceDecoder(codec)
    hop, context = codec.config.hop, codec.decoder_padding
    assert decoder.push(latents[: FIRST_PIECE - 1]) == []
    (first,) = decoder.push(latents[FIRST_PIECE - 1 : FIRST_PIECE])
    assert len(first) == (FIRST_PIECE - context) * hop
    assert decoder.push(latents[32:159]) == []
    (second,) = decoder.push(latents[159:160])
    assert len(second) == 128 * hop
    # What was given does not depend on what follows, and it can be cut short.
    other = random_latents(codec, 299)[:140]
    other = decode(codec, np.concatenate([latents[:160], other]))
    audio = np.concatenate([first.read(), second.read()])
    assert np.array_equal(audio, other[: len(audio)])
    assert sum(map(len, decoder.finish(155))) == (155 - 160 + context) * hop


def test_later_pieces_compile_nothing(codec):
    decode(codec, random_latents(codec, 200), MESSAGE)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kwargs: compiled.append(event)
    )
    decode(codec, random_latents(codec, 700), MESSAGE, cuts=[3, 50, 601])
    assert not [event for event in compiled if "backend_compile" in event]


def test_what_cannot_be_decoded_is_rejected(codec):
    with pytest.raises(EchoError, match="16 bits"):
        PieceDecoder(codec, [0, 1])
    deaf = eqx.tree_at(lambda codec: codec.watermark, codec, None)
    with pytest.raises(EchoError, match="cannot embed watermarks"):
        PieceDecoder(deaf, MESSAGE)
    with pytest.raises(EchoError, match=r"\(frames, 20\)"):
        PieceDecoder(codec).push(np.zeros((5, 12), np.float32))
