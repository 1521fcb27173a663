"""A step of DINOv2 with 2x64^3 + 8x32^3 crops, 6 blocks, 65536 prototypes: see `dinov2`."""

from benchmarks.common import Result
from benchmarks.dinov2 import measure


def run(quick: bool) -> Result:
    return measure("quick" if quick else "b", repetitions=1 if quick else 7)
