"""The watermark: a network that computes, from decoded audio, a quiet signal that carries 16 bits.

All layers are causal and streaming: each takes a state and returns the next one, so a long signal
can be processed in chunks. `init_state` is the state for silence before the start.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from echo_eqx.codec.convolution import Convolution, Downsample, Upsample
from echo_eqx.config import WatermarkConfig
from echo_eqx.layers.precision import matmul_precision

State = Any
"""State that a layer carries from one chunk to the next: arrays, nested in tuples."""


def _prepend(past: Float[Array, "p c"], x: Float[Array, "t c"]) -> tuple[Array, Array]:
    """`x` after the samples before it, and the last p samples, to prepend to the next chunk."""
    joined = jnp.concatenate([past, x])
    return joined, joined[joined.shape[0] - past.shape[0] :]


class CausalConvolution(eqx.Module):
    """A convolution that pads only at the start."""

    conv: Convolution

    @classmethod
    def init(
        cls, kernel: int, in_dim: int, out_dim: int, *, key: PRNGKeyArray
    ) -> "CausalConvolution":
        return cls(Convolution.init(kernel, in_dim, out_dim, key=key))

    def init_state(self) -> State:
        return jnp.zeros(
            (self.conv.total_padding, self.conv.weight.shape[1]), self.conv.weight.dtype
        )

    def __call__(self, x: Float[Array, "t i"], state: State) -> tuple[Float[Array, "t o"], State]:
        joined, state = _prepend(state, x)
        return self.conv.valid(joined), state


class CausalDownsample(eqx.Module):
    """Stride s and kernel 2s, padded by s at the start."""

    conv: Downsample

    @classmethod
    def init(
        cls, stride: int, in_dim: int, out_dim: int, *, key: PRNGKeyArray
    ) -> "CausalDownsample":
        return cls(Downsample.init(stride, in_dim, out_dim, key=key))

    def init_state(self) -> State:
        return jnp.zeros((self.conv.stride, self.conv.weight.shape[1]), self.conv.weight.dtype)

    def __call__(self, x: Float[Array, "t i"], state: State) -> tuple[Float[Array, "u o"], State]:
        joined, state = _prepend(state, x)
        return self.conv.valid(joined), state


class CausalUpsample(eqx.Module):
    """Transposed convolution, stride s and kernel 2s; the last s samples are cropped."""

    conv: Upsample

    @classmethod
    def init(cls, stride: int, in_dim: int, out_dim: int, *, key: PRNGKeyArray) -> "CausalUpsample":
        return cls(Upsample.init(stride, in_dim, out_dim, key=key))

    def init_state(self) -> State:
        return jnp.zeros((1, self.conv.weight.shape[1]), self.conv.weight.dtype)

    def __call__(self, x: Float[Array, "t i"], state: State) -> tuple[Float[Array, "u o"], State]:
        joined, state = _prepend(state, x)
        return self.conv.overlap_add(joined), state


class CausalResidualUnit(eqx.Module):
    """`x + conv1(elu(conv3(elu(x))))`, with half the channels in between."""

    conv1: CausalConvolution
    conv2: CausalConvolution

    @classmethod
    def init(cls, dim: int, *, key: PRNGKeyArray) -> "CausalResidualUnit":
        key1, key2 = jr.split(key)
        return cls(
            CausalConvolution.init(3, dim, dim // 2, key=key1),
            CausalConvolution.init(1, dim // 2, dim, key=key2),
        )

    def init_state(self) -> State:
        return self.conv1.init_state(), self.conv2.init_state()

    def __call__(self, x: Float[Array, "t c"], state: State) -> tuple[Float[Array, "t c"], State]:
        y, state1 = self.conv1(jax.nn.elu(x), state[0])
        y, state2 = self.conv2(jax.nn.elu(y), state[1])
        return x + y, (state1, state2)


class LSTMLayer(eqx.Module):
    """One LSTM layer, gates in the order input, forget, cell, output."""

    weight_in: Float[Array, "d g"]
    weight_hidden: Float[Array, "d g"]
    bias: Float[Array, " g"]

    @classmethod
    def init(cls, dim: int, *, key: PRNGKeyArray) -> "LSTMLayer":
        key_in, key_hidden = jr.split(key)
        bound = dim**-0.5
        return cls(
            jr.uniform(key_in, (dim, 4 * dim), minval=-bound, maxval=bound),
            jr.uniform(key_hidden, (dim, 4 * dim), minval=-bound, maxval=bound),
            jnp.zeros(4 * dim),
        )

    def init_state(self) -> State:
        zeros = jnp.zeros(self.weight_in.shape[0], self.weight_in.dtype)
        return zeros, zeros

    def __call__(self, x: Float[Array, "t d"], state: State) -> tuple[Float[Array, "t d"], State]:
        weight_hidden = self.weight_hidden.astype(x.dtype)
        precision = matmul_precision(x.dtype)
        inputs = jnp.matmul(x, self.weight_in.astype(x.dtype), precision=precision)
        inputs = inputs + self.bias.astype(x.dtype)[None]

        def step(state, gates):
            hidden, cell = state
            gates = gates + jnp.matmul(hidden, weight_hidden, precision=precision)
            i, f, g, o = jnp.split(gates, 4)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        state, y = jax.lax.scan(step, state, inputs)
        return y, state


class SkipLSTM(eqx.Module):
    """`x + lstm(x)`, the LSTM of several layers."""

    layers: tuple[LSTMLayer, ...]

    @classmethod
    def init(cls, dim: int, num_layers: int, *, key: PRNGKeyArray) -> "SkipLSTM":
        return cls(tuple(LSTMLayer.init(dim, key=key) for key in jr.split(key, num_layers)))

    def init_state(self) -> State:
        return tuple(layer.init_state() for layer in self.layers)

    def __call__(self, x: Float[Array, "t d"], state: State) -> tuple[Float[Array, "t d"], State]:
        y, states = x, []
        for layer, layer_state in zip(self.layers, state, strict=True):
            y, layer_state = layer(y, layer_state)
            states.append(layer_state)
        return x + y, tuple(states)


class WatermarkEncoderBlock(eqx.Module):
    """Residual unit, ELU, downsampling that doubles the channels."""

    unit: CausalResidualUnit
    down: CausalDownsample

    def init_state(self) -> State:
        return self.unit.init_state(), self.down.init_state()

    def __call__(self, x: Float[Array, "t i"], state: State) -> tuple[Float[Array, "u o"], State]:
        x, state_unit = self.unit(x, state[0])
        x, state_down = self.down(jax.nn.elu(x), state[1])
        return x, (state_unit, state_down)


class WatermarkDecoderBlock(eqx.Module):
    """ELU, upsampling that halves the channels, residual unit."""

    up: CausalUpsample
    unit: CausalResidualUnit

    def init_state(self) -> State:
        return self.up.init_state(), self.unit.init_state()

    def __call__(self, x: Float[Array, "t i"], state: State) -> tuple[Float[Array, "u o"], State]:
        x, state_up = self.up(jax.nn.elu(x), state[0])
        x, state_unit = self.unit(x, state[1])
        return x, (state_up, state_unit)


class Watermark(eqx.Module):
    """Maps audio (samples,) and a message to the signal (samples,) to add to that audio."""

    conv_in: CausalConvolution
    encoder: tuple[WatermarkEncoderBlock, ...]
    encoder_lstm: SkipLSTM
    to_bottleneck: CausalConvolution
    message_embedding: Float[Array, "rows z"]
    from_bottleneck: CausalConvolution
    decoder_lstm: SkipLSTM
    decoder: tuple[WatermarkDecoderBlock, ...]
    conv_out: CausalConvolution
    gain: float = eqx.field(static=True)

    @classmethod
    def init(cls, config: WatermarkConfig, *, key: PRNGKeyArray) -> "Watermark":
        keys = iter(jr.split(key, 7 + 4 * len(config.strides)))
        lstm_dim, z_dim = config.lstm_dim, config.bottleneck_dim
        dims = [config.dim * 2**i for i in range(len(config.strides))]

        def encoder_block(dim: int, stride: int) -> WatermarkEncoderBlock:
            return WatermarkEncoderBlock(
                CausalResidualUnit.init(dim, key=next(keys)),
                CausalDownsample.init(stride, dim, 2 * dim, key=next(keys)),
            )

        def decoder_block(dim: int, stride: int) -> WatermarkDecoderBlock:
            return WatermarkDecoderBlock(
                CausalUpsample.init(stride, 2 * dim, dim, key=next(keys)),
                CausalResidualUnit.init(dim, key=next(keys)),
            )

        def blocks(block: Any, dims: list[int], strides: tuple[int, ...]) -> tuple:
            return tuple(block(dim, stride) for dim, stride in zip(dims, strides, strict=True))

        return cls(
            conv_in=CausalConvolution.init(7, 1, config.dim, key=next(keys)),
            encoder=blocks(encoder_block, dims, config.strides[::-1]),
            encoder_lstm=SkipLSTM.init(lstm_dim, config.num_lstm_layers, key=next(keys)),
            to_bottleneck=CausalConvolution.init(7, lstm_dim, z_dim, key=next(keys)),
            message_embedding=jr.normal(next(keys), (2 * config.num_bits, z_dim)),
            from_bottleneck=CausalConvolution.init(7, z_dim, lstm_dim, key=next(keys)),
            decoder_lstm=SkipLSTM.init(lstm_dim, config.num_lstm_layers, key=next(keys)),
            decoder=blocks(decoder_block, dims[::-1], config.strides),
            conv_out=CausalConvolution.init(7, config.dim, 1, key=next(keys)),
            gain=config.dim / z_dim,
        )

    @property
    def num_bits(self) -> int:
        return self.message_embedding.shape[0] // 2

    def init_state(self) -> State:
        parts = (
            self.conv_in,
            *self.encoder,
            self.encoder_lstm,
            self.to_bottleneck,
            self.from_bottleneck,
            self.decoder_lstm,
            *self.decoder,
            self.conv_out,
        )
        return tuple(part.init_state() for part in parts)

    def __call__(
        self, audio: Float[Array, " samples"], message: Int[Array, " bits"], state: State
    ) -> tuple[Float[Array, " samples"], State]:
        """The signal to add, and the state for the next chunk."""
        next_states, states = [], iter(state)

        def run(layer: Any, x: Array) -> Array:
            y, new_state = layer(x, next(states))
            next_states.append(new_state)
            return y

        x = run(self.conv_in, audio[:, None])
        for block in self.encoder:
            x = run(block, x)
        x = jax.nn.elu(run(self.encoder_lstm, x))
        x = run(self.to_bottleneck, x)

        rows = 2 * jnp.arange(self.num_bits) + message
        x = x + jnp.sum(self.message_embedding[rows], axis=0).astype(x.dtype)[None]

        x = run(self.decoder_lstm, run(self.from_bottleneck, x))
        for block in self.decoder:
            x = run(block, x)
        x = run(self.conv_out, jax.nn.elu(x))
        return self.gain * x[:, 0], tuple(next_states)


@eqx.filter_jit
def initial_state(watermark: Watermark) -> State:
    """The state before the first chunk."""
    return watermark.init_state()


@eqx.filter_jit
def add_watermark(
    watermark: Watermark,
    audio: Float[Array, " samples"],
    message: Int[Array, " bits"],
    state: State,
) -> tuple[Float[Array, " samples"], State]:
    """A chunk of audio with the watermark in it, and the state for the next chunk."""
    signal, state = watermark(audio, message, state)
    return audio + signal, state
