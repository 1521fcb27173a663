"""DICOM series: the grid comes from the positions of the slices, defects are named."""

import numpy as np
import pydicom
import pytest
import SimpleITK

from nnssl_ext.core.errors import ImageError
from nnssl_ext.io.readers import KINDS, WARNINGS, files_of, read_header, read_volume, warnings_of
from tests.make_raw import ENHANCED_MR, body_volume, dicom_slice, write_dicom, write_multiframe

ARRAY = body_volume((6, 7, 8))


def fails(kind, path, message=""):
    with pytest.raises(ImageError) as error:
        read_volume(path)
    assert error.value.kind == kind and kind in KINDS and kind not in WARNINGS
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_a_series_gives_the_array_and_geometry_that_simpleitk_gives(tmp_path):
    angle = 0.3
    oblique = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    folder = write_dicom(tmp_path / "series", ARRAY, (3, 1.25, 0.7), (5, -6, 7), oblique)
    array, geometry = read_volume(folder)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    assert array.dtype == np.float32 and np.array_equal(array, SimpleITK.GetArrayFromImage(image)) and np.array_equal(array, ARRAY)
    assert geometry == read_header(folder) and geometry.spacing == pytest.approx((3, 1.25, 0.7))
    for voxel in [(0, 0, 0), (5, 6, 7), (2, 3, 1)]:
        assert geometry.to_world(voxel) == pytest.approx(image.TransformIndexToPhysicalPoint(voxel[::-1]), abs=1e-4)


def test_slices_are_ordered_by_position_whatever_their_names_and_numbers(tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY, InstanceNumber=lambda k: (5 * k) % 6, direction=np.diag([1, 1, -1]))
    array, geometry = read_volume(folder)
    assert np.array_equal(array, ARRAY[::-1]) and geometry.origin == pytest.approx((10, -20, 15))


def test_numbers_are_rescaled_slice_by_slice(tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY, Modality="PT", RescaleSlope=lambda k: 1 + 0.5 * k, RescaleIntercept=lambda k: -k)
    expected = np.stack([plane * (1 + 0.5 * k) - k for k, plane in enumerate(ARRAY)])
    assert np.array_equal(read_volume(folder)[0], expected.astype(np.float32))
    assert [kind for kind, _ in warnings_of(folder)] == ["slope"]


def test_one_series_of_a_mixed_folder_is_chosen_by_its_uid(tmp_path):
    write_dicom(tmp_path, ARRAY, series="1.2.3.1")
    write_dicom(tmp_path, ARRAY + 1, series="1.2.3.2")
    fails("mixed", tmp_path, "2 DICOM series")
    path = tmp_path.parent / f"{tmp_path.name}#1.2.3.2"
    assert np.array_equal(read_volume(path)[0], ARRAY + 1)
    assert [file.name for file in files_of(path)] == [f"2_{k:04d}.dcm" for k in range(6)] and len(files_of(tmp_path)) == 12
    fails("missing", tmp_path.parent / f"{tmp_path.name}#1.2.3.9", "no DICOM series 1.2.3.9")


def test_reports_and_other_files_beside_a_series_do_no_harm(tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY)
    dicom_slice(ARRAY[0], series="1.2.3.7", Modality="SR", PixelData=None, Rows=None).save_as(folder / "report.dcm", enforce_file_format=True)
    (folder / "notes.txt").write_text("nothing")
    assert np.array_equal(read_volume(folder)[0], ARRAY)


def test_missing_slices_and_uneven_distances_are_a_gap(tmp_path):
    fails("gap", write_dicom(tmp_path / "missing", ARRAY, leave_out=[3]), "6 mm behind slice 3 of 5, 3 mm elsewhere")
    uneven = write_dicom(tmp_path / "uneven", ARRAY, ImagePositionPatient=lambda k: [0, 0, 3 * k + (k == 2) * 0.5])
    fails("gap", uneven, "unevenly spaced")
    growing = write_dicom(tmp_path / "growing", body_volume((60, 5, 5)), ImagePositionPatient=lambda k: [0, 0, 3 * k * (1 + 0.0012 * k)])
    fails("gap", growing, "changes")


def test_rounded_positions_are_read_with_a_warning(tmp_path):
    folder = write_dicom(tmp_path / "rounded", ARRAY, ImagePositionPatient=lambda k: [0, 0, round(0.625 * k, 1)])
    array, geometry = read_volume(folder)
    assert np.array_equal(array, ARRAY) and geometry.spacing[0] == pytest.approx(0.62)
    assert [kind for kind, _ in warnings_of(folder)] == ["irregular"]
    assert warnings_of(write_dicom(tmp_path / "regular", ARRAY)) == []


