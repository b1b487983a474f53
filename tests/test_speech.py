"""Text to audio with the library: reference voices, lengths, where speech ends, joining."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, GOLDEN, max_difference, random_model

import echo_eqx
from echo_eqx import EchoError, SamplerSettings, UsageError, Utterance, voice
from echo_eqx.config import CodecConfig, WatermarkConfig
from echo_eqx.data.audio import load_audio
from echo_eqx.speech import batching
from echo_eqx.speech.chunks import target_seconds
from echo_eqx.speech.codec import codec_mismatch, silence_latent
from echo_eqx.speech.joining import Joiner, decode_with_silence, fade_edges, speech_end
from echo_eqx.speech.speaker import encode_padded, read_speakers

QUICK = SamplerSettings(steps=2)
HOP = 1920
LONG = "This is the first sentence. Here is the second one. And a third one follows. "


@pytest.fixture(scope="module")
def codec():
    """A codec whose latents are as wide as the golden model's."""
    config = CodecConfig(
        encoder_dim=2,
        hidden_dim=12,
        decoder_dim=32,
        watermark=WatermarkConfig(dim=2, bottleneck_dim=8),
    )
    return random_model(echo_eqx.DACVAE, config, 0.12)


@pytest.fixture(scope="module")
def dit():
    return echo_eqx.load_dit(GOLDEN / "dit_tiny" / "weights_only.pkl")


def speak(dit, codec, text="Hello.", **kwargs):
    return echo_eqx.synthesize(dit, codec, text, **{"duration": 2.0, "settings": QUICK, **kwargs})


def test_audio_has_the_target_length_and_repeats_with_its_seed(dit, codec):
    audio = speak(dit, codec, trim=False)
    assert isinstance(audio, np.ndarray) and audio.dtype == np.float32
    assert audio.shape == (50 * HOP,)
    assert np.array_equal(audio, speak(dit, codec, trim=False))
    assert not np.array_equal(audio, speak(dit, codec, trim=False, seed=43))


@pytest.mark.parametrize("text", ["Grüß Gott, Köln!", "吾輩は猫である。", "Nice 🎉😀"])
def test_texts_of_any_script_are_spoken(dit, codec, text):
    assert np.isfinite(speak(dit, codec, text)).all()


def test_a_message_is_added_and_changes_little_else(dit, codec):
    plain = speak(dit, codec)
    marked = speak(dit, codec, message=[0, 1] * 8)
    assert marked.shape == plain.shape and max_difference(plain, marked) > 0
    with pytest.raises(EchoError, match="16 bits"):
        speak(dit, codec, message=[0, 1])
    with pytest.raises(EchoError, match="only 0 and 1"):
        speak(dit, codec, message=[2] * 16)
    deaf = eqx.tree_at(lambda codec: codec.watermark, codec, None)
    with pytest.raises(EchoError, match="cannot embed watermarks"):  # before anything is sampled
        speak(dit, deaf, message=[0, 1] * 8, progress=pytest.fail)


def test_recordings_audio_and_latents_give_the_same_voice(dit, codec, tmp_path):
    path = DATA / "speech.wav"
    latents = echo_eqx.speaker_latents(dit, codec, path)
    assert latents.shape == (68, 128)  # 3 s but for silence at the end, 17 whole patches
    np.save(tmp_path / "voice.npy", latents)
    audio = load_audio(path, 48_000)
    expected = speak(dit, codec, speaker=path)
    assert not np.array_equal(expected, speak(dit, codec))
    for speaker in (str(path), latents, tmp_path / "voice.npy", audio, jnp.asarray(latents)):
        assert np.array_equal(speak(dit, codec, speaker=speaker), expected)


def test_padding_a_reference_changes_only_its_end(dit, codec):
    audio = load_audio(DATA / "speech.wav", 48_000)[: 70 * HOP]
    mean, _ = codec.encode(audio)
    latents = encode_padded(codec, audio)
    assert latents.shape == (70, 128)
    assert max_difference(latents[:60], mean[:60]) < 1e-5


def test_given_latents_are_used_unchanged(dit, codec):
    """Their length was chosen by the caller of `speaker_latents`."""
    longer = np.zeros((520, 128), np.float32)
    assert np.array_equal(read_speakers(dit, codec, [longer])[0], longer)


