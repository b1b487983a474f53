"""Exports for facebook's DACVAE, mlx-audio and echo-tts-cpp, and their way back."""

import dataclasses
import json
import math
import pickletools
import struct
import time
import zipfile

import equinox as eqx
import gguf
import jax
import numpy as np
import pytest
from conftest import GOLDEN, max_difference, random_model
from safetensors.numpy import load_file, save_file
from test_weights import SMALL

import echo_eqx
from echo_eqx import EchoError
from echo_eqx.codec.fish.dac import FishDAC
from echo_eqx.config import (
    CODEC_PRESETS,
    CodecConfig,
    DiTConfig,
    EncoderConfig,
    FishConfig,
    WatermarkConfig,
)
from echo_eqx.errors import UsageError
from echo_eqx.export import dacvae, mlx
from echo_eqx.export import gguf as gguf_export
from echo_eqx.export.models import Models
from echo_eqx.trees import named_leaves
from echo_eqx.weights.native import DTYPES
from echo_eqx.weights.torch_file import read_torch_file, tensors

PTH = GOLDEN / "dacvae_tiny" / "weights.pth"
FLOAT32 = np.dtype(np.float32)


def random_codec(seed: int):
    """A codec of random sizes, one of whose kernels has a channel of zeros."""
    rng = np.random.default_rng(seed)
    rates = rng.permutation([2, 2, 3 + seed % 3]).tolist()
    layers = len(rates)
    config = CodecConfig(
        encoder_dim=int(rng.integers(1, 6)),
        encoder_rates=tuple(rates),
        hidden_dim=int(rng.integers(2, 9)),
        latent_dim=int(rng.integers(1, 7)),
        decoder_dim=8 * int(rng.integers(1, 4)),
        decoder_rates=tuple(rates[::-1]),
        sample_rate=int(rng.integers(8000, 48001)),
        watermark=WatermarkConfig(
            dim=2, strides=(1, 2, 1)[:layers], bottleneck_dim=3, num_bits=2, num_lstm_layers=1
        ),
    )
    codec = random_model(echo_eqx.DACVAE, config, seed=seed)
    kernel = codec.decoder.conv_in.weight.at[..., 0].set(0)
    return eqx.tree_at(lambda codec: codec.decoder.conv_in.weight, codec, kernel)


def assert_same(found, expected, ulps: int = 0):
    """Leaves are the same bits, or kernels within so many of the last bit."""
    assert found.config == expected.config
    for (name, a), b in zip(named_leaves(found).items(), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype == np.float32, name
        assert np.array_equal(a, b) or (
            ulps and np.all(np.abs(a.view(np.int32) - b.view(np.int32)) <= ulps)
        ), f"{name} differs by {max_difference(a, b)}"


# --- facebook's DACVAE --------------------------------------------------------------------------


def test_the_published_codec_is_written_as_it_was_published(tmp_path, golden_codec):
    dacvae.write_files(golden_codec, tmp_path, FLOAT32)
    published, written = read_torch_file(PTH), read_torch_file(tmp_path / "weights.pth")
    ours, theirs = (tensors(file["state_dict"], PTH) for file in (written, published))
    assert len(ours) == 317
    assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {
        n: (a.shape, a.dtype) for n, a in theirs.items()
    }
    quantizer = {"n_codebooks": 16}  # not used by a DACVAE
    assert written["metadata"]["kwargs"] == {**published["metadata"]["kwargs"], **quantizer}
    for name in ("weights.pth", "model.safetensors"):
        assert_same(echo_eqx.load_codec(tmp_path / name), golden_codec, ulps=1)
    twin = load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(twin[name], array) for name, array in ours.items())
    assert echo_eqx.load_codec(tmp_path).config == golden_codec.config