def test_slices_at_one_place_are_duplicates_or_a_fourth_dimension(tmp_path):
    fails("duplicate", write_dicom(tmp_path / "one", ARRAY, ImagePositionPatient=lambda k: [0, 0, 3 * min(k, 4)]), "1 slices")
    fails("dimensions", write_dicom(tmp_path / "times", ARRAY, ImagePositionPatient=lambda k: [0, 0, 3 * (k // 2)]), "2 images at each of 3 places")
    fails("dimensions", write_dicom(tmp_path / "still", ARRAY, ImagePositionPatient=[0, 0, 3]), "6 images at each of 1 places")


def test_a_file_that_is_there_twice_counts_once(tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY)
    (folder / "copy (1).dcm").write_bytes((folder / "1_0002.dcm").read_bytes())
    assert np.array_equal(read_volume(folder)[0], ARRAY)
    assert [kind for kind, _ in warnings_of(folder)] == ["copies"]


def test_slices_that_all_bear_one_instance_uid_are_no_copies(tmp_path):
    assert np.array_equal(read_volume(write_dicom(tmp_path / "series", ARRAY, SOPInstanceUID="1.2"))[0], ARRAY)


def test_tilted_stacks_are_named_with_their_angle(tmp_path):
    tilted = write_dicom(tmp_path / "tilt", ARRAY, ImagePositionPatient=lambda k: [0, 3 * k * np.tan(np.radians(15)), 3 * k])
    fails("gantry", tilted, "15.0 degrees")
    beside = write_dicom(tmp_path / "beside", ARRAY, ImagePositionPatient=lambda k: [0, 5 * (k == 3), 3 * k])
    fails("varying", beside, "slice 4 of 6 is 5 mm beside")


def test_slices_that_differ_are_named(tmp_path):
    folder = write_dicom(tmp_path / "size", ARRAY)
    dicom_slice(ARRAY[0, :5], 9, ImagePositionPatient=[10, -20, 48], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[2, 2]).save_as(
        folder / "z.dcm", enforce_file_format=True
    )
    fails("varying", folder, "differ in size: (7, 8) and (5, 8)")
    fails("varying", write_dicom(tmp_path / "turned", ARRAY, ImageOrientationPatient=lambda k: [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, 1]), "orientation")
    fails("varying", write_dicom(tmp_path / "zoomed", ARRAY, PixelSpacing=lambda k: [2, 2] if k else [2, 2.1]), "pixel spacing")


def test_headers_without_geometry_are_named(tmp_path):
    fails("spacing", write_dicom(tmp_path / "a", ARRAY, PixelSpacing=None), "no pixel spacing")
    fails("spacing", write_dicom(tmp_path / "b", ARRAY, PixelSpacing=[0, 1]), "not positive")
    fails("position", write_dicom(tmp_path / "c", ARRAY, ImagePositionPatient=None))
    fails("position", write_dicom(tmp_path / "d", ARRAY, ImageOrientationPatient=None))
    fails("shear", write_dicom(tmp_path / "e", ARRAY, ImageOrientationPatient=[1, 0, 0, 0.5, 0.8, 0]), "not orthonormal")
    fails("dimensions", write_dicom(tmp_path / "f", ARRAY[:1]), "2D")


def test_pixels_that_are_missing_cut_or_in_colour_are_named(tmp_path):
    fails("pixels", write_dicom(tmp_path / "a", ARRAY, PixelData=lambda k: None if k == 2 else ARRAY[k].tobytes()), "0002.dcm")
    fails("truncated", write_dicom(tmp_path / "b", ARRAY, PixelData=lambda k: ARRAY[k].tobytes()[: 100 if k == 2 else 112]), "100 bytes")
    file = write_dicom(tmp_path / "c", ARRAY) / "1_0003.dcm"
    file.write_bytes(file.read_bytes()[:-10])
    fails("truncated", file.parent)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ImageError):
        read_volume(file.parent)
    file.write_bytes(b"")
    fails("empty", file.parent)
    fails("colour", write_dicom(tmp_path / "d", ARRAY, SamplesPerPixel=3, PhotometricInterpretation="RGB"))


def test_a_slice_that_is_a_broken_link_is_missing(tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY)
    (folder / "1_0005.dcm").unlink()
    (folder / "1_0005.dcm").symlink_to(tmp_path / "nowhere")
    fails("missing", folder, "1_0005.dcm")


def test_objects_that_are_no_images_are_named(tmp_path):
    fails("notimage", write_dicom(tmp_path / "seg", ARRAY, Modality="SEG"), "SEG")
    (tmp_path / "none").mkdir()
    fails("format", tmp_path / "none", "no DICOM file")


def test_files_without_preamble_and_without_ending_are_dicom(tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY)
    for file in sorted(folder.iterdir()):
        content = pydicom.dcmread(file)
        bare = pydicom.Dataset()
        bare.update(content)
        bare.save_as(folder / file.stem, implicit_vr=True, little_endian=True)
        file.unlink()
    assert np.array_equal(read_volume(folder)[0], ARRAY)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"])
def test_every_way_to_store_numbers_gives_the_same(syntax, tmp_path):
    folder = write_dicom(tmp_path / "series", ARRAY, PatientComments="x" * 33)
    for file in folder.iterdir():
        content = pydicom.dcmread(file)
        if syntax == "1.2.840.10008.1.2.5":
            content.compress(syntax)
            content.save_as(file)
        elif syntax == "1.2.840.10008.1.2.2":
            content.PixelData = np.frombuffer(content.PixelData, "<i2").astype(">i2").tobytes()
            content.file_meta.TransferSyntaxUID = syntax
            pydicom.dcmwrite(file, content, implicit_vr=False, little_endian=False, force_encoding=True)
        else:
            content.file_meta.TransferSyntaxUID = syntax
            content.save_as(file, implicit_vr=syntax == "1.2.840.10008.1.2", little_endian=True)
    assert np.array_equal(read_volume(folder)[0], ARRAY)


@pytest.mark.parametrize("lossless", ["JPEG2000", "JPEG"])
def test_compressed_pixels_that_gdcm_writes_are_decoded(lossless, tmp_path):
    wide = body_volume((3, 40, 48))
    folder = write_dicom(tmp_path / "series", wide)
    for file in folder.iterdir():
        image, writer = SimpleITK.ReadImage(str(file)), SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetCompressor(lossless)
        writer.UseCompressionOn()
        writer.SetFileName(str(file))
        position = pydicom.dcmread(file).ImagePositionPatient
        writer.Execute(image)
        content = pydicom.dcmread(file)
        assert content.file_meta.TransferSyntaxUID.is_compressed
        content.ImagePositionPatient, content.SeriesInstanceUID = position, "1.2.3.1"
        content.save_as(file)
    assert np.array_equal(read_volume(folder)[0], wide)


def test_a_compression_that_nobody_knows_is_named(tmp_path, capfd):
    folder = write_dicom(tmp_path / "series", ARRAY)
    for file in folder.iterdir():
        content = pydicom.dcmread(file)
        content.PixelData = pydicom.encaps.encapsulate([b"no picture at all, but some bytes"])
        content["PixelData"].is_undefined_length = True
        content.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
        content.save_as(file)
    fails("compression", folder, "JPEG Lossless")
    assert capfd.readouterr().err == ""


def test_multi_frame_files_are_read_by_their_functional_groups(tmp_path):
    rescale = [(1 + k, -k) for k in range(6)]
    path = write_multiframe(tmp_path / "a.dcm", ARRAY, rescale=rescale)
    array, geometry = read_volume(path)
    assert np.array_equal(array, np.stack([plane * s + i for plane, (s, i) in zip(ARRAY, rescale)]))
    assert geometry.spacing == pytest.approx((3, 2, 2)) and geometry.origin == pytest.approx((10, -20, 30))
    assert np.array_equal(read_volume(write_multiframe(tmp_path / "folder" / "b.dcm", ARRAY).parent)[0], ARRAY)


def test_multi_frame_files_with_a_distance_between_slices_are_read_and_others_named(tmp_path):
    tags = {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [2, 2], "SOPClassUID": ENHANCED_MR}
    dicom_slice(ARRAY, SpacingBetweenSlices=2.5, **tags).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    array, geometry = read_volume(tmp_path / "a.dcm")
    assert np.array_equal(array, ARRAY) and geometry.spacing == pytest.approx((2.5, 2, 2)) and geometry.origin == (1, 2, 3)
    dicom_slice(ARRAY, **{**tags, "ImagePositionPatient": None}).save_as(tmp_path / "b.dcm", enforce_file_format=True)
    fails("multiframe", tmp_path / "b.dcm", "no position")


def test_bright_is_low_is_said(tmp_path):
    assert [kind for kind, _ in warnings_of(write_dicom(tmp_path / "a", ARRAY, PhotometricInterpretation="MONOCHROME1"))] == ["inverted"]


def test_damaged_headers_never_escape_as_other_exceptions(tmp_path, capfd):
    rng = np.random.Generator(np.random.Philox(3))
    folder = write_dicom(tmp_path / "series", ARRAY)
    content = (folder / "1_0003.dcm").read_bytes()
    verdicts = 0
    for _ in range(300):
        broken = bytearray(content)
        for place in rng.integers(128, len(content) - 120, 4):
            broken[place] = rng.integers(256)
        (folder / "1_0003.dcm").write_bytes(broken)
        try:
            read_volume(folder)
        except ImageError as error:
            verdicts += error.kind in KINDS
    assert verdicts > 50
    assert capfd.readouterr().err == ""