def test_only_the_start_of_a_long_reference_is_used(dit, codec):
    audio = np.tile(load_audio(DATA / "speech.wav", 48_000), 10)
    default = echo_eqx.speaker_latents(dit, codec, audio)
    assert len(default) == dit.config.max_speaker_frames == 512
    longer = echo_eqx.speaker_latents(dit, codec, audio, max_seconds=28.0)
    # The loudness of more speech is slightly different.
    assert len(longer) == 700 and max_difference(longer[:500], default[:500]) < 0.01
    with pytest.raises(UsageError, match="121"):
        echo_eqx.speaker_latents(dit, codec, audio, max_seconds=121.0)


@pytest.mark.parametrize(
    "speaker, message",
    [
        (np.zeros(96_000, np.float32), "silent"),
        (np.zeros(1000, np.float32), "expected at least"),
        (np.full(96_000, np.nan, np.float32), "expected finite"),
        (np.zeros((20, 12), np.float32), r"\(20, 12\)"),
        (np.zeros((3, 128), np.float32), "at least 4 frames, got 3"),
        (np.zeros((2, 20, 128), np.float32), r"\(2, 20, 128\)"),
        ("nowhere.wav", "nowhere.wav does not exist"),
        ("nowhere.npy", "nowhere.npy does not exist"),
    ],
)
def test_unusable_references_are_rejected_by_name(dit, codec, speaker, message):
    with pytest.raises(EchoError, match=message):
        speak(dit, codec, speaker=speaker)


def test_mismatched_models_are_rejected(dit, golden_codec):
    with pytest.raises(EchoError, match=r"expected 128 latent channels, .* got 12;"):
        speak(dit, golden_codec)


def test_the_target_length_is_15_seconds_or_the_longest_in_training(dit, codec):
    assert target_seconds(dit, codec) == 15
    small = echo_eqx.load_dit(voice.CHECKPOINT), echo_eqx.load_codec(voice.CODEC)
    assert target_seconds(*small) == pytest.approx(3.2)
    assert target_seconds(*small, 2.0) == 2


@pytest.mark.parametrize("duration", [0.0, -1.0, 31.0, float("nan")])
def test_lengths_beyond_training_are_rejected(dit, codec, duration):
    with pytest.raises(UsageError, match=r"duration: .* 30\.72 s"):
        speak(dit, codec, duration=duration)


# --- Ends ---------------------------------------------------------------------------------------


def test_speech_ends_where_the_flat_tail_begins(codec):
    silence = silence_latent(codec)
    rng = np.random.default_rng(0)
    for end in (1, 10, 60, 95, 100):
        latents = np.tile(silence, (100, 1)) + 0.01 * rng.standard_normal((100, 128))
        latents[:end] += rng.standard_normal((end, 128))
        latents[20:45][: max(0, end - 50)] = silence  # a pause within speech is not its end
        assert speech_end(latents, silence, 25.0) == end
    assert speech_end(np.tile(silence, (100, 1)), silence, 25.0) == 0


def test_the_silence_latent_is_the_same_everywhere(codec):
    mean, _ = codec.encode(np.zeros(100 * HOP, np.float32))
    assert max_difference(mean[20:80], silence_latent(codec)[None]) < 1e-5


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("text", ["Hello.", LONG])
def test_audio_begins_and_ends_in_silence(dit, codec, trim, text):
    """Also if speech reaches the last frame, as with these random models."""
    audio = speak(dit, codec, text, trim=trim, message=[0, 1] * 8)
    assert np.abs(audio[[0, -1]]).max() < 1e-3 < np.abs(audio).max()


def test_decoded_silence_has_no_click_at_its_ends(golden_codec):
    shipped = echo_eqx.load_codec("voice")
    latents = np.tile(silence_latent(shipped), (20, 1))
    assert np.abs(np.asarray(shipped.decode(latents))[:2]).max() > 0.05  # padded with zeros
    assert np.abs(decode_with_silence(shipped, latents)).max() < 1e-3
    # In the middle it is what the codec itself decodes, for any codec.
    latents = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    hop = golden_codec.config.hop
    inside = slice(12 * hop, 28 * hop)
    expected = np.asarray(golden_codec.decode(latents))[inside]
    audio = decode_with_silence(golden_codec, latents)
    assert len(audio) == 40 * hop and max_difference(audio[inside], expected) < 1e-4
    assert np.abs(fade_edges(audio, 48_000)[[0, -1]]).max() < 1e-3


