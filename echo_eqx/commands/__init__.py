"""The commands: `echo-eqx infer` runs `echo_eqx/commands/infer.py`, as does `scripts/infer.py`."""

import ast
import importlib
import sys
from pathlib import Path

from echo_eqx.cli import run

COMMANDS = (
    "infer",
    "voice",
    "serve",
    "prepare",
    "inspect_shards",
    "train",
    "train_codec",
    "plan",
    "monitor",
    "watchdog",
    "tpu",
    "benchmark",
    "export",
    "make_corpus",
    "eval_codec",
    "eval_voice",
    "build_voice",
)


def main() -> None:
    """`echo-eqx COMMAND ...`: import that command only, and run it with the flags that follow."""
    program, *words = sys.argv
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return
    name = words[0].replace("-", "_")
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: expected a command, one of {known}; got {words[0]!r}", file=sys.stderr)
        raise SystemExit(2)
    if Path(program).name == "__main__.py":
        program = "python -m echo_eqx"
    sys.argv = [f"{program} {name}", *words[1:]]  # the name in usage messages
    run_command(name)


def run_command(name: str) -> None:
    """Run one command with the flags in `sys.argv`."""
    run(importlib.import_module(f"{__name__}.{name}").main)


def _help() -> str:
    lines = ["usage: echo-eqx COMMAND [flags]", "", "commands:"]
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text("utf-8")
        docstring = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:<16}{docstring.splitlines()[0]}")
    return "\n".join([*lines, "", "echo-eqx COMMAND --help explains the flags of a command."])
