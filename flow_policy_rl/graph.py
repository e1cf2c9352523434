"""The ONNX graph of a policy, assembled from pieces.

Each piece (embed, velocity, finish) is traced from torch once. The integrator of `flow.py` then runs on symbols, and
every call of the velocity copies that piece into the graph. So K and integrator cost no new trace, the conventions
stay in `flow.py`, nodes carry readable names (`step_03/velocity_field/trunk/layers/0/Gemm_12`), and whatever depends on
the time grid alone is computed here instead of on the robot.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

OPSET = 20
IR_VERSION = 10


@dataclass(frozen=True)
class Function:
    """What to trace: a function of tensors, examples of what it takes by keyword, and names of what it gives.

    The first axis of an example is the batch, unless it has one row; two rows are right, as the exporter specialises a
    batch of one.
    """

    call: Callable
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """A traced function."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    inputs: dict[str, str]  # name -> name inside
    outputs: dict[str, str]


class _Together(nn.Module):
    """Several functions side by side, each with inputs of its own. The owner's weights keep their names."""

    def __init__(self, owner: nn.Module, functions: Mapping[str, Function]):
        super().__init__()
        self.owner, self.functions = owner, functions

    def forward(self, *values: Tensor) -> list[Tensor]:
        rest, results = list(values), []
        for function in self.functions.values():
            given = {name: rest.pop(0) for name in function.inputs}
            result = function.call(**given)
            results += [result] if isinstance(result, Tensor) else list(result)
        return results


