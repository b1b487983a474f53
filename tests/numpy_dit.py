"""EchoDiT in NumPy, float64, without masks: a masked frame or token is simply not there.

`weights` are the leaves of a model by name. Only what a test of the objective needs.
"""

import numpy as np

from echo_eqx.config import DiTConfig, EncoderConfig

Weights = dict[str, np.ndarray]


def velocity(
    weights: Weights,
    config: DiTConfig,
    x: np.ndarray,
    t: float,
    text_ids: np.ndarray,
    speaker: np.ndarray,
    earlier: np.ndarray,
) -> np.ndarray:
    """Velocity of the frames `x` (t, c), which follow the latents `earlier` (f, c).

    `text_ids` (s,) and `speaker` (r, c) may be empty, and so may `earlier`; both are whole patches.
    """
    w = _Under(weights)
    eps, heads, patch = config.norm_eps, config.num_heads, config.patch_size
    text = w["text_encoder.text_embedding.weight"][text_ids]
    text = _encoder(w / "text_encoder", config.text, eps, text, causal=False)
    text = _rms(text, eps) * w["text_norm.weight"]
    voice, past = (
        _rms(_latents(w / f"{name}_encoder", config, latents), eps) * w[f"{name}_norm.weight"]
        for name, latents in (("speaker", speaker), ("latent", earlier))
    )
    shared = _timestep(w / "time_conditioner", config, t)
    x = _linear(w / "in_proj", x)
    positions = len(earlier) + np.arange(len(x))
    for i in range(config.num_layers):
        layer = w.layer("blocks", i)
        a = layer / "attention"
        shift, scale, gate = _modulation(layer / "attention_adaln", shared)
        h = _rms(x, eps) * (1 + scale) + shift

        def keys(name, state, at=None, a=a):
            k = _rms(_heads(state @ a[f"{name}.weight"], heads), eps) * a["k_norm.weight"]
            return k if at is None else _rope(k, at, heads // 2)

        q = _rms(_heads(h @ a["wq.weight"], heads), eps) * a["q_norm.weight"]
        q = _rope(q, positions, heads // 2)
        k = [keys("wk", h, positions), keys("wk_latent", past, patch * np.arange(len(past)))]
        k += [keys("wk_text", text), keys("wk_speaker", voice)]
        v = [h @ a["wv.weight"], past @ a["wv_latent.weight"]]
        v += [text @ a["wv_text.weight"], voice @ a["wv_speaker.weight"]]
        out = _attend(q, np.concatenate(k), _heads(np.concatenate(v), heads))
        x = x + gate * ((_sigmoid(h @ a["gate.weight"]) * out) @ a["wo.weight"])
        shift, scale, gate = _modulation(layer / "mlp_adaln", shared)
        x = x + gate * _mlp(layer / "mlp", _rms(x, eps) * (1 + scale) + shift)
    return _linear(w / "out_proj", _rms(x, eps) * w["out_norm.weight"])


class _Under:
    """Weights whose names begin with a prefix."""

    def __init__(self, weights: Weights, prefix: str = "", index: int | None = None):
        self._weights, self._prefix, self._index = weights, prefix, index

    def __getitem__(self, name: str) -> np.ndarray:
        weight = self._weights[self._prefix + name]
        return weight if self._index is None else weight[self._index]

    def __truediv__(self, name: str) -> "_Under":
        return _Under(self._weights, f"{self._prefix}{name}.", self._index)

    def layer(self, name: str, index: int) -> "_Under":
        return _Under(self._weights, f"{self._prefix}{name}.", index)


def _linear(w: _Under, x):
    return x @ w["weight"] + w["bias"]


def _rms(x, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _heads(x, heads):
    return x.reshape(len(x), heads, x.shape[-1] // heads)


def _rope(x, positions, heads):
    """Turns the pairs of the first `heads` heads."""
    width = x.shape[-1]
    angles = positions[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    turned = x[:, :heads, 0::2] + 1j * x[:, :heads, 1::2]
    turned = turned * np.exp(1j * angles)[:, None]
    out = x.copy()
    out[:, :heads, 0::2], out[:, :heads, 1::2] = turned.real, turned.imag
    return out


def _attend(q, k, v, causal=False):
    scores = np.einsum("thk,jhk->htj", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(len(q), len(k), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("htj,jhk->thk", weights, v).reshape(len(q), -1)


def _mlp(w: _Under, x):
    return (_silu(x @ w["w1.weight"]) * (x @ w["w3.weight"])) @ w["w2.weight"]


def _encoder(w: _Under, config: EncoderConfig, eps, x, causal):
    if not len(x):
        return x
    positions = np.arange(len(x))
    for i in range(config.num_layers):
        layer = w.layer("blocks", i)
        a = layer / "attention"
        h = _rms(x, eps) * layer["attention_norm.weight"]
        q, k = (
            _rms(_heads(h @ a[f"w{side}.weight"], config.num_heads), eps) * a[f"{side}_norm.weight"]
            for side in "qk"
        )
        q, k = (_rope(each, positions, config.num_heads) for each in (q, k))
        out = _attend(q, k, _heads(h @ a["wv.weight"], config.num_heads), causal)
        x = x + (_sigmoid(h @ a["gate.weight"]) * out) @ a["wo.weight"]
        x = x + _mlp(layer / "mlp", _rms(x, eps) * layer["mlp_norm.weight"])
    return x


def _latents(w: _Under, config: DiTConfig, latents):
    patches = latents.reshape(-1, config.patch_size * config.latent_dim)
    x = _linear(w / "in_proj", patches) * config.speaker_proj_scale
    return _encoder(w, config.speaker, config.norm_eps, x, causal=True)


def _timestep(w: _Under, config: DiTConfig, t: float):
    half = config.time_embed_dim // 2
    angles = 1000 * t * np.exp(-np.log(10_000) * np.arange(half) / half)
    embedding = np.concatenate([np.cos(angles), np.sin(angles)])
    c = _silu(embedding @ w["dense0.weight"]) @ w["dense1.weight"]
    return np.split(_silu(c) @ w["dense2.weight"], 3)


def _modulation(w: _Under, shared):
    shift, scale, gate = (
        _linear(w / f"{name}.up", _silu(each) @ w[f"{name}.down.weight"]) + each
        for name, each in zip(("shift", "scale", "gate"), shared, strict=True)
    )
    return shift, scale, np.tanh(gate)
