"""Graphs written node by node, and weights that need not fit into memory twice.

Tensors are converted to float32 one at a time. They stay inside the file, or go to a file of weights at once, which the
graph then refers to: protobuf holds at most 2 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

# Whole pages, so that engines can map tensors instead of reading them.
_ALIGNMENT_BYTES = 4096
# Below, a tensor costs less inside the file than its padding outside.
_SMALLEST_OUTSIDE_BYTES = 1024


@dataclass(frozen=True)
class WeightStream:
    """Open file for large tensors, and the name by which the graph will refer to it."""

    stream: BinaryIO
    location: str


class GraphWriter:
    """Nodes, tensors, inputs and outputs of a graph, in the order in which they are added.

    They are made inside the model: to put ready parts together would copy all weights at each level.
    """

    def __init__(self, opset: int, outside: WeightStream | None = None) -> None:
        self.opset = opset
        self._outside = outside
        self._model = onnx.ModelProto()
        self._graph = self._model.graph
        self._graph.name = "decoder"
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, outputs: Sequence[str] = (), domain: str = "", **fields: Any
    ) -> str:
        """Add a node and return its first output, which is named after the node unless ``outputs`` say otherwise."""
        outputs = outputs or [f"{name}_output_0"]
        self._graph.node.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **fields))
        return outputs[0]

    def constant(self, values: Any, dtype: type[np.generic] = np.int64) -> str:
        """Name of a small tensor of these values, kept once however often it is asked for."""
        array = np.asarray(values, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self._graph.initializer.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a tensor of the model as float32; returns ``name``."""
        array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
        entry = self._graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        if self._outside is None or array.nbytes < _SMALLEST_OUTSIDE_BYTES:
            entry.raw_data = array.astype("<f4", copy=False).tobytes()
        else:
            _write_outside(array, entry, self._outside)
        return name

    def input(self, name: str, dims: Sequence[int | str], element_type: int = TensorProto.INT64) -> str:
        """Declare an input of the graph; a word among ``dims`` is a free axis."""
        self._graph.input.append(helper.make_tensor_value_info(name, element_type, dims))
        return name

    def output(self, name: str, dims: Sequence[int | str]) -> None:
        """Declare a float32 output of the graph, which a node of this output writes."""
        self._graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))

    def operators(self) -> set[tuple[str, str]]:
        """Domain and type of the nodes so far."""
        return {(node.domain, node.op_type) for node in self._graph.node}

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Whole graph as a model in the oldest file format that its opset allows."""
        domains = {"": self.opset} | {domain: 1 for domain, _ in self.operators() if domain}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        self._model.opset_import.extend(opsets)
        self._model.ir_version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        helper.set_model_props(self._model, dict(metadata))
        return self._model


def _write_outside(array: np.ndarray, entry: TensorProto, outside: WeightStream) -> None:
    offset = -(-outside.stream.tell() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    outside.stream.seek(offset)
    outside.stream.write(array.astype("<f4", copy=False).data)
    entry.data_location = TensorProto.DataLocation.EXTERNAL
    for key, value in (("location", outside.location), ("offset", str(offset)), ("length", str(array.nbytes))):
        entry.external_data.add(key=key, value=value)
