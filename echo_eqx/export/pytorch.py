"""The community's PyTorch EchoDiT (https://github.com/jordandare/echo-tts).

    pytorch_model.safetensors    the file that its loader opens: names and layouts of its state dict
    config.json                  arguments of its constructor: `EchoDiT(**json.load(...))`

Its loader has the sizes of the 2.4B model written in; for others, give it those of `config.json`.
That implementation divides the output of the reference projection by 6, so `in_proj` of the
reference encoder is multiplied by 6, unless the model came from there.

The constructor always makes the block-wise modules (`latent_encoder`, `latent_norm`, `wk_latent`,
`wv_latent`). A model without them is loaded with `strict=False`, as its loader does, and these
modules are not used.
"""

from pathlib import Path

from echo_eqx.config import DiTConfig
from echo_eqx.export.models import Models, float_dtype, published_leaves
from echo_eqx.files import write_json
from echo_eqx.weights.names import to_pytorch
from echo_eqx.weights.safetensors_writer import converted, write_safetensors

FORM = "pytorch"


def write(models: Models, folder: Path, dtype: str) -> None:
    number = float_dtype(FORM, dtype)
    dit = models.only_dit(FORM)
    arrays = to_pytorch(published_leaves(dit, FORM), dit.config)
    tensors = [converted(name, array, number) for name, array in sorted(arrays.items())]
    write_safetensors(folder / "pytorch_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", constructor_arguments(dit.config))


def constructor_arguments(config: DiTConfig) -> dict[str, int | float]:
    """Arguments of the PyTorch EchoDiT's constructor."""
    return {
        "latent_size": config.latent_dim,
        "model_size": config.model_dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "norm_eps": config.norm_eps,
        "text_vocab_size": config.vocab_size,
        "text_model_size": config.text.dim,
        "text_num_layers": config.text.num_layers,
        "text_num_heads": config.text.num_heads,
        "text_intermediate_size": config.text.mlp_dim,
        "speaker_patch_size": config.patch_size,
        "speaker_model_size": config.speaker.dim,
        "speaker_num_layers": config.speaker.num_layers,
        "speaker_num_heads": config.speaker.num_heads,
        "speaker_intermediate_size": config.speaker.mlp_dim,
        "timestep_embed_size": config.time_embed_dim,
        "adaln_rank": config.adaln_rank,
    }
