"""Speech in pieces: as they become known, and together the same as in one go."""

import dataclasses
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest
from conftest import GOLDEN, max_difference, random_model
from processes import call

import echo_eqx
from echo_eqx import EchoError, SamplerSettings, UsageError, Utterance
from echo_eqx.config import CodecConfig, WatermarkConfig
from echo_eqx.speech import batching
from echo_eqx.speech.chunks import split_first
from echo_eqx.speech.codec import silence_latent
from echo_eqx.speech.joining import decode_with_silence
from echo_eqx.speech.pieces import FIRST_PIECE, PieceDecoder
from echo_eqx.weights import fish

MESSAGE = [0, 1] * 8
QUICK = SamplerSettings(steps=2)
LONG = "One sentence stands here. Another one stands here."
HOP = 320


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


def check_pieces(codec, frames: int, message=None) -> np.ndarray:
    """Pieces are the audio of one go; returns how they differ if the latents come in parts."""
    rng, latents = np.random.default_rng(frames), random_latents(codec, frames)
    cuts = np.unique(rng.integers(1, frames, 6)) if frames > 1 else ()
    whole = decode(codec, latents, message)
    assert max_difference(whole, decode_with_silence(codec, latents, message)) < 1e-5
    return decode(codec, latents, message, cuts) - whole


@pytest.mark.parametrize("frames", [pytest.param(1, marks=pytest.mark.slow), 200])
def test_pieces_of_audio_equal_one_go(codec, frames):
    assert not check_pieces(codec, frames, MESSAGE).any()  # bit for bit, however it is cut


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 200])
def test_pieces_equal_one_go_if_all_latents_before_are_read(fish_codec, frames):
    assert max_difference(check_pieces(fish_codec, frames), 0) < 1e-5


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


# --- Streams ------------------------------------------------------------------------------------


def stream(dit, codec, text="Hello.", **kwargs):
    options = {"duration": 2.0, "settings": QUICK, "blocks": ()}
    return list(echo_eqx.stream(dit, codec, text, **options | kwargs))


def one_go(dit, codec, text, **kwargs):
    options = {"duration": 2.0, "settings": QUICK, "batch_size": 1}
    (audio,) = echo_eqx.synthesize_all(dit, codec, [Utterance(text)], **options | kwargs)
    return audio


@pytest.fixture
def ending(monkeypatch, codec):
    """Speech ends after 25 or 26 frames, which random weights never do."""
    silence, original = silence_latent(codec), batching.sample

    def sample(*args, **kwargs):
        latents = original(*args, **kwargs)
        return latents.at[:, int(latents[0, 0, 0] > 0) + 25 :].set(silence)

    monkeypatch.setattr(batching, "sample", sample)


@pytest.mark.parametrize("trim, message", [(True, MESSAGE), (False, None)])
def test_a_stream_is_the_audio_of_synthesize(blockwise_dit, codec, trim, message):
    """Also where chunks are spoken again in halves, since their speech does not end."""
    options = {"trim": trim, "message": message}
    pieces = stream(blockwise_dit, codec, LONG, first_seconds=None, **options)
    whole = one_go(blockwise_dit, codec, LONG, **options)
    assert len(pieces) > 4 and all(len(piece) for piece in pieces)
    assert max_difference(np.concatenate(pieces), whole) < 1e-4


def test_the_end_of_speech_is_cut_and_joined_as_by_synthesize(blockwise_dit, codec, ending):
    pieces = stream(blockwise_dit, codec, LONG, first_seconds=None)
    whole = one_go(blockwise_dit, codec, LONG)
    assert 2 * 25 * HOP <= len(whole) <= 2 * 26 * HOP
    assert max_difference(np.concatenate(pieces), whole) < 1e-4


def test_the_first_chunk_is_short_and_has_a_short_length(blockwise_dit, codec, ending):
    first, *others = stream(blockwise_dit, codec, LONG, duration=8.0, trim=False, first_seconds=2.0)
    # 25 characters of 14 a second, at 25 frames a second, are padded to 64 frames.
    assert len(first) + sum(map(len, others)) == (64 + 200) * HOP
    assert len(first) == (FIRST_PIECE - codec.decoder_padding) * HOP - 40


