"""The package `gguf` reads what is written for echo-tts-cpp, with all that its loader looks up.

python -m pytest -m peers tests/test_peers_gguf.py
"""

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from test_export_ports import LARGE, random_model

import echo_eqx
from echo_eqx.export import gguf as gguf_export
from echo_eqx.export.models import Models

pytestmark = pytest.mark.peers

# github.com/Cirius0310/echo-tts-cpp, cpp/src/echo_model.cpp, November 2026: `load_hparams`,
# `load_pca_state` and `load_weights`.
FIELDS = {
    **{
        f"echo.{name}": GGUFValueType.UINT32
        for name in (
            "latent_size model_size num_layers num_heads intermediate_size text_vocab_size "
            "text_model_size text_num_layers text_num_heads text_intermediate_size "
            "speaker_patch_size speaker_model_size speaker_num_layers speaker_num_heads "
            "speaker_intermediate_size timestep_embed_size adaln_rank"
        ).split()
    },
    "echo.norm_eps": GGUFValueType.FLOAT32,
    "echo.include_blockwise": GGUFValueType.BOOL,
    "pca.latent_scale": GGUFValueType.FLOAT32,
}
ENCODER_LAYER = (
    "attention.wq attention.wk attention.wv attention.wo attention.gate attention.q_norm "
    "attention.k_norm mlp.w1 mlp.w3 mlp.w2 attention_norm mlp_norm"
).split()
DECODER_LAYER = (
    "attention.wq attention.wk attention.wv attention.wk_text attention.wv_text "
    "attention.wk_speaker attention.wv_speaker attention.q_norm attention.k_norm attention.gate "
    "attention.wo mlp.w1 mlp.w3 mlp.w2"
).split()


def tensors_of_the_loader(fields: dict[str, int]) -> set[str]:
    """Every name that the loader looks up, for a file with these fields."""

    def encoder(prefix: str, num_layers: int) -> set[str]:
        return {
            f"{prefix}.blocks.{i}.{layer}.weight"
            for i in range(num_layers)
            for layer in ENCODER_LAYER
        }

    names = {"pca.components", "pca.mean", "text_encoder.text_embedding.weight"}
    names |= encoder("text_encoder", fields["echo.text_num_layers"])
    sides = ["speaker", "latent"] if fields["echo.include_blockwise"] else ["speaker"]
    for side in sides:
        names |= encoder(f"{side}_encoder", fields["echo.speaker_num_layers"])
        names |= {f"{side}_encoder.in_proj.{field}" for field in ("weight", "bias")}
        names |= {f"{side}_norm.weight"}
    names |= {f"cond_module.{i}.weight" for i in (0, 2, 4)}
    names |= {f"{name}.{field}" for name in ("in_proj", "out_proj") for field in ("weight", "bias")}
    names |= {"text_norm.weight", "out_norm.weight"}
    for i in range(fields["echo.num_layers"]):
        latent = ["attention.wk_latent", "attention.wv_latent"] * fields["echo.include_blockwise"]
        names |= {f"blocks.{i}.{layer}.weight" for layer in [*DECODER_LAYER, *latent]}
        for adaln in ("attention_adaln", "mlp_adaln"):
            for part in ("shift", "scale", "gate"):
                names |= {f"blocks.{i}.{adaln}.{part}_{side}.weight" for side in ("down", "up")}
                names |= {f"blocks.{i}.{adaln}.{part}_up.bias"}
    return names


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("model", ["golden", "blockwise", "large"])
def test_the_file_has_what_the_loader_looks_up(tmp_path, golden_dit, blockwise_dit, dtype, model):
    dit = {
        "golden": golden_dit,
        "blockwise": blockwise_dit,
        "large": random_model(echo_eqx.EchoDiT, LARGE) if model == "large" else None,
    }[model]
    gguf_export.write(Models(dit), tmp_path, dtype)
    reader = gguf.GGUFReader(tmp_path / gguf_export.FILE)
    assert reader.fields["general.architecture"].contents() == "echo-tts"
    assert {key: reader.fields[key].types[0] for key in FIELDS} == FIELDS
    fields = {key: reader.fields[key].contents() for key in FIELDS}
    assert fields["echo.model_size"] == dit.config.model_dim

    assert {tensor.name for tensor in reader.tensors} == tensors_of_the_loader(fields)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in found.items():
        assert len(name) < 64  # GGML_MAX_NAME
        one_dimensional = tensor.shape.size == 1 or "_norm" in name
        if one_dimensional or name.startswith("pca."):
            assert tensor.tensor_type.name == "F32", name  # GGML adds and multiplies these
        if name.startswith("cond_module."):
            assert tensor.tensor_type.name in ("F32", "F16", "Q8_0")  # `tensor_to_float_vector`
    components = found["pca.components"].data
    assert components.shape == (dit.config.latent_dim, 1024)
    assert found["pca.mean"].data.shape == (1024,)
    assert np.array_equal(components @ components.T, np.eye(dit.config.latent_dim))
    # (in, out) in GGML's order, the fastest first.
    assert found["in_proj.weight"].shape.tolist() == [dit.config.latent_dim, dit.config.model_dim]
