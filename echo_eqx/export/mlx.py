"""Both models for mlx-audio, in `echo_tts` and `dacvae`; one alone is in the folder itself.

    model = mlx_audio.tts.load("FOLDER/echo_tts")

    codec = DACVAE(DACVAEConfig(**json.load(open("FOLDER/dacvae/config.json"))))
    codec.load_weights("FOLDER/dacvae/model.safetensors")

mlx-audio's `generate` of an EchoDiT turns latents into audio by Fish S1-DAC alone, which it loads
from the Hub; the principal components are written as `pca_state.safetensors`. With latents of a
DACVAE, call `generate_latents` and give them to `codec.decode`.

Source: `tts/models/echo_tts` and `codec/models/dacvae/codec.py` of mlx-audio 0.6.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.codec.fish.dac import FishDAC
from echo_eqx.config import CodecConfig, FishConfig
from echo_eqx.errors import UsageError
from echo_eqx.export.dacvae import check_fits_class, published
from echo_eqx.export.models import Models, float_dtype, published_leaves
from echo_eqx.export.pytorch import constructor_arguments
from echo_eqx.files import write_json
from echo_eqx.generation import ECHO_TTS_CHANNELS, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.weights.dacvae import published_kwargs
from echo_eqx.weights.fish import PCA_FILE, PUBLISHED_FISH
from echo_eqx.weights.mlx import to_mlx
from echo_eqx.weights.names import to_pytorch
from echo_eqx.weights.safetensors_writer import converted, save_arrays, write_safetensors

logger = logging.getLogger(__name__)
FORM = "mlx"
_METADATA = {"format": "mlx"}
_NO_FISH = "--no-fish-codec--"
"""No repository can have this name, so nothing is downloaded for a model with other latents."""


def write(models: Models, folder: Path, dtype: str) -> None:
    """Write a folder for each model.

    **Raises**: `UsageError` naming the tensor that mlx-audio cannot hold.
    """
    number = float_dtype(FORM, dtype)
    if models.dit is None:
        write_codec(models.need_codec(FORM), folder, number)
    elif models.codec is None or isinstance(models.codec, FishDAC):
        write_dit(models.dit, models.codec, folder, number)
    else:
        codec = models.need_codec(FORM)
        write_codec(codec, _new(folder / "dacvae"), number)
        write_dit(models.dit, codec, _new(folder / "echo_tts"), number)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- DACVAE -------------------------------------------------------------------------------------


def check_fits_mlx(config: CodecConfig) -> None:
    """Refuse a codec that mlx-audio's class cannot hold, which is facebook's but for odd strides.

    **Raises**: `UsageError` naming a tensor.
    """
    check_fits_class(config, f"{FORM}: mlx-audio's DACVAE")
    for block, rate in enumerate(config.decoder_rates):
        if rate % 2:
            raise UsageError(
                f"{FORM}: mlx-audio's DACVAE: decoder.blocks.{block}.block_1.weight_v: expected an "
                f"even stride, got {rate}; an odd one loses a sample there"
            )


def write_codec(codec: DACVAE, folder: Path, number: np.dtype) -> None:
    check_fits_mlx(codec.config)
    write_codec_files(codec, folder, number)


def write_codec_files(codec: DACVAE, folder: Path, number: np.dtype) -> None:
    """The files of a codec of any size that has a watermark path."""
    arrays = to_mlx(published(codec), codec.config)
    _save(folder, arrays, number, {**published_kwargs(codec.config), "mean": 0.0, "std": 1.0})


# --- EchoDiT ------------------------------------------------------------------------------------


def write_dit(dit: EchoDiT, codec: Codec | None, folder: Path, number: np.dtype) -> None:
    arrays = to_pytorch(published_leaves(dit, FORM), dit.config)
    _save(folder, arrays, number, _echo_tts(dit, codec))
    if isinstance(codec, FishDAC):
        if codec.config.latent_dim != dit.config.latent_dim:
            raise UsageError(
                f"{FORM}: pca_components: expected {dit.config.latent_dim} components, as the "
                f"model has channels, got {codec.config.latent_dim}"
            )
        pca = {
            "pca_components": codec.pca.components,
            "pca_mean": codec.pca.mean,
            "latent_scale": codec.pca.scale,
        }
        save_arrays(folder / PCA_FILE, {n: np.asarray(a) for n, a in pca.items()}, _METADATA)
        logger.warning(f"{FORM}: of the codec, {PCA_FILE} is written; the rest is {PUBLISHED_FISH}")
    elif _has_fish_latents(dit, codec):
        logger.warning(
            f"{FORM}: mlx-audio's generate() needs {PCA_FILE} in the folder; give --codec, or copy "
            "it from the repository of the model"
        )
    else:
        logger.warning(
            f"{FORM}: mlx-audio's generate() speaks through Fish S1-DAC only, and this model has "
            "other latents; call generate_latents(), then decode() of the DACVAE"
        )


def _has_fish_latents(dit: EchoDiT, codec: Codec | None) -> bool:
    return isinstance(codec, FishDAC) or (
        codec is None and dit.config.latent_dim == ECHO_TTS_CHANNELS
    )


def _echo_tts(dit: EchoDiT, codec: Codec | None) -> dict[str, Any]:
    """`config.json` of an EchoDiT; says which recommended settings mlx-audio has no place for."""
    config, sampler = dit.config, dit.generation.sampler
    missing = [
        f"{name} {getattr(sampler, name)}"
        for name in ("guidance", "guidance_every", "apg_eta", "sway")
        if getattr(sampler, name) != getattr(SamplerSettings(), name)
    ]
    if missing:
        logger.warning(f"{FORM}: mlx-audio's sampler cannot be set to {', '.join(missing)}")
    return {
        "model_type": "echo_tts",
        "sample_rate": (codec.config if codec else FishConfig()).sample_rate,
        "audio_downsample_factor": (codec.config if codec else FishConfig()).hop,
        "max_text_length": config.max_text_bytes,
        "max_speaker_latent_length": config.max_speaker_frames,
        "normalize_text": True,
        "delete_blockwise_modules": not config.blockwise,
        "pca_filename": PCA_FILE,
        "fish_codec_repo": PUBLISHED_FISH if _has_fish_latents(dit, codec) else _NO_FISH,
        "dit": constructor_arguments(config),
        "sampler": {
            "num_steps": sampler.steps,
            "cfg_scale_text": sampler.cfg_scale,
            "cfg_scale_speaker": sampler.speaker_scale,
            "cfg_min_t": sampler.cfg_min_t,
            "cfg_max_t": sampler.cfg_max_t,
            "truncation_factor": sampler.noise_scale,
            "rescale_k": None if sampler.rescale_k == 1 else sampler.rescale_k,
            "rescale_sigma": None if sampler.rescale_k == 1 else sampler.rescale_sigma,
            "speaker_kv_scale": None if sampler.speaker_kv_scale == 1 else sampler.speaker_kv_scale,
            "speaker_kv_min_t": sampler.speaker_kv_min_t,
            "speaker_kv_max_layers": sampler.speaker_kv_layers,
            "sequence_length": config.max_frames,
        },
    }


def _save(
    folder: Path, arrays: dict[str, np.ndarray], number: np.dtype, config: dict[str, Any]
) -> None:
    tensors = [converted(name, array, number) for name, array in sorted(arrays.items())]
    write_safetensors(folder / "model.safetensors", tensors, _METADATA)
    write_json(folder / "config.json", config)
