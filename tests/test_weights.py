"""Loading published files, and that every import uses every tensor."""

import dataclasses
import json
import pickle
import struct
import sys
import types
from collections import OrderedDict, namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, max_difference, random_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import echo_eqx
from echo_eqx import EchoError
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS, DiTConfig, EncoderConfig
from echo_eqx.json_data import to_json
from echo_eqx.trees import leaf_names, named_leaves
from echo_eqx.weights.flax import read_flax_checkpoint
from echo_eqx.weights.load import dit_from_flax
from echo_eqx.weights.safetensors_reader import SafetensorsFile

WEIGHTS_ONLY = GOLDEN / "dit_tiny" / "weights_only.pkl"
FULL_STATE = GOLDEN / "dit_tiny" / "full_state.pkl"
PTH = GOLDEN / "dacvae_tiny" / "weights.pth"
PYTORCH = GOLDEN / "blockwise" / "weights.safetensors"

SMALL = DiTConfig(
    model_dim=24,
    num_layers=2,
    num_heads=2,
    mlp_dim=40,
    text=EncoderConfig(16, 1, 2, 24),
    speaker=EncoderConfig(12, 3, 3, 20),
    latent_dim=10,
    time_embed_dim=18,
    adaln_rank=5,
)


def same(a, b) -> bool:
    return leaf_names(a) == leaf_names(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- Flax ---------------------------------------------------------------------------------------


def test_full_state_has_weights_moments_and_counters(golden_dit, dit_cases):
    expected = np.load(GOLDEN / "dit_tiny" / "full_state_expect.npz")
    dit = echo_eqx.load_dit(FULL_STATE)
    inputs = [
        jnp.asarray(dit_cases[name])
        for name in ("x", "t", "text_ids", "text_mask", "speaker_latents", "speaker_mask")
    ]
    velocity = jax.jit(jax.vmap(dit.__call__))(*inputs)
    assert max_difference(velocity, expected["velocity"]) < 1e-4

    checkpoint = read_flax_checkpoint(FULL_STATE)
    assert checkpoint.adam_count == expected["adam_count"]
    assert (checkpoint.step, checkpoint.samples_seen) == (3, 768)
    mu = dit_from_flax(checkpoint.mu, FULL_STATE, jnp.float32)
    nu = dit_from_flax(checkpoint.nu, FULL_STATE, jnp.float32)
    assert leaf_names(mu) == leaf_names(dit)
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(mu)))
    assert norm == pytest.approx(expected["mu_norm"], rel=1e-6)
    total = sum(np.sum(np.float64(leaf)) for leaf in jax.tree.leaves(nu))
    assert total == pytest.approx(expected["nu_sum"], rel=1e-6)
    assert np.array_equal(mu.out_proj.weight, expected["mu_out_proj"])
    assert np.array_equal(nu.out_proj.weight, expected["nu_out_proj"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_pickles_of_any_protocol_and_precision_load(tmp_path, golden_dit, protocol, dtype):
    checkpoint = read_flax_checkpoint(WEIGHTS_ONLY)
    tree = nested({name: array.astype(dtype) for name, array in checkpoint.params.items()})
    path = tmp_path / "model.pkl"
    content = {"params": tree, "opt_state": None, "step": np.int64(7), "samples_seen": 3}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert read_flax_checkpoint(path).step == 7
    dit = echo_eqx.load_dit(path)
    tolerance = {np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2}.get(dtype, 0)
    for name, leaf in named_leaves(golden_dit).items():
        assert max_difference(named_leaves(dit)[name], leaf) <= tolerance * np.abs(leaf).max()


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_any_memory_layout_load(tmp_path, golden_dit, protocol):
    params = dict(read_flax_checkpoint(WEIGHTS_ONLY).params)
    name = "out_proj/kernel"
    params[name] = np.asfortranarray(params[name])
    other = "in_proj/kernel"
    params[other] = np.ascontiguousarray(params[other].T).T
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"params": nested(params), "step": 0}, protocol=protocol))
    assert same(echo_eqx.load_dit(path), golden_dit)
    wide = np.arange(24.0).reshape(2, 3, 4).transpose(0, 2, 1)
    path.write_bytes(pickle.dumps({"params": {"wide": wide}, "step": 0}, protocol=protocol))
    assert np.array_equal(read_flax_checkpoint(path).params["wide"], wide)


