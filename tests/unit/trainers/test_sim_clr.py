"""SimCLR: what the pairs share, what is pooled, and who is a negative of whom."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.data.sampling import iou
from nnssl_ext.data.spatial import bounds
from nnssl_ext.trainers.config import parse_overrides
from nnssl_ext.trainers.sim_clr import INTENSITY, SimCLRTrainer
from tests.conformance.pairs import Pair, first_batch
from tests.make_data import ArrayStore, tiny_store


class OneSubject(ArrayStore):
    """Every other case is of the same subject."""

    def subject(self, case: int) -> str:
        return "same" if case % 2 else f"subject{case}"


@pytest.fixture(params=["resenc", "primus"])
def trainer(request, tmp_path):
    made = Pair(SimCLRTrainer, request.param).trainer(tmp_path, batch_size=4)
    made.initialize()
    made.model.eval()
    return made


@pytest.mark.parametrize("interval", [(0.5, 1.0), (0.7, 1.0)], ids=str)
def test_the_overlap_of_the_crops_is_their_true_one_also_where_much_is_wanted(interval, tmp_path):
    spec = Pair(SimCLRTrainer, "primus").trainer(tmp_path, iou=interval).views()  # taken as largest shift, 0.7 gives pairs that share nothing
    store, found = tiny_store(), []
    for number in range(40):
        views = spec.sample(store, number % 8, sample_rng(0, number))
        found.append(iou(*(bounds(view.affine, view.image.shape[1:]) for view in views.values())))
    assert interval[0] <= min(found) and max(found) <= interval[1] and len(set(found)) > 2


@pytest.mark.parametrize("patch", [(16, 16, 16), (1, 16, 16)], ids=str)
@pytest.mark.parametrize("text", ["0,0", "1,1", "0.0001,0.3", "0,1"])
def test_disjoint_equal_and_any_crops_can_be_positives_in_volumes_and_in_slices(text, patch, tmp_path):
    interval = parse_overrides(SimCLRTrainer.Config, [f"iou={text}"])["iou"]
    spec, store = Pair(SimCLRTrainer, "primus").trainer(tmp_path, patch=patch, iou=interval).views(), tiny_store()
    found = {iou(*(bounds(view.affine, view.image.shape[1:]) for view in spec.sample(store, n % 8, sample_rng(0, n)).values())) for n in range(40)}
    assert interval[0] <= min(found) and max(found) <= interval[1] and (len(found) > 2 or interval[0] == interval[1])


def test_crops_are_mirrored_and_turned_each_by_itself(tmp_path):
    spec, store = Pair(SimCLRTrainer, "primus").trainer(tmp_path).views(), tiny_store()
    pairs = [[view.affine[:, :3].round() for view in spec.sample(store, 0, sample_rng(0, number)).values()] for number in range(40)]
    assert sum(np.array_equal(*pair) for pair in pairs) < 20
    assert all(np.array_equal(np.abs(matrix).sum(0), np.ones(3)) for pair in pairs for matrix in pair)
    assert any(not np.array_equal(np.abs(matrix), np.eye(3)) for pair in pairs for matrix in pair)


def test_operations_have_the_probabilities_of_the_method():
    found = {name: getattr(INTENSITY, name).p for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")}
    assert found == {"noise": 0.1, "blur": 0.2, "brightness": 0.15, "contrast": 0.15, "low_resolution": 0.1, "gamma": 0.3, "gamma_inverted": 0.0}


def test_the_averages_of_all_maps_are_projected(trainer):
    image = first_batch(trainer)["first"].image
    maps = trainer.backbone.pyramid(image)
    pooled = torch.stack([torch.cat([level[i].mean((1, 2, 3)) for level in maps]) for i in range(len(image))])
    assert pooled.shape[1] == sum(trainer.backbone.widths) and len(maps) == (3 if trainer.family == "resenc" else 1)
    torch.testing.assert_close(trainer.model(image), trainer.model.projector(pooled))


def test_equal_projections_cost_the_logarithm_of_all_others(trainer):
    for parameter in trainer.model.projector.parameters():
        torch.nn.init.zeros_(parameter)
    batch = first_batch(trainer)
    assert trainer.step(trainer.model, batch)["total"].item() == pytest.approx(math.log(2 * 4 - 1), rel=1e-4)


def test_crops_are_told_apart_from_the_first_step_on(trainer):
    vectors = trainer.model.train()(torch.cat([view.image for view in first_batch(trainer).values()]))
    spread = torch.nn.functional.normalize(vectors, dim=1).std(0).norm()
    assert spread > 0.5  # 1 when they point everywhere; without batch normalisation 0.02 on a U-Net


def test_crops_of_one_subject_are_not_negatives_of_each_other(tmp_path):
    made = Pair(SimCLRTrainer, "primus").trainer(tmp_path, batch_size=4, store=OneSubject(8, (20, 24, 22)))
    made.initialize()
    batch = first_batch(made)
    alone, some, apart = ({name: replace(view, cases=cases) for name, view in batch.items()} for cases in ((1, 3, 5, 7), (0, 1, 3, 2), (0, 2, 4, 6)))
    losses = [made.step(made.model.eval(), b)["total"].item() for b in (alone, some, apart)]
    assert losses[0] == 0 < losses[1] < losses[2]


def test_the_default_projection_has_three_layers_of_2048_at_temperature_one_half():
    config = SimCLRTrainer.Config()
    assert (config.hidden, config.temperature, config.iou) == (2048, 0.5, (0.5, 1.0))


@pytest.mark.parametrize("options, message", [({"batch_size": 1}, "compares samples and needs two"), ({"iou": (0.9, 0.5)}, "iou needs two numbers")], ids=str)
def test_what_cannot_work_is_refused_in_a_sentence(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        Pair(SimCLRTrainer, "primus").trainer(tmp_path, **options)
    assert len(str(error.value).splitlines()) <= 3
