"""How a task describes what it observes: one entry per field, carried into the policy's spec and from there to ROS."""

from dataclasses import dataclass

POSE_ELEMENTS = ("x", "y", "z", "qx", "qy", "qz", "qw")


@dataclass(frozen=True)
class ObsField:
    """One named part of an observation.

    Attributes:
        name: key in the observation dict, and input name of the exported graph.
        kind: where it comes from: joint_position, joint_velocity, pose, image, or state (what only a simulation knows).
        elements: joint names, or the elements of a pose (`POSE_ELEMENTS`); empty for an image.
        unit: SI unit of the elements.
        source: for a pose or an image, the name of the object or camera.
        resolution: height and width of an image, which is (height, width, 3) uint8 RGB; else empty.
    """

    name: str
    kind: str
    elements: tuple[str, ...]
    unit: str
    source: str = ""
    resolution: tuple[int, ...] = ()


IMAGE_RESOLUTION = (96, 96)


def camera_field(camera: str) -> ObsField:
    """The image of a named camera as an observation field."""
    return ObsField(f"{camera}_image", "image", (), "", source=camera, resolution=IMAGE_RESOLUTION)
