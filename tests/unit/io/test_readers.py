"""Reading volumes: geometry is kept, defects are named."""

import gzip
import itertools
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnssl_ext.core.errors import UserError
from nnssl_ext.io.index import Case
from nnssl_ext.io.readers import KINDS, WARNINGS, read_case, read_header, read_volume
from tests.make_raw import body_volume, write_dicom, write_image


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_every_format_gives_the_same_array_and_geometry(ending, tmp_path):
    array = body_volume()
    read, geometry = read_volume(write_image(tmp_path / f"image{ending}", array))
    assert read.dtype == np.float32 and np.array_equal(read, array)
    assert geometry.shape == (20, 24, 28)
    assert geometry.spacing == pytest.approx((3, 2, 2)) and geometry.origin == pytest.approx((10, -20, 30))


def test_world_coordinates_equal_simpleitks_for_an_oblique_volume(tmp_path):
    image = SimpleITK.GetImageFromArray(body_volume())
    image.SetSpacing((0.7, 1.3, 2.5))
    image.SetOrigin((-5, 8, 3))
    angle = 0.4
    image.SetDirection((np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "oblique.nii.gz"))
    geometry = read_header(tmp_path / "oblique.nii.gz")
    for voxel in [(0, 0, 0), (3, 7, 11), (19, 23, 27)]:
        assert geometry.to_world(voxel) == pytest.approx(image.TransformIndexToPhysicalPoint(voxel[::-1]), abs=1e-4)


def test_all_48_orientations_are_the_same_image_in_four_formats(tmp_path):
    """Each value lies where SimpleITK puts it; only DICOM, whose slices ascend along their normal, reverses z of left-handed frames."""
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    seen = 0
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            direction, seen = np.eye(3)[list(axes)] * signs, seen + 1
            image = SimpleITK.GetImageFromArray(array)
            image.SetSpacing((0.7, 1.3, 2.5))
            image.SetOrigin((-5, 8, 3))
            image.SetDirection(direction.ravel())
            paths = [tmp_path / f"image{ending}" for ending in (".nii.gz", ".nrrd", ".mha")]
            for path in paths:
                SimpleITK.WriteImage(image, str(path))
            paths.append(write_dicom(tmp_path / f"series{seen}", array, (2.5, 1.3, 0.7), (-5, 8, 3), direction))
            for path in paths:
                read, geometry = read_volume(path)
                reverse = path.is_dir() and np.linalg.det(direction) < 0
                assert np.array_equal(read, array[::-1] if reverse else array)
                for voxel in np.ndindex(read.shape):
                    there = np.argwhere(array == read[voxel])[0]
                    assert np.abs(geometry.to_world(voxel) - image.TransformIndexToPhysicalPoint([int(n) for n in there[::-1]])).max() < 1e-4
    assert seen == 48


def fails(path, message):
    with pytest.raises(UserError) as error:
        read_volume(path)
    assert message in str(error.value)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95, 0.999])
def test_a_truncated_file_is_named(share, tmp_path):
    path = write_image(tmp_path / "image.nii.gz", body_volume())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    fails(path, "truncated")


def test_a_truncated_tail_is_not_filled_with_zeros(tmp_path):
    path = write_image(tmp_path / "image.nii.gz", body_volume())
    path.write_bytes(path.read_bytes()[:-20])
    fails(path, "truncated")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_named(value, tmp_path):
    array = body_volume().astype(np.float32)
    array[3, 4, 5:7] = value
    for ending in (".nii.gz", ".nii", ".mha", ".nrrd"):
        fails(write_image(tmp_path / f"image{ending}", array), "2 voxels that are NaN or infinite")


def test_two_dimensional_images_are_refused(tmp_path):
    fails(write_image(tmp_path / "slice.nii.gz", body_volume()[3]), "2D")
    fails(write_image(tmp_path / "thin.nii.gz", body_volume()[3:4]), "2D")


def test_series_colour_constant_empty_and_missing_files_are_refused(tmp_path):
    fails(write_image(tmp_path / "constant.nii.gz", np.full((4, 5, 6), 7, np.int16)), "constant")
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    fails(tmp_path / "empty.nii.gz", "empty")
    fails(tmp_path / "missing.nii.gz", "not found")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    fails(tmp_path / "link.nii.gz", "broken link")
    (tmp_path / "text.nii.gz").write_text("not an image")
    fails(tmp_path / "text.nii.gz", "isn't compressed")
    for ending in ("nii", "nrrd", "mha"):
        (tmp_path / f"text.{ending}").write_text("not an image")
        fails(tmp_path / f"text.{ending}", "header can't be read")
    colour = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(colour, str(tmp_path / "colour.nrrd"))
    fails(tmp_path / "colour.nrrd", "3 values per voxel")
    SimpleITK.WriteImage(SimpleITK.Image([4, 5, 6, 2], SimpleITK.sitkFloat32), str(tmp_path / "series.nii.gz"))
    fails(tmp_path / "series.nii.gz", "4D")


