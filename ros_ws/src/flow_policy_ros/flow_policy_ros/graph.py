"""What the policy node finds out about its neighbours: publishers and their QoS, rivals, the controller's
parameters."""

import time
from collections.abc import Callable, Collection, Sequence

from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import GetParameters
from rclpy.exceptions import InvalidTopicNameException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool
from trajectory_msgs.msg import JointTrajectory

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.monitor import Arrivals, SaidTwice
from flow_policy_rl.spec import ObservationField
from flow_policy_ros.messages import CONTROLLER_STATE, message_class

DEPTH = 5
BUTTON_DEPTH = 10
SILENT_S = 1.0  # joint_trajectory_controller says its state 50 times per second and more
LATCHED = DurabilityPolicy.TRANSIENT_LOCAL
INPUT_TYPES = {"joint_position": JointState, "joint_velocity": JointState, "pose": PoseStamped}
# The second one on Humble; the third, from Lyrical on, is true unless it is set. Any of them is enough.
SMOOTH = ("interpolate_from_desired_state", "open_loop_control", "allow_trajectory_replacement")
CONTROLLER_PARAMETERS = ("joints", "allow_partial_joints_goal", *SMOOTH)


# Humble tells of a message nothing but the message.
NUMBERED = hasattr(Subscription, "CallbackType")


def numbered(callback: Callable) -> Callable:
    """What a subscription calls, from a callback that takes a message and its DDS sequence number; None where there
    is none."""
    # rclpy looks at the signature.
    if not NUMBERED:
        return lambda msg: callback(msg, None)
    return lambda msg, info: callback(msg, info.get("publication_sequence_number"))


def input_type(topic: str, field: ObservationField) -> type:
    """The message that carries a field."""
    image = CompressedImage if topic.endswith("/compressed") else Image
    return INPUT_TYPES.get(field.kind, image)


def publishers(node: Node, topic: str) -> list[str]:
    """Full names of the nodes that publish a topic, once for each publisher."""
    return _names(node.get_publishers_info_by_topic(node.resolve_topic_name(topic)))


def subscribers(node: Node, topic: str) -> list[str]:
    """Full names of the nodes that subscribe to a topic, once for each subscription."""
    return _names(node.get_subscriptions_info_by_topic(node.resolve_topic_name(topic)))


def _names(endpoints: Sequence) -> list[str]:
    return [f"{e.node_namespace.rstrip('/')}/{e.node_name}" for e in endpoints]


def clock_problem(node: Node) -> str:
    """Who else says what time it is; empty where it is one publisher, or none."""
    names = publishers(node, "/clock")
    if len(names) < 2:
        return ""
    return f"{len(names)} publishers on /clock, one too many: {', '.join(sorted(names))}"


class Input:
    """A subscription that adapts to its publishers: reliable where all of them are, else best effort, which matches
    any.

    Args:
        joints: of joint states, those that count; publishers may have some each.
    """

    def __init__(
        self,
        node: Node,
        kind: type,
        topic: str,
        callback: Callable,
        joints: Collection[str] = (),
    ):
        self._node, self._kind, self._callback = node, kind, callback
        self._joints, self._said_twice = frozenset(joints), SaidTwice()
        self.topic = topic
        self.mismatch = ""
        self.arrivals = Arrivals()
        self._publishers: set[bytes] = set()
        self._reliability = ReliabilityPolicy.BEST_EFFORT
        self._subscription = self._subscribe()

    def _subscribe(self):
        qos = QoSProfile(depth=DEPTH, reliability=self._reliability)
        events = SubscriptionEventCallbacks(incompatible_qos=self._on_incompatible)
        self.arrivals.begin_again()
        return self._node.create_subscription(
            self._kind, self.topic, numbered(self._receive), qos, event_callbacks=events
        )

    def _receive(self, msg, number: int | None) -> None:
        # Numbers of several publishers cannot be told apart.
        alone = len(self._publishers) <= 1
        self.arrivals.count(number if alone else None)
        if not alone:
            what = self._joints.intersection(msg.name) if self._joints else ("it",)
            self._said_twice.count(what, number)
        self._callback(msg)

    def _on_incompatible(self, event) -> None:
        self.mismatch = f"{self.topic}: a publisher's QoS ({event.last_policy_kind}) does not fit"

    @property
    def wanted_type(self) -> str:
        """As ROS writes it: package/msg/Name."""
        package, _, _ = self._kind.__module__.partition(".")
        return f"{package}/msg/{self._kind.__name__}"

    def adapt(self) -> None:
        """Look at the publishers."""
        offers = self._node.get_publishers_info_by_topic(self.topic)
        publishers = {bytes(o.endpoint_gid) for o in offers}
        if publishers != self._publishers:
            self._publishers = publishers
            self.arrivals.begin_again()
            self._said_twice.begin_again()
        others = {o.topic_type for o in offers} - {self.wanted_type}
        self.mismatch = (
            f"{self.topic} is published as {', '.join(sorted(others))}, not {self.wanted_type}"
            if others
            else ""
        )
        fitting = [o.qos_profile for o in offers if o.topic_type == self.wanted_type]
        if not fitting:
            return
        reliable = all(q.reliability == ReliabilityPolicy.RELIABLE for q in fitting)
        wanted = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
        if wanted != self._reliability:
            self._reliability = wanted
            self._node.destroy_subscription(self._subscription)
            self._subscription = self._subscribe()

    @property
    def said_twice(self) -> str:
        """Which joints, or that the topic as a whole, more than one node publishes; empty when none. On Humble nothing
        is found, which numbers no messages."""
        twice = sorted(self._said_twice.names)
        if not twice:
            return ""
        what = f"{', '.join(twice)} of {self.topic}" if self._joints else self.topic
        names = ", ".join(sorted(publishers(self._node, self.topic)))
        return f"{what}: more than one of these says where it is: {names}"

    def close(self) -> None:
        """End the subscription."""
        self._node.destroy_subscription(self._subscription)


