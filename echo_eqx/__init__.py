"""Echo: flow-matching text-to-speech over DACVAE latents, in pure Equinox.

import echo_eqx

dit, codec = echo_eqx.load_dit("voice"), echo_eqx.load_codec("voice")
audio = echo_eqx.synthesize(dit, codec, "Hello.")
"""

from importlib.metadata import version

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS, CodecConfig, DiTConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import sample, sample_blockwise
from echo_eqx.generation import GenerationConfig, KnownVoice, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.speaker import nearest_voice, speaker_latents
from echo_eqx.speech.synthesize import Utterance, synthesize, synthesize_all
from echo_eqx.trees import cast, num_parameters
from echo_eqx.weights.load import load_codec, load_dit
from echo_eqx.weights.native import save

__version__ = version("echo_eqx")

__all__ = [
    "CODEC_PRESETS",
    "DACVAE",
    "DIT_PRESETS",
    "CodecConfig",
    "DiTConfig",
    "EchoDiT",
    "EchoError",
    "GenerationConfig",
    "KnownVoice",
    "SamplerSettings",
    "UsageError",
    "Utterance",
    "cast",
    "load_codec",
    "load_dit",
    "nearest_voice",
    "num_parameters",
    "sample",
    "sample_blockwise",
    "save",
    "speaker_latents",
    "synthesize",
    "synthesize_all",
    "use_compilation_cache",
]
