"""A zoo of broken images: each gets its verdict, none stops the others, and no library prints its own complaint."""

import gzip
import os
import struct
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
import SimpleITK

from nnssl_ext.cli import plan_and_preprocess
from nnssl_ext.core.errors import ImageError
from nnssl_ext.io.readers import KINDS, WARNINGS, read_volume, warnings_of
from nnssl_ext.preprocessing.store import CaseStore
from tests.make_raw import body_volume, dicom_slice, write_dicom, write_image, write_multiframe

ARRAY = body_volume((12, 14, 16))
DIM, PIXDIM, DATATYPE, VOX_OFFSET, QFORM_CODE, SFORM = 40, 76, 70, 108, 252, 280  # byte offsets in a NIfTI-1 header


def written(name, array=ARRAY, **options):
    return lambda folder: write_image(folder / name, array, **options)


def cut(name, share=None, tail=0):
    """A file that ends early: after a share of its bytes, or `tail` bytes before its end."""

    def make(folder):
        path = write_image(folder / name, ARRAY)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))] if share else content[:-tail])
        return path

    return make


def patched(place, form, *values, name="image.nii.gz"):
    """A NIfTI header with other values at a byte offset."""

    def make(folder):
        path = write_image(folder / name, ARRAY)
        content = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into(form, content, place, *values)
        path.write_bytes(gzip.compress(bytes(content)))
        return path

    return make


def sheared(folder):
    path = patched(QFORM_CODE, "<h", 0)(folder)
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<8f", content, SFORM, 2, 0.8, 0, 0, 0, 2, 0, 0)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


def replaced(name, old, new):
    """A file with some bytes replaced, as often as they occur."""

    def make(folder):
        path = write_image(folder / name, ARRAY)
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        return path

    return make


def content(name, data):
    def make(folder):
        (folder / name).write_bytes(data)
        return folder / name

    return make


def with_value(value):
    array = ARRAY.astype(np.float32)
    array[3, 4, 5] = value
    return array


def flipped(folder):
    """One wrong byte in the compressed data."""
    path = write_image(folder / "image.nii.gz", ARRAY)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def colour(folder):
    path = folder / "image.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(path))
    return path


def fourth_dimension(folder):
    path = folder / "image.nii.gz"
    SimpleITK.WriteImage(SimpleITK.Image([4, 5, 6, 2], SimpleITK.sitkFloat32), str(path))
    return path


def complex_numbers(folder):
    path = folder / "image.nii.gz"
    SimpleITK.WriteImage(SimpleITK.Image([4, 5, 6], SimpleITK.sitkComplexFloat32), str(path))
    return path


def broken_link(folder):
    (folder / "image.nii.gz").symlink_to(folder / "nowhere.nii.gz")
    return folder / "image.nii.gz"


def no_permission(folder):
    path = write_image(folder / "image.nii.gz", ARRAY)
    path.chmod(0)
    return path


def without_voxels(name, data):
    """A header whose voxels lie in another file, which is gone."""

    def make(folder):
        path = write_image(folder / name, ARRAY)
        (folder / data).unlink()
        return path

    return make


def short_voxels(folder):
    path = write_image(folder / "image.mhd", ARRAY)
    (folder / "image.raw").write_bytes(ARRAY.tobytes()[:-100])
    return path


def series(**tags):
    return lambda folder: write_dicom(folder / "series", ARRAY, **tags)


def two_series(folder):
    write_dicom(folder, ARRAY, series="1.2.3.1")
    return write_dicom(folder, ARRAY, series="1.2.3.2")


def changed_slice(change):
    """A series whose sixth file is changed."""

    def make(folder):
        file = write_dicom(folder / "series", ARRAY) / "1_0005.dcm"
        file.write_bytes(change(file.read_bytes()))
        return file.parent

    return make


def other_size(folder):
    path = write_dicom(folder / "series", ARRAY)
    extra = dicom_slice(ARRAY[0, :5], 99, ImagePositionPatient=[10, -20, 30 + 3 * len(ARRAY)], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[2, 2])
    extra.save_as(path / "z.dcm", enforce_file_format=True)
    return path


def other_syntax(name, **tags):
    """Plain numbers in files that claim to be compressed."""

    def make(folder):
        path = write_dicom(folder / "series", ARRAY, **tags)
        for file in path.iterdir():
            file.write_bytes(file.read_bytes().replace(b"1.2.840.10008.1.2.1\0", name))
        return path

    return make


