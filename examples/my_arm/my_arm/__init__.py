from pathlib import Path

ROBOT = Path(__file__).with_name("planar.yaml")