def test_pickle_of_numpy_1_loads(tmp_path, golden_dit):
    # NumPy 1 wrote the module numpy.core where NumPy 2 writes numpy._core.
    data = WEIGHTS_ONLY.read_bytes()
    checkpoint = pickle.loads(data)
    old = pickle.dumps(checkpoint, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy._core" not in old
    path = tmp_path / "model.pkl"
    path.write_bytes(old)
    assert same(echo_eqx.load_dit(path), golden_dit)


def test_wrappers_and_optimizer_chains_of_the_trainer_load(tmp_path, golden_dit, monkeypatch):
    # Classes of the same names as Flax's and optax's, so that real pickles of them can be written.
    def module(name, **attributes):
        if "." in name:
            module(name.rpartition(".")[0])
        made = types.ModuleType(name)
        for key, value in attributes.items():
            value.__module__, value.__qualname__ = name, key
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class Partitioned:
        def __init__(self, value, names):
            self.value, self.names, self.mesh = value, names, None

    adam_state = namedtuple("ScaleByAdamState", ["count", "mu", "nu"])
    masked_state = namedtuple("MaskedState", ["inner_state"])
    empty = namedtuple("EmptyState", [])
    module("flax.linen.spmd", LogicallyPartitioned=Partitioned)
    module("optax._src.transform", ScaleByAdamState=adam_state)
    module("optax._src.base", EmptyState=empty)
    module("optax.transforms._masking", MaskedState=masked_state)

    params = read_flax_checkpoint(WEIGHTS_ONLY).params
    wrapped = {name: Partitioned(array, ("a", "b")) for name, array in params.items()}
    halves = {name: Partitioned(array / 2, None) for name, array in params.items()}
    adam = adam_state(np.asarray(9, np.int32), nested(halves), nested(wrapped))
    opt_state = (empty(), (masked_state((adam, empty())), [empty()]))
    content = {"params": nested(wrapped), "opt_state": opt_state, "step": 4, "samples_seen": 8}
    path = tmp_path / "state.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(content)))

    assert same(echo_eqx.load_dit(path), golden_dit)
    checkpoint = read_flax_checkpoint(path)
    assert checkpoint.adam_count == 9
    assert all(np.array_equal(checkpoint.mu[name], array / 2) for name, array in params.items())


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.pop("out_proj/bias"), "out_proj/bias is missing"),
        (lambda p: p.update({"extra/kernel": np.ones(3)}), "extra/kernel belongs to no part"),
        (lambda p: p.update({"norm/weight": np.ones(47)}), "norm/weight .* shape"),
        (lambda p: p.update({"norm/weight": np.full(48, np.nan)}), "norm/weight .* not finite"),
        (lambda p: p.pop("in_proj/kernel"), "in_proj/kernel is missing"),
        (
            lambda p: p.update({"TransformerBlock_1/mlp/w1/kernel": np.ones((48, 127))}),
            "TransformerBlock_0/mlp/w1/kernel .*shape",
        ),
        (
            lambda p: p.update({"TransformerBlock_1/mlp/w1/kernel": np.full((48, 128), np.inf)}),
            "TransformerBlock_1/mlp/w1/kernel has values that are not finite",
        ),
        (
            lambda p: p.update({"norm/weight": np.ones(48, int)}),
            "expected floating-point numbers, got int64",
        ),
    ],
)
def test_every_flax_tensor_is_used(tmp_path, damage, message):
    params = dict(read_flax_checkpoint(WEIGHTS_ONLY).params)
    damage(params)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"params": nested(params), "step": 0}))
    with pytest.raises(EchoError, match=message):
        echo_eqx.load_dit(path)


