"""What an export is made of: the models, and checks that a format can hold them."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.errors import UsageError
from echo_eqx.json_data import to_json
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.codec import silence_latent
from echo_eqx.trees import named_leaves
from echo_eqx.weights.native import DTYPES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models to export, in float32. A format writes all that it can hold."""

    dit: EchoDiT | None = None
    codec: Codec | None = None

    def need_dit(self, form: str) -> EchoDiT:
        if self.dit is None:
            raise UsageError(f"{form}: expected an EchoDiT, got a codec")
        return self.dit

    def need_codec(self, form: str) -> DACVAE:
        if self.codec is None:
            raise UsageError(f"{form}: expected a codec, got an EchoDiT")
        if not isinstance(self.codec, DACVAE):
            raise UsageError(f"{form}: expected a DACVAE, got a {type(self.codec).__name__}")
        return self.codec

    def only_dit(self, form: str) -> EchoDiT:
        """The EchoDiT, for a format that holds nothing else."""
        if self.dit is not None and self.codec is not None:
            logger.warning(f"{form} holds an EchoDiT only; the codec is left out")
        return self.need_dit(form)

    def only_codec(self, form: str) -> DACVAE:
        """The codec, for a format that holds nothing else."""
        if self.dit is not None and self.codec is not None:
            logger.warning(f"{form} holds a codec only; the EchoDiT is left out")
        return self.need_codec(form)


def float_dtype(form: str, dtype: str) -> np.dtype:
    """The NumPy dtype of a format that has no int8.

    **Raises**: `UsageError` for int8.
    """
    if dtype not in DTYPES:
        raise UsageError(f"{form}: expected --dtype {', '.join(DTYPES)}, got {dtype}")
    return DTYPES[dtype]


def published_leaves(dit: EchoDiT, form: str) -> dict[str, np.ndarray]:
    """Leaves by name, for a format of another implementation of the published EchoDiT.

    **Raises**: `UsageError` if the model differs from it in what no tensor shows.
    """
    if dit.config.norm_eps != 1e-5:
        raise UsageError(f"{form}: expected norm_eps 1e-5, got {dit.config.norm_eps}")
    return {name: np.asarray(leaf) for name, leaf in named_leaves(dit).items()}


def describe(models: Models) -> dict[str, Any]:
    """Sizes and recommended settings of the models, for a runtime that reads JSON.

    `silence` is the latent of silence: `decoder_padding` frames of it before and after an utterance
    that is decoded, cut off again, keep the edges from sounding as clicks.
    """
    about: dict[str, Any] = {}
    if models.dit is not None:
        about |= {"dit": to_json(models.dit.config), "generation": to_json(models.dit.generation)}
    if models.codec is not None:
        about["codec"] = to_json(models.codec.config)
        about["silence"] = silence_latent(models.codec).tolist()
        about["decoder_padding"] = models.codec.decoder_padding
    return about


def warn_of_blockwise(dit: EchoDiT, form: str) -> None:
    """Say that block-wise weights are left out of programs that generate in one go."""
    if dit.config.blockwise:
        logger.warning(
            f"{form}: the programs generate in one go; left out: latent_encoder, latent_norm, "
            "wk_latent and wv_latent, which only block-wise generation uses"
        )
