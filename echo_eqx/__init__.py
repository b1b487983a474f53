"""Echo: a flow-matching transformer that speaks, over DACVAE latents, in pure Equinox.

import echo_eqx

dit = echo_eqx.load_dit("owner/name")
codec = echo_eqx.load_codec("facebook/dacvae-watermarked")
audio = echo_eqx.synthesize(dit, codec, "Hello.", speaker="voice.wav")
"""

from importlib.metadata import version

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS, CodecConfig, DiTConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import SamplerSettings, sample, sample_blockwise
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech import Utterance, speaker_latents, synthesize, synthesize_all
from echo_eqx.trees import cast, num_parameters
from echo_eqx.weights.load import load_codec, load_dit
from echo_eqx.weights.own_format import save

__version__ = version("echo_eqx")

__all__ = [
    "CODEC_PRESETS",
    "DACVAE",
    "DIT_PRESETS",
    "CodecConfig",
    "DiTConfig",
    "EchoDiT",
    "EchoError",
    "SamplerSettings",
    "UsageError",
    "Utterance",
    "cast",
    "load_codec",
    "load_dit",
    "num_parameters",
    "sample",
    "sample_blockwise",
    "save",
    "speaker_latents",
    "synthesize",
    "synthesize_all",
]
