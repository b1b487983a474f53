"""The README's commands run exactly as written."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from echo_eqx import cli
from echo_eqx.commands import COMMANDS

ROOT = Path(__file__).parents[1]


class Parsed(Exception):
    """The flags of a command were accepted."""


def test_every_command_in_it_accepts_its_flags(monkeypatch):
    text = (ROOT / "README.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = re.findall(r"\becho-eqx ([^#|>&\n]*)", blocks)
    lines += [line for line in re.findall(r"`echo-eqx ([^`]*)`", text) if " " in line]
    tyro_cli = cli.tyro.cli

    def parse(*args, **options):
        tyro_cli(*args, **options)
        raise Parsed

    def check(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed):
            import_module(f"echo_eqx.commands.{words[0]}").main()

    monkeypatch.setattr(cli.tyro, "cli", parse)
    for line in lines:
        words = shlex.split(line)
        if "COMMAND" in words:
            continue
        check(words)
        if "--" in words:
            check(["train", *words[words.index("--") + 1 :]])
    assert len(lines) > 30
    for name in re.findall(r"scripts/(\w+)\.py", text):
        assert name in COMMANDS, name


def test_names_in_it_exist():
    import echo_eqx

    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"echo_eqx\.(\w+)\(", text):
        assert name in echo_eqx.__all__, name
    for link in re.findall(r"\]\(#([\w-]+)\)", text):
        heading = link.replace("-", " ")
        assert re.search(rf"^#+ {heading}$", text, re.MULTILINE | re.IGNORECASE), link


def test_its_python_runs_as_written(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    audio, again = names["audio"], names["again"]
    assert 0.5 * len(audio) < len(again) <= len(audio) + names["codec"].config.hop
    assert (tmp_path / "model.safetensors").is_file()
