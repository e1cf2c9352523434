"""Fine-tune flow-matching robot policies with RL, export one ONNX file, serve it on ROS 2, judge it on rosbags."""

__version__ = "0.1.0"