# --- PyTorch ------------------------------------------------------------------------------------


def test_blockwise_parts_may_be_missing_but_only_entirely(tmp_path):
    tensors = load_file(PYTORCH)
    for part in ("latent_encoder.", "latent_norm."):
        tensors = {name: x for name, x in tensors.items() if not name.startswith(part)}
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(EchoError, match=r"w[kv]_latent.* belongs to no part"):
        echo_eqx.load_dit(tmp_path / "half.safetensors")
    tensors = {name: x for name, x in tensors.items() if "_latent" not in name}
    save_file(tensors, tmp_path / "whole.safetensors")
    assert not echo_eqx.load_dit(tmp_path / "whole.safetensors").config.blockwise


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("cond_module.2.weight"), "cond_module.2.weight is missing"),
        (lambda t: t.pop("blocks.1.mlp.w2.weight"), "blocks.1.mlp.w2.weight is missing"),
        (lambda t: t.update({"lora": np.ones(2)}), "lora belongs to no part"),
        (lambda t: t.update({"out_proj.bias": np.ones(21)}), "out_proj.bias .*shape"),
        (lambda t: t.update({"out_proj.bias": np.full(20, np.inf)}), "out_proj.bias .*not finite"),
    ],
)
def test_every_pytorch_tensor_is_used(tmp_path, damage, message):
    tensors = load_file(PYTORCH)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(EchoError, match=message):
        echo_eqx.load_dit(tmp_path / "model.safetensors")


def test_published_base_sizes_find_their_training_lengths():
    from echo_eqx.weights.names import _with_limits

    base = DIT_PRESETS["2.4B"]
    read = dataclasses.replace(base, max_frames=768, max_speaker_frames=512)
    assert _with_limits(read) == base
    pruned = _with_limits(dataclasses.replace(read, blockwise=False))
    assert pruned.max_frames == 640 and not pruned.blockwise


# --- DACVAE -------------------------------------------------------------------------------------


def test_all_317_tensors_of_the_codec_are_used(golden_codec):
    from echo_eqx.weights.dacvae import published_sources

    names = [
        name
        for leaf in leaf_names(golden_codec)
        for name in published_sources(leaf, golden_codec.config).names
    ]
    assert len(names) == len(set(names)) == 317


def test_published_codec_size():
    # 107,671,171 in the published file: there weight norm keeps a length g per channel beside each
    # kernel, and an LSTM has two biases.
    config = CODEC_PRESETS["48khz"]
    codec = jax.eval_shape(lambda key: echo_eqx.DACVAE.init(config, key=key), jax.random.key(0))
    leaves = named_leaves(codec)
    lengths = sum(
        leaf.shape[1] if name.endswith(".up.weight") else leaf.shape[2]
        for name, leaf in leaves.items()
        if leaf.ndim == 3 and not name.startswith("watermark.")
    )
    biases = sum(leaf.size for name, leaf in leaves.items() if "lstm" in name and "bias" in name)
    assert echo_eqx.num_parameters(codec) + lengths + biases == 107_671_171


# --- Our own format -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, folder",
    [("float32", False), ("float32", True), ("bfloat16", False), ("float16", True)],
)
def test_saved_models_load_as_they_were(tmp_path, golden_codec, dtype, folder):
    dit = random_model(echo_eqx.EchoDiT, SMALL)
    for model, load in ((dit, echo_eqx.load_dit), (golden_codec, echo_eqx.load_codec)):
        path = tmp_path / "folder" if folder else tmp_path / "model.safetensors"
        echo_eqx.save(model, path, dtype=dtype)
        again = load(path)
        assert again.config == model.config
        rounded = jax.tree.map(lambda x: np.asarray(x, dtype).astype(np.float32), model)
        assert same(again, rounded)


