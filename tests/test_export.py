"""Exports: what other runtimes load, read back bit for bit, in folders that are whole."""

import dataclasses
import io
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import GOLDEN, max_difference, random_model
from processes import call
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_dit import batched, inputs_of
from test_fish import WEIGHTS, write_base
from test_fuzz import CODEC

import echo_eqx
from echo_eqx import voice
from echo_eqx.config import DIT_PRESETS, DiTConfig, EncoderConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.export import flax, native, pytorch
from echo_eqx.export import folder as folder_module
from echo_eqx.export.folder import LISTING, write_folder
from echo_eqx.export.models import Models
from echo_eqx.json_data import to_json
from echo_eqx.model.int8 import dequantize, quantize
from echo_eqx.sharding.mesh import make_mesh
from echo_eqx.sharding.specs import parameter_spec
from echo_eqx.speech.codec import find_codec
from echo_eqx.train.config import TrainConfig
from echo_eqx.train.restore import _from_weights
from echo_eqx.train.state import sharded_abstract_state
from echo_eqx.trees import leaf_names, named_leaves
from echo_eqx.weights.checkpoint.retention import Retention
from echo_eqx.weights.checkpoint.writer import CheckpointWriter
from echo_eqx.weights.native import DTYPES

BLOCKWISE = GOLDEN / "blockwise" / "weights.safetensors"
SEEDS = range(3)


def random_config(seed: int, **fields) -> DiTConfig:
    """Sizes that no two models share."""
    rng = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    def encoder() -> EncoderConfig:
        heads = size(1, 3)
        return EncoderConfig(heads * 2 * size(1, 3), size(1, 3), heads, size(3, 17))

    heads = 2 * size(1, 2)
    config = DiTConfig(
        model_dim=heads * 2 * size(1, 4),
        num_layers=size(1, 3),
        num_heads=heads,
        mlp_dim=size(3, 31),
        text=encoder(),
        speaker=encoder(),
        latent_dim=size(1, 9),
        patch_size=size(1, 5),
        time_embed_dim=2 * size(1, 8),
        adaln_rank=size(1, 6),
    )
    return dataclasses.replace(config, **fields)


def random_dit(seed: int, **fields) -> echo_eqx.EchoDiT:
    return random_model(echo_eqx.EchoDiT, random_config(seed, **fields), seed=seed)


def same(a, b) -> bool:
    ours, theirs = named_leaves(a), named_leaves(b)
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name])
        for name in ours
    )


def made(tmp_path: Path, form, models: Models, dtype: str = "float32") -> Path:
    folder = tmp_path / f"{form.__name__.rpartition('.')[2]}-{dtype}"
    folder.mkdir()
    form.write(models, folder, dtype)
    return folder


# --- Round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, dtype", list(enumerate([*DTYPES, "float32"])))
def test_native_reads_back_bit_for_bit_in_one_file_or_in_parts(tmp_path, seed, dtype, monkeypatch):
    dit = random_dit(seed, blockwise=seed % 2 == 1, speaker_proj_scale=0.7)
    codec = random_model(echo_eqx.DACVAE, CODEC, seed=seed)
    if seed < 3:
        monkeypatch.setattr(native, "MAX_FILE_BYTES", 10 ** (seed + 2))
    folder = made(tmp_path, native, Models(dit, codec), dtype)
    for model, load in ((dit, echo_eqx.load_dit), (codec, echo_eqx.load_codec)):
        again = load(folder)
        assert again.config == model.config
        assert same(again, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), model))
    if seed < 2:
        assert len(list(folder.glob("dit-*-of-*.safetensors"))) > 2
        index = json.loads((folder / "dit.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * echo_eqx.num_parameters(dit) * (
            DTYPES[dtype].itemsize / 4
        )
    config = json.loads((folder / "config.json").read_text())
    assert config["dit"]["config"]["model_dim"] == dit.config.model_dim


@pytest.mark.parametrize("seed", SEEDS)
def test_pytorch_reads_back_bit_for_bit(tmp_path, seed):
    # As exact as the factor 6 lets the reference projection be.
    scale = 1 / 6 if seed % 2 else 1.0
    dit = random_dit(seed, blockwise=seed < 2, speaker_proj_scale=scale)
    folder = made(tmp_path, pytorch, Models(dit))
    again = echo_eqx.load_dit(folder)
    assert again.config == dataclasses.replace(dit.config, speaker_proj_scale=1 / 6)
    for name, leaf in named_leaves(dit).items():
        factor = np.float32(6 * scale if "_encoder.in_proj" in name else 1)
        assert np.array_equal(named_leaves(again)[name], leaf * factor), name
    config = json.loads((folder / "config.json").read_text())
    assert config["speaker_intermediate_size"] == dit.config.speaker.mlp_dim
    twice = made(tmp_path / "pytorch-float32", pytorch, Models(again))
    files = [load_file(place / "pytorch_model.safetensors") for place in (folder, twice)]
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])


