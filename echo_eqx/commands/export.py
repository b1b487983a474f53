"""Write a model in the files that another runtime loads.

    echo-eqx export runs/1 --to pytorch --output for_pytorch
    echo-eqx export voice --to native --dtype int8 --output small

SOURCE is a file, a folder, a run folder, a checkpoint, a Hub id, or voice, as for infer. Of a run
folder it is the newest checkpoint, and the moving average of its weights if there is one.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from echo_eqx import __version__
from echo_eqx.cli import on_terminal, parse
from echo_eqx.errors import UsageError
from echo_eqx.export import dacvae, flax, gguf, mlx, native, onnx, pytorch, stablehlo
from echo_eqx.export.folder import check_target, write_folder
from echo_eqx.export.hub import push, write_card
from echo_eqx.export.models import Models
from echo_eqx.model.int8 import dequantize
from echo_eqx.trees import num_parameters
from echo_eqx.upload import check_repo
from echo_eqx.weights.find import SHIPPED, find_weights
from echo_eqx.weights.load import Kind, load_model, model_kind

logger = logging.getLogger(__name__)
Format = Literal["native", "pytorch", "flax", "dacvae", "mlx", "gguf", "onnx", "stablehlo"]
WRITERS: dict[Format, Callable[[Models, Path, str], None]] = {
    "native": native.write,
    "pytorch": pytorch.write,
    "flax": flax.write,
    "dacvae": dacvae.write,
    "mlx": mlx.write,
    "gguf": gguf.write,
    "onnx": onnx.write,
    "stablehlo": stablehlo.write,
}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.15}
"""Of a number on disk; int8 with scales and with what stays in 16 bits."""


@dataclass(frozen=True)
class Args:
    source: Annotated[str, tyro.conf.Positional]
    """The weights: a file, a folder, a run folder, a Hub id, or voice."""
    to: Format
    """The format: native is our safetensors, pytorch the community's EchoDiT, flax a checkpoint of
    the published trainer, dacvae a codec for facebook's DACVAE, mlx both models for mlx-audio, gguf
    an EchoDiT for echo-tts-cpp, onnx programs for onnxruntime, stablehlo programs for JAX alone."""
    output: Path
    """The folder to write; it appears whole or not at all."""
    codec: str | None = None
    """A codec to write in the same folder, where the format can hold one."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """The numbers on disk. int8 is for the linear layers; see the README."""
    overwrite: bool = False
    """Replace an export that is already in the folder."""
    push: str | None = None
    """OWNER/NAME of a model on the Hub to upload the folder to; a new one is private."""
    license: str | None = None
    """The license of the weights on the card, as the Hub names it, such as apache-2.0."""
    language: str | None = None
    """The language of the speech on the card, such as en."""


def main() -> None:
    args = parse(Args, __doc__)
    check_card(args)
    check_target(args.output, args.overwrite)
    if on_terminal():
        logger.info(f"loading {args.source}")
    models, origin = load_models(args.source, args.codec)
    write_folder(
        args.output,
        lambda folder: write(args, models, folder),
        overwrite=args.overwrite,
        needed=needed_bytes(args.to, models, args.dtype),
        origin={"echo_eqx": __version__, "format": args.to, "dtype": args.dtype, **origin},
    )
    print(f"{args.output}: {args.to}, {args.dtype}")
    if args.push is not None:
        push(args.output, args.push)


def check_card(args: Args) -> None:
    """**Raises**: `UsageError` for flags of the card and the upload that cannot be used."""
    if args.push is not None:
        check_repo(args.push, "model")
    for name, value in (("license", args.license), ("language", args.language)):
        if value is not None and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", value) is None:
            raise UsageError(f"--{name}: expected a name such as the Hub has, got {value!r}")


def write(args: Args, models: Models, folder: Path) -> None:
    """Write the files of the format, and a card, into the new folder.

    **Raises**: `EchoError` naming what the format cannot hold.
    """
    WRITERS[args.to](models, folder, args.dtype)
    is_ours = args.source in SHIPPED
    write_card(
        models,
        folder,
        form=args.to,
        dtype=args.dtype,
        name=args.push or args.output.absolute().name,
        license=args.license or ("apache-2.0" if is_ours else "other"),
        language=args.language or ("en" if is_ours else None),
    )


def needed_bytes(form: Format, models: Models, dtype: str) -> int:
    """About how many bytes the files will take."""
    copies = 2 if form in ("flax", "dacvae") else 1
    return int(copies * _BYTES[dtype] * sum(map(num_parameters, (models.dit, models.codec))))


def load_models(source: str, codec: str | None) -> tuple[Models, dict[str, dict[str, str]]]:
    """The models of `source`, and of `codec` if it is given, with the name of each and its file.

    **Raises**: `EchoError` if `source` holds neither an EchoDiT nor a codec, or is damaged.
    """
    sources: dict[Kind, str] = {"dit": source, "codec": source}
    if find_weights(source, "dit") == find_weights(source, "codec"):
        if model_kind(source) == "dit":
            del sources["codec"]
        elif codec is None:
            del sources["dit"]
        else:
            raise UsageError(f"--codec: expected an EchoDiT as SOURCE, but {source} is a codec")
    if codec is not None:
        sources["codec"] = codec
    found, origin = {}, {}
    for kind, name in sources.items():
        # Fish S1-DAC needs the principal components that are beside the EchoDiT it is for.
        pca = source if kind == "codec" and codec is not None else None
        model, path = load_model(name, kind, pca=pca, exports=False)
        found[kind] = dequantize(model) if kind == "dit" else model
        # Of a path only its last part: the folder may be published.
        shown = Path(name).name if Path(name).exists() else name
        origin[kind] = {"source": shown, "file": path.name}
    return Models(**found), origin
