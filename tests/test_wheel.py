"""A built wheel, installed outside the source tree, has all commands and works."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import soundfile as sf
from processes import xla_flags

from echo_eqx.commands import COMMANDS

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=keep | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because setuptools writes into the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "echo_eqx", source / "echo_eqx", ignore=ignore)
    build = ("wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", source, source)
    run(sys.executable, "-m", "pip", *build, cwd=source)
    (path,) = source.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """`bin` of a new environment: the package from the wheel, its dependencies from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    run(*pip, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "dependencies.pth").write_text("\n".join(paths))
    code = "import echo_eqx; print(echo_eqx.__file__)"
    assert Path(run(python, "-c", code, cwd=home).strip()).is_relative_to(site)
    return python.parent


def test_the_wheel_contains_every_file_of_the_package(wheel: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "echo_eqx").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= held, files - held
    for kind in ("weights/dit.safetensors", "references/ben.flac", "shards/000000.tar"):
        assert f"echo_eqx/voice/{kind}" in held
    assert {"echo_eqx/ops/page/index.html", "echo_eqx/voice/grammar.txt"} <= held


def test_the_first_commands_of_the_readme_work(installed: Path, tmp_path: Path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    install, *lines = blocks[0].splitlines() + blocks[1].splitlines()[:1]
    assert install == "pip install -e ."
    (tmp_path / "echo_eqx").symlink_to(ROOT / "echo_eqx")  # for files of the source tree
    environment = {
        "PATH": f"{installed}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XLA_FLAGS": xla_flags(),
    }
    said = run("bash", "-euc", "\n".join(lines), cwd=tmp_path, **environment)
    assert "next: choose a voice with --voice ben" in said
    for name in ("hello.wav", "output.wav"):
        audio, rate = sf.read(tmp_path / name)
        assert rate == 24_000 and 0.5 < len(audio) / rate < 3.3 and abs(audio).max() > 0.05


def test_commands_and_scripts_have_the_same_help(installed: Path, tmp_path: Path):
    def help_of(*command: object, **environment: str) -> str:
        said = run(*command, "--help", cwd=tmp_path, COLUMNS="100", NO_COLOR="1", **environment)
        return re.sub(r"usage: .*?infer(\.py)? ", "usage: infer ", said)

    text = help_of(installed / "echo-eqx", "infer")
    assert text.startswith("usage: infer [-h] [OPTIONS]") and "--speaker_ref" in text
    script = (sys.executable, ROOT / "scripts" / "infer.py")
    assert text == help_of(*script, PYTHONPATH=str(ROOT))


def test_every_command_has_a_script_and_a_line_of_help(installed: Path, tmp_path: Path):
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == set(COMMANDS)
    modules = (ROOT / "echo_eqx" / "commands").glob("[!_]*.py")
    assert {path.stem for path in modules} == set(COMMANDS)
    lines = run(installed / "echo-eqx", "--help", cwd=tmp_path).splitlines()
    described = {line.split()[0] for line in lines if re.match(r"  \w+ +\w.*\.$", line)}
    assert described == set(COMMANDS)


def test_an_unknown_command_gives_a_one_line_error(installed: Path, tmp_path: Path):
    done = subprocess.run([installed / "echo-eqx", "speek"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: expected a command, one of .*; got 'speek'\n", done.stderr)
