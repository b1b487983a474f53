"""`load_dit` and `load_codec` read any known weights file; its format is found from its content."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.config import CodecConfig, DiTConfig, FishConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import ECHO_TTS, ECHO_TTS_CHANNELS, GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.model.int8 import MARKER
from echo_eqx.weights.assemble import (
    Sources,
    abstract_model,
    check_memory,
    check_sizes,
    load_into,
    single,
)
from echo_eqx.weights.checkpoint.reader import TrainingCheckpoint
from echo_eqx.weights.dacvae import IN_PROJ, load_dacvae_pth, load_dacvae_safetensors
from echo_eqx.weights.find import Kind, find_candidates, find_weights
from echo_eqx.weights.fish import is_fish, load_fish
from echo_eqx.weights.flax import read_flax_checkpoint
from echo_eqx.weights.gguf_reader import MAGIC, GGUFFile
from echo_eqx.weights.mlx import MLX_IN_PROJ, load_dacvae_mlx
from echo_eqx.weights.names import flax_config, flax_sources, pytorch_config, pytorch_sources
from echo_eqx.weights.native import native_config, native_generation, native_kind
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.sharded import INDEX_SUFFIX, ShardedSafetensors, WithoutPrefix

logger = logging.getLogger(__name__)
_NAMES = {"dit": "an EchoDiT", "codec": "a codec"}


def load_dit(source: str | Path, *, dtype: Any = jnp.float32) -> EchoDiT:
    """Load an EchoDiT.

    **Arguments**:
    - `source`: "voice" for the small voice in the package, or a file, a folder or a Hub id
      `owner/name[@revision][:file]` with
      - our safetensors,
      - a Flax checkpoint of the published trainer (pickle or safetensors),
      - the community's PyTorch safetensors, possibly sharded or with a prefix on all names, also as
        mlx-audio has them, or
      - a GGUF file of echo-tts-cpp;

      or a training checkpoint (its EMA if it has one); or a run folder (its newest intact
      checkpoint, read from the bfloat16 export if there is one).
    - `dtype`: of the matrices, and so of the computation. int8 weights stay int8: see
      `echo_eqx.model.int8`.

    **Raises**: `EchoError` naming the file and what is wrong with it. No file can run code.
    """
    return load_model(source, "dit", dtype=dtype)[0]


def load_codec(
    source: str | Path, *, pca: str | Path | None = None, dtype: Any = jnp.float32
) -> Codec:
    """Load a codec: a `DACVAE` or a `FishDAC`, as the file says.

    **Arguments**:
    - `source`: "voice" for the codec of the small voice in the package, or a file, a folder or a
      Hub id `owner/name[@revision][:file]`, with our safetensors, the published DACVAE
      `weights.pth` or its tensors as safetensors, mlx-audio's DACVAE with its `config.json`, or the
      published Fish S1-DAC, or a training checkpoint or run folder, as in `load_dit`.
    - `pca`: for the published Fish S1-DAC, the weights of the EchoDiT that it is for: its principal
      components, `pca_state.safetensors`, are beside them. Without it they are looked for beside
      the codec, and then in jordand/echo-tts-base.
    - `dtype`: of the kernels, and so of the computation.

    **Raises**: `EchoError` naming the file and what is wrong with it. No file can run code.
    """
    return load_model(source, "codec", pca=pca, dtype=dtype)[0]


def model_kind(source: str | Path) -> Kind:
    """Whether `source` holds an EchoDiT or a codec, by its content. Its weights are not read.

    **Raises**: `EchoError` if it cannot be found or opened.
    """
    path = find_weights(source)
    if path.is_dir():
        return "codec" if TrainingCheckpoint(path).model_kind == "codec" else "dit"
    form = _kind(path)
    if form == "safetensors":
        file = _open(path)
        is_dit = native_kind(file) == "dit" or any("speaker_encoder" in n for n in file.names)
        return "dit" if is_dit else "codec"
    return "codec" if form == "torch" else "dit"


def load_model(
    source: str | Path,
    kind: Kind,
    *,
    pca: str | Path | None = None,
    dtype: Any = jnp.float32,
    exports: bool = True,
) -> tuple[Any, Path]:
    """The model of `load_dit` or `load_codec`, and the file or checkpoint it was read from.

    Only the weights are read and verified, once. If the weights in a run folder's newest checkpoint
    are damaged, the previous checkpoint is tried. With `exports`, a checkpoint's own export is
    preferred.
    """
    candidates = find_candidates(source, kind, exports=exports)
    first: EchoError | None = None
    for path in candidates:
        try:
            if path.is_dir():
                return _load_checkpoint(path, kind, dtype), path
            if kind == "dit":
                return _load_dit(path, dtype), path
            return _load_codec(path, pca, dtype), path
        except EchoError as error:
            if len(candidates) == 1:
                raise
            first = first or error
            logger.warning(f"{path} cannot be used ({error}); trying the previous one")
    raise EchoError(f"no checkpoint in {source} can be used; the newest: {first}")


def _load_dit(path: Path, dtype: Any) -> EchoDiT:
    kind = _kind(path)
    if kind == "safetensors":
        file = _open(path)
        if native_kind(file) == "dit":
            return _load_native(file, dtype)
        if native_kind(file) == "codec":
            raise EchoError(f"expected an EchoDiT, got a codec: {path}")
        if any("/" in name for name in file.names):
            weights = WithoutPrefix(file, "/")
            with _naming(path):
                config = flax_config(weights.shapes())
            return _load(config, dtype, path, weights.names, weights, flax_sources)
        weights = WithoutPrefix(file)
        with _naming(path):
            config = pytorch_config(weights.shapes())
        return _load_pytorch(config, dtype, path, weights.names, weights)
    if kind == "pickle":
        return dit_from_flax(read_flax_checkpoint(path).params, path, dtype)
    if kind == "gguf":
        return _load_gguf(GGUFFile(path), dtype)
    raise EchoError(f"expected an EchoDiT, got a PyTorch file of a codec or another model: {path}")


def _load_codec(path: Path, pca: str | Path | None, dtype: Any) -> Codec:
    kind = _kind(path)
    if kind == "torch":
        return load_dacvae_pth(path, dtype)
    if kind == "safetensors":
        file = _open(path)
        if native_kind(file) == "codec":
            return _load_native(file, dtype)
        if IN_PROJ in file.names:
            return load_dacvae_safetensors(file, dtype)
        if MLX_IN_PROJ in file.names:
            return load_dacvae_mlx(file, dtype)
        weights = WithoutPrefix(file)
        if is_fish(weights.names):
            return load_fish(weights, pca, dtype)
    raise EchoError(
        f"expected a DACVAE weights.pth, Fish S1-DAC or our safetensors of a codec, got {path}"
    )


def _load_gguf(file: GGUFFile, dtype: Any) -> EchoDiT:
    """The EchoDiT in a file of echo-tts-cpp. The PCA in it is of a codec, and left out."""
    fields = file.fields
    if (found := fields.get("general.architecture")) != "echo-tts":
        raise EchoError(f"{file.path}: expected architecture echo-tts, got {str(found)[:50]!r}")
    eps = fields.get("echo.norm_eps", 1e-5)
    if type(eps) is not float or not 0 < eps < 1:
        raise EchoError(f"{file.path}: echo.norm_eps: expected 0 to 1, got {str(eps)[:50]}")
    shapes = {name: shape for name, shape in file.shapes().items() if not name.startswith("pca.")}
    with _naming(file.path):
        config = pytorch_config(shapes)
        config = dataclasses.replace(config, norm_eps=float(str(np.float32(eps))))  # 1e-5 again
    return _load_pytorch(config, dtype, file.path, shapes, file)


def _load_pytorch(
    config: DiTConfig, dtype: Any, path: Path, names: Collection[str], arrays: Any
) -> EchoDiT:
    """From tensors under PyTorch names, with the settings of the model that they are of."""
    generation = ECHO_TTS if config.latent_dim == ECHO_TTS_CHANNELS else None
    return _load(config, dtype, path, names, arrays, pytorch_sources, generation)


def dit_from_flax(tensors: Mapping[str, np.ndarray], path: Path, dtype: Any) -> EchoDiT:
    """An EchoDiT from arrays under Flax names: weights, or moments of the same shapes."""
    with _naming(path):
        config = flax_config({name: array.shape for name, array in tensors.items()})
    return _load(config, dtype, path, tensors, tensors, flax_sources)


def _open(path: Path) -> SafetensorsFile | ShardedSafetensors:
    is_index = path.name.endswith(INDEX_SUFFIX)
    return ShardedSafetensors(path) if is_index else SafetensorsFile(path)


def _kind(path: Path) -> str:
    if path.name.endswith(INDEX_SUFFIX):
        return "safetensors"
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise EchoError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise EchoError(f"expected a file of weights, got an empty file: {path}")
    if head[:4] == MAGIC:
        return "gguf"
    # A safetensors file begins with the length of its header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:2] == b"PK":
        return "torch"
    if head[0] == 0x80:
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise EchoError(
        "expected a safetensors, pickle, PyTorch or GGUF file, got one that starts with "
        f"{head[:8]!r}: {path}"
    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prefix errors with `path`."""
    try:
        yield
    except EchoError as error:
        raise EchoError(f"{path}: {error}") from None