def test_a_codec_other_than_the_datas_is_noticed():
    shipped, generation = echo_eqx.load_codec("voice"), echo_eqx.load_dit("voice").generation
    silence = silence_latent(shipped)
    assert codec_mismatch(generation, silence) is None
    assert codec_mismatch(generation, silence.astype(ml_dtypes.bfloat16).astype(np.float32)) is None
    assert "noise" in str(codec_mismatch(generation, silence + 0.2))
    assert codec_mismatch(echo_eqx.GenerationConfig(), silence) is None


# --- Long texts ---------------------------------------------------------------------------------


def test_long_texts_are_spoken_whole_in_chunks(dit, codec):
    chunks = [
        "This is the first sentence.",
        "Here is the second one.",
        "And a third one follows.",
    ]
    speaker = DATA / "speech.mp3"
    options = {"trim": False, "speaker": speaker}
    audio = speak(dit, codec, LONG, **options)
    assert len(audio) == 3 * 50 * HOP
    # The first chunk is what its text alone gives with the same seed.
    first = speak(dit, codec, chunks[0], **options)
    assert max_difference(audio[: 50 * HOP - 4800], first[: 50 * HOP - 4800]) < 1e-4


def test_without_a_reference_all_chunks_use_the_voice_of_the_first(dit, codec, monkeypatch):
    given = []
    original = batching.sample

    def listening(dit, ids, mask, speaker=None, speaker_mask=None, **kwargs):
        out = original(dit, ids, mask, speaker, speaker_mask, **kwargs)
        given.append((speaker, speaker_mask, np.asarray(out)))
        return out

    monkeypatch.setattr(batching, "sample", listening)
    speak(dit, codec, LONG, trim=False)
    (none, _, first), (voice, mask, _) = given
    assert none is None and mask.sum() == 2 * 48  # two chunks, 50 frames in whole patches
    assert np.array_equal(voice[0, :48], first[0, :48])
    assert np.array_equal(voice[0], voice[1])


def test_speech_that_does_not_end_is_spoken_again_in_halves(dit, codec, caplog):
    # Random weights never end: they speak to the last frame.
    text = "We speak about many things, and other people listen."
    voice = echo_eqx.speaker_latents(dit, codec, DATA / "speech.wav")
    options = {"duration": 4.0, "speaker": voice}
    audio = speak(dit, codec, text, **options)
    assert len(audio) == 2 * 100 * HOP  # both halves, each of the full length
    assert np.array_equal(audio, speak(dit, codec, text, **options))
    assert not np.array_equal(audio, speak(dit, codec, text, **options, seed=43))
    (warning, *_) = caplog.messages
    assert "We speak about many things," in warning and "other people listen." in warning
    assert "does not end within 4.00 s" in warning and "try another seed" in warning


@pytest.mark.parametrize(
    "text, options", [("Hello.", {}), ("Hello everybody out there.", {"trim": False})]
)
def test_one_warning_names_chunks_that_are_not_spoken_again(dit, codec, caplog, text, options):
    audio = speak(dit, codec, text, **options)
    assert len(audio) == 50 * HOP
    assert [record.name for record in caplog.records] == ["echo_eqx.speech"]
    assert f"[S1] {text}" in caplog.text


def test_speech_that_ends_in_silence_is_kept_without_a_warning(dit, codec, caplog):
    silence = silence_latent(codec)
    original, calls = batching.sample, []

    def ending(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs).at[:, 30:].set(silence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "sample", ending)
        audio = speak(dit, codec, "Hello everybody out there.")
    assert len(audio) == 30 * HOP and len(calls) == 1 and not caplog.records


@pytest.mark.parametrize("size", [7, 333, 1000])
def test_joined_clips_keep_every_sample_except_at_the_seams(size):
    """Whatever the size of the pieces they arrive in."""
    levels, rate = (0.1, 0.2, 0.3), 2000  # a crossfade of 100 samples, edges of 10
    joiner, parts = Joiner(rate), []
    for level in levels:
        clip = np.full(1000, level, np.float32)
        parts += [joiner.add(clip[i : i + size], end=900) for i in range(0, 1000, size)]
        joiner.end_clip(900)
    assert len(np.concatenate(parts)) == 2690  # but for the last edge
    audio = np.concatenate([*parts, joiner.finish()])
    assert len(audio) == 2700 and audio[0] == 0 and np.abs(audio[-1]) < 0.01
    for start, level in ((10, 0.1), (1000, 0.2), (1900, 0.3)):
        assert np.allclose(audio[start : start + 790], level)
    seam = audio[900:1000]
    assert (np.diff(seam) >= -1e-7).all() and 0.1 <= seam.min() and seam.max() <= 0.2 + 1e-6


