"""Everyday use of all commands: closed pipes, narrow terminals, `~`, dashes, no home folder."""

import os
import pwd
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from echo_eqx import cli
from echo_eqx.commands import run_command
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import EchoError
from echo_eqx.files import expand
from echo_eqx.train.config import TrainConfig
from echo_eqx.train.distributed import StopSignal
from echo_eqx.train.settings import parse_settings

# Each kind of stdout and stderr is tested in its own fork of a process that has all imports.
SINKS = r"""
import logging, os, sys
from pathlib import Path
from echo_eqx.cli import reader_left, run

place = Path(sys.argv[1])

def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return write

def slow_reader():
    read, write = os.pipe()
    os.set_blocking(write, False)
    if os.fork() == 0:
        os.close(write)
        size = 0
        while data := os.read(read, 1 << 16):
            size += len(data)
        (place / "slow_reader read").write_text(str(size))
        os._exit(0)
    os.close(read)
    return write

SINKS = {
    "broken_pipe": broken_pipe,
    "slow_reader": slow_reader,
    "full": lambda: os.open("/dev/full", os.O_WRONLY),
    "narrow": lambda: os.open(place / "narrow.txt", os.O_WRONLY | os.O_CREAT),
    "closed": lambda: None,
}

def main():
    for _ in range(1000):
        print("a line that nobody may read, " * 10)
    print("gr\u00fc\u00df \u0433\u043e\u043b\u043e\u0441 \udcff")
    logging.getLogger("echo_eqx").info("gr\u00fc\u00df \udcff")
    print(end="without an end", flush=True)
    file = os.open(os.devnull, os.O_RDONLY)
    (place / name).write_text(f"{reader_left()} {file > 2}")
    raise SystemExit(3)

for name, make in SINKS.items():
    if os.fork():
        code = os.waitstatus_to_exitcode(os.wait()[1])
        while name == "slow_reader" and not (place / "slow_reader read").exists():
            pass
        print(name, code, *(place / name).read_text().split())
        continue
    sink = make()
    for number in (1, 2):
        os.close(number) if sink is None else os.dup2(sink, number)
    if sink is None:
        sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = None
    else:
        os.close(sink)
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="ascii", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", encoding="ascii", closefd=False)
    run(main)
"""


def test_broken_outputs_neither_stop_a_command_nor_change_its_exit_code(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SINKS, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == [
        "broken_pipe 3 True True",  # exit code, reader_left, files do not take the place of stdout
        "slow_reader 3 False True",
        "full 3 False True",
        "narrow 3 False True",
        "closed 3 False True",
    ], done.stderr
    assert done.stderr == ""
    assert int((tmp_path / "slow_reader read").read_text()) > 290_000  # nothing is dropped
    assert "gr\\xfc\\xdf \\u0433" in (tmp_path / "narrow.txt").read_text("ascii")


STRINGS = [
    "infer --text -hello",
    "infer --checkpoint -x --text hello",
    "infer --speaker_ref -x --text hello",
    "prepare --input -x",
    "inspect_shards --data -x",
    "train --data -x",
    "train --model -x",
    "train --config -x",
    "train --optimizer.schedule -x",
    "train_codec --run-dir -x",
    "monitor --runs a --token -x",
    "plan --mesh -x",
    "watchdog --log -x",
    "make_corpus --output -x",
    "eval_voice --codec -x",
    "export voice --to native --output x --codec -x",
    "build_voice --work -x",
    "tpu create --accelerator_type v4-8 --name -x",
]


@pytest.mark.parametrize("line", STRINGS)
def test_a_hint_explains_how_to_write_a_value_with_a_dash(line, monkeypatch, capsys):
    name, *words = line.split()
    at = next(i for i, word in enumerate(words) if re.match("-[^-]", word))
    flag, value = words[at - 1 : at + 1]
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        run_command(name)
    assert ended.value.code == 2
    assert f"{value!r} is the value of {flag}, write {flag}={value}" in capsys.readouterr().err


@dataclass(frozen=True)
class Inner:
    file: Path = Path("~/inner")


@dataclass(frozen=True)
class Args:
    text: str = ""
    number: int = 0
    some: tuple[Path, ...] = ()
    maybe: Path | None = None
    flag: bool = False
    inner: Inner = Inner()


def parse(*words: str) -> Args:
    return cli.parse(Args, None, arguments=words)


def test_the_hint_appears_only_for_plausible_values(capsys):
    assert parse("--text=-hello").text == "-hello"
    assert parse("--number", "-5").number == -5
    for words in (["--flag", "--typo"], ["--number", "-5", "--typo"], ["--text", "--flag"]):
        with pytest.raises(SystemExit):
            parse(*words)
        assert "is the value of" not in capsys.readouterr().err, words


def test_tilde_is_expanded_in_paths_and_not_in_texts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("--text=~/x", "--some", "~/a", "b", "--maybe=~/x")
    assert args == Args("~/x", 0, (tmp_path / "a", Path("b")), tmp_path / "x", False, args.inner)
    assert args.inner.file == tmp_path / "inner"
    assert expand(Path("~nobody of this name/x")) == Path("~nobody of this name/x")
    (tmp_path / "c.json").write_text('{"model": "tiny", "run_dir": "~/r"}')
    presets = {"tiny": TrainConfig(model="tiny")}
    arguments = ["--config=~/c.json"]
    config = parse_settings(presets, None, default=lambda _: "tiny", arguments=arguments)
    assert config.run_dir == tmp_path / "r"


@pytest.fixture
def no_cache():
    """JAX without a compilation cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_without_a_home_folder_commands_work_or_explain(monkeypatch, no_cache):
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    config = cli.parse(TrainConfig, None, arguments=[])
    assert config.cache_dir.is_absolute() and config.cache_dir.name == "shards"
    with pytest.raises(EchoError, match="~/x: cannot expand ~, because this user has no home"):
        cli.parse(TrainConfig, None, arguments=["--run_dir=~/x"])


def test_commands_work_without_a_writable_cache(monkeypatch, tmp_path, no_cache):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/dev/null"), Path("/proc")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_run_saves_on_signals_unless_they_were_ignored(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        ignoring = StopSignal()
        os.kill(os.getpid(), number)
        assert not ignoring.requested(1)
        signal.signal(number, signal.default_int_handler)
        stop = StopSignal()
        os.kill(os.getpid(), number)
        assert stop.requested(1)
        assert stop.exit_code == (130 if number == signal.SIGINT else 76)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@dataclass(frozen=True)
class Sized:
    size: str = "small"
    width: int = 1
    depth: int = 1


def test_flags_that_set_defaults_may_come_in_any_order(capsys):
    bases = {"small": Sized(), "large": Sized("large", 8, 8)}

    def sized(*words: str) -> Sized:
        return cli.parse(Sized, None, base=lambda flags: bases[flags.size], arguments=words)

    assert sized() == Sized()
    assert sized("--width", "2", "--size=large") == Sized("large", 2, 8)
    with pytest.raises(SystemExit):
        sized("--size", "large", "--help")
    assert "(default: 8)" in capsys.readouterr().out