class Button:
    """A `std_msgs/Bool` that stops, whatever QoS it is published with; what a latched one said before counts as well.

    Args:
        on_press: called with every message that says true; the same one may come three times.

    Attributes:
        topic, pressed: where it is, and what it said last.

    Raises:
        InputError: no such name can be.
    """

    def __init__(self, node: Node, topic: str, on_press: Callable[[], None]):
        self._node, self.topic, self._on_press = node, topic, on_press
        self.pressed = False
        self._subscriptions: list[Subscription] = []
        self._latched = False
        try:
            self._subscribe(ReliabilityPolicy.BEST_EFFORT)  # matches any publisher
            self._subscribe(ReliabilityPolicy.RELIABLE)  # loses nothing of those that match it
        except InvalidTopicNameException as error:
            why = " ".join(str(error).split())
            raise InputError(f"emergency_stop_topic '{topic}' is no topic: {why}") from None

    def _subscribe(self, reliability, durability=DurabilityPolicy.VOLATILE) -> None:
        qos = QoSProfile(depth=BUTTON_DEPTH, reliability=reliability, durability=durability)
        expected = SubscriptionEventCallbacks(incompatible_qos=lambda event: None)
        self._subscriptions.append(
            self._node.create_subscription(
                Bool, self.topic, self._hear, qos, event_callbacks=expected
            )
        )

    def adapt(self) -> None:
        """Look at the publishers: ask a latched one for what it said before."""
        topic = self._node.resolve_topic_name(self.topic)
        offers = [o.qos_profile for o in self._node.get_publishers_info_by_topic(topic)]
        if not self._latched and any(q.durability == LATCHED for q in offers):
            self._latched = True
            self._subscribe(ReliabilityPolicy.RELIABLE, LATCHED)

    def _hear(self, msg: Bool) -> None:
        self.pressed = bool(msg.data)
        if self.pressed:
            self._on_press()

    def close(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)


class LifeSign:
    """Whether a joint_trajectory_controller is active. While it is configured only, it listens to commands and drops
    them; its state it publishes while it is active.

    It is listened to until it is heard, for it says hundreds of states per second. Nothing is known of a controller
    that does not offer its state, nor without control_msgs.

    Args:
        controller: full name of its node.
    """

    def __init__(self, node: Node, controller: str):
        self._node, self._controller = node, controller
        self._topic, self._kind = f"{controller}/controller_state", message_class(CONTROLLER_STATE)
        self._subscription: Subscription | None = None
        self._since = 0.0
        self._known = self._heard = self._doubted = False

    def doubt(self) -> None:
        """It may have become inactive; `problem` looks. From any thread."""
        self._doubted = True

    def problem(self) -> str:
        """Why it is not taken to be active; empty when it is, when nothing is known, and for a moment after `doubt`."""
        if self._kind is None or not self._offered:
            self._known = False
            self.close()
            return ""
        if self._heard:
            self._known = True
            self.close()
        doubted = self._doubted
        if doubted:
            # Before it listens: a doubt that comes from now on is another one.
            self._doubted = False
        if self._subscription is None and (doubted or not self._known):
            self._listen()
        silent = time.monotonic() - self._since
        if self._subscription is None or (self._known and silent < SILENT_S):
            return ""
        return f"{self._controller} is silent on {self._topic}: is it active (ros2 control list_controllers)?"

    @property
    def _offered(self) -> bool:
        offers = self._node.get_publishers_info_by_topic(self._topic)
        theirs = [o for o in offers if o.topic_type == CONTROLLER_STATE]
        return self._controller in _names(theirs)

    def _listen(self) -> None:
        # Best effort matches any publisher.
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._since = time.monotonic()
        self._subscription = self._node.create_subscription(
            self._kind, self._topic, self._hear, qos, raw=True
        )

    def _hear(self, data: bytes) -> None:
        self._heard = True

    def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
        self._subscription, self._heard = None, False


