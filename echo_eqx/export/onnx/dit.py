"""EchoDiT in ONNX: text encoder, reference encoder and velocity, as in `echo_eqx.model`.

Leaves of the models given to these functions are NumPy arrays in float32.
"""

from typing import Any

import jax
import numpy as np

from echo_eqx.export.onnx.graph import Graph
from echo_eqx.layers.adaln import (
    LowRankAdaLN,
    LowRankResidual,
    TimeConditioner,
    timestep_frequencies,
)
from echo_eqx.layers.linear import Linear
from echo_eqx.layers.mlp import SwiGLU
from echo_eqx.model.blocks import DiTBlock, TransformerBlock
from echo_eqx.model.dit import EchoDiT
from echo_eqx.model.joint_attention import JointAttention


def text_encoder(dit: EchoDiT) -> Graph:
    """Bytes (b, s) to the keys and values of the text for all layers (b, n, s, h, k)."""
    g = Graph("text_encoder")
    ids = g.input("text_ids", np.int64, "b", "s")
    mask = g.input("text_mask", np.bool_, "b", "s")
    x = g("Gather", dit.text_encoder.text_embedding.weight, g("Where", mask, ids, 0))
    x = _encoder_blocks(g, x, dit.text_encoder.blocks, g("Unsqueeze", mask, [1, 2]))
    layers = dit.blocks.attention
    state = g.norm(x, dit.text_norm)
    _output_kv(g, "text", "s", layers, layers.wk_text, layers.wv_text, state, mask)
    return g


def speaker_encoder(dit: EchoDiT) -> Graph:
    """Latents (b, r, c), finite also where they are masked, to keys and values (b, n, p, h, k)."""
    g = Graph("speaker_encoder")
    encoder, config = dit.speaker_encoder, dit.config
    latents = g.input("speaker_latents", np.float32, "b", "r", config.latent_dim)
    mask = g.input("speaker_mask", np.bool_, "b", "p")
    patches = g("Reshape", latents, [0, -1, config.latent_dim * config.patch_size])
    x = g("Mul", g.linear(patches, encoder.in_proj), encoder.proj_scale)
    positions = g("Range", 0, g.length(x), 1)
    causal = g("LessOrEqual", g("Unsqueeze", positions, [0]), g("Unsqueeze", positions, [1]))
    state = g.norm(_encoder_blocks(g, x, encoder.blocks, causal), dit.speaker_norm)
    layers = dit.blocks.attention
    _output_kv(g, "speaker", "p", layers, layers.wk_speaker, layers.wv_speaker, state, mask)
    return g


def velocity(dit: EchoDiT) -> Graph:
    """`EchoDiT.velocity` of a batch at one timestep."""
    g = Graph("velocity")
    config = dit.config
    head_dim = dit.blocks.attention.head_dim
    x = g.input("x", np.float32, "b", "t", config.latent_dim)
    t = g.input("t", np.float32)
    masks = [g.input("frame_mask", np.bool_, "b", "t")]
    cached: list[tuple[str, str]] = []
    for name, axis in (("text", "s"), ("speaker", "p")):
        shape = ("b", config.num_layers, axis, config.num_heads, head_dim)
        keys = g.input(f"{name}_keys", np.float32, *shape)
        cached.append((keys, g.input(f"{name}_values", np.float32, *shape)))
        masks.append(g.input(f"{name}_mask", np.bool_, "b", axis))
    speaker_scale = g.input("speaker_scale", np.float32, config.num_layers)

    allowed = g("Unsqueeze", g("Concat", *masks, axis=1), [1, 2])
    rotation = g.rotation(g.length(x), head_dim)
    time = _time_conditioner(g, t, dit.time_conditioner)
    modulations = [
        _adaln(g, time, adaln) for adaln in (dit.blocks.attention_adaln, dit.blocks.mlp_adaln)
    ]

    def extra_kv(i: int, which: int) -> list[str]:
        """The keys (0) or values (1) of text and reference for layer i, (b, j, h, k)."""
        text, speaker = (g("Gather", kv[which], i, axis=1) for kv in cached)
        return [text, g("Mul", speaker, g("Gather", speaker_scale, i))]

    x = g("Where", g("Unsqueeze", masks[0], [2]), x, 0.0)
    x = g.linear(x, dit.in_proj)
    for i in range(config.num_layers):
        block: DiTBlock = _layer(dit.blocks, i)
        of_layer = [[g("Gather", v, i) for v in modulation] for modulation in modulations]
        (shift, scale, gate), (mlp_shift, mlp_scale, mlp_gate) = of_layer
        normed = _modulate(g, x, shift, scale, block.eps)
        keys_values = extra_kv(i, 0), extra_kv(i, 1)
        y = _joint_attention(g, normed, block.attention, rotation, keys_values, allowed)
        x = g("Add", x, g("Mul", gate, y))
        y = _swiglu(g, _modulate(g, x, mlp_shift, mlp_scale, block.eps), block.mlp)
        x = g("Add", x, g("Mul", mlp_gate, y))
    x = g.linear(g.norm(x, dit.out_norm), dit.out_proj)
    g.output("velocity", x, "b", "t", config.latent_dim)
    return g


