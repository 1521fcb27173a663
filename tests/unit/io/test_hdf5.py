"""HDF5 files: the 3D dataset, its spacing, its defects; trees of them."""

import sys

import h5py
import numpy as np
import pytest

from nnssl_ext.core.errors import ImageError, UserError
from nnssl_ext.io.index import read_index
from nnssl_ext.io.readers import KINDS, WARNINGS, files_of, read_header, read_volume, warnings_of
from tests.make_raw import body_volume

ARRAY = body_volume((5, 6, 7))


def write(path, datasets, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


def fails(kind, path, message=""):
    with pytest.raises(ImageError) as error:
        read_volume(path)
    assert message in str(error.value) and error.value.kind == kind and kind in KINDS and kind not in WARNINGS and len(str(error.value).splitlines()) <= 3


def test_the_only_volume_is_read_with_its_geometry(tmp_path):
    direction = (0, 1, 0, 1, 0, 0, 0, 0, -1)
    path = write(tmp_path / "a.h5", {"scan/ct": ARRAY, "label": 1}, spacing=(3, 2, 1), origin=(1, 2, 3), direction=direction)
    array, geometry = read_volume(path)
    assert array.dtype == np.float32 and np.array_equal(array, ARRAY)
    assert (geometry.shape, geometry.spacing, geometry.origin, geometry.direction) == ((5, 6, 7), (3, 2, 1), (1, 2, 3), direction)
    assert read_header(path) == geometry and warnings_of(path) == [] and files_of(path) == [path]


def test_one_of_several_volumes_is_taken_by_name(tmp_path):
    path = write(tmp_path / "a.hdf5", {"image": ARRAY, "label": ARRAY * 0})
    assert np.array_equal(read_volume(path)[0], ARRAY)
    path = write(tmp_path / "b.hdf5", {"x": ARRAY, "g/y": ARRAY + 1})
    fails("ambiguous", path, "2 3D datasets")
    named = tmp_path / "b.hdf5#g/y"
    assert np.array_equal(read_volume(named)[0], ARRAY + 1) and files_of(named) == [path]
    fails("missing", tmp_path / "b.hdf5#z", "no dataset 'z'")


def test_without_spacing_1_mm_is_assumed_and_said(tmp_path):
    path = write(tmp_path / "a.h5", {"image": ARRAY})
    assert read_header(path).spacing == (1, 1, 1) and [kind for kind, _ in warnings_of(path)] == ["nospacing"]
    assert read_header(write(tmp_path / "b.h5", {"image": ARRAY}, voxel_size=0.5)).spacing == (0.5, 0.5, 0.5)


def test_defects_are_named(tmp_path):
    fails("spacing", write(tmp_path / "a.h5", {"image": ARRAY}, spacing=(1, -1, 1)))
    fails("spacing", write(tmp_path / "b.h5", {"image": ARRAY}, spacing=(1, np.nan, 1)))
    fails("spacing", write(tmp_path / "c.h5", {"image": ARRAY}, spacing=(1, 1)))
    fails("spacing", write(tmp_path / "d.h5", {"image": ARRAY}, spacing="one"))
    fails("position", write(tmp_path / "e.h5", {"image": ARRAY}, origin=(1, 1)))
    fails("shear", write(tmp_path / "f.h5", {"image": ARRAY}, direction=(1, 0.2, 0, 0, 1, 0, 0, 0, 1)))
    fails("dimensions", write(tmp_path / "g.h5", {"image": ARRAY[0], "series": ARRAY[None]}))
    fails("dimensions", write(tmp_path / "h.h5", {"text": "hello"}), "text")
    fails("format", tmp_path / "h.h5#text")
    fails("dimensions", tmp_path / "g.h5#image")
    content = write(tmp_path / "i.h5", {"image": ARRAY}).read_bytes()
    (tmp_path / "i.h5").write_bytes(content[: len(content) // 2])
    fails("truncated", tmp_path / "i.h5")
    (tmp_path / "j.h5").write_bytes(b"no such thing" * 100)
    fails("format", tmp_path / "j.h5")
    with h5py.File(tmp_path / "k.h5", "w") as file:
        file.create_dataset("image", (40000,) * 3, np.float32, chunks=(64, 64, 64))
    fails("memory", tmp_path / "k.h5")


def test_a_tree_gives_subject_session_and_modality(tmp_path, capsys):
    for patient in ("p1", "p2"):
        for visit in ("t0", "t1"):
            write(tmp_path / patient / visit / "image.hdf5", {"image": ARRAY}, modality="CT")
    (tmp_path / "p3").mkdir()
    (tmp_path / "p3" / "broken.h5").write_bytes(b"")
    cases = read_index(tmp_path, tmp_path / "cache.json")
    assert [(case.identifier, case.subject, case.session, case.modalities[0]) for case in cases] == [
        *((f"{p}__{t}__image", p, t, "CT") for p in ("p1", "p2") for t in ("t0", "t1")),
        ("p3__broken", "p3", "1", "unknown"),
    ]
    assert read_index(tmp_path, tmp_path / "cache.json") == cases
    assert "1 of 5 HDF5 files have no attribute 'modality'" in capsys.readouterr().out
    fails("empty", cases[-1].images[0])


def test_a_missing_h5py_is_named_with_its_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "p" / "a.h5", {"image": ARRAY})
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (lambda: read_volume(path), lambda: read_index(tmp_path)):
        with pytest.raises(UserError, match=r"pip install nnssl_ext\[hdf5\]"):
            call()
