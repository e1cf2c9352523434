"""The run time: providers, what an observation must be, buffers, memory."""

import gc
import resource
import threading

import numpy as np
import onnxruntime as ort
import pytest
import torch
from toys import looks_trained, small_policy

from flow_policy_rl import export
from flow_policy_rl.errors import ObservationError, ProviderError
from flow_policy_rl.serving import onnx_policy
from flow_policy_rl.serving.onnx_policy import OnnxPolicy, session_options


@pytest.fixture(scope="module")
def torch_policy():
    return looks_trained(small_policy())


@pytest.fixture(scope="module")
def path(torch_policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "policy.onnx"
    spec = torch_policy.spec
    export.write(export.build(export.trace_policy(torch_policy, spec), spec), spec, path)
    OnnxPolicy(path)  # in a child, once
    return path


@pytest.fixture
def policy(path):
    return OnnxPolicy(path)


@pytest.fixture
def obs():
    return {
        "joint_pos": np.zeros((1, 3), np.float32),
        "object_pose": np.ones((1, 7), np.float32),
    }


def test_providers_are_chosen_or_refused_by_name(path):
    assert OnnxPolicy(path, provider="cpu").provider == "cpu"
    assert OnnxPolicy(path, provider="auto").provider in ("tensorrt", "cuda", "cpu")
    with pytest.raises(ProviderError, match="unknown provider 'cudo'.*did you mean 'cuda'"):
        OnnxPolicy(path, provider="cudo")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="there is a GPU build here"
)
def test_a_provider_that_is_not_there_is_an_error_unless_allowed(path, caplog):
    with pytest.raises(ProviderError, match="'cuda' does not run here: .*available: cpu"):
        OnnxPolicy(path, provider="cuda")
    policy = OnnxPolicy(path, provider="cuda", allow_fallback=True)
    assert policy.provider == "cpu"
    assert "'cuda' does not run here" in caplog.text


def test_a_provider_that_onnxruntime_replaces_silently_is_noticed(path, monkeypatch):
    """A GPU build without the GPU's libraries: the session comes up on the CPU."""
    real = ort.InferenceSession
    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: there)
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda data, options, providers, **rest: real(
            data, options, providers=["CPUExecutionProvider"]
        ),
    )
    with pytest.raises(ProviderError, match="'cuda' does not run here: its libraries"):
        OnnxPolicy(path, provider="cuda")
    assert OnnxPolicy(path, provider="auto").provider == "cpu"


@pytest.mark.parametrize(
    ("provider", "order"),
    [
        ("cpu", ["CPU"]),
        ("cuda", ["preload", "CUDA"]),
        ("tensorrt", ["preload", "Tensorrt"]),
        ("auto", ["preload", "Tensorrt", "preload", "CUDA", "CPU"]),
    ],
)
def test_cuda_is_loaded_from_its_wheels_where_it_is_wanted(
    path, monkeypatch, capfd, provider, order
):
    """In time for the session; what onnxruntime prints of it becomes part of the error, not of the output."""
    done = []

    def preload() -> None:
        done.append("preload")
        print("Failed to load libcublas.so.12: not there\nand more")

    real = ort.InferenceSession

    def session(data, options, providers, **rest):
        done.append(providers[0].removesuffix("ExecutionProvider"))
        return real(data, options, providers=["CPUExecutionProvider"])

    there = list(onnx_policy.PROVIDERS.values())
    monkeypatch.setattr(ort, "get_available_providers", lambda: there)
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "preload_dlls", preload, raising=False)
    if provider in onnx_policy.ON_CUDA:
        with pytest.raises(
            ProviderError, match=r"not run here: Failed to load libcublas.so.12: not there;"
        ):
            OnnxPolicy(path, provider=provider)
    else:
        assert OnnxPolicy(path, provider=provider).provider == "cpu"
    assert done == order
    assert capfd.readouterr().out == ""
    monkeypatch.delattr(ort, "preload_dlls")  # before 1.21
    assert onnx_policy.load_cuda_libraries() == ""


def test_threads_do_not_spin_unless_asked():
    key = "session.intra_op.allow_spinning"
    assert session_options().get_session_config_entry(key) == "0"
    assert session_options(2, spinning=True).get_session_config_entry(key) == "1"
    assert session_options(2).intra_op_num_threads == 2


