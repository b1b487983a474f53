"""The README's commands run, letter by letter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import soundfile as sf

ROOT = Path(__file__).parents[1]


def test_the_command_that_needs_no_download_runs(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "noise/dit" in block]
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sf.info(tmp_path / "noise" / "hello.wav").duration > 0.5


def test_commands_and_names_it_shows_exist():
    import echo_eqx

    text = (ROOT / "README.md").read_text()
    for script in re.findall(r"scripts/(\w+\.py)", text):
        assert (ROOT / "scripts" / script).is_file(), script
    for name in re.findall(r"echo_eqx\.(\w+)\(", text):
        assert name in echo_eqx.__all__, name
