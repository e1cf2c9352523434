"""A policy.onnx made by hand, in milliseconds: it holds the joints where it sees them, plus a tenth of the noise."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from flow_policy_rl.serving import model_file
from flow_policy_rl.spec import METADATA_KEY, PolicySpec


def holding_policy(path: Path, spec: PolicySpec, offset: float = 0.0) -> Path:
    """Chunk (B, H, A): measured positions of the commanded joints from the first joint field, plus `offset` and noise.

    Every input takes part in the graph; images and the rest with weight zero.
    """
    joints = next(f for f in spec.observations if f.kind == "joint_position")
    pick = np.zeros((joints.size, spec.num_joints), np.float32)
    for column, name in enumerate(spec.joint_names):
        pick[joints.elements.index(name), column] = 1
    constants = {"pick": pick, "axis": np.array([1]), "tenth": np.float32(0.1)}
    constants |= {"offset": np.float32(offset), "nothing": np.float32(0)}
    nodes = [
        helper.make_node("MatMul", [joints.name, "pick"], ["held"]),
        helper.make_node("Unsqueeze", ["held", "axis"], ["row"]),
        helper.make_node("Mul", ["noise", "tenth"], ["small"]),
        helper.make_node("Add", ["row", "small"], ["moved"]),
        helper.make_node("Add", ["moved", "offset"], ["sum_0"]),
    ]
    others = [f for f in spec.observations if f is not joints]
    inputs = [
        helper.make_tensor_value_info(
            f.name,
            TensorProto.UINT8 if f.kind == "image" else TensorProto.FLOAT,
            ["batch", *f.shape],
        )
        for f in spec.observations
    ]
    for k, f in enumerate(others):
        nodes += [
            helper.make_node("Cast", [f.name], [f"float_{k}"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", [f"float_{k}"], [f"mean_{k}"], keepdims=0),
            helper.make_node("Mul", [f"mean_{k}", "nothing"], [f"zero_{k}"]),
            helper.make_node("Add", [f"sum_{k}", f"zero_{k}"], [f"sum_{k + 1}"]),
        ]
    nodes.append(helper.make_node("Identity", [f"sum_{len(others)}"], ["action_chunk"]))
    shape = ["batch", spec.action_horizon, spec.num_joints]
    inputs.append(helper.make_tensor_value_info("noise", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes,
        "hold",
        inputs,
        [helper.make_tensor_value_info("action_chunk", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    path.write_bytes(model_file.seal(model.SerializeToString()))
    return path