@pytest.mark.parametrize("seed", range(2))
def test_codecs_of_any_size_come_back(tmp_path, seed):
    codec = random_codec(seed)
    dacvae.write_files(codec, tmp_path, FLOAT32)
    (tmp_path / "mlx").mkdir()
    mlx.write_codec_files(codec, tmp_path / "mlx", FLOAT32)
    for file in ("weights.pth", "model.safetensors", "mlx"):
        assert_same(echo_eqx.load_codec(tmp_path / file), codec, ulps=1)


@pytest.mark.parametrize(
    ("dtype", "file"), [("bfloat16", "weights.pth"), ("float16", "model.safetensors")]
)
def test_codecs_of_half_the_precision_come_back(tmp_path, golden_codec, dtype, file):
    dacvae.write_files(golden_codec, tmp_path, DTYPES[dtype])
    found = echo_eqx.load_codec(tmp_path / file)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(golden_codec), strict=True):
        assert max_difference(a, b) < 0.01 * (1 + np.max(np.abs(b)))


def test_the_torch_file_is_made_of_what_torch_reads_without_objects(tmp_path, golden_codec):
    """Opcodes and names that `torch.load(weights_only=True)` takes, stored, on 64 bytes."""
    dacvae.write_files(golden_codec, tmp_path, FLOAT32)
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        code = archive.read("weights/data.pkl")
        assert archive.read("weights/byteorder") == b"little"
        assert archive.read("weights/version") == b"3\n"
        entries = archive.infolist()
        assert {f"weights/data/{i}" for i in range(317)} <= set(archive.namelist())
    operations = [(op.name, argument) for op, argument, _ in pickletools.genops(code)]
    assert {argument for name, argument in operations if name == "GLOBAL"} == {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
    }
    assert {name for name, _ in operations} <= set(
        "PROTO EMPTY_DICT EMPTY_LIST EMPTY_TUPLE MARK TUPLE APPENDS SETITEM REDUCE GLOBAL STOP "
        "BINUNICODE BININT NEWFALSE BINPERSID".split()
    )
    data = path.read_bytes()
    for entry in entries:
        assert entry.compress_type == zipfile.ZIP_STORED
        sizes = struct.unpack_from("<HH", data, entry.header_offset + 26)
        assert (entry.header_offset + 30 + sum(sizes)) % 64 == 0
    again = tmp_path / "again"
    again.mkdir()
    dacvae.write_files(golden_codec, again, FLOAT32)
    assert (again / "weights.pth").read_bytes() == data


def fitting(**changes) -> CodecConfig:
    return dataclasses.replace(CodecConfig(), **changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CODEC_PRESETS["24khz"], r"decoder\.wm_model\.encoder_block\.pre\.3\.weight is missing"),
        (CODEC_PRESETS["tiny"], r"encoder_block\.pre\.3\.weight: expected dim 32, got 4"),
        (fitting(watermark=WatermarkConfig(num_bits=8)), r"msg_processor\.weight: .*16, got 8"),
        (fitting(decoder_dim=768), r"decoder\.model\.0\.weight_v: expected decoder_dim 1536"),
        (
            fitting(encoder_rates=(2, 8, 5, 24)),
            r"encoder\.block\.3\.block\.4\.weight_v: expected an even stride, got 5",
        ),
    ],
)
def test_a_codec_that_the_class_cannot_hold_is_refused(config, message):
    dacvae.check_fits_class(CodecConfig(), "dacvae")
    with pytest.raises(UsageError, match=message):
        dacvae.check_fits_class(config, "dacvae")


