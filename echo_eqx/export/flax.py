"""Checkpoints of the published Flax trainer.

    model.pkl              a pickle of {"params": nested dicts of arrays, "opt_state": None,
                           "step": 0, "samples_seen": 0}
    model.safetensors      the same arrays by path, such as TransformerBlock_0/mlp/w1/kernel

The pickle names no class but NumPy's (and ml_dtypes' for bfloat16), so it loads without Flax and
optax. `opt_state` is None, as in the published files of weights only: an export has no moments, and
the trainer makes a new optimizer state. To train on with moments, keep the run folder.

That implementation does not scale the reference projection; where our model does, by
`speaker_proj_scale`, the scale is multiplied into the kernel. It has no block-wise models.
"""

import pickle
from pathlib import Path
from typing import Any

from echo_eqx.export.models import Models, float_dtype, published_leaves
from echo_eqx.weights.names import to_flax
from echo_eqx.weights.safetensors_writer import converted, to_dtype, write_safetensors

FORM = "flax"
PICKLE_PROTOCOL = 4
"""Read by Python 3.4 and later, and free of limits on size."""


def write(models: Models, folder: Path, dtype: str) -> None:
    number = float_dtype(FORM, dtype)
    dit = models.only_dit(FORM)
    arrays = to_flax(published_leaves(dit, FORM), dit.config)
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split("/")
        place = params
        for part in path:
            place = place.setdefault(part, {})
        place[last] = to_dtype(name, array, number)
    content = {"params": params, "opt_state": None, "step": 0, "samples_seen": 0}
    with (folder / "model.pkl").open("wb") as file:
        pickle.dump(content, file, protocol=PICKLE_PROTOCOL)
    tensors = [converted(name, array, number) for name, array in sorted(arrays.items())]
    write_safetensors(folder / "model.safetensors", tensors, {"format": "flax"})
