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
from flow_policy_rl.spec import ObservationField


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


def test_a_quaternion_is_of_length_one_to_a_hundredth_and_of_numbers():
    assert decode.pose(pose([0, 0, 0, 0, 0, 0, 0.995]))[6] == 0.995
    with pytest.raises(DecodeError, match="length 1.020"):
        decode.pose(pose([0, 0, 0, 0, 0, 0, 1.02]))
    field = ObservationField("cube", "pose", decode.POSE_ELEMENTS, "m, unit quaternion", "cube")
    with pytest.raises(DecodeError, match="'cube': not a finite number in y, qx"):
        decode.decode(field, pose([0, float("nan"), 0, float("inf"), 0, 0, 1]))


# Bytes of a pixel, and which of them are red, green and blue.
ENCODINGS = {
    "rgb8": (3, [0, 1, 2]),
    "bgr8": (3, [2, 1, 0]),
    "8UC3": (3, [0, 1, 2]),
    "rgba8": (4, [0, 1, 2]),
    "bgra8": (4, [2, 1, 0]),
    "mono8": (1, [0, 0, 0]),
    "8UC1": (1, [0, 0, 0]),
}


def image_message(encoding: str, pixels: np.ndarray, padding: int = 0) -> Msg:
    """Of pixels (height, width, bytes), with bytes that mean nothing behind every row."""
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=77)
    return Msg(
        height=height, width=width, encoding=encoding, step=rows.shape[1], data=rows.tobytes()
    )


@pytest.mark.parametrize("encoding", decode.CHANNELS)
@pytest.mark.parametrize("padding", [0, 5])
def test_images_honour_encoding_and_row_step(encoding, padding):
    size, places = ENCODINGS[encoding]
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, size), dtype=np.uint8)
    msg = image_message(encoding, pixels, padding)
    assert np.array_equal(decode.rgb(msg), pixels[..., places])
    msg.data = msg.data[:-1]
    with pytest.raises(DecodeError, match="bytes"):
        decode.image(msg)
    msg.encoding = "16UC1"
    with pytest.raises(DecodeError, match="not one of"):
        decode.image(msg)


@pytest.mark.parametrize("wrong", [{"step": 17}, {"height": 0, "data": b""}, {"width": 0}])
def test_images_without_room_for_their_pixels_are_refused(wrong):
    msg = image_message("rgb8", np.zeros((4, 6, 3), np.uint8))
    for name, value in wrong.items():
        setattr(msg, name, value)
    msg.data = msg.data[: msg.step * msg.height]
    with pytest.raises(DecodeError, match=r"image of \dx\d rgb8 has step"):
        decode.image(msg)


def test_a_larger_picture_is_brought_to_size_by_the_average_of_its_areas():
    """Rows and columns by their own factors, in the policy's order: height, then width."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 18, 3), dtype=np.uint8)
    found = decode.fit(pixels, (4, 6))
    means = pixels.reshape(4, 2, 6, 3, 3).mean(axis=(1, 3))
    assert found.shape == (4, 6, 3)
    assert np.abs(found - means).max() <= 0.5
    assert decode.fit(pixels, (8, 18)) is pixels


@pytest.mark.parametrize("data", [b"", b"no picture at all", bytes(1000)])
def test_a_compressed_image_that_is_none_is_refused(data):
    with pytest.raises(DecodeError, match=f"{len(data)} bytes \\('jpeg'\\) is unreadable"):
        decode.rgb(Msg(format="jpeg", data=data))


def test_a_debug_record_has_every_array_in_its_own_shape():
    arrays = {"obs": np.arange(6.0).reshape(2, 3), "one": np.array(7.0), "none": np.zeros((0, 4))}
    dims = [Msg(label="stamp:2", size=2)]
    dims += [
        Msg(label=f"{n}:{','.join(map(str, a.shape))}", size=a.size) for n, a in arrays.items()
    ]
    data = [12.0, 345_678_901.0, *np.concatenate([a.ravel() for a in arrays.values()])]
    stamp, found = decode.debug_record(Msg(layout=Msg(dim=dims), data=data))
    assert stamp == 12_345_678_901
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[n], a) for n, a in arrays.items())


@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_a_compressed_image_is_rgb_with_every_opencv(kind, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB", raising=False)  # came with 4.11
    pixels = np.full((8, 8, 3), [200, 30, 90], np.uint8)
    data = cv2.imencode(kind, pixels[..., ::-1])[1].tobytes()
    found = decode.rgb(Msg(format=kind[1:], data=data))
    assert np.abs(found.astype(int) - pixels).max() <= 3