def trace(owner: nn.Module, functions: Mapping[str, Function]) -> dict[str, Piece]:
    """Trace functions that use the weights of `owner`: in one go, as the exporter takes seconds to set up."""
    batch = torch.export.Dim("batch")
    # Clones: the exporter takes one tensor given twice for one input.
    examples = {f"{f}.{n}": v.clone() for f, fn in functions.items() for n, v in fn.inputs.items()}
    outputs = [f"{f}.{n}" for f, function in functions.items() for n in function.outputs]
    with _quiet():
        program = torch.onnx.export(
            _Together(owner, functions).eval(),
            tuple(examples.values()),
            input_names=list(examples),
            output_names=outputs,
            dynamo=True,
            dynamic_shapes=(tuple({0: batch} if len(v) > 1 else None for v in examples.values()),),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    graph = program.model_proto.graph
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return {
        name: _piece(
            graph,
            weights,
            {n: f"{name}.{n}" for n in function.inputs},
            {n: f"{name}.{n}" for n in function.outputs},
        )
        for name, function in functions.items()
    }


def _piece(graph, weights, inputs: dict[str, str], outputs: dict[str, str]) -> Piece:
    """What the given outputs need of a graph."""
    needed, nodes = set(outputs.values()), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.insert(0, node)
            needed.update(node.input)
    return Piece(nodes, {n: v for n, v in weights.items() if n in needed}, inputs, outputs)


@contextlib.contextmanager
def _quiet():
    """The exporter prints progress to standard output and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


class Symbol:
    """A tensor of the graph under construction, with the arithmetic that integrators use."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, builder: "Builder", name: str, shape: tuple[int, ...]):
        self.builder, self.name = builder, name
        self.shape = (1, *shape)  # the batch counts as one row, which broadcasts

    def __add__(self, other: "Symbol") -> "Symbol":
        return self._emit("Add", other.name)

    def __mul__(self, number: float) -> "Symbol":
        return self._emit("Mul", self.builder.constant(np.float32(number)))

    __rmul__ = __mul__

    def _emit(self, kind: str, other: str) -> "Symbol":
        (name,) = self.builder.node(kind, [self.name, other])
        return Symbol(self.builder, name, self.shape[1:])


class Builder:
    """Collects nodes and constants; what can be computed now is."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.scope = ""
        self._values: dict[str, np.ndarray] = {}  # constants by name, used or not
        self._numbers: dict[tuple, str] = {}
        self._made: dict[bytes, list[str]] = {}  # operation -> its outputs

    def call(self, piece: Piece, given: Mapping[str, str]) -> dict[str, str]:
        """Copy a piece; its inputs are the given values. Returns the names of its outputs."""
        names = {inside: given[name] for name, inside in piece.inputs.items()}
        for inside, value in piece.constants.items():
            if inside.startswith("owner."):
                names[inside] = inside.removeprefix("owner.")
                self._values[names[inside]] = value
            else:
                names[inside] = self.constant(value)
        for node in piece.nodes:
            inputs = [names[name] if name else "" for name in node.input]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            made = self.node(
                node.op_type, inputs, len(node.output), _place(node), node.domain, attributes
            )
            names.update(zip(node.output, made, strict=True))
        return {name: names[inside] for name, inside in piece.outputs.items()}

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant; equal ones share it."""
        value = np.asarray(value)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._numbers:
            short = value.size == 1 and value.dtype.kind in "fiu"
            name = f"{value.item():.6g}" if short else f"constant_{len(self._numbers)}"
            while name in self._values:
                name += "'"
            self._numbers[key] = name
            self._values[name] = value
        return self._numbers[key]

    def node(
        self, kind, inputs, num_outputs=1, place="", domain="", attributes: Mapping | None = None
    ) -> list[str]:
        """One operation, or the one made before that does the same; constants in, constants out."""
        operation = helper.make_node(kind, inputs, [], domain=domain)
        operation.attribute.extend(
            helper.make_attribute(k, v) for k, v in (attributes or {}).items()
        )
        key = operation.SerializeToString(deterministic=True)
        if key in self._made:
            return self._made[key]
        path = "/".join(p for p in (self.scope, place, f"{kind}_{len(self._made)}") if p)
        outputs = [path if i == 0 else f"{path}.{i}" for i in range(num_outputs)]
        node = onnx.NodeProto(name=path, output=outputs)
        node.MergeFrom(operation)
        if inputs and all(name in self._values or not name for name in inputs):
            for name, value in zip(outputs, self._compute(node), strict=True):
                self._values[name] = np.asarray(value)
        else:
            self.nodes.append(node)
        self._made[key] = outputs
        return outputs

    def _compute(self, node: onnx.NodeProto) -> list[np.ndarray]:
        given = {name: self._values[name] for name in node.input if name}
        value_info = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in given.items()
        ]
        outputs = [helper.make_value_info(n, onnx.TypeProto()) for n in node.output]
        model = helper.make_model(
            helper.make_graph([node], "now", value_info, outputs),
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        return ReferenceEvaluator(model).run(None, given)

    def model(self, inputs, output: tuple[str, str, tuple], batch: int | None) -> onnx.ModelProto:
        """The whole graph.

        Args:
            inputs: {name: (shape without batch, element type)}.
            output: (name, value, shape without batch).
            batch: fixed number of rows, or None for any.
        """
        rows = batch or "batch"
        name, value, shape = output
        nodes = merge_additions(stay_flat(self.nodes, self._values, value), keep={value})
        used = {n for node in nodes for n in node.input}
        self._rename(nodes, value, name)
        graph = helper.make_graph(
            nodes,
            "policy",
            [helper.make_tensor_value_info(n, t, [rows, *s]) for n, (s, t) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, *shape])],
            [numpy_helper.from_array(v, n) for n, v in self._values.items() if n in used],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="flow_policy_rl",
        )

    @staticmethod
    def _rename(nodes, old: str, new: str) -> None:
        for node in nodes:
            node.output[:] = [new if n == old else n for n in node.output]
            node.input[:] = [new if n == old else n for n in node.input]


