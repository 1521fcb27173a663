"""Every warning is given where it should be, with room on the other side of its threshold."""

from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.core.geometry import Geometry
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.io import integrity
from nnssl_ext.io.integrity import Look, collection_findings, content_hash, geometry_findings, orientation, outliers, volume_findings
from nnssl_ext.io.readers import KINDS
from tests.make_raw import body_volume

CT = body_volume((24, 28, 32)).astype(np.float32)
INSIDE = CT > -500
MR = np.where(INSIDE, np.abs(CT) + 100, sample_rng(0, 0, "noise").normal(0, 5, CT.shape)).astype(np.float32)  # Gaussian noise around 0 in air is fine


def kinds(volume, modality="CT", mask=INSIDE):
    return [finding.kind for finding in volume_findings(Look.at(np.asarray(volume, np.float32), mask, modality))]


def with_share(value, share):
    """MR with `value` in a share of the body's voxels."""
    volume, places = MR.copy(), np.flatnonzero(INSIDE)
    volume.ravel()[places[: int(share * len(places))]] = value
    return volume


def case(index, subject=None, spacing=(3.0, 1.0, 1.0), shape=(60, 256, 256), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), modality="CT"):
    wobble = 1 + 0.1 * np.sin(index)
    return {
        "subject": subject or f"s{index}",
        "modalities": [modality],
        "shape": [int(n * wobble) for n in shape],
        "spacing": [mm * wobble for mm in spacing],
        "direction": list(direction),
    }


def test_images_as_they_should_be_have_no_findings():
    assert kinds(CT) == [] and kinds(MR, "T1w") == [] and kinds(np.clip(CT, -1024, 3071)) == []
    assert geometry_findings(Geometry((60, 256, 256), (5.0, 0.7, 0.7))) == []


@pytest.mark.parametrize(
    "values, reason",
    [(CT + 1024, "intercept"), (np.clip((CT + 1000) / 5, 0, 255).round(), "8-bit"), ((CT - 40) / 400, "normalised"), (np.clip(CT, -150, 300), "no air")],
)
def test_a_ct_that_is_not_in_hounsfield_units_is_named_with_the_reason(values, reason):
    (finding,) = (f for f in volume_findings(Look.at(values.astype(np.float32), INSIDE, "CT")) if f.kind == "hu")
    assert reason in finding.sentence
    assert "hu" not in kinds(values, "MR")


