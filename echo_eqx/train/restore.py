"""The initial state of a run: random, from weights, from a published state, or restored."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from echo_eqx.config import CodecConfig, DiTConfig
from echo_eqx.errors import EchoError
from echo_eqx.hub import SCHEME, HubDataset
from echo_eqx.model.dit import EchoDiT
from echo_eqx.model.int8 import dequantize
from echo_eqx.sharding.specs import state_shardings
from echo_eqx.train.config import TrainConfig
from echo_eqx.train.optimizer import learning_rate
from echo_eqx.train.settings import RunConfig, changes
from echo_eqx.train.state import TrainState, init_state, init_train_state, sharded_abstract_state
from echo_eqx.trees import leaf_names
from echo_eqx.weights.checkpoint.reader import (
    FOLDER,
    TrainingCheckpoint,
    find_checkpoints,
    open_verified,
)
from echo_eqx.weights.checkpoint.writer import put_on_mesh, restore_state
from echo_eqx.weights.find import find_candidates, find_weights
from echo_eqx.weights.flax import FlaxCheckpoint, read_flax_checkpoint
from echo_eqx.weights.load import dit_from_flax, load_dit

logger = logging.getLogger(__name__)


def newest_restorable(run_dir: Path) -> TrainingCheckpoint | None:
    """The newest intact checkpoint of a run; each process verifies its share of the pieces.

    **Raises**: `EchoError` if there are checkpoints but all are damaged.
    """
    found = find_checkpoints(run_dir / FOLDER)
    for step, path in found:
        checkpoint = None
        try:
            checkpoint = open_verified(step, path, jax.process_index(), jax.process_count())
        except EchoError as error:
            logger.info(f"checkpoint {path} is damaged ({error}); trying the previous one")
        if _all_processes(checkpoint is not None) and checkpoint is not None:
            return checkpoint
    if found:
        raise EchoError(
            f"all {len(found)} checkpoints in {run_dir / FOLDER} are damaged; "
            "move them away to start over"
        )
    return None


def pinned_source(config: TrainConfig) -> str:
    """`config.data`; if it is a dataset on the Hub and the run has started, at the run's commit."""
    assert config.data is not None
    if not config.data.startswith(SCHEME):
        return config.data
    dataset = HubDataset.parse(config.data)
    for _, path in find_checkpoints(config.run_dir / FOLDER) if not dataset.revision else ():
        with contextlib.suppress(EchoError, KeyError):  # damage is reported later
            revision = TrainingCheckpoint(path).manifest["data"]["revision"]
            return str(dataset.at(revision)) if revision else config.data
    return config.data


def check_same_run(
    checkpoint: TrainingCheckpoint,
    sizes: DiTConfig | CodecConfig,
    config: RunConfig,
    data: dict[str, Any],
) -> None:
    """Check that `checkpoint` belongs to this run, and warn about settings that have changed.

    `data` identifies the data in checkpoints.

    **Raises**: `EchoError` if model, seed or data differ, or an EMA would be dropped.
    """
    path = checkpoint.path
    if type(checkpoint.config) is not type(sizes):
        expected = "dit" if isinstance(sizes, DiTConfig) else "codec"
        raise EchoError(
            f"checkpoint {path}: expected a model of kind {expected}, got "
            f"{checkpoint.model_kind}; use another --run_dir"
        )
    for name, there in vars(checkpoint.config).items():
        if (here := getattr(sizes, name)) != there:
            raise EchoError(
                f"checkpoint {path} has another architecture: expected {name} {here}, got {there}"
            )
    if checkpoint.manifest.get("seed") != config.seed:
        raise EchoError(
            f"checkpoint {path} has another seed: expected {config.seed}, got "
            f"{checkpoint.manifest.get('seed')}"
        )
    if checkpoint.manifest.get("data", {}).get("digest") != data["digest"]:
        raise EchoError(
            f"the data in {config.data} differs from what {path} was trained on; use the same "
            "data, or another --run_dir with --init_from this one"
        )
    changed = changes(checkpoint.manifest.get("settings"), config)
    if config.optimizer.ema_decay == 0 and any(
        name.startswith("ema.") for name in checkpoint.tensors
    ):
        decay = changed.get("ema_decay", (0.999, 0))[0]
        raise EchoError(
            f"checkpoint {path} has an EMA of the weights, which exports are made from, but "
            f"--ema_decay is 0; continue with --ema_decay {decay}, or start another --run_dir with "
            f"--init_from {config.run_dir}"
        )
    if jax.process_index() == 0:
        for line in _warnings(changed, config, checkpoint.step):
            logger.warning(line)