DIM_X, PIXDIM_X, QFORM_CODE, SFORM = 42, 80, 252, 280  # byte offsets in a NIfTI-1 header


def nifti_with(path, *fields):
    content = bytearray(gzip.decompress(write_image(path, body_volume()).read_bytes()))
    for place, form, values in fields:
        struct.pack_into(form, content, place, *values)
    path.write_bytes(gzip.compress(bytes(content)))
    return path


@pytest.mark.parametrize("spacing", [0.0, -2.0, np.nan])
def test_a_spacing_that_is_not_positive_is_refused(spacing, tmp_path, capfd):
    fails(nifti_with(tmp_path / "image.nii.gz", (PIXDIM_X, "<f", [spacing])), "is not positive")
    path = write_image(tmp_path / "image.mha", body_volume())
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 2 2 3", f"ElementSpacing = {spacing} 2 3".encode()))
    fails(path, "is not positive")
    assert capfd.readouterr().err == ""


def test_a_header_that_claims_too_many_voxels_is_refused(tmp_path):
    fails(nifti_with(tmp_path / "image.nii.gz", (DIM_X, "<3h", [100, 100, 100])), "truncated")
    fails(nifti_with(tmp_path / "image.nii.gz", (DIM_X, "<3h", [30000] * 3)), "doesn't fit into memory: 30000 x 30000 x 30000 voxels, 100,583 GiB")
    for ending, size, huge in (("nrrd", b"sizes: 28 24 20", b"sizes: 40000 40000 40000"), ("mha", b"DimSize = 28 24 20", b"DimSize = 40000 40000 40000")):
        path = write_image(tmp_path / f"image.{ending}", body_volume())
        path.write_bytes(path.read_bytes().replace(size, huge))
        fails(path, "doesn't fit into memory")


def test_a_sheared_direction_is_refused(tmp_path):
    sheared = nifti_with(tmp_path / "image.nii.gz", (QFORM_CODE, "<h", [0]), (SFORM, "<8f", [2, 0.8, 0, 0, 0, 2, 0, 0]))
    fails(sheared, "orthonormal")


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
@pytest.mark.parametrize("compressed", [True, False])
def test_other_formats_cut_short_are_refused(ending, compressed, tmp_path):
    path = tmp_path / f"image{ending}"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(body_volume()), str(path), compressed)
    path.write_bytes(path.read_bytes()[:-1000])
    fails(path, "can't be read" if compressed else "truncated")


def test_a_name_beyond_ascii_is_read(tmp_path):
    assert read_volume(write_image(tmp_path / "Bäuche 漢.nii.gz", body_volume()))[0].shape == (20, 24, 28)


def test_channels_are_stacked_and_must_share_their_grid(tmp_path):
    paths = [write_image(tmp_path / f"{i}.nii.gz", body_volume(index=i)) for i in range(2)]
    array, _ = read_case(Case("a", "a", "1", tuple(paths), ("T1", "T2")))
    assert array.shape == (2, 20, 24, 28) and np.array_equal(array[1], body_volume(index=1))
    for name, changed in [
        ("shape", write_image(tmp_path / "shape.nii.gz", body_volume((20, 24, 27)))),
        ("spacing", write_image(tmp_path / "spacing.nii.gz", body_volume(), spacing=(3, 2, 2.2))),
        ("origin", write_image(tmp_path / "origin.nii.gz", body_volume(), origin=(10, -20, 31))),
    ]:
        with pytest.raises(UserError, match=f"channels of case a differ in {name}"):
            read_case(Case("a", "a", "1", (paths[0], changed), ("T1", "T2")))


def test_every_kind_of_defect_is_documented_and_every_raised_one_has_a_sentence():
    root = Path(__file__).parents[3]
    page = (root / "documentation" / "how-to" / "own_data.md").read_text(encoding="utf-8")
    assert all(f"| `{kind}` | {sentence} |" in page for kind, sentence in KINDS.items()) and WARNINGS < set(KINDS)
    sources = [root / "nnssl_ext" / "io" / f"{name}.py" for name in ("dicom", "dicom_files", "hdf5", "itk", "nifti", "readers")]
    raised = {kind for file in sources for kind in re.findall(r'ImageError\(\s*"(\w+)"', file.read_text(encoding="utf-8"))}
    assert raised and raised <= set(KINDS) - WARNINGS
