"""How long recordings, references and texts may be, from the model that will be trained."""

from dataclasses import dataclass

from echo_eqx.config import DIT_PRESETS, CodecConfig
from echo_eqx.errors import EchoError, UsageError


@dataclass(frozen=True)
class Limits:
    max_seconds: float
    ref_seconds: float
    max_text_bytes: int
    """Of the text and the 0 in front of it."""

    @classmethod
    def of(
        cls,
        model: str | None,
        codec: CodecConfig,
        max_seconds: float | None = None,
        ref_seconds: float | None = None,
    ) -> "Limits":
        """What the preset `model` holds of latents of `codec`; seconds that are given come first.

        **Raises**: `UsageError` if there is no such preset, and `EchoError` if it is for latents
        of another width.
        """
        if model is None:
            return cls(max_seconds or 30.72, ref_seconds or 20.48, 768)
        if model not in DIT_PRESETS:
            names = ", ".join(DIT_PRESETS)
            raise UsageError(f"--model: expected one of {names}, got {model!r}")
        config = DIT_PRESETS[model]
        if config.latent_dim != codec.latent_dim:
            fit = [name for name, c in DIT_PRESETS.items() if c.latent_dim == codec.latent_dim]
            instead = f"give --model {' or '.join(fit)}, or" if fit else "give"
            raise EchoError(
                f"--model {model}: expected a codec with latents of {config.latent_dim} channels, "
                f"got {codec.latent_dim}; {instead} another --codec"
            )
        return cls(
            max_seconds or config.max_frames / codec.frame_rate,
            ref_seconds or config.max_speaker_frames / codec.frame_rate,
            config.max_text_bytes,
        )
