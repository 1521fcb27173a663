import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nnssl_ext.core.errors import UserError
from nnssl_ext.evaluation import torso


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return _sha(path.read_bytes())


def _link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_wanted_members_are_copied_and_nothing_else(tmp_path):
    digest = _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo("p/setup.py"), b"raise SystemExit"), (tarfile.TarInfo("p/a.nii.gz"), b"volume"))
    torso.extract_members(tmp_path / "p.tar.gz", digest, {"p/a.nii.gz": (tmp_path / "cache" / "a.nii.gz", _sha(b"volume"))})
    assert [p.name for p in _files_below(tmp_path / "cache")] == ["a.nii.gz"] and (tmp_path / "cache" / "a.nii.gz").read_bytes() == b"volume"


def test_wheels_are_read_like_source_distributions(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        archive.writestr("p/a.nii.gz", b"volume")
    digest = _sha((tmp_path / "p.whl").read_bytes())
    torso.extract_members(tmp_path / "p.whl", digest, {"p/a.nii.gz": (tmp_path / "cache" / "a.nii.gz", _sha(b"volume"))})
    assert (tmp_path / "cache" / "a.nii.gz").read_bytes() == b"volume"


@pytest.mark.parametrize("name", ["../evil", "p/../../evil", "/evil", "p\\..\\evil", "C:/evil"])
def test_an_archive_with_a_name_that_leaves_its_folder_is_refused_whole(tmp_path, name):
    target = {"p/a": (tmp_path / "cache" / "a", _sha(b"volume"))}
    digest = _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo("p/a"), b"volume"), (tarfile.TarInfo(name), b"evil"))
    with pytest.raises(UserError, match="leaves its folder"):
        torso.extract_members(tmp_path / "p.tar.gz", digest, target)
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        archive.writestr("p/a", b"volume")
        archive.writestr(name, b"evil")
    with pytest.raises(UserError, match="leaves its folder"):
        torso.extract_members(tmp_path / "p.whl", _sha((tmp_path / "p.whl").read_bytes()), target)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_devices_and_folders_are_refused(tmp_path, kind):
    digest = _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo("p/b"), b"volume"), (_link("p/a", "p/b", kind), b""))
    with pytest.raises(UserError, match="link"):
        torso.extract_members(tmp_path / "p.tar.gz", digest, {"p/a": (tmp_path / "cache" / "a", _sha(b"volume"))})
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(tmp_path):
    target = {"p/a": (tmp_path / "cache" / "a", _sha(b"volume"))}
    digest = _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo("p/a"), b"evil"), (tarfile.TarInfo("p/a"), b"volume"))
    with pytest.raises(UserError, match="twice"):
        torso.extract_members(tmp_path / "p.tar.gz", digest, target)
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        archive.writestr("p/a", b"evil")
        archive.writestr("p/a", b"volume")
    with pytest.raises(UserError, match="twice"):
        torso.extract_members(tmp_path / "p.whl", _sha((tmp_path / "p.whl").read_bytes()), target)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["p/a", "p/unwanted"])
def test_an_archive_that_inflates_a_thousandfold_is_refused(tmp_path, name):
    zeros, target = bytes(8 << 20), {"p/a": (tmp_path / "cache" / "a", "0" * 64)}
    digest = _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo(name), zeros))
    assert len(zeros) > 900 * (tmp_path / "p.tar.gz").stat().st_size
    with pytest.raises(UserError, match="hundreds of times its size"):
        torso.extract_members(tmp_path / "p.tar.gz", digest, target)
    with zipfile.ZipFile(tmp_path / "p.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, zeros)
    with pytest.raises(UserError, match="hundreds of times its size"):
        torso.extract_members(tmp_path / "p.whl", _sha((tmp_path / "p.whl").read_bytes()), target)
    assert not (tmp_path / "cache").exists()


def test_symbolic_links_in_wheels_are_refused(tmp_path):
    member = zipfile.ZipInfo("p/a")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as archive:
        archive.writestr(member, "/etc/hostname")
    with pytest.raises(UserError, match="link"):
        torso.extract_members(tmp_path / "p.whl", _sha((tmp_path / "p.whl").read_bytes()), {"p/a": (tmp_path / "a", "0")})


def test_an_archive_with_another_hash_is_never_opened(tmp_path, monkeypatch):
    _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo("p/a"), b"volume"))
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match="not the pinned one"):
        torso.extract_members(tmp_path / "p.tar.gz", "0" * 64, {"p/a": (tmp_path / "a", "0")})


def test_a_member_with_another_hash_and_a_missing_member_are_refused(tmp_path):
    digest = _tar(tmp_path / "p.tar.gz", (tarfile.TarInfo("p/a"), b"volume"))
    with pytest.raises(UserError, match="SHA-256"):
        torso.extract_members(tmp_path / "p.tar.gz", digest, {"p/a": (tmp_path / "cache" / "a", "0" * 64)})
    with pytest.raises(UserError, match="lacks"):
        torso.extract_members(tmp_path / "p.tar.gz", digest, {"p/b": (tmp_path / "cache" / "b", "0" * 64)})
    assert not (tmp_path / "cache").exists()


def test_without_a_client_or_a_network_the_error_names_the_phantom(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_cache", str(tmp_path))
    for clients in ([], [["false"]], [["no-such-program"]]):
        monkeypatch.setattr(torso, "_clients", lambda clients=clients: clients)
        with pytest.raises(UserError) as error:
            torso.load_scan("abdomen_ct")
        assert "nnssl_demo --phantom" in error.value.fix and "totalsegmentator==2.18.0" in error.value.what
    assert not torso.is_cached()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("nnssl_cache", str(tmp_path / "own"))
    assert torso.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("nnssl_cache")
    assert torso.cache_folder() == tmp_path / "xdg" / "nnssl_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert torso.cache_folder() == Path.home() / ".cache" / "nnssl_ext"


def test_an_unknown_scan_is_a_user_error():
    with pytest.raises(UserError, match="unknown scan"):
        torso.load_scan("abdomen")


@pytest.mark.network
def test_the_five_scans_have_the_documented_geometry_and_labels(scans):
    shapes = {"abdomen_ct": (112, 101, 122), "thorax_ct": (191, 167, 233), "abdomen_mr": (20, 91, 117), "spine_ct": (47, 73, 73), "spine_mr": (52, 68, 67)}
    assert set(shapes) == set(torso.SCANS)
    for name, source in torso.SCANS.items():
        scan = torso.load_scan(name)
        assert scan.image.shape == scan.labels.shape == scan.geometry.shape == shapes[name] and scan.modality == source.modality
        assert np.allclose(scan.geometry.spacing, 1.5 if name in ("thorax_ct", "spine_ct", "spine_mr") else 3.0)
        for organ, values in source.label_names.items():
            assert np.isin(scan.labels, values).sum() > 50, (name, organ)


@pytest.mark.network
def test_a_damaged_file_of_the_cache_counts_as_missing(scans, tmp_path, monkeypatch):
    source = torso.SCANS["spine_ct"]
    content = torso._cached(source.package, source.image).read_bytes()
    monkeypatch.setenv("nnssl_cache", str(tmp_path))
    path = torso._cached(source.package, source.image)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert torso._valid(source.package, source.image)
    path.write_bytes(content[:-1])
    assert not torso._valid(source.package, source.image)
