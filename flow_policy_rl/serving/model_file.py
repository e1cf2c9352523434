"""What a `policy.onnx` is before anything executes it: bounded, self-contained, undamaged, with a spec inside.

An ONNX file is one protobuf message. Walking its fields takes a page of Python, so a file is judged before the native
parser of onnxruntime sees it, and `inspect` needs no runtime at all. Field numbers are those of `onnx.proto3`.

The seal: `policy.onnx` ends with one metadata entry that holds the SHA-256 of everything before it. It finds damage (a
flipped bit in a weight is a different robot arm motion), not malice: anybody can compute it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flow_policy_rl.errors import PolicyFileError
from flow_policy_rl.serving import shipped
from flow_policy_rl.spec import METADATA_KEY, PolicySpec

SEAL_KEY = "flow_policy_rl.sha256"
MAX_BYTES = 1 << 30  # protobuf itself ends at 2 GiB
OPSETS = range(17, 24)  # of the standard operators
DOMAINS = ("", "ai.onnx", "com.microsoft")

# Field numbers.
_MODEL = {"producer": 2, "graph": 7, "opset": 8, "metadata": 14, "training": 20, "functions": 25}
_GRAPH = {"node": 1, "initializer": 5, "sparse_initializer": 15}
_NODE = {"op_type": 4, "attribute": 5, "domain": 7}
_ATTRIBUTE = {"tensor": 5, "graph": 6, "tensors": 10, "graphs": 11, "sparse": 22, "sparses": 23}
_TENSOR = {"external_data": 13, "data_location": 14}
_KEY, _VALUE = 1, 2  # of a metadata entry
_DOMAIN, _VERSION = 1, 2  # of an operator set


@dataclass(frozen=True)
class ModelFile:
    """A file that passed every check here.

    Attributes:
        path: where it came from.
        data: the bytes that were checked; load these, not the path.
        sha256: of all bytes, hex.
        opset: version of the standard operators.
        spec: the contract inside.
        metadata: every key and value in the file.
        operators: how many nodes of each kind.
    """

    path: Path
    data: bytes
    sha256: str
    opset: int
    spec: PolicySpec
    metadata: dict[str, str]
    operators: dict[str, int]


def read(path: str | Path, max_bytes: int = MAX_BYTES) -> ModelFile:
    """Read and judge a file, or a policy that ships with the package, by name.

    Raises:
        InputError: no such file.
        PolicyFileError: what is wrong with it, in one line.
    """
    path = shipped.existing(path)
    if path.suffix == ".safetensors":
        raise PolicyFileError(
            f"policy '{path}' is a checkpoint: make a policy.onnx of it with "
            f"flow-policy export --checkpoint {path}"
        )
    size = path.stat().st_size
    if size > max_bytes:
        raise PolicyFileError(f"policy '{path}' has {size:,} bytes; the limit is {max_bytes:,}")
    data = path.read_bytes()
    try:
        opset, metadata, operators = _walk(data)
        _check_seal(data, metadata)
        spec = PolicySpec.from_json(metadata[METADATA_KEY])
    except ValueError as error:  # an InputError of the spec is one as well
        raise PolicyFileError(f"policy '{path}' cannot be loaded: {error}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    return ModelFile(path, data, sha256, opset, spec, metadata, operators)


def seal(data: bytes) -> bytes:
    """A serialised model with its checksum as one more metadata entry at the end: protobuf appends by concatenation."""
    return data + _seal_of(data)


def _seal_of(data: bytes) -> bytes:
    entry = b"".join(
        _length_delimited(number, text.encode())
        for number, text in ((_KEY, SEAL_KEY), (_VALUE, hashlib.sha256(data).hexdigest()))
    )
    return _length_delimited(_MODEL["metadata"], entry)


def _length_delimited(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content  # both below 128 here


def _check_seal(data: bytes, metadata: dict[str, str]) -> None:
    if METADATA_KEY not in metadata:
        raise ValueError(f"no '{METADATA_KEY}' in its metadata: not made by flow-policy export")
    if SEAL_KEY not in metadata:
        raise ValueError(f"no '{SEAL_KEY}' in its metadata: made by version 0.1.0, export it again")
    body = data[: -len(_seal_of(b""))]
    if data != seal(body):
        raise ValueError(
            "its checksum does not match: damaged on the way, or edited; export it again"
        )


def _walk(data: bytes) -> tuple[int, dict[str, str], dict[str, int]]:
    """Opset, metadata and operators of a model; raises ValueError for what we do not accept."""
    opsets: dict[str, int] = {}
    metadata: dict[str, str] = {}
    operators: dict[str, int] = {}
    graphs = 0
    for number, value in _fields(memoryview(data)):
        if number == _MODEL["opset"]:
            version = _only(value, _VERSION, int, 0)
            opsets[_text(value, _DOMAIN)] = version
        elif number == _MODEL["metadata"]:
            key = _text(value, _KEY)
            if key in metadata:
                raise ValueError(f"metadata key '{key}' is there twice")
            metadata[key] = _text(value, _VALUE)
        elif number == _MODEL["graph"]:
            graphs += 1
            _walk_graph(value, operators)
        elif number in (_MODEL["functions"], _MODEL["training"]):
            raise ValueError("it has functions or training information of its own; ours has none")
    if graphs != 1:
        raise ValueError(f"not an ONNX model ({graphs} graphs)")
    foreign = sorted(set(opsets) - set(DOMAINS))
    if foreign:
        raise ValueError(f"operators of unknown domain '{foreign[0]}'")
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if opset not in OPSETS:
        raise ValueError(f"opset {opset}; this version runs {OPSETS[0]} to {OPSETS[-1]}")
    return opset, metadata, operators


def _walk_graph(graph: memoryview, operators: dict[str, int]) -> None:
    for number, value in _fields(graph):
        if number == _GRAPH["initializer"]:
            _refuse_external(value)
        elif number == _GRAPH["sparse_initializer"]:
            raise ValueError("it has sparse weights; ours has none")
        elif number == _GRAPH["node"]:
            kind = _text(value, _NODE["op_type"])
            operators[kind] = operators.get(kind, 0) + 1
            for inner, attribute in _fields(value):
                if inner == _NODE["attribute"]:
                    _walk_attribute(attribute, kind)


def _walk_attribute(attribute: memoryview, kind: str) -> None:
    for number, value in _fields(attribute):
        if number in (_ATTRIBUTE["tensor"], _ATTRIBUTE["tensors"]):
            _refuse_external(value)
        elif number in (_ATTRIBUTE["graph"], _ATTRIBUTE["graphs"]):
            raise ValueError(f"control flow ('{kind}'); our graphs have none")
        elif number in (_ATTRIBUTE["sparse"], _ATTRIBUTE["sparses"]):
            raise ValueError("it has sparse weights; ours has none")


def _refuse_external(tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number == _TENSOR["external_data"] or (number == _TENSOR["data_location"] and value):
            raise ValueError("weights in another file (external data); a policy is one file")


# --- the protobuf wire format ---


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, value) of a message: an int for a number, the bytes of anything else."""
    if not isinstance(message, memoryview):
        raise ValueError("not an ONNX model (a number where a message belongs)")
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("not an ONNX model (field number 0)")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"not an ONNX model (wire type {kind})")
        if at + size > end:
            raise ValueError("cut short, or not an ONNX model")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("cut short, or not an ONNX model")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _only(message: memoryview, number: int, kind: type, default):
    """The last value of a field (protobuf's rule for a repeated single field)."""
    found = default
    for n, value in _fields(message):
        if n == number:
            if not isinstance(value, kind):
                raise ValueError("not an ONNX model (a field of the wrong type)")
            found = value
    return found


def _text(message: memoryview, number: int) -> str:
    """A string field; a UnicodeDecodeError is a ValueError."""
    return str(_only(message, number, memoryview, memoryview(b"")), "utf-8")
