"""Write a model in the files that another runtime loads.

    echo-eqx export runs/1 --to pytorch --output for_pytorch
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from echo_eqx.cli import parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.export.models import Models
from echo_eqx.weights.find import SHIPPED
from echo_eqx.weights.load import load_codec, load_dit

Format = Literal["native"]


@dataclass(frozen=True)
class Args:
    source: Annotated[str, tyro.conf.Positional]
    """The weights: a file, a folder, a run folder, a Hub id, or voice."""
    to: Format
    """The format to write."""
    output: Path
    """The folder to write; it appears whole or not at all."""
    codec: str | None = None
    """A codec to write in the same folder, where the format can hold one."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """The numbers on disk."""
    overwrite: bool = False
    """Replace an export that is already in the folder."""


def main() -> None:
    args = parse(Args, __doc__)
    models = load_models(args)
    print(models)


def load_models(args: Args) -> Models:
    """SOURCE as what its content says it is; voice is both models of the small voice."""
    if args.source in SHIPPED:
        return Models(load_dit(args.source), load_codec(args.codec or args.source))
    try:
        return Models(load_dit(args.source), load_codec(args.codec) if args.codec else None)
    except EchoError as error:
        if args.codec:
            raise
        try:
            return Models(codec=load_codec(args.source))
        except EchoError:
            raise UsageError(str(error)) from None
