"""Lengths by the text: few frames for short texts, and all of them where speech does not end."""

import dataclasses

import numpy as np
import pytest
from conftest import GOLDEN, random_model
from shards import sample_parts, write_shard

import echo_eqx
from echo_eqx import SamplerSettings, voice
from echo_eqx.config import CodecConfig
from echo_eqx.data.pace import measure_frames_per_byte
from echo_eqx.data.shards import Shard, ShardIndex, list_shards
from echo_eqx.speech import batching
from echo_eqx.speech.chunks import frames_for_text
from echo_eqx.speech.codec import silence_latent

LONG = "The kind doctor and the tall engineer open the door."


@pytest.fixture(scope="module")
def shipped():
    return echo_eqx.load_dit("voice"), echo_eqx.load_codec("voice")


@pytest.fixture(scope="module")
def endless():
    """Models with random weights, which speak to the last frame."""
    config = CodecConfig(encoder_dim=2, hidden_dim=12, decoder_dim=32, watermark=None)
    dit = echo_eqx.load_dit(GOLDEN / "dit_tiny" / "weights_only.pkl")
    return dit, random_model(echo_eqx.DACVAE, config, 0.12)


@pytest.fixture
def lengths(monkeypatch):
    """The frames of every call of the sampler."""
    seen, original = [], batching.sample

    def listening(*args, noise, **kwargs):
        seen.append(noise.shape[1])
        return original(*args, noise=noise, **kwargs)

    monkeypatch.setattr(batching, "sample", listening)
    return seen


@pytest.fixture
def ending(endless, monkeypatch):
    """Makes speech end after 20 frames."""
    silence, original = silence_latent(endless[1]), batching.sample

    def ends(*args, **kwargs):
        return original(*args, **kwargs).at[:, 20:].set(silence)

    monkeypatch.setattr(batching, "sample", ends)


def speak(dit, codec, **options):
    settings = SamplerSettings(steps=2)
    return echo_eqx.synthesize(dit, codec, "Hello.", duration=2.0, settings=settings, **options)


def with_pace(dit, frames_per_byte):
    generation = dataclasses.replace(dit.generation, frames_per_byte=frames_per_byte)
    return dataclasses.replace(dit, generation=generation)


def test_a_text_gets_frames_by_its_bytes_or_by_how_it_is_read(shipped):
    dit, codec = shipped
    paced = with_pace(dit, 2.0)
    short, long = "[S1] Hello.", "[S1] " + LONG  # 12 and 58 bytes with the zero in front
    assert [frames_for_text(short, paced, codec, most) for most in (20, 80, 750)] == [20, 32, 32]
    assert [frames_for_text(long, paced, codec, most) for most in (80, 120, 750)] == [80, 120, 128]
    unknown = with_pace(dit, None)
    assert frames_for_text(short, unknown, codec, 750) == 32
    numbers = "[S1] 1999 1999 1999 1999"
    assert frames_for_text(numbers, unknown, codec, 750) > frames_for_text(
        numbers, paced, codec, 750
    )


def test_speech_that_does_not_end_is_spoken_once_more_in_full(endless, lengths):
    progress = []
    auto = speak(*endless, length="auto", progress=lambda *step: progress.append(step))
    assert lengths == [32, 50] and progress[-1] == (4, 4)
    assert np.array_equal(auto, speak(*endless, length="full"))


def test_the_checkpoint_chooses_the_length(endless, lengths, ending):
    dit, codec = endless
    generation = dataclasses.replace(dit.generation, length="auto", frames_per_byte=2.5)
    dit = dataclasses.replace(dit, generation=generation)
    assert len(speak(dit, codec)) == 20 * codec.config.hop
    assert lengths == [32]  # 12 bytes
    assert len(speak(dit, codec, length="full")) == 20 * codec.config.hop
    assert lengths == [32, 50]


def test_the_pace_of_a_data_set_is_exceeded_by_one_recording_in_twenty(tmp_path):
    rng = np.random.default_rng(0)
    # Recordings of 20 to 40 frames, and 10 bytes that the model reads.
    samples = [(f"{n}", sample_parts(rng, n, 3, text="123456789")) for n in range(20, 41)]
    broken = {"npy": b"", "json": b"{}"}
    write_shard(tmp_path / "a.tar", [("broken", broken), *samples[:9]])
    write_shard(tmp_path / "b.tar", samples[9:])
    assert measure_frames_per_byte(list_shards(str(tmp_path), tmp_path)) == 3.9
    remote = ShardIndex("hub", "c", (Shard("a.tar", 9, url="http://x"),))
    assert measure_frames_per_byte(remote) is None


def test_the_small_voice_knows_its_pace(shipped):
    shards = list_shards(str(voice.SHARDS), voice.SHARDS)
    assert measure_frames_per_byte(shards) == shipped[0].generation.frames_per_byte


@pytest.mark.slow
def test_the_small_voice_ends_short_texts_in_few_frames(shipped, lengths):
    dit, codec = with_pace(shipped[0], 1.65), shipped[1]
    ben = echo_eqx.speaker_latents(dit, codec, voice.REFERENCES / "ben.flac")
    utterances = [echo_eqx.Utterance(text, ben) for text in ("Hello.", LONG)]
    short, long = echo_eqx.synthesize_all(dit, codec, utterances, length="auto")
    assert lengths == [32, 80] and 0.2 < len(short) / 24_000 < 1.28
    assert np.array_equal(long, echo_eqx.synthesize(dit, codec, LONG, ben, length="full"))
