"""Fish S1-DAC: parity with the published one, its files, and an Echo-TTS model that uses it."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile as sf
from conftest import DATA, GOLDEN, max_difference, random_model
from processes import call
from safetensors.numpy import save_file

import echo_eqx
from echo_eqx.codec.fish import dac
from echo_eqx.codec.fish.transformer import rotate, rotation_table, window_attention
from echo_eqx.config import DiTConfig, EncoderConfig, FishConfig
from echo_eqx.data.reference import load_reference
from echo_eqx.errors import EchoError
from echo_eqx.export import pytorch
from echo_eqx.export.models import Models
from echo_eqx.generation import ECHO_TTS
from echo_eqx.speech.codec import codec_identity, find_codec, silence_latent, silence_latents
from echo_eqx.speech.speaker import encode_padded, speaker_latents
from echo_eqx.trees import leaf_names, named_leaves
from echo_eqx.weights import fish

FISH = GOLDEN / "fish_tiny"
WEIGHTS, PCA = FISH / "weights.safetensors", FISH / fish.PCA_FILE
HOP = 24
TINY_DIT = DiTConfig(
    model_dim=24,
    num_layers=2,
    num_heads=2,
    mlp_dim=40,
    text=EncoderConfig(16, 1, 2, 24),
    speaker=EncoderConfig(16, 1, 2, 24),
    latent_dim=80,
    time_embed_dim=16,
    adaln_rank=4,
    speaker_proj_scale=1 / 6,
    blockwise=True,
)


@pytest.fixture(scope="module")
def codec() -> echo_eqx.FishDAC:
    return echo_eqx.load_codec(WEIGHTS)


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    return dict(np.load(FISH / "cases.npz"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as `jordand/echo-tts-base`, with the codec beside: all of it tiny and random."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


def write_base(folder):
    folder.mkdir(exist_ok=True)
    model = random_model(echo_eqx.EchoDiT, TINY_DIT)
    pytorch.write(Models(model), folder, "float32")
    (folder / "codec.safetensors").write_bytes(WEIGHTS.read_bytes())
    rng = np.random.default_rng(0)
    state = {
        "pca_components": rng.standard_normal((80, 24)).astype(np.float32) / 9,
        "pca_mean": rng.standard_normal((1, 24)).astype(np.float32),
        "latent_scale": np.full((), 0.5, np.float32),
    }
    save_file(state, folder / fish.PCA_FILE)


# --- Parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [0, 1, 2])
def test_latents_equal_the_published_ones(codec, cases, case):
    for audio, latents in zip(cases[f"audio_{case}"], cases[f"latents_{case}"], strict=True):
        mean, std = codec.encode(audio)
        assert max_difference(mean, latents) < 1e-5 and not np.any(std)


@pytest.mark.parametrize("case", [0, 1])
def test_audio_equals_the_published_one(codec, cases, case):
    """The second is decoded in two chunks."""
    audio = codec.decode(cases[f"input_{case}"][0])
    assert max_difference(audio, cases[f"decoded_{case}"][0]) < 3e-5


def test_batches_by_vmap_equal_rows(codec, cases):
    latents, _ = jax.vmap(codec.moments)(jnp.asarray(cases["audio_0"]))
    assert max_difference(latents, cases["latents_0"]) < 1e-5


def test_rotations_are_those_of_the_file(codec):
    for name, table in load_tensors(WEIGHTS).items():
        if name.endswith("freqs_cis"):
            assert np.array_equal(table, rotation_table(len(table), codec.config.head_dim))


@pytest.mark.parametrize(("length", "window"), [(3, 4), (9, 4)])
def test_window_attention_equals_a_masked_one(length, window):
    queries, keys, values = np.random.default_rng(0).standard_normal((3, length, 2, 6))
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    weights = np.exp(np.einsum("qhk,jhk->hqj", queries, keys) / math.sqrt(6))
    weights = weights * ((distance >= 0) & (distance < window))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("hqj,jhk->qhk", weights, values)
    parts = (jnp.asarray(part, jnp.float32) for part in (queries, keys, values))
    assert (
        max_difference(jax.jit(window_attention, static_argnums=3)(*parts, window), expected) < 1e-5
    )


def test_rotations_depend_on_the_distance_only():
    table = jnp.asarray(rotation_table(40, 8))
    x, y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 8)), jnp.float32)
    products = [
        jnp.sum(rotate(x, table[i : i + 1]) * rotate(y, table[i + 7 : i + 8])) for i in (0, 9, 30)
    ]
    assert max_difference(products[1:], products[0]) < 0.02  # tables are rounded to bfloat16


# --- Lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, HOP - 1])
def test_any_length_is_filled_with_silence_to_whole_frames(codec, samples):
    audio = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    filled = np.pad(audio, (0, -samples % HOP))
    latents, _ = codec.encode(audio)
    assert latents.shape == (-(-samples // HOP), 7)
    assert np.array_equal(latents, codec.encode(filled)[0])
    assert codec.decode(latents).shape == filled.shape


def test_long_recordings_are_encoded_in_pieces_as_in_training(codec, cases):
    last = cases["audio_0"][0]
    audio = np.concatenate([np.resize(last, 640 * HOP), last])
    assert max_difference(codec.encode(audio)[0][640:], cases["latents_0"][0]) < 1e-5


def test_nothing_reads_ahead(codec, cases):
    audio, latents = cases["audio_0"][0].copy(), cases["input_0"][0].copy()
    audio[30 * HOP :], latents[30:] = 0.5, 0.5
    assert max_difference(codec.encode(audio)[0][:30], cases["latents_0"][0][:30]) < 1e-5
    decoded = codec.decode(latents)[: 30 * HOP]
    assert max_difference(decoded, cases["decoded_0"][0][: 30 * HOP]) < 3e-5


# --- Files --------------------------------------------------------------------------------------


def load_tensors(path) -> dict[str, np.ndarray]:
    file = fish.SafetensorsFile(path)
    return {name: file[name] for name in file.names}


def test_sizes_are_read_from_the_file(codec):
    assert codec.config == FishConfig(
        encoder_dim=4,
        encoder_rates=(2, 3),
        encoder_layers=2,
        encoder_mlp_dim=36,
        head_dim=8,
        hidden_dim=24,
        quantizer_layers=2,
        quantizer_mlp_dim=40,
        semantic_codebook_size=28,
        num_codebooks=3,
        codebook_size=20,
        codebook_dim=5,
        latent_dim=7,
        decoder_dim=20,
        decoder_rates=(3, 2),
    )
    assert codec.config.hop == HOP and codec.config.frame_rate == 44_100 / HOP


def test_every_published_tensor_has_its_place():
    """Names and shapes of the published model at full size, from its own code."""
    shapes = json.loads((FISH / "published_shapes.json").read_text())
    shapes |= {"pca_components": (80, 1024), "pca_mean": (1024,), "latent_scale": ()}
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    assert fish._config(shapes, 64) == FishConfig()
    skeleton = jax.eval_shape(
        lambda key: dac.FishDAC.init(FishConfig(), key=key), jax.random.key(0)
    )
    names = {name for name in shapes if not re.search("causal_mask|freqs_cis", name)}
    used = [
        name
        for leaf in leaf_names(skeleton)
        for name in fish._sources(leaf, FishConfig(), names).names
    ]
    assert sorted(used) == sorted(names)
    for leaf, array in named_leaves(skeleton).items():
        count = sum(math.prod(shapes[n]) for n in fish._sources(leaf, FishConfig(), names).names)
        assert array.size in (count, count - shapes_of_gains(leaf, shapes, names))


def shapes_of_gains(leaf, shapes, names) -> int:
    sources = fish._sources(leaf, FishConfig(), names).names
    return sum(math.prod(shapes[name]) for name in sources if name.endswith("original0"))


def renamed(tensors: dict[str, np.ndarray], form: str) -> dict[str, np.ndarray]:
    """The weight norm as older versions of PyTorch wrote it, or folded into the kernels."""
    out = {}
    for name, array in tensors.items():
        base, found, number = name.partition("parametrizations.weight.original")
        if not found:
            out[name] = array
        elif form == "older":
            out[f"{base}weight_{'gv'[int(number)]}"] = array
        elif number == "1":
            gain = tensors[f"{base}{found}0"]
            norm = np.sqrt(np.sum(np.square(array), axis=(1, 2), keepdims=True))
            out[f"{base}weight"] = (gain * array / norm).astype(np.float32)
    return out


@pytest.mark.parametrize("form", ["older", "folded"])
def test_other_forms_of_weight_norm_are_the_same_codec(codec, tmp_path, form):
    tensors = renamed(load_tensors(WEIGHTS), form)
    masks = {name for name in tensors if name.endswith("causal_mask")}
    save_file(
        {f"module.{n}": a for n, a in tensors.items() if n not in masks}, tmp_path / "a.safetensors"
    )
    other = echo_eqx.load_codec(tmp_path / "a.safetensors", pca=PCA)
    for name, leaf in named_leaves(other).items():
        assert max_difference(leaf, named_leaves(codec)[name]) < 1e-6, name


def test_saved_and_loaded_it_is_the_same_without_another_file(codec, tmp_path):
    echo_eqx.save(codec, tmp_path / "saved")
    loaded = echo_eqx.load_codec(tmp_path / "saved")
    assert isinstance(loaded, echo_eqx.FishDAC) and loaded.config == codec.config
    for name, leaf in named_leaves(codec).items():
        assert np.array_equal(leaf, named_leaves(loaded)[name]), name
    assert codec_identity(loaded) == codec_identity(codec)
    described = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert described["kind"] == "codec" and described["config"]["type"] == "fish_s1_dac"
    half = echo_eqx.load_codec(WEIGHTS, dtype=jnp.bfloat16)
    assert half.decoder.conv_in.weight.dtype == jnp.bfloat16
    assert half.pca.components.dtype == jnp.float32


def test_the_principal_components_are_found_beside_or_where_told(codec, tmp_path, base):
    alone = tmp_path / "pytorch_model.safetensors"
    alone.write_bytes(WEIGHTS.read_bytes())
    with pytest.raises(EchoError, match=r"needs the pca_state\.safetensors .*put that file beside"):
        echo_eqx.load_codec(tmp_path)
    for place in (PCA, FISH, WEIGHTS):
        assert echo_eqx.load_codec(tmp_path, pca=place).config == codec.config
    wide = echo_eqx.load_codec(WEIGHTS, pca=base)  # before that beside the codec
    assert wide.config.latent_dim == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.block.0.conv.bias"), r"encoder\.block\.0\.conv\.bias is missing"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "extra belongs to no part"),
        (
            lambda t: t.update({"decoder.model.4.conv.bias": np.full(1, np.nan, np.float32)}),
            r"decoder\.model\.4\.conv\.bias has values that are not finite",
        ),
        (
            lambda t: t.update({"quantizer.post_module.norm.weight": np.ones(25, np.float32)}),
            r"quantizer\.post\.norm\.weight: expected shape \(24,\)",
        ),
        (
            lambda t: t.update(
                {n: np.ones_like(t[n]) for n in [*t] if n.endswith("post_module.freqs_cis")}
            ),
            r"post_module\.freqs_cis: expected the rotations of RoPE with base 10000",
        ),
        (lambda t: t.pop("quantizer.quantizer.quantizers.0.codebook.weight"), "no such tensor"),
    ],
)
def test_damaged_files_are_refused_by_tensor(tmp_path, change, message):
    tensors = load_tensors(WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(EchoError, match=message):
        echo_eqx.load_codec(tmp_path / "a.safetensors", pca=PCA)


# --- As a codec ---------------------------------------------------------------------------------


def test_it_has_no_watermark_and_names_its_channels(codec):
    assert codec.watermark is None
    with pytest.raises(EchoError, match="cannot embed watermarks"):
        codec.decode(np.zeros((3, 7), np.float32), np.zeros(16, np.int32))
    with pytest.raises(EchoError, match=r"expected shape \(frames, 7\).*got \(3, 8\)"):
        codec.decode(np.zeros((3, 8), np.float32))


def test_silence_is_steady(codec):
    latents, _ = codec.encode(np.zeros(330 * HOP, np.float32))
    assert max_difference(latents[320], silence_latent(codec)) < 1e-5


def test_a_codec_of_another_kind_is_not_trained(tmp_path):
    done = call(
        "train_codec", "--init_from", WEIGHTS, "--run_dir", tmp_path / "run", "--data", DATA
    )
    assert done.returncode != 0 and "expected a DACVAE, got a FishDAC" in done.stderr


# --- With Echo-TTS ------------------------------------------------------------------------------


def test_weights_with_its_channels_recommend_what_their_authors_use(base):
    dit = echo_eqx.load_dit(base)
    assert dit.generation == ECHO_TTS
    settings = dit.generation.sampler
    assert (settings.steps, settings.cfg_scale, settings.speaker_scale) == (40, 3.0, 8.0)
    assert (settings.cfg_min_t, settings.cfg_max_t, settings.noise_scale) == (0.5, 1.0, 0.8)
    assert settings.first_time == 0.999 and settings.rescale_k == 1
    full = echo_eqx.DIT_PRESETS["2.4B"]
    assert dit.generation.duration * FishConfig().frame_rate == pytest.approx(full.max_frames)
    assert FishConfig().latent_dim == full.latent_dim


def test_its_speech_ends_where_zeros_begin(base):
    dit = echo_eqx.load_dit(base)
    codec = echo_eqx.load_codec(base / "codec.safetensors")
    padding, around = silence_latents(dit, codec)
    assert not np.any(padding) and around is None
    silent = dataclasses.replace(dit.generation, padding="silence")
    silent = dataclasses.replace(dit, generation=silent)
    for latent in silence_latents(silent, codec):
        assert np.array_equal(latent, silence_latent(codec))


def test_references_keep_their_level_as_recorded(base):
    dit, codec = echo_eqx.load_dit(base), echo_eqx.load_codec(base / "codec.safetensors")
    recording = DATA / "speech.mp3"
    latents = speaker_latents(dit, codec, recording, max_seconds=0.45)
    expected = encode_padded(codec, load_reference(recording, 44_100, 0.45))
    assert max_difference(latents, expected[: len(latents)]) < 1e-5
    louder = speaker_latents(dit, codec, recording, max_seconds=0.45, lufs=-12.0)
    assert max_difference(louder, latents) > 1e-3


def test_the_codec_is_found_beside_the_checkpoint(base):
    dit = echo_eqx.load_dit(base)
    assert find_codec(dit, None, str(base))[1] == base / "codec.safetensors"
    with pytest.raises(EchoError, match=r"published models: jordand/fish-s1-dac-min is not in the"):
        find_codec(dit)


def test_a_folder_with_all_of_it_speaks(base, tmp_path):
    output = tmp_path / "out.wav"
    words = ["--text", "Hi.", "--output", output, "--steps", 2, "--duration", 0.1, "--json"]
    done = call("infer", "--checkpoint", base, *words)
    assert done.returncode == 0, done.stderr
    audio, rate = sf.read(output)
    assert rate == 44_100 and len(audio) % HOP == 0 and np.abs(audio).max() > 1e-4
    described = json.loads(output.with_suffix(".json").read_text())
    assert described["speaker_scale"] == 8.0 and described["noise_scale"] == 0.8
    assert described["codec"]["config"]["type"] == "fish_s1_dac"
    assert described["watermark"] is False