def test_pytorch_has_the_tensors_of_the_original_and_computes_the_same(tmp_path):
    original = load_file(BLOCKWISE)
    folder = made(tmp_path, pytorch, Models(echo_eqx.load_dit(BLOCKWISE)))
    exported = load_file(folder / "pytorch_model.safetensors")
    assert set(exported) == set(original)
    assert all(np.array_equal(exported[name], original[name]) for name in original)

    dit = random_dit(7)
    again = echo_eqx.load_dit(made(tmp_path / "pytorch-float32", pytorch, Models(dit)))
    rng, patch = np.random.default_rng(0), dit.config.patch_size
    shape = (2 * patch, dit.config.latent_dim)
    x, speaker = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in "ab")
    ones = jnp.ones(2 * patch, bool)
    inputs = x, jnp.float32(0.4), jnp.arange(2 * patch), ones, speaker, ones
    assert max_difference(dit(*inputs), again(*inputs)) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_flax_reads_back_bit_for_bit_from_both_files(tmp_path, seed):
    dit = random_dit(seed)
    folder = made(tmp_path, flax, Models(dit))
    for source in (folder, folder / "model.pkl", folder / "model.safetensors"):
        again = echo_eqx.load_dit(source)
        assert again.config == dit.config and same(again, dit)


def test_the_flax_pickle_holds_plain_dicts_of_arrays(tmp_path):
    dit = random_dit(0)
    for dtype in DTYPES:
        folder = made(tmp_path, flax, Models(dit), dtype)
        content = pickle.loads((folder / "model.pkl").read_bytes())
        assert list(content) == ["params", "opt_state", "step", "samples_seen"]
        assert content["opt_state"] is None and content["step"] == content["samples_seen"] == 0

        def visit(node, dtype=dtype):
            if type(node) is dict:
                return sum(map(visit, node.values()))
            assert type(node) is np.ndarray and node.dtype == DTYPES[dtype]
            return node.size

        assert visit(content["params"]) == echo_eqx.num_parameters(dit)
        rounded = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype).astype(np.float32), dit)
        assert same(echo_eqx.load_dit(folder / "model.pkl"), rounded)


def test_the_published_flax_checkpoint_comes_back_as_it_was(tmp_path, golden_dit):
    path = GOLDEN / "dit_tiny" / "weights_only.pkl"
    published, ours = pickle.loads(path.read_bytes()), made(tmp_path, flax, Models(golden_dit))
    exported = pickle.loads((ours / "model.pkl").read_bytes())
    assert jax.tree.structure(published["params"]) == jax.tree.structure(exported["params"])
    assert jax.tree.all(jax.tree.map(np.array_equal, published["params"], exported["params"]))


def test_a_scaled_reference_projection_is_folded_for_flax(tmp_path):
    dit = random_dit(1, speaker_proj_scale=1 / 6)
    again = echo_eqx.load_dit(made(tmp_path, flax, Models(dit)))
    assert again.config == dataclasses.replace(dit.config, speaker_proj_scale=1.0)
    scaled = dit.speaker_encoder.in_proj.weight * np.float32(1 / 6)
    assert np.array_equal(again.speaker_encoder.in_proj.weight, scaled)


