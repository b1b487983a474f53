"""Five ONNX programs, for onnxruntime on any device and in the browser.

    text_encoder    text_ids, text_mask -> text_keys, text_values
    speaker_encoder speaker_latents, speaker_mask -> speaker_keys, speaker_values
    velocity        x, t, frame_mask, text_keys, text_values, text_mask, speaker_keys,
                    speaker_values, speaker_mask, speaker_scale -> velocity
    codec_encoder   audio -> mean, std
    codec_decoder   latents, message (if the codec has a watermark) -> audio

Batch and lengths are free. Axis names are those of `echo_eqx.config`; `speaker_mask` has one entry
per patch of `patch_size` latents, and `samples` are a multiple of the codec's hop. `config.json`
says the sizes and the recommended sampler settings.
"""

import json
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from echo_eqx.errors import UsageError, optional
from echo_eqx.export.models import Models, describe, warn_of_blockwise
from echo_eqx.files import write_json

T = TypeVar("T")


def write(models: Models, folder: Path, dtype: str) -> None:
    """Write the programs of the models at hand to `folder`, in float32.

    **Raises**: `EchoError` for another `dtype`, or if the package onnx is missing.
    """
    if dtype != "float32":
        raise UsageError(f"onnx: expected --dtype float32, got {dtype}")
    optional("onnx", "export")
    from echo_eqx.export.onnx import codec, dit

    about = describe(models)
    programs = []
    if models.dit is not None:
        warn_of_blockwise(models.dit, "onnx")
        model = _in_numpy(models.dit)
        programs += [dit.text_encoder(model), dit.speaker_encoder(model), dit.velocity(model)]
    if models.codec is not None:
        model = _in_numpy(models.need_codec("onnx"))
        programs += [codec.codec_encoder(model), codec.codec_decoder(model)]
    for program in programs:
        program.save(folder, {key: json.dumps(value) for key, value in about.items()})
    write_json(folder / "config.json", about)


def _in_numpy(model: T) -> T:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), model)