def test_loaded_matrices_have_the_requested_dtype(tmp_path):
    echo_eqx.save(random_model(echo_eqx.EchoDiT, SMALL), tmp_path)
    leaves = named_leaves(echo_eqx.load_dit(tmp_path, dtype=jnp.bfloat16))
    assert leaves["blocks.mlp.w1.weight"].dtype == jnp.bfloat16
    assert leaves["out_norm.weight"].dtype == jnp.float32


def test_every_matrix_of_a_codec_is_cast_and_nothing_else(golden_codec):
    leaves = named_leaves(echo_eqx.cast(golden_codec, jnp.bfloat16))
    for name, leaf in leaves.items():
        small = name.endswith(("bias", "alpha"))
        assert leaf.dtype == (jnp.float32 if small else jnp.bfloat16), name
    for name in ("message_embedding", "encoder_lstm.layers.0.weight_in"):
        assert leaves[f"watermark.{name}"].dtype == jnp.bfloat16


def test_files_describe_themselves_and_other_programs_read_them(tmp_path):
    echo_eqx.save(random_model(echo_eqx.EchoDiT, SMALL), tmp_path / "a" / "b")
    described = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert (described["format"], described["kind"]) == ("echo_eqx", "dit")
    assert described["config"]["model_dim"] == 24
    assert (tmp_path / "a" / "b" / "model.safetensors").stat().st_mode & 0o044


def test_numbers_that_do_not_fit_are_rejected_and_the_old_file_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    dit = random_model(echo_eqx.EchoDiT, SMALL)
    echo_eqx.save(dit, path)
    before = path.read_bytes()
    huge = jax.tree.map(lambda leaf: leaf * 1e6, dit)
    with pytest.raises(EchoError, match="float16 cannot hold"):
        echo_eqx.save(huge, path, dtype="float16")
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_an_unwritable_path_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EchoError, match="cannot be written"):
        echo_eqx.save(
            random_model(echo_eqx.EchoDiT, SMALL), tmp_path / "file" / "model.safetensors"
        )


def own_file(tmp_path, **metadata):
    path = tmp_path / "model.safetensors"
    echo_eqx.save(random_model(echo_eqx.EchoDiT, SMALL), path)
    tensors = load_file(path)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    old = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    save_file(tensors, path, {**old, **metadata})
    return path


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"kind": "poem"}, "'poem'"),
        ({"config": "{"}, "no usable config"),
        ({"config": "[]"}, "no usable config"),
        ({"config": "{}"}, "field .* is missing"),
        ({"config": "[" * 100_000}, "no usable config"),
        ({"config": '{"model_dim": "x"}'}, "no usable config"),
    ],
)
def test_bad_metadata_is_rejected_by_name(tmp_path, metadata, message):
    with pytest.raises(EchoError, match=message):
        echo_eqx.load_dit(own_file(tmp_path, **metadata))


def test_config_fields_with_wrong_type_or_name_are_reported(tmp_path):
    config = to_json(SMALL)
    for change, message in (
        ({"model_dim": -4}, "model_dim: expected .* got -4"),
        ({"model_dim": 2**40}, "model_dim"),
        ({"blockwise": 1}, "blockwise: expected true or false, got 1"),
        ({"norm_eps": float("nan")}, "value NaN"),
        ({"depth": 3}, "unknown field depth"),
        ({"text": {"dim": 16}}, "field text.num_layers is missing"),
        ({"num_heads": 5}, "5 heads"),
    ):
        path = own_file(tmp_path, config=json.dumps(config | change))
        with pytest.raises(EchoError, match=message):
            echo_eqx.load_dit(path)