# --- int8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_int8_is_what_its_description_says_and_reads_back_bit_for_bit(tmp_path, seed):
    dit = random_dit(seed, blockwise=seed % 2 == 0)
    folder = made(tmp_path, native, Models(dit), "int8")
    tensors = load_file(folder / "model.safetensors")
    leaves, scaled = named_leaves(dit), 0
    for name, array in tensors.items():
        if name.endswith(".scale"):
            continue
        if array.dtype == np.int8:
            scale = tensors[f"{name.removesuffix('weight')}scale"]
            assert scale.dtype == np.float32 and scale.shape == (array.shape[0], array.shape[2])
            error = np.abs(array * scale[:, None] - leaves[name])
            assert (error <= 0.5001 * scale[:, None]).all()
            assert (np.abs(array).max(axis=1) == 127).all()
            scaled += 1
        else:
            is_adaln = "_adaln." in name or "time_conditioner" in name
            is_half = is_adaln and name.endswith("weight")
            assert array.dtype == (DTYPES["bfloat16"] if is_half else np.float32), name
    # 5 + 3 layers of a block of an encoder, 9 + 3 of the DiT, and 2 for the latents.
    assert scaled == (12 + 2 * 8 if seed % 2 else 14 + 3 * 8)
    again = echo_eqx.load_dit(folder)
    assert same(again, quantize(dit))
    # What was quantized once is the same when it is quantized again.
    assert same(quantize(dequantize(again)), again)
    echo_eqx.save(again, tmp_path / "float.safetensors")
    echo_eqx.save(echo_eqx.load_dit(tmp_path / "float.safetensors"), tmp_path / "b", dtype="int8")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_int8_takes_3_5_times_less_memory():
    def num_bytes(make) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(make))

    for preset in ("1.3B", "840M", "2.4B"):
        init = lambda: echo_eqx.EchoDiT.init(DIT_PRESETS[preset], key=jax.random.key(0))  # noqa: B023, E731
        full, small = (model := jax.eval_shape(init)), quantize(model)
        assert num_bytes(full) > 3.5 * num_bytes(small), preset


def relative_error(a, b) -> float:
    return float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(b)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_velocity_of_int8_is_within_two_percent(
    golden_dit, dit_cases, blockwise_dit, blockwise_cases, dtype
):
    models = ((golden_dit, dit_cases), (blockwise_dit, blockwise_cases))
    for dit, cases in models[: 2 if dtype == jnp.float32 else 1]:
        velocity = batched(echo_eqx.cast(quantize(dit), dtype), *inputs_of(cases))
        assert velocity.dtype == jnp.float32
        assert 1e-4 < relative_error(velocity, cases["velocity"]) < 0.02


def test_the_sampler_runs_on_int8(golden_dit, dit_cases):
    # The settings of the golden vectors; the rounding errors of eight steps add up.
    small = quantize(golden_dit)
    assert small.blocks.attention.wq.weight.dtype == jnp.int8
    settings = echo_eqx.SamplerSettings(
        steps=8, cfg_scale=3.0, speaker_scale=5.0, cfg_min_t=0.5, noise_scale=0.9, start_t=0.999
    )
    names = ("text_ids", "text_mask", "speaker_latents", "speaker_mask")
    latents = echo_eqx.sample(
        small, *(dit_cases[n] for n in names), noise=dit_cases["noise"], settings=settings
    )
    assert relative_error(latents, dit_cases["sample_independent"]) < 0.05


def test_int8_layers_are_sharded_as_their_float_layers_are():
    dit = quantize(random_dit(0, blockwise=True))
    for name in leaf_names(dit):
        if name.endswith(".scale"):
            weight = parameter_spec(f"{name.removesuffix('scale')}weight")
            assert tuple(parameter_spec(name)) == (None, weight[2])


def test_a_run_starts_from_int8_weights_as_floats(tmp_path, monkeypatch):
    dit = random_dit(0)
    echo_eqx.save(dit, tmp_path / "model.safetensors", dtype="int8")
    monkeypatch.setitem(DIT_PRESETS, "small", dit.config)
    config = TrainConfig(model="small")
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    abstract = sharded_abstract_state(dit.config, config.optimizer, mesh)
    state = _from_weights(str(tmp_path), config, abstract)
    assert same(state.model, dequantize(quantize(dit)))