def test_label_maps_are_told_from_images():
    labels = (CT // 20).clip(0, 30)
    assert kinds(labels, "MR") == ["labels"] and kinds(labels > 3) == ["labels"]
    assert kinds(labels + 0.5, "MR") != ["labels"]  # no whole numbers
    assert "labels" not in kinds((CT // 2).clip(0, 255), "MR")


def test_hardly_any_body_is_noticed():
    mask = np.zeros_like(INSIDE)
    mask.ravel()[: int(0.009 * mask.size)] = True
    assert kinds(CT, mask=mask) == ["bodyless"]
    mask.ravel()[: int(0.012 * mask.size)] = True
    assert kinds(CT, mask=mask) == []


def test_negative_values_in_bulk_are_noticed_in_magnitude_images_only():
    normalised = (MR - MR.mean()) / MR.std()
    assert kinds(normalised, "FLAIR") == ["negative"] and kinds(normalised, "QSM") == []
    few = MR.copy()
    few.ravel()[: int(0.07 * few.size)] = -50
    assert kinds(few, "MR") == []
    few.ravel()[: int(0.12 * few.size)] = -50
    assert kinds(few, "MR") == ["negative"]


def test_clipped_images_are_noticed():
    assert kinds(with_share(400, 0.025), "MR") == ["saturated"] and kinds(with_share(400, 0.015), "MR") == []


def test_voxels_far_above_the_others_are_noticed_but_for_ct():
    usual = np.percentile(MR[INSIDE], 99.5)
    assert kinds(with_share(25 * usual, 0.001), "MR") == ["spikes"] and kinds(with_share(15 * usual, 0.001), "MR") == []
    assert kinds(np.where(CT == CT.max(), 30000, CT)) == []


@pytest.mark.parametrize(
    "shape, spacing, kind",
    [
        ((7, 256, 256), (5, 1, 1), "thin"),
        ((20, 20, 20), (2, 2, 2), "tiny"),
        ((800, 800, 800), (1, 1, 1), "huge"),
        ((20, 256, 256), (10.1, 0.5, 0.5), "anisotropy"),
        ((60, 256, 256), (0.003, 0.001, 0.001), "extent"),
        ((60, 256, 256), (5, 50, 5), "extent"),
    ],
)
def test_odd_sizes_and_spacings_are_noticed(shape, spacing, kind):
    assert [finding.kind for finding in geometry_findings(Geometry(shape, tuple(map(float, spacing))))] == [kind]


def test_the_hash_is_of_shape_and_voxels_alone():
    assert content_hash(CT) == content_hash(np.asfortranarray(CT)) == content_hash(CT.astype(np.int16).astype(np.float32))
    other = CT.copy()
    other[3, 4, 5] += 1
    assert len({content_hash(volume) for volume in (CT, other, CT[::-1], CT.reshape(28, 24, 32))}) == 4


def test_copies_are_told_apart_by_subject():
    cases = {"a": case(0, "s"), "b": case(1, "s"), "c": case(2, "t"), "d": case(3, "u"), "e": case(4, "v"), "f": case(5, "w")}
    found = collection_findings(cases, {"a": ["1"], "b": ["1"], "c": ["2"], "d": ["2"], "e": ["3"], "f": ["4", "4"]})
    assert {name: [finding.kind for finding in findings] for name, findings in found.items()} == {
        "a": ["twin"],
        "b": ["twin"],
        "c": ["leak"],
        "d": ["leak"],
        "f": ["twin"],
    }
    assert "as b, of the same subject" in found["a"][0].sentence and "as d, under 2 subjects" in found["c"][0].sentence
    assert found["f"][0].sentence == "channels 0, 1 hold the same voxels"


def test_a_hundred_copies_are_named_in_a_short_sentence():
    cases = {f"c{index:03d}": case(index) for index in range(100)}
    found = collection_findings(cases, {name: ["same"] for name in cases})
    assert found["c050"][0].sentence == "holds the same voxels as c000, c001, c002 and 96 more, under 100 subjects"


def test_outliers_are_rare_cases_far_from_a_collection():
    cases = {f"c{index:02d}": case(index) for index in range(20)}
    assert collection_findings(cases, {}) == {}
    cases["c07"] = case(7, spacing=(30.0, 1.0, 1.0))
    cases["c08"] = case(8, shape=(60, 256, 16))
    cases["c09"] = case(9, direction=(1, 0, 0, 0, -1, 0, 0, 0, -1))
    found = collection_findings(cases, {})
    assert {name: [finding.kind for finding in findings] for name, findings in found.items()} == {
        "c07": ["unusual_spacing"],
        "c08": ["unusual_shape"],
        "c09": ["unusual_orientation"],
    }
    assert "LAI, 19 of the 20 CT cases as LPS" in found["c09"][0].sentence


def test_small_collections_and_groups_have_no_outliers():
    few = {f"c{index}": case(index) for index in range(8)} | {"x": case(9, spacing=(30.0, 1, 1))}
    assert collection_findings(few, {}) == {}
    groups = {f"c{index:02d}": case(index, spacing=(30.0 if index % 5 == 0 else 1.0, 1, 1)) for index in range(40)}
    assert collection_findings(groups, {}) == {}
    modalities = {f"c{index:02d}": case(index, modality="MR" if index == 3 else "CT", spacing=(30.0 if index == 3 else 1.0, 1, 1)) for index in range(20)}
    assert collection_findings(modalities, {}) == {}


def test_outliers_agree_with_a_plain_loop():
    rng = sample_rng(0, 0, "outliers")
    for _ in range(50):
        values = np.exp(rng.normal(0, rng.uniform(0.01, 0.3), (60, 3)))
        for row in range(int(rng.integers(0, 6))):
            values[row, int(rng.integers(3))] *= rng.uniform(1, 20)
        far = set()
        for axis in range(3):
            logs = [float(np.log(row[axis])) for row in values]
            median = sorted(logs)[29] / 2 + sorted(logs)[30] / 2
            away = sorted(abs(x - median) for x in logs)
            spread = max(1.4826 * (away[29] + away[30]) / 2, 0.1)
            far |= {index for index, x in enumerate(logs) if abs(x - median) / spread > 6}
        assert outliers(values) == (sorted(far) if len(far) <= 3 else [])


def test_the_axes_of_an_image_are_named():
    assert orientation((1, 0, 0, 0, 1, 0, 0, 0, 1)) == "LPS" and orientation((-1, 0, 0, 0, -1, 0, 0, 0, 1)) == "RAS"
    assert orientation((0, 0, 1, 1, 0, 0, 0, -1, 0)) == "PIL"  # columns are the image's axes


def test_every_kind_is_documented_and_none_has_two_meanings():
    page = (Path(__file__).parents[3] / "documentation" / "how-to" / "verify.md").read_text(encoding="utf-8")
    assert [kind for kind in (*integrity.FIXES, *KINDS) if f"`{kind}`" not in page] == []
    assert not set(integrity.FIXES) & set(KINDS)
