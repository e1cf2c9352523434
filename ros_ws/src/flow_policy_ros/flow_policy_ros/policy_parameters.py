"""The parameters of `policy_node`."""

from flow_policy_rl.serving.chunk_scheduler import LEAD_S, METHODS
from flow_policy_ros.parameters import Parameter

PARAMETERS = (
    Parameter("policy", "", "path of the policy.onnx; a change takes effect with ~/reload"),
    Parameter("robot", "panda", "name of a robot, or path of a robot file", when_unconfigured=True),
    Parameter(
        "armed",
        False,
        "command the arm; otherwise dry run: chunks are computed and shown only",
        fixed=True,
    ),
    Parameter("autostart", True, "configure and activate without a lifecycle manager", fixed=True),
    Parameter(
        "output",
        "trajectory",
        "a whole chunk as JointTrajectory, or one Float64MultiArray per tick",
        choices=("trajectory", "per_tick"),
        when_unconfigured=True,
    ),
    Parameter(
        "tick_rate_hz", 100.0, "rate of per_tick output", 1.0, 1000.0, when_unconfigured=True
    ),
    Parameter(
        "joining",
        "auto",
        "how consecutive chunks join; auto is rtc for a policy trained with a prefix, else replace",
        choices=("auto", *METHODS),
        when_unconfigured=True,
    ),
    Parameter(
        "noise", "zero", "where the flow starts, random from `seed`", choices=("zero", "random")
    ),
    Parameter("seed", 0, "of random noise", 0, 2**31 - 1, when_unconfigured=True),
    Parameter("max_input_age_s", 0.2, "older input is stale: hold", 0.001, 10.0),
    Parameter(
        "max_silence_s", 1.0, "no message at all for this long (steady clock): hold", 0.01, 60.0
    ),
    Parameter(
        "max_start_distance",
        0.5,
        "refuse to start if the first target is further away (rad, m)",
        0.0,
        10.0,
    ),
    Parameter(
        "max_tracking_error",
        0.1,
        "hold if an arm joint is further (rad, m) from all it was commanded in the last 0.15 s; 0: never",
        0.0,
        10.0,
    ),
    Parameter(
        "position_margin", 0.0, "distance that arm joints keep from their limits (rad)", 0.0, 1.0
    ),
    Parameter(
        "soft_start_s", 0.5, "time from the first command of a run until full speed", 0.0, 60.0
    ),
    Parameter(
        "lead_s",
        LEAD_S,
        "a plan may change no sooner than this: controller period and transport, and as much again",
        0.001,
        1.0,
        when_unconfigured=True,
    ),
    Parameter(
        "max_limited_in_a_row",
        10,
        "armed: emergency stop after so many plans in a row that miss an arm target by more than 0.25; 0: never",
        0,
        10_000,
    ),
    Parameter(
        "workspace",
        True,
        "keep the tool in the box of the robot file, if it has one",
        when_unconfigured=True,
    ),
    Parameter(
        "max_sigma",
        10.0,
        "warn when an input is so many standard deviations from training; 0: never",
        0.0,
        1e6,
    ),
    Parameter(
        "emergency_stop_topic",
        "/emergency_stop",
        "std_msgs/Bool of any QoS: true stops, in every state of the node",
        when_unconfigured=True,
    ),
    Parameter(
        "inject_delay_s",
        0.0,
        "a fault for testing: every inference takes so much longer (s, ROS clock); 0: off",
        0.0,
        10.0,
    ),
    Parameter("debug", False, "publish all of every inference on ~/debug_inference"),
)