def _warnings(changed: dict[str, tuple[Any, Any]], config: RunConfig, step: int) -> Iterator[str]:
    """What changes for a run that resumes after `step`, one line per setting."""
    if step >= config.num_steps:
        yield f"the run has done {step} steps and --num_steps is {config.num_steps}: nothing to do"
        return
    for name, (there, here) in changed.items():
        line = f"--{name} was {there} until step {step} and is {here} from now on"
        if name == "num_steps" and isinstance(there, int) and there > 0:
            rates = (learning_rate(config.optimizer, n, jnp.array(step)) for n in (there, here))
            before, now = (f"{float(rate):.3g}" for rate in rates)
            line += (
                f": the learning-rate schedule has another length, and step {step + 1} has rate "
                f"{now} instead of {before}"
            )
        if name == "ema_decay" and there == 0:
            line += f": the EMA starts from the weights of step {step}"
        if name in ("init_from", "resume_from"):
            line = f"--{name} {here} is ignored: the run resumes from its own step {step}"
        yield line


def init_or_restore(
    config: TrainConfig, checkpoint: TrainingCheckpoint | None, mesh: Mesh
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """State, samples seen, and data cursor (None for the start of the data)."""
    dit_config = config.dit_config()
    abstract = sharded_abstract_state(dit_config, config.optimizer, mesh)
    if checkpoint is not None:
        state = restore_state(checkpoint, abstract)
        return state, checkpoint.samples_seen, checkpoint.manifest["cursor"]
    if config.resume_from is not None:
        path = find_weights(config.resume_from)
        published = read_flax_checkpoint(path)
        state = _from_published(published, path, abstract)
        return state, published.samples_seen, None
    if config.init_from is not None:
        return _from_weights(config.init_from, config, abstract), 0, None
    return init_state(dit_config, config.optimizer, mesh, config.seed), 0, None


def _from_weights(source: str, config: TrainConfig, abstract: TrainState) -> TrainState:
    """Initial state with the weights of `source`.

    Each process reads and verifies what its own devices need. If one process finds damage in the
    newest checkpoint of a run folder, all of them use the previous one.
    """
    first: EchoError | None = None
    for path in (candidates := find_candidates(source, exports=False)):
        model = None
        try:
            model = _read_model(path, source, abstract.model)
        except EchoError as error:
            first = first or error
            if path != candidates[-1]:
                logger.warning(f"{path} cannot be used ({error}); trying the previous one")
        if _all_processes(model is not None) and model is not None:
            return _state_from(model, source, config, abstract)
    raise first or EchoError(f"another process cannot read --init_from {source}")


def _all_processes(good: bool) -> bool:
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _read_model(path: Path, source: str, abstract: EchoDiT) -> EchoDiT:
    """The model in `path`, on the mesh. Checkpoints are read by shard, other files whole.

    It may lack the latent encoder that `abstract` has.
    """
    if not path.is_dir():
        model = _on_host(lambda: dequantize(load_dit(path)))
        return _on_mesh(model, source, _as_found(model.config, abstract))
    checkpoint = TrainingCheckpoint(path)
    if not isinstance(checkpoint.config, DiTConfig):
        raise EchoError(f"expected the weights of an EchoDiT, got a codec: {source}")
    abstract = _as_found(checkpoint.config, abstract)
    _check_sizes(checkpoint.config, abstract.config, source)
    arrays = checkpoint.model_arrays()
    leaves, treedef = jax.tree.flatten(abstract)
    return treedef.unflatten(
        jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index, name=name: arrays.part(name, index)
        )
        for name, leaf in zip(leaf_names(abstract), leaves, strict=True)
    )


