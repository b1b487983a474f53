"""Our own safetensors, which `load_dit` and `load_codec` read: weights, sizes and settings.

    model.safetensors, config.json                       one model
    dit.safetensors, codec.safetensors, config.json      both

Files above `MAX_FILE_BYTES` are split as on the Hugging Face Hub: into files such as
`model-00001-of-00002.safetensors`, with `model.safetensors.index.json`. Every file carries the
config; `config.json` repeats it for people and other programs. `weights.native.native_tensors`
describes the tensors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from echo_eqx.export.models import Models
from echo_eqx.files import write_json
from echo_eqx.weights.native import INT8, native_metadata, native_tensors, readable
from echo_eqx.weights.safetensors_writer import Tensor, write_safetensors
from echo_eqx.weights.sharded import INDEX_SUFFIX

MAX_FILE_BYTES = 4 * 10**9


def write(models: Models, folder: Path, dtype: str) -> None:
    """Write one model or both. With int8, a codec beside an EchoDiT is float32."""
    configs = {}
    both = models.dit is not None and models.codec is not None
    for kind, model in (("dit", models.dit), ("codec", models.codec)):
        if model is None:
            continue
        metadata = native_metadata(model)
        of_model = "float32" if dtype == INT8 and both and kind == "codec" else dtype
        write_parts(folder, kind if both else "model", native_tensors(model, of_model), metadata)
        configs[kind] = readable(metadata)
    write_json(folder / "config.json", configs if both else next(iter(configs.values())))


def write_parts(
    folder: Path, stem: str, tensors: Sequence[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write `stem.safetensors`, or several files with an index if it would be too large."""
    parts: list[list[Tensor]] = [[]]
    for tensor in tensors:
        used = sum(other.num_bytes for other in parts[-1])
        if parts[-1] and used + tensor.num_bytes > MAX_FILE_BYTES:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, metadata)
        return
    files = {
        f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, 1)
    }
    for name, part in files.items():
        write_safetensors(folder / name, part, metadata)
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": {tensor.name: name for name, part in files.items() for tensor in part},
    }
    write_json(folder / f"{stem}{INDEX_SUFFIX}", index)
