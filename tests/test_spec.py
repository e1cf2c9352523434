"""The spec survives its round trip at full precision, and says what is wrong with a bad one."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import small_spec

from flow_policy_rl.errors import InputError
from flow_policy_rl.spec import PolicySpec

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(
    low=st.tuples(finite, finite).map(lambda pair: tuple(min(v, 1e300) for v in pair)),
    width=st.floats(min_value=1e-3, max_value=1e3),
    control_dt=st.floats(min_value=1e-4, max_value=60.0),
    steps=st.integers(1, 64),
    names=st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True),
)
def test_round_trip_is_exact(low, width, control_dt, steps, names):
    high = tuple(v + max(width, abs(v) * 1e-3) for v in low)
    spec = small_spec(
        joint_names=tuple(names),
        action_low=low,
        action_high=high,
        control_dt=control_dt,
        num_flow_steps=steps,
    )
    assert PolicySpec.from_json(spec.to_json()) == spec


def bad(**changes) -> str:
    raw = json.loads(small_spec().to_json())
    for key, value in changes.items():
        if value is KeyError:
            del raw[key]
        else:
            raw[key] = value
    return json.dumps(raw)


def bad_field(**changes) -> str:
    first, *others = json.loads(small_spec().to_json())["observations"]
    return bad(observations=[first | changes, *others])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (bad(schema_version=99), "schema_version 99"),
        (bad(control_dt=KeyError), "'control_dt' is missing"),
        (bad(control_dt="fast"), "'control_dt' must be float, not str"),
        *(
            (bad(control_dt=dt), "control_dt must be from 0.0001 to 60 s")
            for dt in (0.0, -1, 1e-9, 1e30)
        ),
        (bad(num_flow_steps=0), "num_flow_steps must be at least 1"),
        (bad(num_flow_steps=True), "'num_flow_steps' must be int, not bool"),
        (bad(surprise=1), "unknown key 'surprise'"),
        (bad(joint_names=["a", "a"]), "duplicates"),
        (bad(action_low=[0.0]), "need 2 values"),
        (bad(action_low=[5.0, 5.0]), "not below"),
        (bad(execute_horizon=7), "execute_horizon <= action_horizon"),
        (bad(integrator="leapfrog"), "integrator must be one of"),
        (bad(observations={}), "'observations' must be a list"),
        (bad(observations=[3]), "not a JSON object"),
        (bad(observations=[]), "observations is empty"),
        *(
            (bad_field(mean=mean, std=std), "one value per element")
            for mean, std in (([1.0], [1.0]), ([], [1.0] * 3), ([1.0] * 3, []))
        ),
        *(
            (
                bad_field(kind="image", elements=[], resolution=size),
                "a resolution of 1 to 4096 pixels each way",
            )
            for size in ([8], [8, 0], [4097, 8])
        ),
        (bad_field(mean=[0.0] * 3, std=[1.0, 0.0, 1.0]), "std must be above zero"),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(text, says):
    with pytest.raises(InputError) as error:
        PolicySpec.from_json(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@given(st.data())
def test_any_damage_to_the_json_is_an_input_error_or_a_valid_spec(data):
    raw = json.loads(small_spec().to_json())
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers()), finite
    )
    key = data.draw(st.sampled_from(sorted(raw)))
    raw[key] = data.draw(junk)
    try:
        spec = PolicySpec.from_json(json.dumps(raw))
    except InputError:
        return
    assert dataclasses.asdict(spec)[key] is not None


def test_options_of_the_task_are_written_only_where_there_are_some():
    """Files without are those of versions that knew none, which read them too."""
    plain, dense = small_spec(), small_spec(task_options={"reward": "dense"})
    assert "task_options" not in json.loads(plain.to_json())
    assert PolicySpec.from_json(plain.to_json()).task_options == {}
    assert PolicySpec.from_json(dense.to_json()) == dense