def _latent_parts(model: EchoDiT) -> tuple[Any, ...]:
    """What only block-wise models have; None in others."""
    attention = model.blocks.attention
    return model.latent_encoder, model.latent_norm, attention.wk_latent, attention.wv_latent


def _as_found(found: DiTConfig, abstract: EchoDiT) -> EchoDiT:
    """`abstract`, without its latent encoder if the model that was found has none."""
    if found.blockwise or not abstract.config.blockwise:
        return abstract
    sizes = dataclasses.replace(abstract.config, blockwise=False)
    without = eqx.tree_at(_latent_parts, abstract, (None,) * len(_latent_parts(abstract)))
    return dataclasses.replace(without, config=sizes)


def _state_from(
    model: EchoDiT, source: str, config: TrainConfig, abstract: TrainState
) -> TrainState:
    """The state before the first step. A latent encoder that `model` lacks is made.

    It starts as a copy of the reference's encoder, which has the same sizes and reads the same
    latents; so do its keys and values.
    """
    adds = abstract.model.config.blockwise and not model.config.blockwise
    if adds and jax.process_index() == 0:
        logger.info(
            f"{source} has no latent_encoder: the new one starts as a copy of its speaker_encoder"
        )

    def init(model: EchoDiT) -> TrainState:
        if adds:
            attention = model.blocks.attention
            encoder = model.speaker_encoder, model.speaker_norm
            parts = *encoder, attention.wk_speaker, attention.wv_speaker
            # Copied, because the state's arrays are donated, each once.
            parts = jax.tree.map(jnp.copy, parts)
            model = eqx.tree_at(_latent_parts, model, parts, is_leaf=lambda x: x is None)
            model = dataclasses.replace(model, config=abstract.model.config)
        return init_train_state(model, config.optimizer)

    shardings = state_shardings(abstract, jax.tree.leaves(abstract)[0].sharding.mesh)
    return jax.jit(init, out_shardings=shardings)(model)


def _from_published(published: FlaxCheckpoint, path: Path, abstract: TrainState) -> TrainState:
    if published.mu is None or published.nu is None:
        raise EchoError(
            f"expected an optimizer state in {path}, got none; use its weights alone with "
            "--init_from"
        )
    trees = []
    for tensors in (published.params, published.mu, published.nu):
        tree = _on_host(partial(dit_from_flax, tensors, path, jnp.float32))
        trees.append(_on_mesh(tree, str(path), abstract.model))
    model, mu, nu = trees

    def counter(value: int | None, like: Any) -> jax.Array:
        return put_on_mesh(np.array(value or 0, np.int32), like.sharding)

    return TrainState(
        step=counter(published.step, abstract.step),
        skipped=counter(0, abstract.skipped),
        model=model,
        adam=optax.ScaleByAdamState(counter(published.adam_count, abstract.step), mu, nu),
        ema=jax.tree.map(jnp.copy, model) if abstract.ema is not None else None,
    )


def _on_host(load: Callable[[], EchoDiT]) -> EchoDiT:
    """Load whole weights into host memory, not onto the accelerator."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return load()


def _on_mesh(model: EchoDiT, source: str, abstract: EchoDiT) -> EchoDiT:
    _check_sizes(model.config, abstract.config, source)
    leaves, treedef = jax.tree.flatten(abstract)
    return treedef.unflatten(
        put_on_mesh(np.asarray(leaf, np.float32), target.sharding)
        for leaf, target in zip(jax.tree.leaves(model), leaves, strict=True)
    )


def _check_sizes(found: DiTConfig, expected: DiTConfig, source: str) -> None:
    """All sizes must match, except the maximum lengths, which no parameter depends on."""
    for name, there in vars(found).items():
        here = getattr(expected, name)
        if not name.startswith("max_") and here != there:
            hint = "; add --blockwise" if name == "blockwise" and there else ""
            raise EchoError(
                f"expected {name} {here}, as in this run, got {there} in {source}{hint}"
            )