@pytest.mark.parametrize("module", [dacvae, mlx])
def test_what_a_format_has_no_place_for_is_refused(tmp_path, module, golden_codec, golden_dit):
    with pytest.raises(UsageError, match=r"expected dim 32, got 2"):
        module.write(Models(codec=golden_codec), tmp_path, "float32")
    with pytest.raises(UsageError, match="int8"):
        module.write(Models(codec=golden_codec), tmp_path, "int8")
    if module is dacvae:
        with pytest.raises(UsageError, match="expected a codec"):
            module.write(Models(golden_dit), tmp_path, "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_twin_with_other_metadata_is_named(tmp_path, golden_codec):
    dacvae.write_files(golden_codec, tmp_path, FLOAT32)
    path = tmp_path / "model.safetensors"
    arrays = load_file(path)
    for metadata, message in [
        ({}, "expected the sizes of a DACVAE as JSON"),
        ({"kwargs": "[]"}, "no metadata kwargs"),
        ({"kwargs": '{"encoder_dim": 7}'}, "expected"),
        ({"kwargs": '{"decoder_dim": 1e300}'}, "decoder_dim"),
        ({"kwargs": '{"encoder_rates": [4194304, 2]}'}, "encoder_rates"),
    ]:
        save_file(arrays, path, metadata)
        with pytest.raises(EchoError, match=rf"model\.safetensors.*{message}"):
            echo_eqx.load_codec(path)


# --- mlx-audio ----------------------------------------------------------------------------------


def test_the_codec_has_the_names_and_axes_of_mlx_audio(tmp_path, golden_codec):
    mlx.write_codec_files(golden_codec, tmp_path, FLOAT32)
    arrays = load_file(tmp_path / "model.safetensors")
    # One bias for two in each of four LSTM layers.
    assert len(arrays) == 317 - 4
    codec = golden_codec
    for name, leaf in {
        "encoder.conv_in": codec.encoder.conv_in,
        "encoder.blocks.1.res3.conv1": codec.encoder.blocks[1].units[2].conv1,
        "encoder.blocks.3.conv": codec.encoder.blocks[3].down,
        "encoder.conv_out": codec.encoder.conv_out,
        "quantizer_in_proj": codec.bottleneck.in_proj,
        "decoder.blocks.0.block_1": codec.decoder.blocks[0].up,
        "decoder.blocks.2.block_8.conv2": codec.decoder.blocks[2].units[2].conv2,
        "decoder.conv_out": codec.decoder.conv_out,
    }.items():  # (out, k, in)
        assert np.array_equal(arrays[f"{name}.weight_v"], np.transpose(leaf.weight, (2, 0, 1)))
    up = arrays["decoder.blocks.0.block_1.weight_v"]
    assert arrays["decoder.blocks.0.block_1.weight_g"].shape == (1, 1, up.shape[2])
    snake = codec.encoder.blocks[0].units[1].snake2.alpha
    assert np.array_equal(arrays["encoder.blocks.0.res2.act2.alpha"], snake[None, None])
    lstm = codec.watermark.encoder_lstm.layers[1]
    prefix = "decoder.wm_model.encoder_block.post_0.lstm.layers.1."
    assert np.array_equal(arrays[f"{prefix}Wx"], lstm.weight_in.T)
    assert np.array_equal(arrays[f"{prefix}Wh"], lstm.weight_hidden.T)
    assert np.array_equal(arrays[f"{prefix}bias"], lstm.bias)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == set(
        "encoder_dim encoder_rates latent_dim decoder_dim decoder_rates n_codebooks codebook_size "
        "codebook_dim quantizer_dropout sample_rate mean std".split()
    )


def test_a_codec_of_mlx_audio_needs_its_config(tmp_path, golden_codec):
    mlx.write_codec_files(golden_codec, tmp_path, FLOAT32)
    config = tmp_path / "config.json"
    for text in ("", "{", "[]", '{"encoder_rates": "x"}', '{"encoder_rates": [[]]}', '{"a": NaN}'):
        config.write_text(text)
        with pytest.raises(EchoError, match="config"):
            echo_eqx.load_codec(tmp_path)
    config.unlink()
    with pytest.raises(EchoError, match=r"config\.json cannot be read"):
        echo_eqx.load_codec(tmp_path)


def test_odd_strides_of_the_decoder_are_refused_for_mlx_audio():
    mlx.check_fits_mlx(CodecConfig())
    config = fitting(encoder_rates=(2, 10, 8, 12), decoder_rates=(128, 5, 3, 1))
    with pytest.raises(UsageError, match=r"decoder\.blocks\.1\.block_1\.weight_v: .*got 5"):
        mlx.check_fits_mlx(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_echo_dit_for_mlx_audio_comes_back(tmp_path, golden_dit, caplog, dtype):
    mlx.write(Models(golden_dit), tmp_path, dtype)
    assert "generate_latents" in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "echo_tts" and config["delete_blockwise_modules"]
    assert {"sample_rate", "pca_filename", "fish_codec_repo", "sampler"} <= set(config)
    assert config["dit"]["latent_size"] == golden_dit.config.latent_dim
    found = echo_eqx.load_dit(tmp_path)
    assert dataclasses.replace(found.config, speaker_proj_scale=1.0) == golden_dit.config
    for (name, a), b in zip(named_leaves(found).items(), jax.tree.leaves(golden_dit), strict=True):
        factor = 6 if name.startswith("speaker_encoder.in_proj.") else 1
        tolerance = 1e-2 if dtype == "bfloat16" else 1e-6 if factor == 6 else 0
        assert np.allclose(np.asarray(a), factor * np.asarray(b), rtol=tolerance, atol=0), name


def fish(**sizes) -> FishDAC:
    """Fish S1-DAC at a small size."""
    config = FishConfig(
        encoder_dim=4,
        encoder_rates=(2,),
        encoder_layers=1,
        encoder_mlp_dim=3,
        head_dim=4,
        quantizer_layers=1,
        quantizer_mlp_dim=3,
        semantic_codebook_size=5,
        num_codebooks=1,
        codebook_size=5,
        decoder_dim=2,
        decoder_rates=(2,),
        **sizes,
    )
    return random_model(FishDAC, config)


def test_the_principal_components_of_a_codec_are_written_for_mlx_audio(
    tmp_path, golden_dit, caplog
):
    codec = fish(latent_dim=golden_dit.config.latent_dim, hidden_dim=16)
    mlx.write(Models(golden_dit, codec), tmp_path, "bfloat16")
    pca = load_file(tmp_path / "pca_state.safetensors")
    assert np.array_equal(pca["pca_components"], codec.pca.components)
    assert np.array_equal(pca["pca_mean"], codec.pca.mean)
    assert pca["latent_scale"] == codec.pca.scale and pca["latent_scale"].dtype == np.float32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["fish_codec_repo"] == "jordand/fish-s1-dac-min"
    assert "pca_state.safetensors is written" in caplog.text
    assert echo_eqx.load_dit(tmp_path).config.latent_dim == golden_dit.config.latent_dim
    with pytest.raises(UsageError, match="pca_components: expected"):
        mlx.write(Models(golden_dit, fish(latent_dim=3, hidden_dim=16)), tmp_path, "float32")
    with pytest.raises(UsageError, match="expected a DACVAE"):
        mlx.write(Models(codec=codec), tmp_path, "float32")


def test_the_principal_components_of_a_codec_are_written_for_echo_tts_cpp(tmp_path, golden_dit):
    channels = golden_dit.config.latent_dim
    codec = fish(latent_dim=channels, hidden_dim=1024)
    gguf_export.write(Models(golden_dit, codec), tmp_path, "float32")
    reader = gguf.GGUFReader(tmp_path / "echo-dit.gguf")
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(read["pca.components"], codec.pca.components)
    assert np.array_equal(read["pca.mean"], codec.pca.mean)
    assert reader.fields["pca.latent_scale"].contents() == codec.pca.scale
    with pytest.raises(UsageError, match=r"pca\.components: expected shape"):
        gguf_export.write(Models(golden_dit, fish(latent_dim=3, hidden_dim=16)), tmp_path, "int8")


def test_block_wise_models_keep_their_parts_in_every_port(tmp_path, blockwise_dit):
    mlx.write(Models(blockwise_dit), tmp_path, "float32")
    assert not json.loads((tmp_path / "config.json").read_text())["delete_blockwise_modules"]
    gguf_export.write(Models(blockwise_dit), tmp_path, "float32")
    for file in ("model.safetensors", "echo-dit.gguf"):
        assert_same(echo_eqx.load_dit(tmp_path / file), blockwise_dit)


# --- echo-tts-cpp -------------------------------------------------------------------------------

LARGE = DiTConfig(
    model_dim=1024,
    num_layers=1,
    num_heads=2,
    mlp_dim=1000,  # no multiple of 32
    text=EncoderConfig(16, 1, 2, 24),
    speaker=EncoderConfig(12, 1, 2, 20),
    latent_dim=10,
    time_embed_dim=18,
    adaln_rank=4,
    speaker_proj_scale=1 / 6,
)
"""Some of its tensors have a million numbers, from which on they are not F32."""


@pytest.fixture(scope="module")
def large_dit():
    return random_model(echo_eqx.EchoDiT, LARGE)


@pytest.mark.parametrize(
    ("dtype", "types"),
    [
        ("float32", {"blocks.0.attention.wq": "F32", "cond_module.2": "F32"}),
        ("float16", {"blocks.0.attention.wq": "F16", "cond_module.2": "F16"}),
        ("bfloat16", {"blocks.0.attention.wq": "BF16", "cond_module.2": "F32"}),
        (
            "int8",
            {
                "blocks.0.attention.wq": "Q8_0",
                "blocks.0.mlp.w1": "Q8_0",
                "blocks.0.mlp.w2": "F16",
                "cond_module.2": "F16",
            },
        ),
    ],
)
def test_gguf_comes_back_from_every_type(tmp_path, large_dit, dtype, types):
    gguf_export.write(Models(large_dit), tmp_path, dtype)
    path = tmp_path / "echo-dit.gguf"
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    small = {"text_encoder.text_embedding": "F32", "out_proj": "F32"}
    for name, kind in {**types, **small}.items():
        assert read[f"{name}.weight"].tensor_type.name == kind, name
    found = echo_eqx.load_dit(path)
    if dtype == "float32":
        assert_same(found, large_dit)
    for (name, a), b in zip(named_leaves(found).items(), jax.tree.leaves(large_dit), strict=True):
        tolerance = {"float32": 0, "float16": 5e-4, "bfloat16": 4e-3, "int8": 5e-3}[dtype]
        assert max_difference(a, b) <= tolerance * np.max(np.abs(b)), name
    # As the package reads it.
    query = gguf.quants.dequantize(
        read["blocks.0.attention.wq.weight"].data, read["blocks.0.attention.wq.weight"].tensor_type
    )
    assert np.array_equal(query.T, found.blocks.attention.wq.weight[0])


@pytest.mark.parametrize("seed", range(3))
def test_gguf_of_any_size_comes_back(tmp_path, seed):
    rng = np.random.default_rng(seed)

    def encoder() -> EncoderConfig:
        heads = int(rng.integers(1, 4))
        return EncoderConfig(2 * heads * int(rng.integers(1, 4)), int(rng.integers(1, 3)), heads, 7)

    config = dataclasses.replace(
        SMALL,
        num_layers=int(rng.integers(1, 4)),
        latent_dim=int(rng.integers(1, 20)),
        patch_size=int(rng.integers(1, 5)),
        text=encoder(),
        speaker=encoder(),
        norm_eps=float(rng.choice([1e-5, 1e-6, 3e-4])),
        blockwise=bool(seed % 2),
        speaker_proj_scale=1 / 6,
    )
    dit = random_model(echo_eqx.EchoDiT, config, seed=seed)
    gguf_export.write(Models(dit), tmp_path, "float32")
    assert_same(echo_eqx.load_dit(tmp_path), dit)


def test_a_model_too_small_for_a_type_of_gguf_is_told(tmp_path, golden_dit, caplog):
    gguf_export.write(Models(golden_dit), tmp_path, "int8")
    assert "no tensor is Q8_0" in caplog.text


def test_numbers_that_a_type_of_gguf_cannot_hold_are_named(tmp_path, large_dit):
    for dtype, value in (("float16", 1e5), ("int8", 1e8)):
        dit = eqx.tree_at(
            lambda dit: dit.blocks.attention.wq.weight,
            large_dit,
            large_dit.blocks.attention.wq.weight.at[0, 0, 0].set(value),
        )
        with pytest.raises(EchoError, match=r"blocks\.0\.attention\.wq\.weight has values"):
            gguf_export.write(Models(dit), tmp_path, dtype)


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string)) + string.encode()