def test_bad_observations_are_refused(policy, obs):
    noise = policy.zero_noise()
    policy.infer(obs, noise)
    broken = obs["joint_pos"].copy()
    broken[0, 1] = np.nan
    good = obs["joint_pos"]
    for changed, draw, says in (
        ({"joint_pos": None}, noise, "'joint_pos' is missing"),
        ({"joint_pos": np.zeros((1, 4))}, noise, "shape (1, 4), not (1, 3)"),
        ({"joint_pos": good[0]}, noise, "shape (3,), not (1, 3)"),
        ({"joint_pos": broken}, noise, "'joint_pos' has numbers that are not finite"),
        ({"joint_pos": good + np.inf}, noise, "'joint_pos' has numbers that are not finite"),
        ({"joint_pos": np.full((1, 3), 1e300)}, noise, "'joint_pos' has numbers that are not"),
        ({"joint_pos": np.full((1, 3), "1")}, noise, "type <U1, not float32"),
        ({"joint_pos": good > 0}, noise, "type bool, not float32"),
        ({"joint_pos": good + 1j}, noise, "type complex64, not float32"),
        ({"prefix": good, "inference_delay": good}, noise, "not trained to continue"),
        ({}, np.zeros((1, 6, 3), np.float32), "'noise' has shape"),
        ({}, noise * np.nan, "'noise' has numbers that are not finite"),
        ({}, np.float32(0), "batch of 0"),
        ({}, noise[:0], "batch of 0"),
    ):
        with pytest.raises(ObservationError) as error:
            policy.infer({**obs, **changed}, draw)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    policy.infer(obs, noise)  # and none of it stays


def test_results_do_not_share_memory_and_batches_may_change(policy, obs):
    first = policy.infer(obs, policy.zero_noise())
    kept = first.copy()
    other = {name: values + 1 for name, values in obs.items()}
    second = policy.infer(other, policy.zero_noise())
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)
    both = {name: np.concatenate([obs[name], other[name]]) for name in obs}
    np.testing.assert_allclose(
        policy.infer(both, policy.zero_noise(2)), [first[0], second[0]], atol=1e-6
    )
    assert np.array_equal(policy.infer(obs, policy.zero_noise()), first)


def test_observations_may_be_any_kind_of_array_of_numbers(policy, obs):
    expected = policy.infer(obs, policy.zero_noise())
    strided = {name: np.repeat(v, 2, axis=1).astype(np.float64)[:, ::2] for name, v in obs.items()}
    assert np.array_equal(policy.infer(strided, policy.zero_noise()), expected)
    integers = {name: v.astype(int).tolist() for name, v in obs.items()}
    assert np.array_equal(policy.infer(integers, policy.zero_noise()), expected)


def test_threads_may_share_a_policy(policy, obs):
    expected = {
        k: policy.infer({n: v + k for n, v in obs.items()}, policy.zero_noise()) for k in range(4)
    }
    wrong = []

    def work(k: int) -> None:
        shifted = {n: v + k for n, v in obs.items()}
        for _ in range(200):
            if not np.array_equal(policy.infer(shifted, policy.zero_noise()), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_stays_where_it_is(policy, obs):
    """The long version, a million calls, is part of `flow-policy bench serve --memory-calls`."""
    noise = policy.zero_noise()

    def calls(number: int) -> int:
        for _ in range(number):
            policy.infer(obs, noise)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    settled = calls(5_000)
    assert calls(30_000) - settled < 1024  # 35 bytes per call would show


def test_distance_from_the_training_data(torch_policy, tmp_path):
    from flow_policy_rl.train_run import with_statistics

    spec = with_statistics(torch_policy.spec, torch_policy)
    path = tmp_path / "policy.onnx"
    export.write(export.build(export.trace_policy(torch_policy, spec), spec), spec, path)
    policy = OnnxPolicy(path, first_load_in_child=False)
    mean = {f.name: np.array([f.mean]) for f in spec.observations}
    assert policy.deviations(mean) == {"joint_pos": 0.0, "object_pose": 0.0}
    mean["joint_pos"][0, 2] += 7 * spec.observations[0].std[2]
    assert policy.deviations(mean)["joint_pos"] == pytest.approx(7)
    assert torch.isfinite(torch_policy.normalizer.std).all()