def packed_as_plain(folder):
    path = not_decodable(folder)
    for file in path.iterdir():
        file.write_bytes(file.read_bytes().replace(b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.1\0\0\0"))
    return path


def text_as_spacing(folder):
    path = write_dicom(folder / "series", ARRAY)
    for file in path.iterdir():
        file.write_bytes(file.read_bytes().replace(b"2.0\\2.0", b"two\\two"))
    return path


def not_decodable(folder):
    path = write_dicom(folder / "series", ARRAY)
    for file in path.iterdir():
        image = pydicom.dcmread(file)
        image.PixelData = pydicom.encaps.encapsulate([b"no picture at all, but some bytes"])
        image["PixelData"].is_undefined_length = True
        image.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
        image.save_as(file)
    return path


def multiframe_without_positions(folder):
    dicom_slice(ARRAY, ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[2, 2]).save_as(folder / "a.dcm", enforce_file_format=True)
    return folder / "a.dcm"


def hdf5(datasets, **attributes):
    def make(folder):
        with h5py.File(folder / "image.h5", "w") as file:
            for name, values in datasets.items():
                file[name] = values
            file.attrs.update(attributes)
        return folder / "image.h5"

    return make


def cut_hdf5(folder):
    path = hdf5({"image": ARRAY})(folder)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def empty_folder(folder):
    (folder / "image.nii.gz").mkdir()
    return folder / "image.nii.gz"


STEP = 3.0
BROKEN = [
    ("gz cut within the header", cut("image.nii.gz", share=0.01), "truncated"),
    ("gz cut in the middle", cut("image.nii.gz", share=0.5), "truncated"),
    ("gz cut in its last bytes", cut("image.nii.gz", tail=4), "truncated"),
    ("plain NIfTI cut", cut("image.nii", share=0.7), "truncated"),
    ("plain NIfTI cut within the header", cut("image.nii", share=0.02), "damaged"),
    ("nrrd cut", cut("image.nrrd", share=0.7), "truncated"),
    ("mha cut", cut("image.mha", share=0.7), "truncated"),
    ("gz with a wrong byte", flipped, "damaged"),
    ("empty file", content("image.nii.gz", b""), "empty"),
    ("text named nii.gz", content("image.nii.gz", b"this is no image"), "format"),
    ("gz of garbage", content("image.nii.gz", gzip.compress(bytes(range(256)) * 20)), "format"),
    ("gz of nothing", content("image.nii.gz", gzip.compress(b"")), "damaged"),
    ("text named nrrd", content("image.nrrd", b"this is no image"), "format"),
    ("picture named mha", content("image.mha", b"\x89PNG\r\n\x1a\n" + bytes(100)), "damaged"),
    ("web page instead of a download", content("image.nii", b"<!DOCTYPE html><html>not found</html>" * 20), "format"),
    ("missing file", lambda folder: folder / "image.nii.gz", "missing"),
    ("missing folder", lambda folder: folder / "none" / "image.nii.gz", "missing"),
    ("broken link", broken_link, "missing"),
    ("folder named nii.gz", empty_folder, "format"),
    ("no permission", no_permission, "permission"),
    ("more voxels in the header than in the file", patched(DIM, "<4h", 3, 16, 14, 90), "truncated"),
    ("huge NIfTI header", patched(DIM, "<4h", 3, 32000, 32000, 32000), "memory"),
    ("huge nrrd header", replaced("image.nrrd", b"sizes: 16 14 12", b"sizes: 40000 40000 40000"), "memory"),
    ("huge mha header", replaced("image.mha", b"DimSize = 16 14 12", b"DimSize = 40000 40000 40000"), "memory"),
    ("negative size", patched(DIM, "<4h", 3, -16, 14, 12), "damaged"),
    ("no such number of dimensions", patched(DIM, "<h", 11), "damaged"),
    ("unknown number type", patched(DATATYPE, "<h", 777), "damaged"),
    ("unknown element type", replaced("image.mha", b"ElementType = MET_SHORT", b"ElementType = MET_WRONG"), "damaged"),
    ("voxels begin behind the end", patched(VOX_OFFSET, "<f", 1e7), "truncated"),
    ("NaN", written("image.nii.gz", with_value(np.nan)), "nonfinite"),
    ("infinity", written("image.mha", with_value(np.inf)), "nonfinite"),
    ("constant", written("image.nii.gz", np.full((4, 5, 6), 7, np.int16)), "constant"),
    ("2D", written("image.nii.gz", ARRAY[0]), "dimensions"),
    ("a single slice", written("image.nii.gz", ARRAY[:1]), "dimensions"),
    ("4D", fourth_dimension, "dimensions"),
    ("colour", colour, "colour"),
    ("complex numbers", complex_numbers, "colour"),
    ("zero spacing", patched(PIXDIM + 4, "<f", 0.0), "spacing"),
    ("negative spacing", patched(PIXDIM + 4, "<f", -2.0), "spacing"),
    ("NaN spacing", patched(PIXDIM + 12, "<f", np.nan), "spacing"),
    ("zero spacing in mha", replaced("image.mha", b"ElementSpacing = 2 2 3", b"ElementSpacing = 0 2 3"), "spacing"),
    ("sheared axes", sheared, "shear"),
    ("mhd without its raw file", without_voxels("image.mhd", "image.raw"), "missing"),
    ("nhdr without its raw file", without_voxels("image.nhdr", "image.raw"), "missing"),
    ("mhd with a short raw file", short_voxels, "truncated"),
    ("DICOM: two series in a folder", two_series, "mixed"),
    ("DICOM: series that is not there", lambda folder: Path(f"{series()(folder)}#1.2.9"), "missing"),
    ("DICOM: missing slice", series(leave_out=[4]), "gap"),
    ("DICOM: two slice distances", series(ImagePositionPatient=lambda k: [0, 0, STEP * k + max(0, k - 6)]), "gap"),
    ("DICOM: two slices at one place", series(ImagePositionPatient=lambda k: [0, 0, STEP * min(k, 10)]), "duplicate"),
    ("DICOM: two times in a series", series(ImagePositionPatient=lambda k: [0, 0, STEP * (k % 6)]), "dimensions"),
    ("DICOM: gantry tilt", series(ImagePositionPatient=lambda k: [0, k, STEP * k]), "gantry"),
    ("DICOM: one slice aside", series(ImagePositionPatient=lambda k: [0, 9 * (k == 4), STEP * k]), "varying"),
    ("DICOM: slices of two sizes", other_size, "varying"),
    ("DICOM: slices of two orientations", series(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, -1]), "varying"),
    ("DICOM: two pixel spacings", series(PixelSpacing=lambda k: [2, 2] if k else [1, 1]), "varying"),
    ("DICOM: no pixel spacing", series(PixelSpacing=None), "spacing"),
    ("DICOM: pixel spacing is text", text_as_spacing, "spacing"),
    ("DICOM: zero pixel spacing", series(PixelSpacing=[0, 0]), "spacing"),
    ("DICOM: no position", series(ImagePositionPatient=None), "position"),
    ("DICOM: no orientation", series(ImageOrientationPatient=None), "position"),
    ("DICOM: axes not at right angles", series(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]), "shear"),
    ("DICOM: no pixel data", series(PixelData=None), "pixels"),
    ("DICOM: too few bytes of pixels", series(PixelData=lambda k: bytes(100)), "truncated"),
    ("DICOM: cut within the pixels", changed_slice(lambda data: data[:-50]), "truncated"),
    ("DICOM: cut within the header", changed_slice(lambda data: data[:200]), "damaged"),
    ("DICOM: an empty slice", changed_slice(lambda data: b""), "empty"),
    ("DICOM: a slice of garbage", changed_slice(lambda data: bytes(range(256)) * 3), "damaged"),
    ("DICOM: a slice of zeros", changed_slice(lambda data: bytes(len(data))), "damaged"),
    ("DICOM: wrong transfer syntax", other_syntax(b"1.2.840.10008.1.2.5\0"), "compression"),
    ("DICOM: unknown transfer syntax", other_syntax(b"1.2.840.99999.1.2.1\0"), "compression"),
    ("DICOM: compressed pixels that claim to be plain", packed_as_plain, "compression"),
    ("DICOM: big endian claimed", other_syntax(b"1.2.840.10008.1.2.2\0"), "damaged"),
    ("DICOM: pixels that can't be decompressed", not_decodable, "compression"),
    ("DICOM: colour", series(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "colour"),
    ("DICOM: a segmentation", series(Modality="SEG"), "notimage"),
    ("DICOM: a report", series(Modality="SR", Rows=None, Columns=None, PixelData=None), "notimage"),
    ("DICOM: a single slice", lambda folder: write_dicom(folder / "series", ARRAY[:1]), "dimensions"),
    ("DICOM: constant", series(PixelData=bytes(2 * 14 * 16)), "constant"),
    ("DICOM: rescaled to infinity", series(RescaleSlope=1e300), "nonfinite"),
    ("DICOM: frames without positions", multiframe_without_positions, "multiframe"),
    ("DICOM: a billion frames", series(NumberOfFrames=10**9), "damaged"),
    ("HDF5: cut", cut_hdf5, "truncated"),
    ("HDF5: text", content("image.h5", b"this is no image"), "format"),
    ("HDF5: no 3D dataset", hdf5({"image": ARRAY[0]}), "dimensions"),
    ("HDF5: only text inside", hdf5({"image": "hello"}), "dimensions"),
    ("HDF5: two candidates", hdf5({"x": ARRAY, "y": ARRAY}), "ambiguous"),
    ("HDF5: dataset that is not there", lambda folder: Path(f"{hdf5({'x': ARRAY})(folder)}#y"), "missing"),
    ("HDF5: negative spacing", hdf5({"image": ARRAY}, spacing=(1, -1, 1)), "spacing"),
    ("HDF5: NaN", hdf5({"image": with_value(np.nan)}), "nonfinite"),
]
VALID = [
    ("unicode name", written("Bäuche 漢字.nii.gz")),
    ("name with a hash sign", written("image #2.nii.gz")),
    ("DICOM series", series()),
    ("DICOM series of a mixed folder", lambda folder: Path(f"{two_series(folder)}#1.2.3.2")),
    ("multi-frame DICOM", lambda folder: write_multiframe(folder / "a.dcm", ARRAY)),
    ("HDF5", hdf5({"image": ARRAY}, spacing=(3, 2, 2))),
    ("capital letters in the ending", written("IMAGE.NRRD")),
]
AS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def animals():
    return [pytest.param(make, kind, id=name, marks=[AS_ROOT] if kind == "permission" else []) for name, make, kind in BROKEN]


def test_the_zoo_is_large_and_its_kinds_are_known():
    assert len(BROKEN) >= 40 and len({name for name, _, _ in BROKEN}) == len(BROKEN)
    assert {kind for _, _, kind in BROKEN} == set(KINDS) - WARNINGS - {"mismatch", "unreadable"}


@pytest.mark.parametrize("make, kind", animals())
def test_a_broken_image_gets_its_verdict(make, kind, tmp_path, capfd):
    path = make(tmp_path)
    with pytest.raises(ImageError) as error:
        read_volume(path)
    assert error.value.kind == kind, str(error.value)
    assert len(str(error.value).splitlines()) <= 3 and str(tmp_path) in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in VALID])
