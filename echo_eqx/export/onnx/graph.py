"""Builds an ONNX program node by node. A value of the program is a string: its name."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import helper, numpy_helper

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.rotary import TURN, rotary_turns

OPSET, IR_VERSION = 18, 8
EXTERNAL_BYTES = 2**31 - 2**24
"""Weights of more bytes go to a file of their own: protobuf holds no message above 2 GiB."""
LOWEST = float(np.finfo(np.float32).min)


class Graph:
    """`graph("Add", x, y)` adds a node and returns the name of its output.

    Operands are names, or constants: arrays, floats (float32), integers and lists of them (int64).
    Weights are constants. Comments of shapes use the axis names of `echo_eqx.config`.
    """

    def __init__(self, name: str):
        self.name = name
        self._nodes: list[Any] = []
        self._constants: dict[str, np.ndarray] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, dtype: type, *shape: int | str) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, *shape: int | str) -> None:
        """Make `value`, float32, an output called `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(_value_info(name, np.float32, shape))

    def __call__(self, operator: str, *operands: Any, **attributes: Any) -> str:
        return self._node(operator, operands, 1, attributes)[0]

    def split(self, x: str, parts: int, axis: int) -> list[str]:
        return self._node("Split", (x,), parts, {"axis": axis, "num_outputs": parts})

    def _node(self, operator: str, operands: Any, outputs: int, attributes: Any) -> list[str]:
        number = len(self._nodes)
        inputs = [
            operand if isinstance(operand, str) else self._constant(f"c{number}_{i}", operand)
            for i, operand in enumerate(operands)
        ]
        names = [f"v{number}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def _constant(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        self._constants[name] = np.ascontiguousarray(array, kind).reshape(array.shape)
        return name

    def save(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write `name.onnx`, and weights that are too large for it in `name.onnx.data`."""
        file, data = folder / f"{self.name}.onnx", folder / f"{self.name}.onnx.data"
        constants = self._constants.items()
        if sum(array.nbytes for _, array in constants) > EXTERNAL_BYTES:
            with data.open("wb") as out:
                weights = [_external(name, array, out) for name, array in constants]
        else:
            weights = [numpy_helper.from_array(array, name) for name, array in constants]
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, weights)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="echo_eqx"
        )
        helper.set_model_props(model, metadata)
        file.write_bytes(model.SerializeToString())

    # --- Layers -------------------------------------------------------------------------------

    def linear(self, x: str, layer: Linear) -> str:
        y = self("MatMul", x, layer.weight)
        return y if layer.bias is None else self("Add", y, layer.bias)

    def silu(self, x: str) -> str:
        return self("Mul", x, self("Sigmoid", x))

    def rms(self, x: str, eps: float) -> str:
        """`x / sqrt(mean(x^2) + eps)` over the last axis."""
        square = self("ReduceMean", self("Mul", x, x), [-1], keepdims=1)
        return self("Div", x, self("Sqrt", self("Add", square, eps)))

    def norm(self, x: str, layer: RMSNorm) -> str:
        return self("Mul", self.rms(x, layer.eps), layer.weight)

    def heads(self, x: str, head_dim: int) -> str:
        """(b, t, d) to (b, t, h, k)."""
        return self("Reshape", x, [0, 0, -1, head_dim])

    def length(self, x: str) -> str:
        """The size of axis 1, a scalar."""
        return self("Squeeze", self("Shape", x, start=1, end=2), [0])

    def rotation(self, length: str, head_dim: int) -> tuple[str, str]:
        """Cosines and sines (t, 1, a, 1) of the angles of RoPE.

        Angles are computed in integers, since products in float32 lose digits at late positions.
        """
        positions = self("Unsqueeze", self("Range", 0, length, 1), [1, 2, 3])
        angles = self("Mul", positions, rotary_turns(head_dim)[None, :, None])
        fractions = self("Cast", self("Mod", angles, TURN), to=onnx.TensorProto.FLOAT)
        angles = self("Mul", fractions, 2 * np.pi / TURN)
        return self("Cos", angles), self("Sin", angles)

    def rope(self, x: str, rotation: tuple[str, str]) -> str:
        """Rotate the pairs `(x[2i], x[2i + 1])` of each head; x is (b, t, h, k)."""
        cos, sin = rotation
        even, odd = self.split(self("Reshape", x, [0, 0, 0, -1, 2]), 2, axis=-1)
        rotated_even = self("Sub", self("Mul", even, cos), self("Mul", odd, sin))
        rotated_odd = self("Add", self("Mul", even, sin), self("Mul", odd, cos))
        return self("Reshape", self("Concat", rotated_even, rotated_odd, axis=-1), [0, 0, 0, -1])

    def half_rope(self, x: str, rotation: tuple[str, str]) -> str:
        """`rope` of the first half of the heads."""
        first, second = self.split(x, 2, axis=2)
        return self("Concat", self.rope(first, rotation), second, axis=2)

    def attention(self, queries: str, keys: str, values: str, allowed: str, head_dim: int) -> str:
        """`softmax(q k^T / sqrt(k)) v` of (b, t, h, k) and (b, j, h, k), as (b, t, d).

        Keys are attended to where `allowed`, which broadcasts to (b, h, t, j).
        """
        queries = self("Transpose", queries, perm=[0, 2, 1, 3])
        keys = self("Transpose", keys, perm=[0, 2, 3, 1])
        values = self("Transpose", values, perm=[0, 2, 1, 3])
        logits = self("Mul", self("MatMul", queries, keys), head_dim**-0.5)
        weights = self("Softmax", self("Where", allowed, logits, LOWEST), axis=-1)
        out = self("Transpose", self("MatMul", weights, values), perm=[0, 2, 1, 3])
        return self("Reshape", out, [0, 0, -1])


def _value_info(name: str, dtype: type, shape: tuple[int | str, ...]) -> Any:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, shape)


def _external(name: str, array: np.ndarray, file: BinaryIO) -> onnx.TensorProto:
    """A tensor in `file`, or in the program itself if it is small, as shapes must be."""
    if array.nbytes < 1024:
        return numpy_helper.from_array(array, name)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": Path(file.name).name, "offset": file.tell(), "length": array.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    file.write(array.data)
    return tensor
