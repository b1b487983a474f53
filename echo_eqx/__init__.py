"""Echo: flow-matching text-to-speech over DACVAE latents, in pure Equinox.

    dit, codec = echo_eqx.load_dit("voice"), echo_eqx.load_codec("voice")
    audio = echo_eqx.synthesize(dit, codec, "Hello.")

- Models: `EchoDiT` and the codecs, each a `Codec`: `DACVAE`, and `FishDAC` for Echo-TTS base. Their
  sizes are `DiTConfig`, `CodecConfig` and `FishConfig`; `DIT_PRESETS` and `CODEC_PRESETS` are sizes
  by name.
- Weights: `load_dit` and `load_codec` read every known format, `save` writes ours, `cast` changes
  the dtype, `num_parameters` counts.
- Text to audio: `synthesize` one text, `synthesize_all` a list of `Utterance`s in batches, `stream`
  one text piece by piece.
- Reference voices: `speaker_latents` of a recording, `nearest_voice` among those a model knows.
- Text to latents: `sample`, and `sample_blockwise` for block-wise models, with `SamplerSettings`.
- What a checkpoint recommends: `GenerationConfig`, with the `KnownVoice`s of the training data.
- Errors: `EchoError` for input that cannot be used, `UsageError` for wrong arguments.
- `use_compilation_cache` sets the folder of compiled programs.
"""

from importlib.metadata import version

from echo_eqx.codec.codec import Codec
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.codec.fish.dac import FishDAC
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS, CodecConfig, DiTConfig, FishConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import sample, sample_blockwise
from echo_eqx.generation import GenerationConfig, KnownVoice, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.speaker import nearest_voice, speaker_latents
from echo_eqx.speech.stream import stream
from echo_eqx.speech.synthesize import Utterance, synthesize, synthesize_all
from echo_eqx.trees import cast, num_parameters
from echo_eqx.weights.load import load_codec, load_dit
from echo_eqx.weights.native import save

__version__ = version("echo_eqx")

__all__ = [
    "CODEC_PRESETS",
    "DACVAE",
    "DIT_PRESETS",
    "Codec",
    "CodecConfig",
    "DiTConfig",
    "EchoDiT",
    "EchoError",
    "FishConfig",
    "FishDAC",
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
    "stream",
    "synthesize",
    "synthesize_all",
    "use_compilation_cache",
]
