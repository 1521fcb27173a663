"""Clusters of a dataset's voxels: what they are fitted to, what they say of a voxel, and what is written."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from nnssl_ext.cli.cluster import UPSAMPLING
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.geometry import Geometry
from nnssl_ext.evaluation import clusters
from nnssl_ext.evaluation.clusters import ClusterModel, assign, body_voxels, cluster, features_of, fit, upsampler_of
from nnssl_ext.evaluation.features import Extractor
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.preprocessing.clusters import FOLDER, MODEL
from nnssl_ext.preprocessing.store import CaseStore, pack_body, write_case

SHAPES, PATCH = ((20, 24, 22), (17, 24, 30), (24, 24, 24), (8, 8, 8)), (8, 8, 16)


class Moments(Backbone):
    """Mean of each cell, of its square and of its sine."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.strides, self.widths, self.patch_size, self.channels = ((2, 4, 2),), (3,), PATCH, 1

    def pyramid(self, x):
        return [torch.cat([F.avg_pool3d(y, self.strides[0]) for y in (x, x**2, torch.sin(3 * x))], 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four cases: in a body of noise, of two thirds of the volume, a bright box; the last case has no body."""
    folder = tmp_path_factory.mktemp("data") / "Dataset801_Test" / "nnsslPlans_3d_fullres"
    for case, shape in enumerate(SHAPES):
        array = np.random.default_rng(case).normal(scale=0.2, size=(1, *shape)).astype(np.float32)
        array[0, 4:12, 4:12, 4:12] += 4
        body = np.zeros(shape, bool)
        body[:, : 16 if case < 3 else 0] = True
        info = {"subject": f"s{case}", "stored": Geometry(shape, (1.0, 2.0, 1.5)).as_dict(), "fill": [0.0], "body": pack_body(body, shape)}
        write_case(folder, f"case{case}", array, info, PATCH)
    return folder


@pytest.fixture
def store(folder):
    return CaseStore(folder)


@pytest.fixture
def extractor():
    return Extractor(Moments())


def drawn(monkeypatch, store, extractor, **options):
    """A model, and the features of the voxels that it was fitted to, by case."""
    kept = {}

    def keeping(numbered, store, extractor, upsampling, seed, folder, original=clusters._keep):
        original(numbered, store, extractor, upsampling, seed, folder)
        kept[numbered[0]] = np.load(folder / f"{numbered[0]}.npy")

    monkeypatch.setattr(clusters, "_keep", keeping)
    return fit(store, extractor, "identity", **options), kept


def test_voxels_are_drawn_evenly_over_the_bodies_of_all_cases_each_once_at_most(store, extractor, monkeypatch):
    bodies = [int(body_voxels(store, case).sum()) for case in range(4)]
    assert bodies == [20 * 16 * 22, 17 * 16 * 30, 24 * 16 * 24, 0]
    monkeypatch.setattr(clusters, "VOXELS", 3000)
    model, kept = drawn(monkeypatch, store, extractor, classes=3)
    assert sum(map(len, kept.values())) == model.settings["voxels"] == 3000 and sorted(kept) == [0, 1, 2]
    for case, values in kept.items():
        assert abs(len(values) - 3000 * bodies[case] / sum(bodies)) <= 1
        volume, found = features_of(store, case, extractor)
        inside = np.flatnonzero(body_voxels(store, case))
        every = upsampler_of("trilinear", found, volume)(torch.from_numpy(found.values), torch.from_numpy(inside)).T.numpy()
        rows = {row.tobytes() for row in every}
        assert {row.tobytes() for row in values} <= rows and len({row.tobytes() for row in values}) > 0.9 * len(values)
    assert len(drawn(monkeypatch, store, extractor, classes=3)[1][0]) == len(kept[0])


def test_all_voxels_are_drawn_where_there_are_few(store, extractor, monkeypatch):
    monkeypatch.setattr(clusters, "_AT_ONCE", 1000)
    model, kept = drawn(monkeypatch, store, extractor, classes=2)
    assert [len(kept[case]) for case in range(3)] == [int(body_voxels(store, case).sum()) for case in range(3)]
    for case, values in kept.items():
        volume, found = features_of(store, case, extractor)
        every = upsampler_of("trilinear", found, volume)(torch.from_numpy(found.values), torch.arange(volume[0].size)).T.numpy()
        np.testing.assert_array_equal(values, every[body_voxels(store, case).ravel()])


def test_components_and_inertia_are_those_of_scikit_learn(store, extractor, monkeypatch):
    monkeypatch.setattr(clusters, "VOXELS", 4000)
    model, kept = drawn(monkeypatch, store, extractor, classes=4)
    points = np.concatenate(list(kept.values()))
    theirs = PCA(3).fit(points)
    np.testing.assert_allclose(np.abs(theirs.components_ @ model.components.directions), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(model.components.explained, theirs.explained_variance_ratio_, rtol=1e-4, atol=1e-6)
    inertia = model.settings["variance"] * len(points)
    assert inertia == pytest.approx(KMeans(4, init=model.centres, n_init=1).fit(model.components.project(points.T).T).inertia_, rel=1e-3)
    assert inertia <= 1.02 * KMeans(4, n_init=10, random_state=0).fit(theirs.transform(points)).inertia_


def test_separable_blobs_are_found_the_largest_first():
    rng = np.random.default_rng(1)
    middles = 20 * np.concatenate((np.eye(5), -np.eye(5)))[:6]
    labels = rng.permutation(np.repeat(np.arange(6), 50 * np.arange(1, 7)))
    points = (middles[labels] + rng.normal(size=(len(labels), 5))).astype(np.float32)
    centres, counts, inertia = cluster(points, 6, 0)
    means = np.stack([points[labels == k].mean(0) for k in range(5, -1, -1)])
    np.testing.assert_allclose(centres, means, atol=0.05)
    assert counts.tolist() == [300, 250, 200, 150, 100, 50]
    assert inertia == pytest.approx(sum(((points[labels == k] - means[5 - k]) ** 2).sum() for k in range(6)), rel=1e-2)


@pytest.mark.parametrize("upsampling", UPSAMPLING)
def test_the_model_does_not_depend_on_the_order_of_the_cases_and_depends_on_every_setting(store, extractor, monkeypatch, upsampling):
    monkeypatch.setattr(clusters, "VOXELS", 2000)
    one = fit(store, extractor, "identity", upsampling=upsampling)
    with monkeypatch.context() as patch:
        patch.setattr(clusters, "run_all", lambda function, items, *rest, original=clusters.run_all: original(function, items[::-1], rest[0][::-1], *rest[1:]))
        backwards = fit(store, extractor, "identity", upsampling=upsampling)
    assert one.identity == backwards.identity and np.array_equal(one.centres, backwards.centres)
    others = [{"seed": 1}, {"classes": 9}, {"upsampling": next(name for name in UPSAMPLING if name != upsampling)}]
    models = [one, *(fit(store, extractor, "identity", **{"upsampling": upsampling, **other}) for other in others), fit(store, extractor, "other")]
    models.append(fit(store, Extractor(Moments(), overlap=0.25), "identity", upsampling=upsampling))
    assert len({model.identity for model in models}) == 6


@pytest.mark.parametrize("upsampling", UPSAMPLING)
def test_a_voxel_belongs_to_the_centre_that_is_nearest_to_its_own_features(store, extractor, monkeypatch, upsampling):
    model = fit(store, extractor, "identity", 5, upsampling)
    volume, found = features_of(store, 1, extractor)
    labels = model.labels(found, volume, body_voxels(store, 1))
    features = upsampler_of(upsampling, found, volume)(torch.from_numpy(found.values), torch.arange(volume[0].size)).T.numpy().astype(np.float64)
    apart = ((((features - model.components.mean) @ model.components.directions)[:, None] - model.centres) ** 2).sum(2)
    sure = np.diff(np.sort(apart, 1)[:, :2], axis=1)[:, 0] > 1e-4  # not between two centres
    inside = body_voxels(store, 1).ravel()
    assert sure.mean() > 0.99 and set(labels.ravel()[inside]) == {1, 2, 3, 4, 5} and not labels.ravel()[~inside].any()
    assert np.array_equal(labels.ravel()[inside & sure], 1 + apart.argmin(1)[inside & sure])
    monkeypatch.setattr(clusters, "_AT_ONCE", 77)
    assert np.array_equal(model.labels(found, volume, body_voxels(store, 1)), labels)


def test_a_structure_that_differs_from_the_rest_becomes_a_cluster(store, extractor):
    model = fit(store, extractor, "identity", 2, "bilateral")
    for case in range(3):
        volume, found = features_of(store, case, extractor)
        labels, body = model.labels(found, volume, body_voxels(store, case)), body_voxels(store, case)
        assert np.mean((labels == 2)[body] == (volume[0] > 2)[body]) > 0.97
    assert model.settings["shares"][0] > model.settings["shares"][1] > 0.04  # the larger one is the first


def test_a_model_is_read_as_it_was_written_and_a_changed_one_is_refused(store, extractor, tmp_path):
    model = fit(store, extractor, "identity", 3)
    model.save(tmp_path / MODEL, tmp_path / "c.pth")
    again, path = ClusterModel.load(tmp_path / MODEL)
    assert path == tmp_path / "c.pth" and again.identity == model.identity and again.settings == model.settings
    with np.load(tmp_path / MODEL, allow_pickle=False) as content:
        arrays = dict(content)
    for name in ("centres", "directions", "settings"):
        changed = {**arrays, name: np.array(str(arrays[name]).replace("trilinear", "bilateral")) if name == "settings" else arrays[name] + 1e-3}
        np.savez(tmp_path / "other.npz", **changed)
        with pytest.raises(UserError, match="hash differs"):
            ClusterModel.load(tmp_path / "other.npz")
    np.savez(tmp_path / "other.npz", **{name: array for name, array in arrays.items() if name != "mean"})
    with pytest.raises(UserError, match="the cluster model is damaged"):
        ClusterModel.load(tmp_path / "other.npz")


# Labels of all cases


@pytest.fixture
def assigned(store, extractor, tmp_path):
    """What assigns the labels, with a fitted model; returns messages of cases that failed."""
    model = fit(store, extractor, "identity", 3)
    model.save(tmp_path / MODEL, tmp_path / "c.pth")

    def run(model=model):
        return assign(store, model, extractor, tmp_path, PATCH)

    run.model = model
    return run


def stamps(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("case*")}


def test_every_case_gets_its_labels_and_a_picture(store, extractor, assigned, tmp_path):
    assert assigned() == {}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([MODEL, *(f"case{i}.{end}" for i in range(4) for end in ("b2nd", "json", "png"))])
    (store.folder / FOLDER).symlink_to(tmp_path)
    try:
        labels = store.clusters()
        for case in range(4):
            volume, found = features_of(store, case, extractor)
            expected = assigned.model.labels(found, volume, body_voxels(store, case))
            assert np.array_equal(labels.read(case, tuple((0, n) for n in SHAPES[case]))[0], expected)
            assert expected.any() == (case < 3)  # nothing is known where there is no body
            with Image.open(tmp_path / f"case{case}.png") as image:
                assert image.width > 400
    finally:
        (store.folder / FOLDER).unlink()


def test_what_is_there_stays_and_what_is_missing_damaged_or_of_other_clusters_is_made_again(store, extractor, assigned, tmp_path):
    assigned()
    before = stamps(tmp_path)
    assert assigned() == {} and stamps(tmp_path) == before
    (tmp_path / "case0.b2nd").unlink()
    (tmp_path / "case1.b2nd").write_bytes((tmp_path / "case2.b2nd").read_bytes())
    (tmp_path / "case3.json").unlink()
    assigned()
    now = stamps(tmp_path)
    assert {name for name in now if now[name] != before[name]} == {f"case{i}.{end}" for i in (0, 1, 3) for end in ("b2nd", "json", "png")}
    assigned(fit(store, extractor, "identity", 3, seed=1))
    assert all(now[name] != stamp for name, stamp in stamps(tmp_path).items())


def test_a_case_that_fails_is_named_and_the_others_are_done(store, assigned, tmp_path, monkeypatch):
    def failing(case, original=store.verify):
        if case == 1:
            raise UserError("a stored case is damaged", "case1")
        original(case)

    monkeypatch.setattr(store, "verify", failing)
    assert list(assigned()) == ["case1"] and {file.stem for file in tmp_path.glob("*.json")} == {"case0", "case2", "case3"}


# What can't be fitted


def refused(message, *arguments, **options):
    with pytest.raises(UserError, match=message) as error:
        fit(*arguments, **options)
    assert len(str(error.value).splitlines()) == 3


def test_a_damaged_case_other_channels_and_bodies_without_enough_voxels_are_refused(store, extractor, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "verify", lambda case: (_ for _ in ()).throw(UserError("damaged", "there", "mend it")))
        refused("3 of 4 cases failed", store, extractor, "identity")
    with monkeypatch.context() as patch:
        patch.setattr(store, "fill", lambda case: [0.0, 0.0])
        refused("the cases have 2 channel", store, extractor, "identity")
    with monkeypatch.context() as patch:
        patch.setattr(store, "body", lambda case: np.zeros([-(-n // 8) for n in SHAPES[case]], bool))
        refused("have 0 voxels, too few for 10 clusters", store, extractor, "identity")
    with monkeypatch.context() as patch:
        patch.setattr(Moments, "pyramid", lambda self, x: [torch.full((1, 3, 4, 2, 8), 1.0)])
        refused("the features fall into 1 clusters, not into 10", store, extractor, "identity")
        patch.setattr(Moments, "pyramid", lambda self, x: [torch.full((1, 3, 4, 2, 8), float("nan"))])
        refused("3 of 4 cases failed", store, extractor, "identity")
