"""cases.csv to cases."""

import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.io.index import read_index


def table(folder, text, encoding="utf-8"):
    (folder / "cases.csv").write_text(text, encoding=encoding)
    return folder


def fails(folder, text, *parts):
    with pytest.raises(UserError) as error:
        read_index(table(folder, text))
    assert all(part in str(error.value) for part in parts) and len(str(error.value).splitlines()) <= 3, str(error.value)


def test_a_column_of_images_is_enough(tmp_path):
    cases = read_index(table(tmp_path, "image\nb/second.nii.gz\nfirst.nrrd\n\n"))
    assert [case.identifier for case in cases] == ["first", "second"]
    assert cases[1].images == (tmp_path / "b" / "second.nii.gz",) and cases[0].modalities == ("unknown",)
    assert cases[0].subject == "first" and cases[0].session == "1"


def test_all_columns_are_used_and_others_ignored(folders):
    folder = folders["nnssl_raw"] / "Dataset811_Table"
    folder.mkdir()
    text = "Image;Subject;session;modality;anatomy_mask;age\n$nnssl_raw/x/a.nii;s1;v1;CT;m.nii;50\n/data/b#1.2.3;s1;v2;T1w;;\n"
    cases = read_index(table(folder, text, encoding="utf-8-sig"))
    assert [case.identifier for case in cases] == ["s1__v1__a", "s1__v2__b-1.2.3"]
    assert cases[0].images == (folders["nnssl_raw"] / "x" / "a.nii",) and cases[0].anatomy_mask == folder / "m.nii"
    assert str(cases[1].images[0]) == "/data/b#1.2.3" and cases[1].anatomy_mask is None
    assert [(case.subject, case.session, case.modalities[0]) for case in cases] == [("s1", "v1", "CT"), ("s1", "v2", "T1w")]


def test_lines_of_one_identifier_or_visit_are_channels(tmp_path):
    text = "image,subject,identifier,channel,modality\nb.nii,s1,x,1,T2w\na.nii,s1,x,0,T1w\nc.nii,s2,,0,T1w\nd.nii,s2,,1,T2w\n"
    cases = read_index(table(tmp_path, text))
    assert [(case.identifier, [path.name for path in case.images], case.modalities) for case in cases] == [
        ("s2", ["c.nii", "d.nii"], ("T1w", "T2w")),
        ("x", ["a.nii", "b.nii"], ("T1w", "T2w")),
    ]


def test_names_with_separators_may_be_quoted(tmp_path):
    assert read_index(table(tmp_path, 'image\tsubject\n"a, b.nii.gz"\tBäuche\n'))[0].images[0].name == "a, b.nii.gz"


def test_mistakes_are_named_with_their_line(tmp_path):
    fails(tmp_path, "", "line 1", "no column 'image'")
    fails(tmp_path, "file,subject\na.nii,s\n", "line 1", "no column 'image'")
    fails(tmp_path, "image,image\na.nii,s\n", "column image is there twice")
    fails(tmp_path, "image,modalty\na.nii,CT\n", "unknown column 'modalty'", "did you mean 'modality'")
    fails(tmp_path, "image,subject\na.nii,s\n\n,t\n", "line 4", "names no image")
    fails(tmp_path, "image,subject\na.nii,s,t\n", "line 2", "3 fields")
    fails(tmp_path, "image,channel\na.nii,first\n", "line 2", "is no number")
    fails(tmp_path, "image,identifier\na.nii,x\nb.nii,x\n", "line 3", "named in line 2 already")
    fails(tmp_path, "image,identifier,channel\na.nii,x,0\nb.nii,x,2\n", "channels [0, 2]")
    fails(tmp_path, "image,identifier,channel,subject\na.nii,x,0,s\nb.nii,x,1,t\n", "different subjects")
    fails(tmp_path, "image,identifier,channel\na.nii,x,0\nb.nii,x,1\nc.nii,y,0\n", "others: ")
    fails(tmp_path, "image\n", "holds no image")
    (tmp_path / "cases.csv").write_bytes("image\nBäuche.nii\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_index(tmp_path)
