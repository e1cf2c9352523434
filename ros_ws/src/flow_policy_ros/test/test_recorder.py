"""A recorder that is killed, or whose disk is full, leaves a bag that can be read up to that point."""

import resource
import signal
import subprocess

from std_msgs.msg import Float64

from flow_policy_rl.data.bags import deserialize, read_bag
from flow_policy_rl.ros import node_command

FULL_BEFORE_THE_END = """
import errno, sys
from flow_policy_rl.data.bags import BagWriter
from flow_policy_ros import recorder
write = BagWriter.write
def full(self, *message):
    if recorder.message_count >= 20:
        raise OSError(errno.ENOSPC, "No space left on device")
    recorder.message_count += 1
    write(self, *message)
recorder.message_count, BagWriter.write = 0, full
sys.exit(recorder.main())
"""


def publish(peer, count: int, start: int = 0) -> None:
    publisher = peer.node.create_publisher(Float64, "/numbers", 50)
    peer.until(lambda: publisher.get_subscription_count() > 0, "the recorder's subscription")
    for i in range(start, start + count):
        publisher.publish(Float64(data=float(i)))
        peer.spin(0.01)


def test_a_killed_recorder_leaves_what_it_wrote(start, peer, tmp_path):
    nodes = start(recorder={"bag": str(tmp_path / "bag")})
    publish(peer, 150)
    nodes["recorder"].kill()
    values = [deserialize(m).data for m in read_bag(tmp_path / "bag") if m.topic == "/numbers"]
    assert values == [float(i) for i in range(len(values))]
    assert len(values) >= 50  # two flushes a second


def test_a_stopped_recorder_has_everything(start, peer, tmp_path):
    nodes = start(recorder={"bag": str(tmp_path / "bag")})
    publish(peer, 40)
    peer.spin(0.3)
    nodes["recorder"].signal(signal.SIGINT)
    assert nodes["recorder"].wait(60.0) == 0
    values = [deserialize(m).data for m in read_bag(tmp_path / "bag", ["/numbers"])]
    assert values == [float(i) for i in range(40)]


def test_a_disk_that_is_full_is_a_failure_and_no_wrong_input(ros_environment, peer, tmp_path):
    python, _, _, *rest = node_command("recorder", {"bag": str(tmp_path / "bag")})
    with (tmp_path / "recorder.log").open("w") as log:
        child = subprocess.Popen([python, "-c", FULL_BEFORE_THE_END, *rest], stderr=log)
        publish(peer, 60)
        assert child.wait(60.0) == 1
        said = (tmp_path / "recorder.log").read_text().splitlines()
    assert said[-1].startswith("error: recording stopped after 20 messages: ")


def test_a_disk_that_fills_up_at_the_very_end_leaves_what_was_flushed(start, peer, tmp_path):
    """From some moment on the system refuses to let files grow, as it would on a full disk."""
    recorder = start(recorder={"bag": str(tmp_path / "bag")})["recorder"]
    publish(peer, 150)
    written = (tmp_path / "bag" / "bag_0.mcap").stat().st_size
    resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (written, written))
    recorder.signal(signal.SIGINT)
    assert recorder.wait(60.0) == 1
    said = recorder.log.read_text().splitlines()[-1]
    assert said.startswith("error: the end of the bag could not be written: ")
    values = [deserialize(m).data for m in read_bag(tmp_path / "bag") if m.topic == "/numbers"]
    assert values == [float(i) for i in range(len(values))]
    assert len(values) >= 50


def test_an_existing_bag_is_not_overwritten(start, tmp_path):
    (tmp_path / "bag").mkdir()
    nodes = start(recorder={"bag": str(tmp_path / "bag")})
    assert nodes["recorder"].wait(60.0) == 2
    assert "exists already" in nodes["recorder"].log.read_text()