class Outlet:
    """A command publisher, and whether one may command there."""

    def __init__(self, node: Node, kind: type, topic: str, joint_names: Sequence[str]):
        self._node, self._joints = node, tuple(joint_names)
        self.mismatch = ""
        events = PublisherEventCallbacks(incompatible_qos=self._on_incompatible)
        self.publisher = node.create_publisher(
            kind, topic, QoSProfile(depth=1), event_callbacks=events
        )
        self.topic = self.publisher.topic_name
        controller = self.topic.rpartition("/")[0]  # empty for a topic at the root
        self._controller, self._heard = controller, False
        self.controller_problem = self.caution = self._asleep = ""
        self._life = LifeSign(node, controller)
        self.doubt = self._life.doubt
        self._asked, self._answers = 0, {}
        self._trajectories = kind is JointTrajectory
        self._client = node.create_client(GetParameters, f"{controller}/get_parameters")
        self._pending = None

    def _on_incompatible(self, event) -> None:
        self.mismatch = (
            f"{self.topic}: a subscriber's QoS ({event.last_policy_kind}) does not fit ours"
        )

    def problem(self) -> str:
        """Why nothing may be commanded here now; empty when it may."""
        self._asleep = self._life.problem()
        names, mine = publishers(self._node, self.topic), self._node.get_fully_qualified_name()
        if len(names) > 1:
            if mine in names:
                names.remove(mine)
            return f"another publisher is on {self.topic}: {', '.join(sorted(names))}"
        self._ask()
        return self.mismatch or self.deaf or self.controller_problem or self._unknown_order

    @property
    def deaf(self) -> str:
        """Why a command would reach no controller; empty when it would."""
        listeners = subscribers(self._node, self.topic)
        self._heard |= self._controller in listeners
        if self._heard and self._controller not in listeners:
            return f"{self._controller} does not listen to {self.topic} any more"
        if self.publisher.get_subscription_count() == 0:
            return f"nobody listens to {self.topic}: is the controller running?"
        return self._asleep

    @property
    def _unknown_order(self) -> str:
        """Why plain numbers might reach the wrong joints; empty for trajectories, which name them."""
        if self._trajectories or not self._heard or "joints" in self._answers:
            return ""
        return f"{self._controller} has not said yet in which order it takes its joints"

    def _ask(self) -> None:
        """Ask the controller for its joints, whether it takes some of them, and where it starts from, each time it
        appears."""
        if not self._client.service_is_ready():
            self._asked, self._pending, self._answers = 0, None, {}
            self.controller_problem = self.caution = ""
        elif self._pending is not None and self._pending.done():
            answer, self._pending = self._pending.result(), None
            value = answer.values[0] if answer is not None and answer.values else None
            self._answers[CONTROLLER_PARAMETERS[self._asked - 1]] = value
            self._judge()
        elif self._pending is None and self._asked < len(CONTROLLER_PARAMETERS):
            # One at a time: a controller that lacks one of several answers none of them.
            request = GetParameters.Request(names=[CONTROLLER_PARAMETERS[self._asked]])
            self._pending, self._asked = self._client.call_async(request), self._asked + 1

    def _judge(self) -> None:
        joints, partial, *smooth = (self._answers.get(name) for name in CONTROLLER_PARAMETERS)
        theirs = set(joints.string_array_value) if joints else set()
        ours, text = set(self._joints), ""
        if theirs and ours - theirs:
            text = f"it has no {', '.join(sorted(ours - theirs))}"
        elif theirs - ours and not (partial and partial.bool_value):
            text = f"it also needs {', '.join(sorted(theirs - ours))}"
        self.controller_problem = (
            f"the controller of {self.topic} drives other joints: {text}" if text else ""
        )
        order = list(joints.string_array_value) if joints else []
        if order and not text and not self._trajectories and order != list(self._joints):
            self.controller_problem = (
                f"{self._controller} takes its joints in another order ({', '.join(order)}) than the policy gives them "
                f"({', '.join(self._joints)})"
            )

        told = [a.bool_value for a in smooth if a and a.type == ParameterType.PARAMETER_BOOL]
        jerky = self._trajectories and self._asked == len(CONTROLLER_PARAMETERS) and told
        self.caution = (
            f"{self._controller} starts every trajectory from where the arm lags behind: set its {SMOOTH[0]} "
            f"(on Humble {SMOOTH[1]}) to true"
            if jerky and not any(told)
            else ""
        )

    def close(self) -> None:
        """End the publisher and the client."""
        self._node.destroy_publisher(self.publisher)
        self._node.destroy_client(self._client)
        self._life.close()