# --- Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_flipped_bit_in_our_files_never_loads_as_other_weights(tmp_path, dtype):
    dit = random_model(echo_eqx.EchoDiT, SMALL)
    path = tmp_path / "model.safetensors"
    echo_eqx.save(dit, path, dtype=dtype)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    # Bits all over the header, and some in the data, including its first and last byte.
    places = [*range(0, header, 97), *range(header, len(data), 4001), len(data) - 1]
    refused = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            opened = SafetensorsFile(path)
            for name in opened.names:
                opened[name]
        except EchoError:
            refused += 1
    # A flip is missed only in the name of the checksums' own entry, where it changes nothing.
    assert refused >= len(places) - 1


def test_files_without_checksums_and_files_changed_by_other_programs_load(tmp_path):
    dit = random_model(echo_eqx.EchoDiT, SMALL)
    path = tmp_path / "model.safetensors"
    echo_eqx.save(dit, path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["in_proj.bias"] = tensors["in_proj.bias"] + 1
    save_file(tensors, path, metadata)  # the old checksums with other numbers
    changed = echo_eqx.load_dit(path)
    assert np.array_equal(changed.in_proj.bias, tensors["in_proj.bias"])
    save_file(tensors, path, {k: v for k, v in metadata.items() if "crc32" not in k})
    assert same(echo_eqx.load_dit(path), changed)


# --- Prefixes and parts -------------------------------------------------------------------------


PREFIXES = ["module.", "_orig_mod.", "ema_model.", "module._orig_mod.", "net.0.diffusion."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_shared_by_all_names_is_removed(tmp_path, golden_dit, prefix):
    path = tmp_path / "model.safetensors"
    expected = echo_eqx.load_dit(PYTORCH)
    tensors = {prefix + name: array for name, array in load_file(PYTORCH).items()}
    save_file(tensors, path)
    assert same(echo_eqx.load_dit(path), expected)
    # If one name lacks it, nothing is guessed.
    name = f"{prefix}out_proj.bias"
    save_file({**tensors, "out_proj.bias": tensors.pop(name)}, path)
    with pytest.raises(EchoError, match="is missing"):
        echo_eqx.load_dit(path)
    flax = read_flax_checkpoint(WEIGHTS_ONLY).params
    under = nested({f"{prefix.replace('.', '/')}{name}": array for name, array in flax.items()})
    pickled = tmp_path / "model.pkl"
    pickled.write_bytes(pickle.dumps({"params": under, "step": 0}))
    assert same(echo_eqx.load_dit(pickled), golden_dit)


def write_sharded(folder, tensors, stem="model", count=3):
    """Write `tensors` as several files with an index; returns the index."""
    where = {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        names = sorted(tensors)[i::count]
        save_file({name: tensors[name] for name in names}, folder / file)
        where |= dict.fromkeys(names, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_sharded_files_with_an_index_load(tmp_path, stem, prefix):
    tensors = {prefix + name: array for name, array in load_file(PYTORCH).items()}
    index = write_sharded(tmp_path, tensors, stem)
    part = tmp_path / f"{stem}-00002-of-00003.safetensors"
    expected = echo_eqx.load_dit(PYTORCH)
    for source in (tmp_path, index, part):
        assert same(echo_eqx.load_dit(source), expected)


def test_our_own_codec_loads_sharded(tmp_path, golden_codec):
    echo_eqx.save(golden_codec, tmp_path / "codec.safetensors")
    with safe_open(tmp_path / "codec.safetensors", "numpy") as file:
        metadata = file.metadata()
    index = write_sharded(tmp_path, load_file(tmp_path / "codec.safetensors"))
    for part in tmp_path.glob("model-*"):
        save_file(load_file(part), part, metadata)
    assert same(echo_eqx.load_codec(index), golden_codec)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index.write_text("{}"), "weight_map"),
        (lambda index: index.write_text("[" * 9000), "nested too deeply"),
        (lambda index: index.write_text('{"weight_map": {"a": 5}}'), "next to it, got '5'"),
        (lambda index: index.write_text('{"weight_map": {"a": "../x.safetensors"}}'), "got '../x"),
        (lambda index: index.write_text('{"weight_map": {"a": "/etc/x.safetensors"}}'), "got '/e"),
        (lambda index: index.write_text('{"weight_map": {"a": "x.safetensors"}}'), "x.safetensors"),
        (lambda index: next(index.parent.glob("*-00002-*")).unlink(), "00002-of-00003"),
        (
            lambda index: save_file({"x": np.ones(2)}, next(index.parent.glob("*-00002-*"))),
            "-00002-of-00003.safetensors, got none",
        ),
        (
            lambda index: index.write_text(index.read_text().replace('"out_proj.bias"', '"other"')),
            "expected tensor other",
        ),
    ],
)
def test_a_wrong_index_is_rejected_by_name(tmp_path, change, message):
    index = write_sharded(tmp_path, load_file(PYTORCH))
    change(index)
    with pytest.raises(EchoError, match=message):
        echo_eqx.load_dit(tmp_path)


# --- Files that are something else --------------------------------------------------------------


def test_models_of_the_wrong_kind_are_rejected_by_name(tmp_path, golden_codec):
    echo_eqx.save(golden_codec, tmp_path / "codec")
    echo_eqx.save(random_model(echo_eqx.EchoDiT, SMALL), tmp_path / "dit")
    with pytest.raises(EchoError, match="expected an EchoDiT, got a codec"):
        echo_eqx.load_dit(tmp_path / "codec")
    for path in (tmp_path / "dit", WEIGHTS_ONLY, PYTORCH):
        with pytest.raises(EchoError, match="safetensors of a codec, got"):
            echo_eqx.load_codec(path)
    with pytest.raises(EchoError, match="expected an EchoDiT"):
        echo_eqx.load_dit(PTH)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pkl", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x00" * 4096, b"\x80\x04K"])
