"""Files from strangers are data: nothing is unpickled, no YAML makes objects, no bag brings code."""

import ast
import contextlib
import os
import pickle
import sys

import numpy as np
import pytest
from mcap.writer import Writer
from toys import ROOT

from flow_policy_rl import checkpoint, cli
from flow_policy_rl.data import demonstrations
from flow_policy_rl.data.bags import BadMessage, Bag
from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import load_robot

SOURCES = [
    path
    for folder in (
        "flow_policy_rl",
        "sim",
        "robots",
        "launch",
        "ros_ws/src/flow_policy_ros/flow_policy_ros",
    )
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
CALLS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
ARGUMENTS = {"allow_pickle", "shell", "weights_only"}  # as keywords that are not False


def dangers(tree: ast.AST) -> list[str]:
    """What in a file could run what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [n for n in names if n.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            written_here = (
                ast.unparse(node) == "exec('')"
            )  # cli.py: runs nothing, and nothing that was read
            found += [name] if name in CALLS and not written_here else []
            for keyword in node.keywords:
                given = keyword.value
                if keyword.arg in ARGUMENTS and not (
                    isinstance(given, ast.Constant) and given.value is False
                ):
                    found.append(f"{name}({keyword.arg})")
    return found


def test_no_source_file_unpickles_or_runs_what_it_reads():
    assert len(SOURCES) > 60
    found = {str(path): dangers(ast.parse(path.read_text())) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_search_finds_what_it_looks_for():
    bad = "import pickle\nimport numpy as np\nnp.load(f, allow_pickle=True)\nyaml.load(x)\nrun('a', shell=True)"
    assert len(dangers(ast.parse(bad))) == 4


class Watch:
    """Counts unpickled names and shell commands. Python's audit hooks cannot be taken away, only switched off."""

    EVENTS = ("pickle.find_class", "os.system", "marshal.loads")

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if (
            self.on
            and event in self.EVENTS
            and "importlib" not in sys._getframe(1).f_code.co_filename
        ):
            self.seen.append((event, *map(str, arguments)))

    def __enter__(self):
        self.seen, self.on = [], True
        return self

    def __exit__(self, *exc):
        self.on = False


WATCH = Watch()


def test_the_trace_sees_unpickling():
    data = pickle.dumps(np.arange(3))
    with WATCH:
        pickle.loads(data)
    assert WATCH.seen


@pytest.mark.slow
def test_nothing_is_unpickled_from_demonstrations_to_replay(tmp_path, capsys):
    """The whole chain under a trace; the imports come first, for Python's own caches of code are marshalled."""
    lines = (
        f"collect --task reach --episodes 2 --out {tmp_path}/demos.hdf5 --num-envs 2 --json",
        f"train bc --task reach --demos {tmp_path}/demos.hdf5 --run-dir {tmp_path}/bc --bc.num-steps 2 "
        "--bc.batch-size 8 --network.width 16 --json",
        f"export --checkpoint {tmp_path}/bc/policy.safetensors --out {tmp_path}/policy.onnx --json",
        f"verify --policy {tmp_path}/policy.onnx --checkpoint {tmp_path}/bc/policy.safetensors --json",
        f"inspect {tmp_path}/policy.onnx --json",
        f"eval --policy {tmp_path}/policy.onnx --episodes 1 --json",
        f"report --run-dir {tmp_path}/bc --json",
    )
    with WATCH:
        for line in lines:
            assert cli.main(line.split()) == 0, capsys.readouterr().err
    unpickled = [event for event in WATCH.seen if event[0] != "marshal.loads"]
    assert unpickled == []


class Attack:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("policy.safetensors", checkpoint.load),
        ("demos.hdf5", demonstrations.load),
        ("policy.onnx", OnnxPolicy),
        ("robot.yaml", lambda path: load_robot(str(path))),
        ("bag.mcap", lambda path: list(Bag(path).messages())),
        ("bag.db3", lambda path: list(Bag(path).messages())),
    ],
)
def test_a_pickle_under_any_name_is_refused_unopened(tmp_path, name, read):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Attack(tmp_path / "hacked")))
    with WATCH, pytest.raises(InputError):
        read(path)
    assert WATCH.seen == []
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch hacked']",
        "name: !!python/name:os.system\narm: {}",
        "arm: !!python/object/new:os.system [touch hacked]",
    ],
)
def test_yaml_makes_no_objects(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "robot.yaml").write_text(text)
    with pytest.raises(InputError, match="is not YAML"):
        load_robot("robot.yaml")
    assert not (tmp_path / "hacked").exists()


IDL = "module a_msgs {{ module msg {{ {} }}; }};"
RUN = "__import__('os').system('touch hacked')"
DEFINITIONS = {
    "constant": ("a_msgs/msg/B", "ros2msg", f"int32 X={RUN}\nfloat64 a"),
    "string constant": ("a_msgs/msg/B", "ros2msg", f'string S=""" + {RUN} + """\nfloat64 a'),
    "default": ("a_msgs/msg/B", "ros2msg", f"float64 a {RUN}"),
    "size": ("a_msgs/msg/B", "ros2msg", f"int32[{RUN}] a"),
    "field name": ("a_msgs/msg/B", "ros2msg", f"float64 a={RUN}"),
    "dunder": ("a_msgs/msg/B", "ros2msg", "float64 __class__\nfloat64 __init__"),
    "type name": (f"a_msgs/msg/B:\n    x = {RUN}\n#", "ros2msg", "float64 a"),
    "type name in one line": (f"a_msgs/msg/B({RUN})", "ros2msg", "float64 a"),
    "idl": (
        "a_msgs/msg/B",
        "ros2idl",
        IDL.format(f"const long X = {RUN};"),
    ),
    "idl struct": (
        "a_msgs/msg/B",
        "ros2idl",
        IDL.format(f"struct B({RUN}) {{ double a; }};"),
    ),
}


@pytest.mark.parametrize("attack", DEFINITIONS)
def test_a_message_definition_in_a_bag_is_never_run(tmp_path, monkeypatch, attack):
    """The decoder writes Python for a type; whatever a stranger writes into its definition stays a word."""
    monkeypatch.chdir(tmp_path)
    name, encoding, text = DEFINITIONS[attack]
    with open("bag.mcap", "wb") as file:
        writer = Writer(file)
        writer.start("ros2")
        schema = writer.register_schema(name, encoding, text.encode())
        channel = writer.register_channel("/x", "cdr", schema)
        writer.add_message(channel, 1, b"\x00\x01\x00\x00" + bytes(16), 1)
        writer.finish()
    bag = Bag(tmp_path / "bag.mcap")
    with WATCH:
        for message in bag.messages():
            with contextlib.suppress(BadMessage):
                bag.deserialize(message)
    assert WATCH.seen == []
    assert not (tmp_path / "hacked").exists()
