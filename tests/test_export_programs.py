"""Exported programs compute what our own code computes, in a process that cannot import it."""

import dataclasses
import json
import re
import subprocess
import sys
import wave
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import max_difference, random_model
from onnx.checker import check_model
from onnx.reference import ReferenceEvaluator
from programs import (
    CODEC,
    DIT,
    SETTINGS,
    codec_cases,
    context_case,
    small_models,
    velocity_case,
)
from safetensors import safe_open

from echo_eqx import EchoDiT
from echo_eqx.errors import UsageError
from echo_eqx.export import onnx, stablehlo
from echo_eqx.export.models import Models
from echo_eqx.flow.sampler import sample
from echo_eqx.layers.rotary import rotary_angles
from echo_eqx.speech.codec import silence_latent
from echo_eqx.speech.joining import decode_with_silence
from echo_eqx.trees import cast, leaf_names

# Runs the programs in a folder on the inputs in a file, and prints the largest differences from the
# outputs in that file. Then speaks.
ELSEWHERE = """
import sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("echo_eqx", "equinox", "jaxtyping"):
            raise ImportError(name)

sys.meta_path.insert(0, NotHere())
folder, cases, text, wav, voice = sys.argv[1:]
sys.path.insert(0, folder)
import numpy as np
import run

cases = np.load(cases)
for program, about in run.ABOUT["programs"].items():
    if program == "decode":
        continue
    out = run.load(program)(*(cases[f"{program}/{of['name']}"] for of in about["inputs"]))
    out = out if isinstance(out, (tuple, list)) else [out]
    for of, array in zip(about["outputs"], out, strict=True):
        expected = cases[f"{program}/{of['name']}"]
        assert array.dtype == expected.dtype and array.shape == expected.shape
        print(program, of["name"], np.max(np.abs(np.asarray(array) - expected)))
run.main(text, wav, voice)
"""
TEXT = "[S1] hello"


@pytest.fixture(scope="module")
def models() -> Models:
    return small_models()


@pytest.fixture(scope="module")
def programs(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    stablehlo.write(models, folder, "float32")
    return folder


@pytest.fixture(scope="module")
def cases(models):
    """Inputs and outputs by program."""
    batch, frames = 2, 4
    context = context_case(models.dit, batch, text=11, patches=3)
    return {
        "context": context,
        "velocity": velocity_case(models.dit, batch, frames, context[0] | context[1]),
        **codec_cases(models.codec, batch, frames),
    }


def write_wav(path: Path, audio: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, CODEC.sample_rate, 0, "NONE", ""))
        file.writeframes((audio * 32767).astype("<i2").tobytes())


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        assert file.getframerate() == CODEC.sample_rate
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(2**15)


def spoken(models: Models, voice: np.ndarray) -> np.ndarray:
    """What `run.py` should say, from the same noise."""
    dit, codec = models.dit, models.codec
    ids = np.frombuffer(b"\0" + TEXT.encode(), np.uint8).astype(np.int32)[None]
    reference = codec.encode(voice)[0][None]
    noise = np.random.default_rng(42).standard_normal((DIT.max_frames, DIT.latent_dim), np.float32)
    latents = sample(
        dit,
        ids,
        np.ones(ids.shape, bool),
        reference,
        np.ones(reference.shape[:2], bool),
        noise=noise[None],
        settings=SETTINGS,
    )
    return decode_with_silence(codec, np.asarray(latents[0]), None, silence_latent(codec))


def test_programs_run_without_this_package(models, programs, cases, tmp_path):
    arrays = {
        f"{program}/{name}": array
        for program, (inputs, outputs) in cases.items()
        if program != "decode"  # run.py uses it
        for name, array in (inputs | outputs).items()
    }
    np.savez(tmp_path / "cases.npz", **arrays)
    # In other lengths, and in batches of one and three.
    write_wav(tmp_path / "voice.wav", 0.2 * np.sin(np.arange(8 * CODEC.hop)))
    files = [tmp_path / "cases.npz", TEXT, tmp_path / "out.wav", tmp_path / "voice.wav"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, programs, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(differences) == 4 + 1 + 2 + 1
    assert max(differences) < 1e-5, done.stdout
    audio = read_wav(tmp_path / "out.wav")
    expected = np.clip(spoken(models, read_wav(tmp_path / "voice.wav")), -1, 1)
    assert max_difference(audio, expected) < 1e-4  # 16 bits


def test_every_weight_is_in_the_program_that_reads_it(models, programs):
    about = json.loads((programs / "programs.json").read_text())["programs"]
    weights = {name: set(program["weights"]) for name, program in about.items()}
    both = {"dit.blocks.attention.k_norm.weight"}
    assert weights["context"] & weights["velocity"] == both
    assert weights["decode"] < weights["decode_watermarked"]
    assert not weights["encode"] & weights["decode_watermarked"]
    leaves = [f"dit.{name}" for name in leaf_names(models.dit)]
    leaves += [f"codec.{name}" for name in leaf_names(models.codec)]
    assert set.union(*weights.values()) == set(leaves)
    with safe_open(programs / "weights.safetensors", "numpy") as file:
        assert set(file.keys()) == set(leaves)


def test_programs_hold_no_kernel_of_the_exporting_machine(monkeypatch):
    """On a GPU our own bfloat16 attention is a cuDNN call, which other platforms do not have."""
    config = dataclasses.replace(DIT, model_dim=32)
    dit = cast(random_model(EchoDiT, config), jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program = stablehlo.dit_programs(config, "bfloat16")["velocity"]
    exported, about = stablehlo.export_program(dit, program, "dit")
    assert exported.platforms == ("cpu", "cuda", "tpu")
    calls = set(re.findall(r"custom_call @([\w.]+)", exported.mlir_module()))
    assert calls == {"shape_assertion"}
    (keys,) = (of for of in about["inputs"] if of["name"] == "text_keys")
    assert keys == {"name": "text_keys", "shape": ["b", 3, "s", 4, 8], "dtype": "bfloat16"}


def test_onnx_programs_compute_what_we_compute(models, cases, tmp_path):
    onnx.write(models, tmp_path, "float32")
    of = {
        "text_encoder": "context",
        "speaker_encoder": "context",
        "velocity": "velocity",
        "codec_encoder": "encode",
        "codec_decoder": "decode_watermarked",
    }
    for name, case in of.items():
        inputs, outputs = cases[case]
        check_model(tmp_path / f"{name}.onnx", full_check=True)
        program = ReferenceEvaluator(str(tmp_path / f"{name}.onnx"))
        given = {key: inputs[key] for key in program.input_names}
        for key in given.keys() & {"text_ids", "message"}:
            given[key] = given[key].astype(np.int64)
        names = program.output_names
        for key, array in zip(names, program.run(names, given), strict=True):
            assert max_difference(array, outputs[key]) < 1e-4, (name, key)


def test_other_dtypes_are_refused(tmp_path):
    for form, expected in ((stablehlo, "float32 or bfloat16"), (onnx, "float32")):
        with pytest.raises(UsageError, match=f"expected --dtype {expected}, got float16"):
            form.write(Models(), tmp_path, "float16")


def test_angles_of_a_symbolic_length_equal_those_of_a_known_one():
    length, head_dim = 2000, 12
    known = rotary_angles(length, head_dim)
    symbolic = rotary_angles(np.int64(length), head_dim)  # not an int, as a symbolic one
    assert max_difference(np.cos(known), np.cos(symbolic)) < 3e-6
    assert max_difference(np.sin(known), np.sin(symbolic)) < 3e-6
