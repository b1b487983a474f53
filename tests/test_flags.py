"""Flags have the same name in all commands."""

import re
import sys
from collections import defaultdict
from importlib import import_module

import jax
import jax.numpy as jnp
import pytest
import tyro
from processes import call

from echo_eqx import cli
from echo_eqx.commands import COMMANDS
from echo_eqx.layers.precision import matmul_precision

KEPT = {
    "infer": "checkpoint text output speaker_ref cfg_scale steps duration seed",
    "train": "model data run_dir num_steps batch_size checkpoint_every seed silence mesh init_from "
    "learning_rate",
}
WORDS = {
    "accumulate": "accum",
    "accumulation": "accum",
    "average": "mean",
    "directory": "",
    "dir": "",
    "folder": "",
    "maximum": "max",
    "longest": "max",
    "minimum": "min",
    "normalise": "normalize",
    "normalisation": "normalize",
    "normalization": "normalize",
    "number": "num",
    "n": "num",
    "param": "parameter",
    "preset": "model",
    "ref": "speaker",
    "reference": "speaker",
    "sec": "second",
    "synthesise": "synthesize",
    "temp": "temperature",
    "tokeniser": "tokenizer",
}
DIFFERENT = (
    {"voice", "voices"},  # one voice; a folder of voices
    {"run_dir", "runs"},  # one run; a folder of runs
    {"references", "speaker"},  # recordings of voices; the name of the speaker
    {"chip", "chips"},  # the kind; how many
    {"host", "hosts"},  # the address to listen on; machines to train on
    {"worker", "workers"},  # the index of one; how many
)


pytestmark = pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Flags by command, from its parser."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in COMMANDS:

            def collect(kind, *, name=name, use_underscores, default=tyro.MISSING, **_):
                parser = tyro.extras.get_parser(
                    kind, default=default, use_underscores=use_underscores
                )
                found[name] = set(options_of(parser))
                raise SystemExit

            patch.setattr(cli.tyro, "cli", collect)
            patch.setattr(sys, "argv", [name])
            with pytest.raises(SystemExit):
                import_module(f"echo_eqx.commands.{name}").main()
    return found


def options_of(parser):
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from options_of(inner)


def meaning(flag: str) -> str:
    """The flag without the differences between spellings of the same thing."""
    name = flag.removeprefix("--").rpartition(".")[2].lower().replace("-", "_").removeprefix("no_")
    words = re.sub("([a-z])our", r"\1or", name).replace("centre", "center").split("_")
    words = [word.removesuffix("s") if len(word) > 3 else word for word in words]
    return "_".join(filter(None, (WORDS.get(word, word) for word in words)))


def spelling(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2].removeprefix("no_")


def test_no_flag_has_two_spellings(flags):
    spellings = defaultdict(set)
    for command in flags.values():
        for flag in command:
            spellings[meaning(flag)].add(spelling(flag))
    twice = [names for names in spellings.values() if len(names) > 1 and names not in DIFFERENT]
    assert not twice
    assert sum(map(len, spellings.values())) > 100


def test_two_spellings_are_noticed():
    for one, other in (
        ("--batch-size", "--batch_size"),
        ("--normalise_text", "--normalize_text"),
        ("--cache", "--cache_dir"),
        ("--ref_frames", "--speaker_frames"),
        ("--optimizer.num_step", "--no_num_steps"),
    ):
        assert meaning(one) == meaning(other)


def test_flags_are_lower_case_with_underscores(flags):
    for command in flags.values():
        for flag in command:
            assert re.fullmatch(r"--[a-z0-9_.]+", flag), flag


@pytest.mark.parametrize("command", KEPT)
def test_published_flags_still_exist(flags, command):
    assert {f"--{name}" for name in KEPT[command].split()} <= flags[command]


@pytest.mark.parametrize(
    "name, flags",
    [
        ("infer", ("--text", "x", "--checkpoint")),
        ("train", ("--data",)),
        ("train_codec", ("--data",)),
    ],
)
def test_matmul_precision_is_set_before_anything_is_loaded(name, flags, tmp_path):
    option = "jax_default_matmul_precision"
    before = getattr(jax.config, option)
    try:
        asked = ("--matmul_precision", "tensorfloat32")
        done = call(name, *flags, tmp_path / "none.safetensors", *asked, cwd=tmp_path)
        assert done.returncode == 1 and "none.safetensors" in done.stderr
        assert getattr(jax.config, option) == matmul_precision(jnp.float32) == "tensorfloat32"
        assert matmul_precision(jnp.bfloat16) is None
    finally:
        jax.config.update(option, before)
    assert matmul_precision(jnp.float32) == "highest"