def test_damaged_int8_is_named(tmp_path):
    dit = random_dit(0)
    path = tmp_path / "model.safetensors"
    for name, change, message in (
        ("blocks.mlp.w1.weight", lambda x: x.astype(np.float32), "expected int8, got float32"),
        ("out_proj.weight", lambda x: x.astype(np.int8), "floating-point numbers, got int8"),
        ("blocks.mlp.w1.scale", lambda x: x * np.float32(np.nan), "not finite"),
        ("blocks.mlp.w1.scale", lambda x: x[:, :-1], "expected shape"),
        ("blocks.mlp.w1.scale", None, "w1.scale is missing"),
    ):
        echo_eqx.save(dit, path, dtype="int8")
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        array = tensors.pop(name)
        save_file(tensors | ({name: change(array)} if change else {}), path, metadata)
        with pytest.raises(EchoError, match=message):
            echo_eqx.load_dit(path)


# --- What a format cannot hold ------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_named(tmp_path, caplog):
    dit, codec = random_dit(1), random_model(echo_eqx.DACVAE, CODEC)
    blockwise = random_dit(1, blockwise=True)
    huge = eqx.tree_at(lambda d: d.speaker_encoder.in_proj.bias, dit, replace_fn=lambda x: x + 2e4)
    for form, models, dtype, message in (
        (flax, Models(blockwise), "float32", "flax: it has no place for latent_encoder"),
        (
            flax,
            Models(random_dit(1, norm_eps=1e-6)),
            "float32",
            "expected norm_eps 1e-5, got 1e-06",
        ),
        (pytorch, Models(dit), "int8", "pytorch: expected --dtype float32, bfloat16, float16, got"),
        (pytorch, Models(codec=codec), "float32", "pytorch: expected an EchoDiT, got a codec"),
        (pytorch, Models(huge), "float16", r"speaker_encoder\.in_proj\.bias .* float16 cannot"),
        (native, Models(codec=codec), "int8", "int8: expected an EchoDiT, got a codec"),
    ):
        with pytest.raises(EchoError, match=message):
            made(tmp_path, form, models, dtype)
        next(tmp_path.iterdir()).rename(tmp_path.parent / f"{tmp_path.name}-{hash(message)}")
    made(tmp_path, pytorch, Models(dit, codec))
    assert "pytorch holds an EchoDiT only; the codec is left out" in caplog.text


# --- The command --------------------------------------------------------------------------------


class State(NamedTuple):
    """What a checkpoint is made of."""

    step: jax.Array
    model: echo_eqx.EchoDiT
    ema: echo_eqx.EchoDiT


