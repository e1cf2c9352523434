"""`python scripts/build.py OUT`: wheel and source distribution, by the setuptools that is there, without network."""

import os
import sys
from pathlib import Path

from setuptools import build_meta


def main(out: Path) -> list[Path]:
    """Build both; returns their paths."""
    os.chdir(Path(__file__).resolve().parent.parent)
    out.mkdir(parents=True, exist_ok=True)
    builds = (build_meta.build_sdist, build_meta.build_wheel)
    return [out / build(str(out)) for build in builds]


if __name__ == "__main__":
    for path in main(Path(sys.argv[1]).absolute()):
        print(path)
