"""DACVAE in ONNX: encoder and decoder, as in `echo_eqx.codec`. Signals inside are (b, c, t).

Leaves of the codec given to these functions are NumPy arrays in float32.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array

from echo_eqx.codec.convolution import Convolution, Downsample, Upsample
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.codec.residual import ResidualUnit, Snake
from echo_eqx.codec.watermark import CausalConvolution, CausalResidualUnit, SkipLSTM, Watermark
from echo_eqx.export.onnx.graph import Graph


def codec_encoder(codec: DACVAE) -> Graph:
    """Whole frames of audio (b, samples) to mean and standard deviation of latents (b, t, c)."""
    g = Graph("codec_encoder")
    audio = g.input("audio", np.float32, "b", "samples")
    x = _conv(g, g("Unsqueeze", audio, [1]), codec.encoder.conv_in)
    for block in codec.encoder.blocks:
        x = _units(g, x, block.units)
        x = _down(g, _snake(g, x, block.snake), block.down)
    x = _conv(g, _snake(g, x, codec.encoder.snake_out), codec.encoder.conv_out)
    mean, scale = g.split(_conv(g, x, codec.bottleneck.in_proj), 2, axis=1)
    std = g("Add", g("Softplus", scale), 1e-4)
    for name, value in (("mean", mean), ("std", std)):
        value = g("Transpose", value, perm=[0, 2, 1])
        g.output(name, value, "b", "t", codec.config.latent_dim)
    return g


def codec_decoder(codec: DACVAE) -> Graph:
    """Latents (b, t, c), and the message if the codec has a watermark, to audio (b, samples)."""
    g = Graph("codec_decoder")
    latents = g.input("latents", np.float32, "b", "t", codec.config.latent_dim)
    x = _conv(g, g("Transpose", latents, perm=[0, 2, 1]), codec.bottleneck.out_proj)
    x = _conv(g, x, codec.decoder.conv_in)
    for block in codec.decoder.blocks:
        x = _units(g, _up(g, _snake(g, x, block.snake), block.up), block.units)
    x = g("Tanh", _conv(g, _snake(g, x, codec.decoder.snake_out), codec.decoder.conv_out))
    if codec.watermark is not None:
        message = g.input("message", np.int64, "b", codec.watermark.num_bits)
        x = g("Add", x, _watermark(g, x, message, codec.watermark))
    g.output("audio", g("Squeeze", x, [1]), "b", "samples")
    return g


def _conv(g: Graph, x: str, layer: Convolution) -> str:
    side = layer.total_padding // 2
    return _convolution(g, x, layer, pads=[side, side])


def _convolution(g: Graph, x: str, layer: Convolution, pads: list[int]) -> str:
    weight = layer.weight.transpose(2, 1, 0)
    return g("Conv", x, weight, layer.bias, pads=pads, dilations=[layer.dilation])


def _down(g: Graph, x: str, layer: Downsample) -> str:
    return _strided(g, x, layer, pads=[(layer.stride + 1) // 2, layer.stride // 2])


def _strided(g: Graph, x: str, layer: Downsample, pads: list[int]) -> str:
    weight = layer.weight.transpose(2, 1, 0)
    return g("Conv", x, weight, layer.bias, pads=pads, strides=[layer.stride])


def _up(g: Graph, x: str, layer: Upsample) -> str:
    return _transposed(g, x, layer, pads=[(layer.stride + 1) // 2, layer.stride // 2])


def _transposed(g: Graph, x: str, layer: Upsample, pads: list[int]) -> str:
    """`pads` are the samples to crop from the start and the end."""
    weight = layer.weight.transpose(1, 2, 0)
    return g("ConvTranspose", x, weight, layer.bias, pads=pads, strides=[layer.stride])


def _snake(g: Graph, x: str, layer: Snake) -> str:
    alpha = layer.alpha[:, None]
    sine = g("Sin", g("Mul", x, alpha))
    return g("Add", x, g("Mul", g("Mul", sine, sine), 1 / (alpha + 1e-9)))


def _units(g: Graph, x: str, units: Sequence[ResidualUnit]) -> str:
    for unit in units:
        y = _conv(g, _snake(g, x, unit.snake1), unit.conv1)
        x = g("Add", x, _conv(g, _snake(g, y, unit.snake2), unit.conv2))
    return x


# --- The watermark: causal, so all padding is at the start ---------------------------------------


def _watermark(g: Graph, audio: str, message: str, watermark: Watermark) -> str:
    """The signal to add to `audio`, (b, 1, samples)."""
    x = _causal(g, audio, watermark.conv_in)
    for block in watermark.encoder:
        down = block.down.conv
        x = g("Elu", _causal_unit(g, x, block.unit))
        x = _strided(g, x, down, pads=[down.stride, 0])
    x = g("Elu", _lstm(g, x, watermark.encoder_lstm))
    x = _causal(g, x, watermark.to_bottleneck)

    rows = g("Add", message, 2 * np.arange(watermark.num_bits))
    bits = g("ReduceSum", g("Gather", watermark.message_embedding, rows), [1], keepdims=0)
    x = g("Add", x, g("Unsqueeze", bits, [2]))

    x = _lstm(g, _causal(g, x, watermark.from_bottleneck), watermark.decoder_lstm)
    for block in watermark.decoder:
        up = block.up.conv
        x = _transposed(g, g("Elu", x), up, pads=[0, up.stride])
        x = _causal_unit(g, x, block.unit)
    x = _causal(g, g("Elu", x), watermark.conv_out)
    return g("Mul", x, watermark.gain)


def _causal(g: Graph, x: str, layer: CausalConvolution) -> str:
    return _convolution(g, x, layer.conv, pads=[layer.conv.total_padding, 0])


def _causal_unit(g: Graph, x: str, unit: CausalResidualUnit) -> str:
    y = _causal(g, g("Elu", x), unit.conv1)
    return g("Add", x, _causal(g, g("Elu", y), unit.conv2))


def _lstm(g: Graph, x: str, lstm: SkipLSTM) -> str:
    y = g("Transpose", x, perm=[2, 0, 1])  # (t, b, d)
    for layer in lstm.layers:
        dim = layer.weight_in.shape[0]
        bias = np.concatenate([_gates(layer.bias), np.zeros(4 * dim, np.float32)])
        weights = _gates(layer.weight_in), _gates(layer.weight_hidden), bias
        y = g("LSTM", y, *(weight[None] for weight in weights), hidden_size=dim)
        y = g("Squeeze", y, [1])  # the axis of directions
    return g("Add", x, g("Transpose", y, perm=[1, 2, 0]))


def _gates(columns: Array | np.ndarray) -> np.ndarray:
    """Columns of gates i, f, g, o as rows in ONNX's order i, o, f, g."""
    i, f, g, o = np.split(np.asarray(columns).T, 4)
    return np.concatenate([i, o, f, g])