def test_an_unusual_but_valid_image_is_read(make, tmp_path, capfd):
    path = make(tmp_path)
    assert np.array_equal(read_volume(path)[0], ARRAY) and warnings_of(path) == []
    assert capfd.readouterr() == ("", "")


def test_one_dataset_of_all_of_them_is_preprocessed_but_for_the_broken_ones(folders, capfd):
    raw = folders["nnssl_raw"] / "Dataset840_Zoo"
    zoo = {name: make for name, make, kind in BROKEN if kind != "permission"} | dict(VALID[:3])
    lines = ["image\tidentifier\tmodality"]
    for number, make in enumerate(zoo.values()):
        (raw / f"{number}").mkdir(parents=True)
        lines.append(f"{make(raw / str(number)).relative_to(raw)}\tcase{number:03d}\tCT")
    (raw / "cases.csv").write_text("\n".join(lines), encoding="utf-8")
    assert plan_and_preprocess.main(["-d", "840", "-gpu_memory_target", "0.5", "-np", "1"]) == 1
    done = [f"case{number:03d}" for number, name in enumerate(zoo) if name in dict(VALID)]
    store = CaseStore(folders["nnssl_preprocessed"] / raw.name / "nnsslPlans_3d_fullres")
    assert list(store.identifiers) == done and len(done) == 3
    out, err = capfd.readouterr()
    for number, name in enumerate(zoo):
        assert (f"failed: case{number:03d}: " in out) == (name not in dict(VALID)), name
    assert err == "" and "unexpected" not in out