def test_a_clip_that_is_cut_short_or_lacks_its_end_is_joined():
    joiner, ones = Joiner(2000), np.ones(50, np.float32)
    parts = [joiner.add(ones)]
    joiner.end_clip(60)
    parts.append(joiner.add(ones, end=0))
    joiner.end_clip(5)
    audio = np.concatenate([*parts, joiner.finish()])
    assert list(map(len, parts)) == [40, 10]
    assert np.allclose(audio[10:50], 1) and not audio[50:60].any() and len(audio) == 65
    empty = Joiner(2000)
    assert len(empty.finish()) == 0
    assert np.array_equal(empty.add(np.ones(4, np.float32)), [])
    empty.end_clip(4)
    assert np.array_equal(empty.finish(), fade_edges(np.ones(4, np.float32), 2000))


def test_batched_utterances_equal_single_ones(dit, codec):
    voice = DATA / "speech.flac"
    utterances = [
        Utterance("Hello.", voice, 1),
        Utterance("A somewhat longer sentence, " * 2, None, 2),
        Utterance("Good bye.", voice, 3),
        Utterance("Yes.", None, 4),
    ]
    options = {"duration": 2.0, "settings": QUICK, "trim": False}
    calls = []
    together = echo_eqx.synthesize_all(
        dit, codec, utterances, **options, progress=lambda *step: calls.append(step)
    )
    assert calls[-1][0] == calls[-1][1] and len(calls) == calls[-1][1]
    one_by_one = echo_eqx.synthesize_all(dit, codec, utterances, **options, batch_size=1)
    for utterance, audio, single in zip(utterances, together, one_by_one, strict=True):
        (alone,) = echo_eqx.synthesize_all(dit, codec, [utterance], **options)
        assert max_difference(audio, alone) < 1e-3 and np.array_equal(alone, single)


@pytest.mark.parametrize("text, message", [("", "empty"), ("a\0", "NUL"), ("\udc80", "UTF-8")])
def test_unspeakable_text_is_rejected(dit, codec, text, message):
    with pytest.raises(EchoError, match=message):
        speak(dit, codec, text)


def test_a_nonfinite_result_is_reported(dit, codec):
    wild = eqx.tree_at(lambda dit: dit.out_proj.bias, dit, jnp.full(128, 3e38))
    with pytest.raises(EchoError, match=r"expected finite latents .* gentler settings"):
        speak(wild, codec)


def test_blockwise_models_speak_block_by_block(blockwise_dit):
    config = CodecConfig(
        encoder_dim=2, hidden_dim=12, latent_dim=20, decoder_dim=32, watermark=None
    )
    codec = random_model(echo_eqx.DACVAE, config, 0.12)
    options = {"duration": 1.12, "settings": QUICK, "trim": False, "block_frames": 12}
    calls = []
    (audio,) = echo_eqx.synthesize_all(
        blockwise_dit,
        codec,
        [Utterance("Hello.")],
        **options,
        progress=lambda *call: calls.append(call),
    )
    assert len(audio) == 28 * HOP  # blocks of 12, 12 and 4 frames
    assert calls == [(step, 6) for step in range(1, 7)]
    with pytest.raises(UsageError, match="multiples of 4"):
        echo_eqx.synthesize_all(
            blockwise_dit, codec, [Utterance("Hello.")], **options | {"block_frames": 10}
        )


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_rejected(dit, codec, seed):
    with pytest.raises(UsageError, match=f"seed: expected .* got {seed}"):
        speak(dit, codec, seed=seed)


def test_settings_are_checked_before_anything_runs(dit, codec):
    with pytest.raises(UsageError, match="steps: expected 1 to 10000, got -1"):
        speak(dit, codec, settings=dataclasses.replace(QUICK, steps=-1))