@pytest.mark.parametrize(
    "text, parts",
    [
        ("Hello.", ["Hello."]),
        ("Oh! This sentence is longer.", ["Oh!", "This sentence is longer."]),
        ("[S1] Oh yes. [S2] This one is longer.", ["[S1] Oh yes.", "[S2] This one is longer."]),
        ("[S1] Oh yes. This one is longer.", ["[S1] Oh yes.", "[S1] This one is longer."]),
    ],
)
def test_the_first_chunk_is_cut_once(blockwise_dit, text, parts):
    assert split_first(text, blockwise_dit, 1.0) == parts


def test_blocks_are_the_audio_of_block_wise_sampling(blockwise_dit, codec):
    options = {"duration": 3.84, "trim": False}
    pieces = stream(blockwise_dit, codec, LONG, blocks=[(12, 2)], **options)
    whole = one_go(blockwise_dit, codec, LONG, block_frames=12, **options)
    assert max_difference(np.concatenate(pieces), whole) < 1e-4


def test_a_block_that_ends_in_silence_is_the_last(blockwise_dit, codec, monkeypatch):
    silence, original, sizes = silence_latent(codec), batching.sample_blocks, []

    def ending(*args, **kwargs):
        for index, block in enumerate(original(*args, **kwargs)):
            sizes.append(block.shape[1])
            # A pause at the end of the first block; from within the third one on, silence.
            yield block.at[:, (12, 12, 4, 0)[index] :].set(silence)

    monkeypatch.setattr(batching, "sample_blocks", ending)
    pieces = stream(blockwise_dit, codec, blocks=[(24, 1), (12, 2)], duration=3.84)
    assert sizes == [24, 12, 12, 12]  # the last size repeats, and the rest is not sampled
    assert sum(map(len, pieces)) == 40 * HOP


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocks": [(30, 2)]}, "multiples of 4 frames"),
        ({"blocks": [(32, 0)]}, "steps: expected"),
        ({"first_seconds": 0.0}, "first_seconds: expected more than 0"),
        ({"seed": -1}, "seed: expected 0"),
        ({"duration": 100.0}, "duration: expected"),
    ],
)
def test_wrong_arguments_are_rejected_before_the_first_piece(
    blockwise_dit, codec, options, message
):
    with pytest.raises(UsageError, match=message):
        echo_eqx.stream(blockwise_dit, codec, "Hello.", **options)
    other = dataclasses.replace(blockwise_dit.config, blockwise=False)
    plain = dataclasses.replace(blockwise_dit, config=other)
    with pytest.raises(UsageError, match="latent_encoder"):
        echo_eqx.stream(plain, codec, "Hello.", blocks=[(32, 2)])


# --- The command --------------------------------------------------------------------------------

SPEAK = ["infer", "--text", "Good morning. Turn off the kitchen lights.", "--steps", "2"]
TO_STDOUT = [sys.executable, "-m", "echo_eqx", *SPEAK, "--stream", "-"]


def test_samples_come_through_a_pipe_and_messages_do_not(tmp_path):
    done = subprocess.run(TO_STDOUT, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    audio = np.frombuffer(done.stdout, "<i2")
    assert len(audio) > 12_000 and np.abs(audio).max() > 1000 and audio[0] == 0
    assert b"first sound after" in done.stderr and b"real-time factor" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_gets_the_same_samples(tmp_path):
    done = call(*SPEAK, "--stream", "speech.pcm", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "" and "first sound after" in done.stderr
    piped = subprocess.run(TO_STDOUT, capture_output=True, cwd=tmp_path).stdout
    assert (tmp_path / "speech.pcm").read_bytes() == piped


def test_a_reader_that_leaves_ends_it_quietly(tmp_path):
    with subprocess.Popen(
        TO_STDOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(100)) == 100
        process.stdout.close()
        messages = process.stderr.read().decode()
    assert process.returncode == 141  # as of a program that SIGPIPE ends
    assert "Traceback" not in messages and "error" not in messages


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--stream", "-", "--json"], 2, "--stream: expected --text with it"),
        (["--stream", "none/speech.pcm"], 1, "cannot write none/speech.pcm"),
        (["--stream", "/dev/full"], 1, "cannot write /dev/full"),
        (["--stream", "speech.pcm", "--first_seconds", "0"], 2, "first_seconds: expected"),
        (["--stream", "speech.pcm", "--block_frames", "12"], 2, "latent_encoder"),
    ],
)
def test_streams_that_cannot_be_written_are_reported(tmp_path, flags, code, message):
    done = call(*SPEAK, *flags, cwd=tmp_path)
    assert done.returncode == code and message in done.stderr and done.stdout == ""
