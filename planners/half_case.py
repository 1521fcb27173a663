"""Example of a plug-in: a planner with another rule for the patch size."""

from __future__ import annotations

from collections.abc import Sequence

from nnssl_ext.planners.planner import Planner


class HalfCasePlanner(Planner):
    """Patches of at most half the median case along each axis (rounded up to what the networks divide), so that crops of a case differ more."""

    def patch_size(self, spacing: Sequence[float], median_shape: Sequence[int]) -> tuple[int, ...]:
        half = [max(1, voxels // 2) for voxels in median_shape]
        self.decisions.append(f"patch: at most {'x'.join(map(str, half))} voxels, half of the median case, before rounding")
        return super().patch_size(spacing, half)