def header(num_tensors: int, *fields: bytes, version: int = 3) -> bytes:
    architecture = text("general.architecture") + struct.pack("<I", 8) + text("echo-tts")
    fields = (architecture, *fields)
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, len(fields)) + b"".join(fields)


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**60
HOSTILE = {
    "counts": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, HUGE), "at most"),
    "version": (header(0, version=1), "version 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "name": (header(1) + struct.pack("<Q", HUGE), "a text of at most"),
    "array": (header(0, text("a") + struct.pack("<IIQ", 9, 0, HUGE)), "reaches beyond"),
    "strings": (header(0, text("a") + struct.pack("<IIQ", 9, 8, HUGE)), "refused"),
    "nested": (header(0, text("a") + struct.pack("<IIQ", 9, 9, 1)), "refused"),
    "field type": (header(0, text("a") + struct.pack("<I", 77)), "type 0 to 12"),
    "twice": (header(0, *[text("a") + struct.pack("<IB", 0, 1)] * 2), "twice"),
    "not text": (header(0, struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)), "GGUF"),
    "alignment": (header(0, text("general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
    "rank": (header(1) + text("a") + struct.pack("<I", 2**31), "at most 4"),
    "sizes": (header(1) + tensor("a", 2**40, 2**40), "beyond its end"),
    "overflow": (header(1) + tensor("a", 2**63, 2), "below"),
    "offset": (header(1) + tensor("a", 1, offset=2**63), "beyond its end"),
    "overlap": (header(9) + b"".join(tensor(f"{i}", 64) for i in range(9)) + bytes(320), "overlap"),
    "tensor twice": (header(2) + 2 * tensor("a", 1) + bytes(64), "twice"),
    "tensor type": (header(1) + tensor("a", 1, kind=2) + bytes(64), "F32, F16, BF16 or Q8_0"),
    "rows": (header(1) + tensor("a", 33, kind=8) + bytes(999), "multiple of 32"),
    "no model": (header(1) + tensor("a", 1) + bytes(64), "expected an EchoDiT"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_is_named_at_once(tmp_path, name):
    data, message = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(EchoError, match=rf"model\.gguf.*{message}"):
        echo_eqx.load_dit(path)
    assert time.monotonic() - start < 1


def test_gguf_cut_off_or_damaged_anywhere_is_one_error(tmp_path, blockwise_dit):
    gguf_export.write(Models(blockwise_dit), tmp_path, "float32")
    path = tmp_path / "echo-dit.gguf"
    data = path.read_bytes()
    size = len(data)
    for length in [*range(0, 200, 23), *range(200, size, size // 9), size - 40]:
        path.write_bytes(data[:length])
        with pytest.raises(EchoError, match=r"echo-dit\.gguf"):
            echo_eqx.load_dit(path)
    rng = np.random.default_rng(0)
    weights = size - 4 * sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(blockwise_dit))
    for position in rng.integers(0, weights, 20):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            echo_eqx.load_dit(path)
        except EchoError as error:
            assert "echo-dit.gguf" in str(error)


def test_gguf_of_another_model_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", arch="llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EchoError, match=r"expected architecture echo-tts, got 'llama'"):
        echo_eqx.load_dit(tmp_path)
    with pytest.raises(EchoError, match=r"llama\.gguf"):
        echo_eqx.load_codec(tmp_path)
