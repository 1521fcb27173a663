"""A step of DINOv2 with 2x64^3 + 4x32^3 crops, 4 blocks, 8192 prototypes: see `dinov2`."""

from benchmarks.common import Result
from benchmarks.dinov2 import measure


def run(quick: bool) -> Result:
    return measure("quick" if quick else "a", repetitions=1 if quick else 15)