def _load_checkpoint(path: Path, kind: str, dtype: Any) -> Any:
    checkpoint = TrainingCheckpoint(path)
    if checkpoint.model_kind != kind:
        raise EchoError(f"expected {_NAMES[kind]}, got {_NAMES[checkpoint.model_kind]}: {path}")
    arrays = checkpoint.model_arrays()
    config, generation = checkpoint.config, checkpoint.generation()
    check_sizes(config, arrays.shapes, str(path))
    return _load(config, dtype, path, arrays.shapes, arrays, generation=generation)


def _load_native(file: SafetensorsFile | ShardedSafetensors, dtype: Any) -> Any:
    weights = WithoutPrefix(file)
    config, generation = native_config(file), native_generation(file)
    check_sizes(config, weights.shapes(), str(file.path))
    return _load(config, dtype, file.path, weights.names, weights, generation=generation)


def _load(
    config: DiTConfig | CodecConfig | FishConfig,
    dtype: Any,
    path: Path,
    names: Collection[str],
    arrays: Any,
    sources: Callable[[str, Any], Sources] = lambda leaf, _: Sources([leaf], single),
    generation: GenerationConfig | None = None,
) -> Any:
    """The model of `config`, from `arrays` under our names or those of `sources`."""
    skeleton = abstract_model(config, generation or GenerationConfig(), dtype, MARKER in names)
    check_memory(skeleton, str(path))
    return load_into(skeleton, lambda leaf: sources(leaf, config), arrays, names, str(path))
