"""Images of one visit stay registered; masks travel with their images."""

import json
import shutil

import numpy as np
import pytest

from nnssl_ext.cli import plan_and_preprocess
from nnssl_ext.io.index import Case
from nnssl_ext.preprocessing.preprocessor import load
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_raw import body_volume, write_image

SHAPE = (20, 24, 28)


def ball(radius, shape=SHAPE):
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return np.sqrt(z**2 + y**2 + x**2) < radius


def mr(radius, index, shape=SHAPE):
    return np.where(ball(radius, shape), 500 + body_volume(shape, index) % 200, 3).astype(np.int16)


def dataset(root, images, name="Dataset811_Sessions"):
    """`images`: name -> (modality, array, keyword arguments of write_image, masks by name); all of one visit."""
    folder, listed = root / name, []
    for image, (modality, array, options, masks) in images.items():
        write_image(folder / f"{image}.nii.gz", array, **options)
        for mask, values in masks.items():
            write_image(folder / f"{image}_{mask}.nii.gz", values.astype(np.uint8), **options)
        paths = {mask: f"{image}_{mask}.nii.gz" for mask in masks}
        listed.append({"name": f"{image}.nii.gz", "modality": modality, "image_path": f"{image}.nii.gz", "associated_masks": paths})
    visit = {"session_id": "v1", "images": listed}
    subjects = {"s1": {"subject_id": "s1", "sessions": {"v1": visit}}}
    (folder / "pretrain_data.json").write_text(json.dumps({"datasets": {"1": {"subjects": subjects}}}))


def preprocessed(folders, configuration="onemmiso"):
    code = plan_and_preprocess.main(["-d", "811", "-c", configuration, "-np", "1", "-gpu_memory_target", "0.5"])
    store = CaseStore(folders["nnssl_preprocessed"] / "Dataset811_Sessions" / f"nnsslPlans_{configuration}")
    return code, store, {store.info(i)["identifier"].rpartition("__")[2]: store.info(i) for i in range(len(store))}


def test_images_on_one_grid_are_cropped_alike_and_know_each_other(folders):
    images = {"t1": ("T1w", mr(0.5, 0), {}, {}), "t2": ("T2w", mr(0.7, 1), {}, {}), "ct": ("CT", body_volume(SHAPE), {"origin": (0, 0, 0)}, {})}
    dataset(folders["nnssl_raw"], images)
    code, store, info = preprocessed(folders)
    assert code == 0 and len(store) == 3
    assert info["t1"]["body_box"] == info["t2"]["body_box"] and info["t1"]["stored"] == info["t2"]["stored"]
    assert info["t1"]["registered"] == ["1__s1__v1__t2"] and info["t2"]["registered"] == ["1__s1__v1__t1"] and info["ct"]["registered"] == []
    wide = load(Case("x", "x", "1", (folders["nnssl_raw"] / "Dataset811_Sessions" / "t2.nii.gz",), ("T2w",))).box
    assert [list(edge) for edge in wide] == info["t1"]["body_box"]  # the larger body decides
    ball_t1 = store.read(store.identifiers.index("1__s1__v1__t1"))[0] > 0  # each is still normalised by its own body
    assert 0.2 < ball_t1.mean() / (store.read(store.identifiers.index("1__s1__v1__t2"))[0] > 0).mean() < 0.7


def test_a_broken_image_does_not_stop_the_others_of_its_visit(folders, capsys):
    dataset(folders["nnssl_raw"], {"t1": ("T1w", mr(0.5, 0), {}, {}), "t2": ("T2w", mr(0.7, 1), {}, {}), "t3": ("T3w", mr(0.6, 2), {}, {})})
    assert preprocessed(folders)[0] == 0
    shutil.rmtree(folders["nnssl_preprocessed"] / "Dataset811_Sessions" / "nnsslPlans_onemmiso")
    path = folders["nnssl_raw"] / "Dataset811_Sessions" / "t2.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    code, store, info = preprocessed(folders)
    assert code == 1 and sorted(info) == ["t1", "t3"] and info["t1"]["registered"] == ["1__s1__v1__t3"]
    assert "preprocessing Dataset811_Sessions onemmiso: 2 of 3 cases done, 1 failed" in capsys.readouterr().out


def test_masks_are_cropped_and_resampled_with_their_image_and_decide_what_counts(folders):
    head, face = ball(0.6), ball(0.6) & (np.arange(SHAPE[0]) < 8)[:, None, None]
    volume = mr(0.6, 0)
    volume[face] = 9000  # what was removed must not enter the statistics
    dataset(folders["nnssl_raw"], {"t1": ("T1w", volume, {}, {"anatomy_mask": head, "anonymization_mask": face})})
    code, store, info = preprocessed(folders, "3d_fullres")
    assert code == 0 and info["t1"]["masks"] == ["anatomy_mask", "anonymization_mask"]
    inside = tuple(slice(low, high) for low, high in info["t1"]["body_box"])
    assert np.array_equal(store.read_mask(0, "anatomy_mask"), head[inside]) and np.array_equal(store.read_mask(0, "anonymization_mask"), face[inside])
    counted = head & ~face
    assert info["t1"]["normalization"][0]["shift"] == pytest.approx(volume[counted].mean(), rel=1e-6)
    code, store, info = preprocessed(folders, "onemmiso")
    assert store.read_mask(0, "anatomy_mask").shape == store.shape(0)
    assert store.read_mask(0, "anatomy_mask").mean() == pytest.approx(head[inside].mean(), abs=0.02)


def test_an_empty_mask_is_a_mask_and_one_on_another_grid_is_refused(folders, capsys):
    dataset(folders["nnssl_raw"], {"t1": ("T1w", mr(0.6, 0), {}, {"anonymization_mask": np.zeros(SHAPE)})})
    assert preprocessed(folders)[0] == 0
    write_image(folders["nnssl_raw"] / "Dataset811_Sessions" / "t1_anonymization_mask.nii.gz", np.zeros(SHAPE, np.uint8), origin=(0, 0, 0))
    from nnssl_ext.cli import preprocess

    assert preprocess.main(["-d", "811", "-c", "onemmiso", "-np", "1"]) == 1
    assert "the mask isn't on the grid of its image" in capsys.readouterr().out