def stay_flat(
    nodes: list[onnx.NodeProto], constants: Mapping[str, np.ndarray], output: str
) -> list[onnx.NodeProto]:
    """Sums and multiples of reshaped vectors are taken before the reshape, which then goes where nobody needs it.

    The velocity is a vector that becomes a chunk (B, H, A); Euler's step adds it to another one, and the next layer
    wants a vector again. A scalar factor becomes `alpha` and `beta` of the matrix product that made the vector.
    """
    uses = _uses(nodes)
    made: dict[str, onnx.NodeProto] = {}
    flat: dict[str, str] = {}  # a chunk -> the same numbers as a vector
    same: dict[str, str] = {}  # a vector -> the one to use in its place
    shapes: dict[str, str] = {}  # a chunk -> the constant with its shape
    result = []
    for old in nodes:
        node = onnx.NodeProto()
        node.CopyFrom(old)
        node.input[:] = [same.get(n, n) for n in old.input]
        source, out = node.input[0], node.output[0]
        other = node.input[1] if len(node.input) == 2 else ""
        rank = constants[other].size if node.op_type == "Reshape" and other in constants else 0
        if rank == 2 and source in flat:
            same[out] = flat[source]
            continue
        if rank == 2:
            flat[source] = out
        elif rank == 3 and source in made and made[source].op_type == "Gemm":
            flat[out], shapes[out] = source, other
        elif node.op_type == "Mul" and source in flat and np.size(constants.get(other, ())) == 1:
            product = made.get(flat[source])
            once = uses[source] == 1 and uses.get(flat[source]) == 1
            if product is not None and product.op_type == "Gemm" and once and source in shapes:
                _scale(product, float(constants[other].item()))
                node = helper.make_node("Reshape", [flat[source], shapes[source]], [out], node.name)
                flat[out], shapes[out] = flat[source], shapes[source]
        elif node.op_type == "Add" and source in flat and other in flat:
            shape = shapes.get(other) or shapes.get(source)
            vector = f"{out}.flat"
            total = helper.make_node(
                "Add", [flat[source], flat[other]], [vector], f"{node.name}.flat"
            )
            result.append(total)
            made[vector] = total
            node = helper.make_node("Reshape", [vector, shape], [out], node.name)
            flat[out], shapes[out] = vector, shape
        made[out] = node
        result.append(node)
    return _needed(result, {output})


def _scale(product: onnx.NodeProto, factor: float) -> None:
    """Multiply the result of a Gemm."""
    old = {a.name: helper.get_attribute_value(a) for a in product.attribute}
    new = old | {name: factor * old.get(name, 1.0) for name in ("alpha", "beta")}
    del product.attribute[:]
    product.attribute.extend(helper.make_attribute(k, v) for k, v in new.items())


def _uses(nodes: list[onnx.NodeProto]) -> dict[str, int]:
    """How often each value is read."""
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    return uses


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes that something depends on."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def merge_additions(nodes: list[onnx.NodeProto], keep: set[str]) -> list[onnx.NodeProto]:
    """Add(Gemm(x, W), c) is Gemm(x, W, c): one pass over memory less."""
    uses = _uses(nodes)
    made = {node.output[0]: node for node in nodes}
    merged, gone = {}, set()
    for node in nodes:
        if node.op_type != "Add":
            continue
        product, other = made.get(node.input[0]), node.input[1]
        if (
            product is not None
            and product.op_type == "Gemm"
            and len(product.input) == 2
            and uses[node.input[0]] == 1
            and node.input[0] not in keep
        ):
            attributes = {a.name: helper.get_attribute_value(a) for a in product.attribute}
            merged[node.name] = helper.make_node(
                "Gemm", [*product.input, other], node.output, name=product.name, **attributes
            )
            gone.add(product.name)
    return [merged.get(n.name, n) for n in nodes if n.name not in gone]


def _place(node: onnx.NodeProto) -> str:
    """The submodule a traced node came from, as a path."""
    scopes = next(
        (p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), ""
    )
    names = [s.strip(" '[]") for s in scopes.split(",")]
    modules = [n.removeprefix("owner.") for n in names if n.startswith("owner.")]
    return modules[-1].replace(".", "/") if modules else ""