def _layer(layers: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], layers)


def _encoder_blocks(g: Graph, x: str, blocks: TransformerBlock, allowed: str) -> str:
    head_dim = blocks.attention.head_dim
    rotation = g.rotation(g.length(x), head_dim)
    for i in range(blocks.attention_norm.weight.shape[0]):
        block: TransformerBlock = _layer(blocks, i)
        attention, normed = block.attention, g.norm(x, block.attention_norm)
        queries = g.norm(g.heads(g.linear(normed, attention.wq), head_dim), attention.q_norm)
        keys = g.norm(g.heads(g.linear(normed, attention.wk), head_dim), attention.k_norm)
        values = g.heads(g.linear(normed, attention.wv), head_dim)
        queries, keys = g.rope(queries, rotation), g.rope(keys, rotation)
        out = g.attention(queries, keys, values, allowed, head_dim)
        out = g("Mul", g("Sigmoid", g.linear(normed, attention.gate)), out)
        x = g("Add", x, g.linear(out, attention.wo))
        x = g("Add", x, _swiglu(g, g.norm(x, block.mlp_norm), block.mlp))
    return x


def _swiglu(g: Graph, x: str, mlp: SwiGLU) -> str:
    return g.linear(g("Mul", g.silu(g.linear(x, mlp.w1)), g.linear(x, mlp.w3)), mlp.w2)


def _output_kv(
    g: Graph,
    name: str,
    axis: str,
    layers: JointAttention,
    wk: Linear,
    wv: Linear,
    state: str,
    mask: str,
) -> None:
    """Keys and values of the state of an encoder, (b, j, e), for all layers in one product."""
    num_layers, num_heads, head_dim = layers.k_norm.weight.shape

    def project(weight: Linear) -> str:
        joined = np.concatenate(list(weight.weight), axis=1)  # (e, n d)
        return g("Reshape", g("MatMul", state, joined), [0, 0, num_layers, num_heads, head_dim])

    keys = g.norm(project(wk), layers.k_norm)
    values = g("Where", g("Unsqueeze", mask, [2, 3, 4]), project(wv), 0.0)
    for kind, value in (("keys", keys), ("values", values)):
        value = g("Transpose", value, perm=[0, 2, 1, 3, 4])
        g.output(f"{name}_{kind}", value, "b", num_layers, axis, num_heads, head_dim)


def _joint_attention(
    g: Graph,
    x: str,
    layer: JointAttention,
    rotation: tuple[str, str],
    extra_kv: tuple[list[str], list[str]],
    allowed: str,
) -> str:
    head_dim = layer.head_dim
    queries = g.norm(g.heads(g.linear(x, layer.wq), head_dim), layer.q_norm)
    keys = g.norm(g.heads(g.linear(x, layer.wk), head_dim), layer.k_norm)
    values = g.heads(g.linear(x, layer.wv), head_dim)
    queries, keys = g.half_rope(queries, rotation), g.half_rope(keys, rotation)
    extra_keys, extra_values = extra_kv
    keys = g("Concat", keys, *extra_keys, axis=1)
    values = g("Concat", values, *extra_values, axis=1)
    out = g.attention(queries, keys, values, allowed, head_dim)
    return g.linear(g("Mul", g("Sigmoid", g.linear(x, layer.gate)), out), layer.wo)


def _time_conditioner(g: Graph, t: str, conditioner: TimeConditioner) -> list[str]:
    """Shift, scale and gate (1, d) shared by all blocks."""
    angles = g("Mul", t, timestep_frequencies(conditioner.embed_dim)[None])
    embedding = g("Concat", g("Cos", angles), g("Sin", angles), axis=1)
    c = g.linear(g.silu(g.linear(embedding, conditioner.dense0)), conditioner.dense1)
    return g.split(g.linear(g.silu(c), conditioner.dense2), 3, axis=1)


def _adaln(g: Graph, time: list[str], layers: LowRankAdaLN) -> list[str]:
    """Shift, scale and gate (n, 1, d) of one sub-layer for all layers."""

    def residual(v: str, layers: LowRankResidual) -> str:
        assert layers.up.bias is not None
        y = g("MatMul", g("MatMul", g.silu(v), layers.down.weight), layers.up.weight)
        return g("Add", g("Add", y, layers.up.bias[:, None]), v)

    parts = (layers.shift, layers.scale, layers.gate)
    shift, scale, gate = (residual(v, part) for v, part in zip(time, parts, strict=True))
    return [shift, scale, g("Tanh", gate)]


def _modulate(g: Graph, x: str, shift: str, scale: str, eps: float) -> str:
    return g("Add", g("Mul", g.rms(x, eps), g("Add", scale, 1.0)), shift)
