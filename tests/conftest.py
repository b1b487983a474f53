"""Shape checks on every call, strict promotion, and the golden vectors."""

from beartype import BeartypeConf
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

SHAPED = ("codec", "flow", "layers", "model", "sharding", "speech", "train", "trees")
"""Where signatures have shapes. Their checks cost more than those of other types."""
OTHERS = ("cli", "commands", "data", "export", "files", "generation", "hub", "json_data", "ops")
OTHERS += ("prepare", "serve", "voice", "weights")
install_import_hook([f"echo_eqx.{name}" for name in SHAPED], "beartype.beartype")
beartype_packages([f"echo_eqx.{name}" for name in OTHERS], conf=BeartypeConf(claw_is_pep526=False))

import functools  # noqa: E402
import gc  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

# What one test compiled, others find: in this process, in other workers, and in the commands that
# tests start, which inherit the folder.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="echo_eqx_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import huggingface_hub  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hub_server import Hub  # noqa: E402
from processes import xla_flags  # noqa: E402
from speech_server import Client, locked, shared_server  # noqa: E402

import echo_eqx  # noqa: E402
from echo_eqx.cli import log_to_stderr  # noqa: E402
from echo_eqx.flow.objective import frame_weight, squared_errors  # noqa: E402
from echo_eqx.trees import leaf_names  # noqa: E402

gc.set_threshold(50_000, 20, 20)  # as commands do
log_to_stderr()
logging.getLogger("echo_eqx").propagate = True  # for caplog
# Devices for meshes; everything else runs on the first one.
os.environ["XLA_FLAGS"] = xla_flags(devices=8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may use the network

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, so that all workers finish at about the same time."""
    long = ("test_train.py", "test_kills.py", "test_checkpoint.py", "test_sharding.py")
    items.sort(key=lambda item: long.index(item.path.name) if item.path.name in long else len(long))


def pytest_unconfigure() -> None:
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def golden_dit() -> echo_eqx.EchoDiT:
    return echo_eqx.load_dit(GOLDEN / "dit_tiny" / "weights_only.pkl")


@pytest.fixture(scope="session")
def dit_cases() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "dit_tiny" / "cases.npz"))


@pytest.fixture(scope="session")
def golden_codec() -> echo_eqx.DACVAE:
    return echo_eqx.load_codec(GOLDEN / "dacvae_tiny" / "weights.pth")


@pytest.fixture(scope="session")
def codec_cases() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "dacvae_tiny" / "cases.npz"))


@pytest.fixture(scope="session")
def blockwise_dit() -> echo_eqx.EchoDiT:
    return echo_eqx.load_dit(GOLDEN / "blockwise" / "weights.safetensors")


@pytest.fixture(scope="session")
def blockwise_cases() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "blockwise" / "cases.npz"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback, which `huggingface_hub` takes for the real one."""
    hub = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield hub
    hub.stop()


@pytest.fixture(scope="session")
def speech_port(tmp_path_factory):
    """The port of a speech server that all workers share."""
    with shared_server(shared_folder(tmp_path_factory)) as port:
        yield port


@pytest.fixture
def server(speech_port, tmp_path_factory):
    """A client of the shared speech server, which serves one test at a time."""
    with locked(shared_folder(tmp_path_factory) / "speech_server.turn"):
        yield Client(speech_port)


def shared_folder(tmp_path_factory):
    """The temporary folder of this test run, which all workers see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@functools.cache
def abstract_model(kind, config):
    return jax.eval_shape(lambda key: kind.init(config, key=key), jax.random.key(0))


def random_model(kind, config, scale: float = 0.1, seed: int = 0):
    """A model whose leaves are all random, made without compiling anything."""
    rng = np.random.default_rng(seed)
    skeleton = abstract_model(kind, config)

    def leaf(name: str, shape: tuple[int, ...]):
        base = 1.0 if name.endswith(("norm.weight", "alpha")) else 0.0
        return jax.device_put((base + scale * rng.standard_normal(shape)).astype(np.float32))

    leaves, treedef = jax.tree.flatten(skeleton)
    names = leaf_names(skeleton)
    return treedef.unflatten(leaf(n, x.shape) for n, x in zip(names, leaves, strict=True))


def max_difference(a, b) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def flow_loss(dit, batch, sample, *, valid_frames_only=False):
    """The loss on one device: the mean over all frames, or over those of the recordings."""
    weight = frame_weight(batch, valid_frames_only)
    return jnp.sum(squared_errors(dit, batch, sample) * weight) / jnp.sum(weight)
