"""ONNX programs give the same numbers in onnxruntime."""

import numpy as np
import pytest
from conftest import max_difference
from programs import codec_cases, context_case, small_models, velocity_case

import echo_eqx
from echo_eqx.export import onnx
from echo_eqx.export.models import Models

pytestmark = pytest.mark.peers
runtime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
SIZES = [(1, 5, 2, 9), (3, 11, 1, 4), (2, 40, 13, 130)]
"""Batch, bytes of text, patches of the reference, frames."""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    models = small_models()
    onnx.write(models, folder, "float32")
    return folder, models


def largest_difference(folder, name: str, inputs, outputs) -> float:
    session = runtime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    given = {
        of.name: inputs[of.name].astype(np.int64) if of.type == "tensor(int64)" else inputs[of.name]
        for of in session.get_inputs()
    }
    names = [of.name for of in session.get_outputs()]
    found = session.run(names, given)
    return max(max_difference(a, outputs[n]) for n, a in zip(names, found, strict=True))


def check_dit(folder, dit, batch: int, text: int, patches: int, frames: int) -> None:
    inputs, outputs = context_case(dit, batch, text, patches)
    assert largest_difference(folder, "text_encoder", inputs, outputs) < 1e-4
    assert largest_difference(folder, "speaker_encoder", inputs, outputs) < 1e-4
    case = velocity_case(dit, batch, frames, inputs | outputs)
    assert largest_difference(folder, "velocity", *case) < 1e-4


def check_codec(folder, codec, batch: int, frames: int) -> None:
    cases = codec_cases(codec, batch, frames)
    decode = cases["decode" if codec.watermark is None else "decode_watermarked"]
    assert largest_difference(folder, "codec_encoder", *cases["encode"]) < 1e-4
    assert largest_difference(folder, "codec_decoder", *decode) < 1e-4


@pytest.mark.parametrize("batch, text, patches, frames", SIZES)
def test_onnxruntime_computes_what_we_compute(small, batch, text, patches, frames):
    folder, models = small
    check_dit(folder, models.dit, batch, text, patches, frames)
    check_codec(folder, models.codec, batch, frames)


def test_models_of_the_golden_files(tmp_path, golden_dit, golden_codec, blockwise_dit, caplog):
    """The codec has all the strides and the watermark of the published one."""
    onnx.write(Models(golden_dit, golden_codec), tmp_path, "float32")
    check_dit(tmp_path, golden_dit, 2, 9, 3, 21)
    check_codec(tmp_path, golden_codec, 2, 3)

    assert "left out" not in caplog.text
    onnx.write(Models(blockwise_dit), tmp_path, "float32")
    check_dit(tmp_path, blockwise_dit, 2, 9, 3, 21)
    assert "left out: latent_encoder" in caplog.text


def test_the_small_voice(tmp_path):
    models = Models(echo_eqx.load_dit("voice"), echo_eqx.load_codec("voice"))
    onnx.write(models, tmp_path, "float32")
    check_dit(tmp_path, models.dit, 2, 60, 12, 80)
    check_codec(tmp_path, models.codec, 1, 20)


def test_weights_above_the_limit_are_in_their_own_file(tmp_path, monkeypatch):
    from echo_eqx.export.onnx import graph

    monkeypatch.setattr(graph, "EXTERNAL_BYTES", 1000)
    models = small_models()
    onnx.write(models, tmp_path, "float32")
    assert (tmp_path / "velocity.onnx").stat().st_size < 60_000
    assert (tmp_path / "velocity.onnx.data").exists()
    check_dit(tmp_path, models.dit, 2, 5, 2, 7)
