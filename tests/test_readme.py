"""The README's commands run, letter by letter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import soundfile as sf

ROOT = Path(__file__).parents[1]


def test_the_first_commands_speak(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    install, *lines = blocks[0].splitlines() + blocks[1].splitlines()[:1]
    assert install == "pip install -e ."
    for folder in ("scripts", "echo_eqx"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("hello.wav", "output.wav"):
        assert 0.5 < sf.info(tmp_path / name).duration < 3.3
    assert "next: choose a voice with --speaker_ref" in done.stdout


def test_commands_and_names_it_shows_exist():
    import echo_eqx

    text = (ROOT / "README.md").read_text()
    for script in re.findall(r"scripts/(\w+\.py)", text):
        assert (ROOT / "scripts" / script).is_file(), script
    for name in re.findall(r"echo_eqx\.(\w+)\(", text):
        assert name in echo_eqx.__all__, name


def test_its_python_runs_as_written(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    audio, again = names["audio"], names["again"]
    assert 0.5 * len(audio) < len(again) <= len(audio) + names["codec"].config.hop
    assert (tmp_path / "model.safetensors").is_file()
