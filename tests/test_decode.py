"""Messages to arrays: without ROS, on plain objects shaped like messages."""

from types import SimpleNamespace as Msg

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_toys import joint_state, pose
from toys import small_spec

from flow_policy_rl.serving import decode
from flow_policy_rl.serving.decode import DecodeError


@given(st.permutations(["a", "b", "c", "extra"]))
def test_joints_are_matched_by_name_in_any_order(order):
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "extra": 9.0}
    msg = joint_state(order, [values[n] for n in order], [10 * values[n] for n in order])
    assert decode.joint_values(msg, ("c", "a"), "position").tolist() == [3.0, 1.0]
    assert decode.joint_values(msg, ("c", "a"), "velocity").tolist() == [30.0, 10.0]


@pytest.mark.parametrize(
    ("msg", "says"),
    [
        (joint_state(["a", "b"], [1, 2]), "lacks c; it has a, b"),
        (joint_state(["a", "b", "c"], [1, 2]), "3 names but 2 values"),
        (joint_state(["a", "b", "c"], [1, float("nan"), 3]), "not a finite number in b"),
        (joint_state([], []), "it has no joints"),
    ],
)
def test_bad_joint_states_say_what_is_wrong(msg, says):
    field = small_spec().observations[0]
    with pytest.raises(DecodeError) as error:
        decode.decode(field, msg)
    assert says in str(error.value)


def test_a_pose_has_one_form_whatever_the_sign_of_its_quaternion():
    q = np.array([0.1, -0.2, 0.3, 0.4])
    q /= np.linalg.norm(q)
    one, other = decode.pose(pose([1, 2, 3, *q])), decode.pose(pose([1, 2, 3, *-q]))
    assert np.array_equal(one, other)
    assert one[6] > 0
    with pytest.raises(DecodeError, match="length"):
        decode.pose(pose([0, 0, 0, 0, 0, 0, 0.5]))


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8"])
@pytest.mark.parametrize("padding", [0, 5])
def test_images_honour_encoding_and_row_step(encoding, padding):
    channels = 1 if encoding == "mono8" else 3
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, channels), dtype=np.uint8)
    rows = np.pad(pixels.reshape(4, -1), ((0, 0), (0, padding)))
    msg = Msg(height=4, width=6, encoding=encoding, step=rows.shape[1], data=rows.tobytes())
    expected = pixels[..., ::-1] if encoding == "bgr8" else pixels
    assert np.array_equal(decode.image(msg), expected)
    msg.data = msg.data[:-1]
    with pytest.raises(DecodeError, match="bytes"):
        decode.image(msg)
    msg.encoding = "16UC1"
    with pytest.raises(DecodeError, match="not one of"):
        decode.image(msg)


@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_a_compressed_image_is_rgb_with_every_opencv(kind, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB", raising=False)  # came with 4.11
    pixels = np.full((8, 8, 3), [200, 30, 90], np.uint8)
    data = cv2.imencode(kind, pixels[..., ::-1])[1].tobytes()
    found = decode.rgb(Msg(format=kind[1:], data=data))
    assert np.abs(found.astype(int) - pixels).max() <= 3