@pytest.mark.parametrize("load", [echo_eqx.load_dit, echo_eqx.load_codec])
def test_files_of_another_kind_are_rejected_by_name(tmp_path, name, content, load):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EchoError, match=name):
        load(path)


@pytest.mark.parametrize("source", [WEIGHTS_ONLY, FULL_STATE, PYTORCH, PTH])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, 0.99999])
def test_truncated_files_are_rejected_by_name(tmp_path, source, share):
    data = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(data[: int(len(data) * share)])
    load = echo_eqx.load_codec if source.suffix == ".pth" else echo_eqx.load_dit
    with pytest.raises(EchoError, match=source.name):
        load(path)


def test_missing_and_ambiguous_sources_are_reported(tmp_path):
    with pytest.raises(EchoError, match="does not exist"):
        echo_eqx.load_dit(tmp_path / "none.safetensors")
    with pytest.raises(EchoError, match=r"expected weights .* got none"):
        echo_eqx.load_dit(tmp_path)
    for name in ("a.pkl", "b.pkl"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(EchoError, match=r"expected one file of weights, got 2 \(a\.pkl, b\.pkl\)"):
        echo_eqx.load_dit(tmp_path)


def test_a_model_larger_than_memory_is_rejected_before_it_is_read(tmp_path):
    # A real file of the right size that is mostly a hole, because its data is never read.
    config = dataclasses.replace(DIT_PRESETS["1.3B"], num_layers=4000)
    skeleton = jax.eval_shape(lambda key: echo_eqx.EchoDiT.init(config, key=key), jax.random.key(0))
    header, offset = {}, 0
    for name, leaf in named_leaves(skeleton).items():
        header[name] = {
            "dtype": "F32",
            "shape": leaf.shape,
            "data_offsets": [offset, offset + 4 * leaf.size],
        }
        offset += 4 * leaf.size
    header["__metadata__"] = {
        "format": "echo_eqx",
        "kind": "dit",
        "config": json.dumps(to_json(config)),
    }
    text = json.dumps(header).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    with pytest.raises(EchoError, match=r"needs \d+\.\d GiB for its weights; .* free"):
        echo_eqx.load_dit(path)
