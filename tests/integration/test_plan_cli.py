"""nnssl_plan_experiment: reasons in words, a table, a page."""

import re

import numpy as np
import pytest

from nnssl_ext.cli import plan_experiment
from nnssl_ext.core.files import write_json
from nnssl_ext.planners.planner import Planner
from nnssl_ext.planners.primus import local_crop, token_size
from tests.make_data import make_fingerprint


@pytest.fixture
def planned(folders):
    (folders["nnssl_raw"] / "Dataset801_Test").mkdir()
    fingerprint = make_fingerprint(shapes=[(60, 200, 210), (80, 220, 190), (70, 180, 200)], spacings=[(3.0, 0.8, 0.8)] * 3)
    write_json(folders["nnssl_preprocessed"] / "Dataset801_Test" / "dataset_fingerprint.json", fingerprint)
    return folders["nnssl_preprocessed"] / "Dataset801_Test"


def test_every_choice_is_explained_and_shown_on_a_page_without_external_requests(planned, capsys):
    assert plan_experiment.main(["-d", "801", "--explain", "-gpu_memory_target", "12"]) == 0
    out = capsys.readouterr().out
    for words in (
        "the median of the cases",
        "limited by memory",
        "Hounsfield units are comparable",
        "local ones of",
        "as many samples as fit",
        "GB before compression",
    ):
        assert words in out
    page = (planned / "nnsslPlans.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "limited by memory" in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:|#)[a-z]+:", page)


def test_without_explain_a_table_is_printed(planned, capsys):
    assert plan_experiment.main(["-d", "801", "-gpu_memory_target", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "configuration" and lines[2].split()[0] == "3d_fullres" and len(lines) < 12


@pytest.mark.parametrize(
    ("patch", "spacing"),
    [((96, 96, 96), (1, 1, 1)), ((64, 96, 128), (3, 3, 3)), ((16, 192, 160), (5, 1, 1)), ((8, 8, 24), (1, 1, 1)), ((2, 64, 64), (9, 1, 1))],
)
def test_local_crops_are_half_the_patch_in_whole_tokens(patch, spacing):
    token = token_size(spacing)
    local = local_crop(patch, token)
    for p, t, edge in zip(patch, token, local):
        assert edge % t == 0 and edge <= p and edge >= min(p, 2 * t) and (edge == p / 2 or p % (2 * t) or edge == min(p, 2 * t))
    assert local_crop((96, 96, 96), (8, 8, 8)) == (48, 48, 48)


@pytest.mark.parametrize("name", ["CT", "ct", "CT_contrast", "CTA", "computed tomography"])
def test_computed_tomography_is_recognised_however_it_is_spelled(name):
    plan = Planner(make_fingerprint(modality=name), 8).plan("p")
    assert plan.configurations["3d_fullres"].normalization[name].scheme == "ct"


def test_each_modality_of_a_mixed_collection_has_its_own_rule():
    fingerprint = make_fingerprint()
    fingerprint["intensities"] |= {name: {**fingerprint["intensities"]["CT"], "mean": 900.0} for name in ("T1w", "PT", "US", "noNorm")}
    plan = Planner(fingerprint, 8).plan("p")
    schemes = {name: found.scheme for name, found in plan.configurations["3d_fullres"].normalization.items()}
    assert schemes == {"CT": "ct", "T1w": "zscore", "PT": "zscore", "US": "zscore", "noNorm": "none"}
    assert plan.configurations["3d_fullres"].normalization["CT"].mean == 40.0
    assert any("mixes CT, PT, T1w, US, noNorm" in sentence for sentence in plan.decisions)


def test_a_ct_of_one_value_is_not_clipped_to_nothing():
    fingerprint = make_fingerprint()
    fingerprint["intensities"]["CT"] |= {"percentile_00_5": 7.0, "percentile_99_5": 7.0, "std": 0.0}
    assert Planner(fingerprint, 8).plan("p").configurations["3d_fullres"].normalization["CT"].scheme == "zscore"


@pytest.mark.parametrize("shape", [(2, 512, 512), (5, 6, 7), (2048, 2048, 2048), (1, 1, 1)])
def test_slabs_crumbs_and_giants_get_a_patch_that_is_no_larger_than_rounding_needs(shape):
    config = Planner(make_fingerprint(shapes=[shape] * 3, spacings=[(2.0, 1.0, 1.0)] * 3), 12).plan("p").configurations["3d_fullres"]
    divisor = np.lcm(np.prod(config.networks["resenc"].kwargs["strides"], axis=0), config.networks["primus"].kwargs["patch_embed_size"])
    assert all(p < n + d for p, n, d in zip(config.patch_size, shape, divisor))
