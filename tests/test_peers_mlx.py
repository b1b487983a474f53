"""mlx-audio loads what is written for it, strictly, and computes the same.

Its environment: python -m venv /tmp/venv-mlx && /tmp/venv-mlx/bin/pip install "mlx[cpu]" mlx-audio
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import max_difference, random_model
from peers.environments import python_of, run
from test_weights import SMALL

import echo_eqx
from echo_eqx.config import CodecConfig
from echo_eqx.export import mlx
from echo_eqx.export.models import Models

pytestmark = pytest.mark.peers
SCRIPTS = Path(__file__).parent / "peers"


def outputs(script: str, folder: Path, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """What mlx-audio computes from `arrays` with the weights in `folder`."""
    python = python_of("mlx", "mlx", "mlx_audio")
    np.savez(folder / "in.npz", **arrays)
    run(python, SCRIPTS / script, folder)
    return dict(np.load(folder / "out.npz"))


def test_dacvae_loads_strictly_and_encodes_and_decodes_the_same(tmp_path):
    config = CodecConfig(
        encoder_dim=3,
        encoder_rates=(2, 4, 4, 10),
        hidden_dim=14,
        latent_dim=6,
        decoder_rates=(2, 4, 4, 10),
    )
    codec = random_model(echo_eqx.DACVAE, config, scale=0.03)
    mlx.write(Models(codec=codec), tmp_path, "float32")
    rng = np.random.default_rng(0)
    audio = rng.standard_normal(9 * config.hop).astype(np.float32)
    latents = rng.standard_normal((7, config.latent_dim)).astype(np.float32)
    out = outputs("mlx_dacvae.py", tmp_path, audio=audio, latents=latents)
    mean, expected = codec.encode(audio)[0], codec.decode(latents)
    assert np.std(mean) > 0.01 and np.std(expected) > 0.01
    assert max_difference(out["mean"], mean) < 1e-4
    assert max_difference(out["audio"], expected) < 1e-4


@pytest.mark.parametrize("blockwise", [False, True])
def test_echo_dit_loads_strictly_and_has_the_same_velocity(
    tmp_path, golden_dit, blockwise_dit, blockwise
):
    dit = blockwise_dit if blockwise else golden_dit
    mlx.write(Models(dit), tmp_path, "float32")
    rng = np.random.default_rng(0)
    channels, frames = dit.config.latent_dim, 4 * dit.config.patch_size
    inputs = {
        "x": rng.standard_normal((11, channels)).astype(np.float32),
        "t": np.float32(0.7),
        "text_ids": rng.integers(0, 256, 9).astype(np.int32),
        "text_mask": np.arange(9) < 7,
        "speaker_latents": rng.standard_normal((frames, channels)).astype(np.float32),
        "speaker_mask": np.arange(frames) < frames - dit.config.patch_size,
    }
    out = outputs("mlx_echo_tts.py", tmp_path, **inputs)
    expected = jax.jit(dit.__call__)(*inputs.values())
    assert np.std(expected) > 0.01
    assert max_difference(out["velocity"], expected) < 1e-4
    assert out["latents"].shape == (12, channels) and np.isfinite(out["latents"]).all()


def test_both_models_are_in_folders_of_their_own(tmp_path):
    codec = random_model(
        echo_eqx.DACVAE,
        CodecConfig(
            encoder_dim=1,
            encoder_rates=(2, 4, 4, 10),
            hidden_dim=8,
            latent_dim=SMALL.latent_dim,
            decoder_rates=(2, 4, 4, 10),
        ),
    )
    mlx.write(Models(random_model(echo_eqx.EchoDiT, SMALL), codec), tmp_path, "bfloat16")
    audio = np.zeros(2 * codec.config.hop, np.float32)
    latents = np.zeros((2, SMALL.latent_dim), np.float32)
    assert outputs("mlx_dacvae.py", tmp_path / "dacvae", audio=audio, latents=latents)[
        "mean"
    ].shape == (2, 10)
