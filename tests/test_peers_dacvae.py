"""PyTorch reads our `weights.pth`, and a codec written in it from the published layers computes the
same as ours.

If facebook's package `dacvae` (github.com/facebookresearch/dacvae) is installed in that
environment too, its own class loads a codec of its sizes.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import max_difference, random_model
from peers.environments import python_of, run

import echo_eqx
from echo_eqx.config import CodecConfig
from echo_eqx.export import dacvae
from echo_eqx.export.models import Models

pytestmark = pytest.mark.peers
SCRIPTS = Path(__file__).parent / "peers"


def outputs(python: Path, script: str, folder: Path, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """What a script computes from `arrays` with the weights in `folder`."""
    np.savez(folder / "in.npz", **arrays)
    run(python, SCRIPTS / script, folder)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("number", [0, 1])
def test_pytorch_reads_the_golden_codec_and_computes_the_golden_outputs(
    tmp_path, golden_codec, codec_cases, number
):
    dacvae.write_files(golden_codec, tmp_path, np.dtype(np.float32))
    audio, latents = codec_cases[f"audio_{number}"], codec_cases[f"latents_{number}"]
    python = python_of("torch", "torch", "numpy", "safetensors")
    out = outputs(python, "dacvae_layers_torch.py", tmp_path, audio=audio, latents=latents)
    assert max_difference(out["mean"], codec_cases[f"mean_{number}"]) < 1e-5
    assert max_difference(out["audio"], codec_cases[f"clean_{number}"]) < 1e-5


def test_the_class_of_facebook_loads_a_codec_of_its_sizes(tmp_path):
    python = python_of("torch", "torch", "dacvae")
    config = CodecConfig(
        encoder_dim=3,
        encoder_rates=(2, 4, 4, 10),
        hidden_dim=14,
        latent_dim=6,
        decoder_rates=(4, 4, 4, 5),
    )
    codec = random_model(echo_eqx.DACVAE, config, scale=0.03)
    dacvae.write(Models(codec=codec), tmp_path, "float32")
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((1, 9 * config.hop)).astype(np.float32)
    latents = rng.standard_normal((1, 7, config.latent_dim)).astype(np.float32)
    message = rng.integers(0, 2, (1, 16)).astype(np.int32)
    out = outputs(
        python, "dacvae_facebook.py", tmp_path, audio=audio, latents=latents, message=message
    )
    assert max_difference(out["mean"][0], codec.encode(audio[0])[0]) < 1e-4
    assert max_difference(out["marked"][0], codec.decode(latents[0], message[0])) < 1e-4
