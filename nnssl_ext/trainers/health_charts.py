"""How the figures of the health monitor are shown: which belong into one chart, and what each chart means in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        title: of the chart.
        meaning: one sentence: what is drawn, and which values are healthy.
        figures: names after "health/", or after the last "/" for figures that several groups of vectors have.
    """

    title: str
    meaning: str
    figures: tuple[str, ...]

    def label(self, name: str) -> str:
        """How a metric ("health/...") is called in this chart's legend."""
        short = name.removeprefix("health/")
        if "/" in short:
            return short.rpartition("/")[0] if len(self.figures) == 1 else short
        return short.replace("_", " ")


CHARTS = (
    Chart(
        "Spread of the features",
        "std · √D of normalised vectors: 1 when they point everywhere, below 0.1 when a projection has collapsed.",
        ("std",),
    ),
    Chart("Effective rank", "RankMe as a share of the largest possible, which grows with the width: low says little, falling does.", ("rank_share",)),
    Chart(
        "Directions",
        "Along which vectors differ (participation ratio): a projection with less than 1.5, and less than 0.1 of the rank, has collapsed.",
        ("directions",),
    ),
    Chart("Cosine between vectors", "Mean over pairs of different vectors: 0 when they point everywhere, 1 when all are alike.", ("cosine",)),
    Chart("Information about the image", "Mutual information of image and prototype in nat: below 0.1 all images get the same answer.", ("MI",)),
    Chart(
        "Entropies of the prototypes",
        "As shares of log K. H_cond: of one image, low when the answer is sharp. H_marg: of all images, high when all prototypes are used.",
        ("H_cond", "H_marg", "prototypes"),
    ),
    Chart("KL(teacher || student)", "How far the student is from its teacher's answers, in nat.", ("KL",)),
    Chart(
        "Patches of an image",
        "Variance of patch features within an image, and between the means of images: both should stay above 0.",
        ("patch_variance_within", "patch_variance_between"),
    ),
    Chart(
        "Features that know the position",
        "Share of the patches' variance that their place explains: near 1 they know nothing else.",
        ("position_r2",),
    ),
    Chart("Channels that never change", "Share of the feature channels whose deviation is below 1/1000 of the largest: above 0.5 is an alarm.", ("dead",)),
    Chart("Gradient norm", "Median of the epoch before clipping: a sudden rise to ten times the usual is an alarm.", ("gradient_norm",)),
    Chart(
        "Change of the weights per step",
        "||update|| / ||weights||, mean over up to 16 matrices: about 0.001 is usual.",
        ("update_ratio",),
    ),
    Chart(
        "Distance of the teacher",
        "||student - teacher|| / ||student||: above 0, and steady.",
        ("teacher_distance",),
    ),
    Chart("Momentum of the teacher", "Share of itself that the teacher keeps at each step.", ("momentum",)),
    Chart("Temperature of the teacher", "The lower, the sharper are the targets.", ("teacher_temperature",)),
    Chart("What the network sees", "Share of near-empty voxels in the crops, and of hidden tokens or blocks.", ("background", "mask_ratio")),
    Chart("Skipped steps", "Steps of the epoch in which something was not finite: 0 is healthy.", ("skipped_steps",)),
)
HIDDEN = ("rank_me", "dimensions")  # in the files only: the rank's share says the same


def grouped(names: Sequence[str]) -> list[tuple[Chart, list[str]]]:
    """Charts with the metrics ("health/...") that belong to them; a figure that no chart knows gets one of its own."""
    left = [name for name in names if name.rpartition("/")[2] not in HIDDEN]
    found = [(chart, [name for name in left if name.rpartition("/")[2] in chart.figures]) for chart in CHARTS]
    known = {name for _, members in found for name in members}
    found += [(Chart(name.removeprefix("health/"), "", ()), [name]) for name in left if name not in known]
    return [(chart, members) for chart, members in found if members]