def test_a_run_is_exported_by_its_average_in_full_precision(tmp_path):
    config = random_config(0)
    models = [random_model(echo_eqx.EchoDiT, config, seed=seed) for seed in (0, 1)]
    state = State(jax.device_put(np.int32(5)), *models)
    options = {"launch_id": "0a" * 8, "process": 0, "num_processes": 1, "export": True}
    writer = CheckpointWriter(tmp_path / "run", retention=Retention(), **options)
    manifest = {"step": 5, "samples_seen": 8, "model": to_json(config), "seed": 0, "data": {}}
    writer.save(state, manifest, {"0": [0, 0, 5]})
    writer.wait()
    done = call("export", tmp_path / "run", "--to", "native", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert same(echo_eqx.load_dit(tmp_path / "out"), state.ema)
    listing = json.loads((tmp_path / "out" / LISTING).read_text())
    assert listing["dit"]["file"] == "step_000000005" and listing["format"] == "native"
    assert set(listing["files"]) == {"model.safetensors", "config.json", "README.md"}


def test_both_models_are_in_one_folder_and_speak(tmp_path):
    folder = tmp_path / "out"
    done = call("export", "voice", "--to", "native", "--output", folder, "--dtype", "int8")
    assert done.returncode == 0, done.stderr
    dit, codec = echo_eqx.load_dit(folder), echo_eqx.load_codec(folder)
    assert same(codec, echo_eqx.load_codec("voice"))
    assert same(dit, quantize(echo_eqx.load_dit("voice")))
    assert dit.generation == echo_eqx.load_dit("voice").generation
    assert find_codec(dit, None, str(folder)) == (str(folder), folder / "codec.safetensors")
    again = call("export", folder, "--to", "native", "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert same(echo_eqx.load_dit(tmp_path / "again"), dequantize(dit))
    assert same(echo_eqx.load_codec(tmp_path / "again"), codec)


def test_echo_tts_base_and_its_codec_are_exported_together(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "out"
    write_base(base)
    for words in ([], ["--codec", WEIGHTS, "--overwrite"]):
        done = call("export", base, "--to", "native", "--output", folder, *words)
        assert done.returncode == 0, done.stderr
        assert same(echo_eqx.load_dit(folder), echo_eqx.load_dit(base))
        assert same(echo_eqx.load_codec(folder), echo_eqx.load_codec(WEIGHTS, pca=base))
    assert "44,100 Hz, mono" in (folder / "README.md").read_text()
    done = call("export", base, "--to", "dacvae", "--output", tmp_path / "dacvae")
    assert done.returncode == 2 and "dacvae: expected a DACVAE, got a FishDAC" in done.stderr


def test_sources_that_do_not_go_together_are_named(tmp_path, golden_codec):
    echo_eqx.save(golden_codec, tmp_path / "codec")
    for words, message in (
        (["nothing/here.pkl", "--to", "native"], "does not exist"),
        ([tmp_path / "codec", "--to", "native", "--codec", "voice"], "expected an EchoDiT as SOUR"),
        ([tmp_path / "codec", "--to", "pytorch"], "pytorch: expected an EchoDiT, got a codec"),
        ([tmp_path / "codec", "--to", "native", "--dtype", "int8"], "no linear layers"),
    ):
        done = call("export", *words, "--output", tmp_path / "out")
        assert done.returncode != 0 and message in done.stderr
        assert done.stderr.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["codec"]


# --- The Hub ------------------------------------------------------------------------------------


def test_an_export_is_pushed_with_a_card_and_comes_back(tmp_path, hub):
    repo, folder = "owner/small-voice", tmp_path / "out"
    words = ["voice", "--output", folder, "--push", repo, "--overwrite"]
    done = call("export", *words, "--to", "native")
    assert done.returncode == 0, done.stderr
    assert hub.private[repo] and "it is private until you change its settings" in done.stderr
    there = hub.repos[repo]
    names = {path.name for path in folder.iterdir()}
    assert names == {"dit.safetensors", "codec.safetensors", "config.json", "README.md", LISTING}
    assert all(there[name] == (folder / name).read_bytes() for name in names)
    card = there["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["language"] == "en"
    assert front["library_name"] == "echo_eqx" and front["pipeline_tag"] == "text-to-speech"
    assert "# small-voice\n" in card and f"infer --checkpoint {repo} --text" in card
    for fact in (
        "24,000 Hz",
        "32 channels",
        "25 frames a second",
        "at most 64 bytes",
        f"{voice.REFERENCE_LUFS:g} LUFS",
    ):
        assert fact in card, fact

    # A second export of another form: what it replaces goes, what others put there stays.
    there |= {"mine.txt": b"mine", "README.md": there["README.md"].replace(b"apache-2.0", b"mit")}
    done = call("export", *words, "--to", "flax")
    assert done.returncode == 0, done.stderr
    names = {"model.pkl", "model.safetensors", "README.md", LISTING}
    assert hub.repos[repo].keys() - {".gitattributes"} == names | {"mine.txt"}
    card = hub.repos[repo]["README.md"].decode()
    assert "license: mit" in card and "flax, float32" in card and "native, float" not in card
    commits = len(hub.commits)
    assert call("export", *words, "--to", "flax").returncode == 0
    assert len(hub.commits) == commits  # nothing had changed


def test_a_name_or_token_that_is_wrong_is_one_sentence(tmp_path, hub, monkeypatch):
    words = ["voice", "--to", "native", "--output", tmp_path / "out"]
    for more, message in (
        (["--push", "name"], "--push: expected owner/name of a model on the Hub, got 'name'"),
        (["--license", "a: b"], "--license: expected a name such as the Hub has"),
    ):
        done = call("export", *words, *more)
        assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = call("export", *words, "--push", "owner/x")
    assert done.returncode == 1 and "cannot push to owner/x: the Hub answered 401" in done.stderr
    assert done.stderr.count("\n") == 1 and (tmp_path / "out" / LISTING).is_file()


# --- The folder ---------------------------------------------------------------------------------


def write_text(folder: Path, text: str = "new", name: str = "a.txt") -> None:
    (folder / name).write_text(text)


def put(folder: Path, text: str = "new", overwrite: bool = False, needed: int = 9) -> None:
    write_folder(
        folder,
        lambda place: write_text(place, text),
        overwrite=overwrite,
        needed=needed,
        origin={"format": "text"},
    )


def test_an_export_is_replaced_only_when_asked(tmp_path):
    folder = tmp_path / "deep" / "out"
    put(folder, "one")
    with pytest.raises(UsageError, match="exists; give --overwrite"):
        put(folder, "two")
    assert (folder / "a.txt").read_text() == "one"
    put(folder, "two", overwrite=True)
    assert (folder / "a.txt").read_text() == "two"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: write_text(folder, name="mine.txt"), "mine.txt in it was not written by"),
        (lambda folder: write_text(folder, "longer"), "a.txt in it was changed"),
        (lambda folder: (folder / "a.txt").unlink(), "a.txt is listed, but is not in it"),
        (lambda folder: (folder / LISTING).unlink(), "a.txt in it was not written by this command"),
        (lambda folder: (folder / LISTING).write_text("[]"), "expected the listing of an export"),
        (lambda folder: (folder / "link").symlink_to("/etc"), "link in it was not written by"),
        (
            lambda folder: ((folder / "sub").mkdir(), write_text(folder / "sub", name="b")),
            "sub/b in it was not written by",
        ),
    ],
)
def test_nothing_but_an_export_of_ours_is_replaced(tmp_path, change, message):
    folder = tmp_path / "out"
    put(folder, "one")
    change(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(EchoError, match=message):
        put(folder, "two", overwrite=True)
    assert sorted(folder.rglob("*")) == before


def test_links_and_files_are_never_replaced(tmp_path):
    put(tmp_path / "out", "one")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(UsageError, match="expected a folder to write, got a link or a file"):
            put(tmp_path / name, overwrite=True)
    put(tmp_path / "out", "two", overwrite=True)


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path):
    with pytest.raises(EchoError, match=r"needs \d+\.\d\d GB; its disk has .* GB free"):
        put(tmp_path / "out", needed=2**60)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_old_export(tmp_path):
    put(tmp_path / "out", "one")

    def fail(folder: Path) -> None:
        write_text(folder)
        raise EchoError("no")

    with pytest.raises(EchoError, match="no"):
        write_folder(tmp_path / "out", fail, overwrite=True, needed=1, origin={})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "one"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_a_long_export_is(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "BAR_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())

    def write(folder: Path) -> None:
        write_text(folder, "x" * 600)
        time.sleep(0.5)
        write_text(folder, "x" * 400, "b.txt")

    write_folder(tmp_path / "out", write, overwrite=False, needed=1000, origin={})
    assert "writing:  60%" in sys.stderr.getvalue()


SLOW = """
import sys, time
from pathlib import Path
from echo_eqx.export.folder import write_folder

def write(folder):
    (folder / "a.txt").write_text("half")
    print("writing", flush=True)
    time.sleep(60)

write_folder(Path(sys.argv[1]), write, overwrite=True, needed=1, origin={})
"""


def test_a_killed_export_leaves_the_old_one_and_is_cleared_away_by_the_next(tmp_path):
    folder = tmp_path / "out"
    put(folder, "one")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    put(folder, "two", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2  # that of the other export stays while it runs
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "a.txt").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 2
    put(folder, "three", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
