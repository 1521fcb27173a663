"""Public datasets as they are downloaded: the folder trees of BraTS, LiTS, LUNA16, the Decathlon, FLARE and others -> cases with labels."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.files import read_json
from nnssl_ext.io import bids
from nnssl_ext.io.case import ENDINGS, Case, stem
from nnssl_ext.io.index import read_index
from nnssl_ext.io.tree import walk


@dataclass(frozen=True)
class Entry:
    """A case as it lies in a source folder.

    Args:
        case: what to read; one image with several modalities is a 4D file that holds one volume for each of them.
        label: its segmentation; None without one.
        test: belongs to a test or validation set, which pretraining must not see.
        category: class of the whole volume; "" without one.
        fold: part of a cross-validation that the data's authors chose; "" without one.
    """

    case: Case
    label: Path | None = None
    test: bool = False
    category: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Source:
    """What a folder holds.

    Args:
        layout: name of the layout.
        entries: its cases, sorted by identifier; identifiers are unique and fit for file names.
        description: fields for nnU-Net's `dataset.json` that the layout knows, such as "labels".
        relabel: old label -> new label, where the data skip numbers.
    """

    layout: str
    entries: list[Entry]
    description: Mapping[str, Any] = field(default_factory=dict)
    relabel: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A way to lay out a dataset.

    Args:
        pattern: how its files look, for people.
        find: (folder, names of the image files below it) -> entries, fields for `dataset.json`.
        relabel: see `Source`.
    """

    pattern: str
    find: Callable[[Path, Sequence[str]], tuple[list[Entry], Mapping[str, Any]]]
    relabel: Mapping[int, int] = field(default_factory=dict)


def find_entries(folder: Path, layout: str | None = None, modalities: Sequence[str] = (), processes: int = 1) -> Source:
    """All cases of a source folder.

    Args:
        folder: the downloaded dataset.
        layout: one of `LAYOUTS`; None takes the first one that finds a case.
        modalities: one per channel, instead of what the layout says.
        processes: how many read headers of a DICOM or HDF5 tree.

    Raises:
        UserError: no such folder or layout; no case; a modality that can't be known; as `read_index`.
    """
    if not folder.is_dir():
        raise UserError("source folder not found", folder, "give the folder of the dataset")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"unknown layout '{layout}'", "option -layout", did_you_mean(layout, LAYOUTS))
    name, entries, description = _detected(folder, [layout] if layout else _candidates(folder), processes)
    entries = _named_uniquely([_with_modalities(entry, modalities) for entry in entries], folder)
    return Source(name, sorted(entries, key=lambda entry: entry.case.identifier), description, LAYOUTS[name].relabel)


def _detected(folder: Path, candidates: Sequence[str], processes: int) -> tuple[str, list[Entry], Mapping[str, Any]]:
    """The first layout that finds a case, and what it finds."""
    names = _image_names(folder)
    cause = ""
    for name in candidates:
        try:
            find = partial(_index, processes=processes) if name == "index" else LAYOUTS[name].find
            entries, description = find(folder, names)
        except UserError as error:
            if len(candidates) == 1 or name != "index":
                raise
            entries, cause = [], f" ({error.what})"
        if entries:
            return name, entries, description
    wanted = "; ".join(f"{name}: {LAYOUTS[name].pattern}" for name in candidates)
    raise UserError(f"no case found; looked for {wanted}{cause}", folder, "check the folder, or list its cases in a cases.csv")


def _candidates(folder: Path) -> list[str]:
    """The layouts in the order in which they are tried; an index that someone wrote counts more than names of files."""
    written = any((folder / name).is_file() for name in ("pretrain_data.json", "cases.csv")) or bids.is_bids(folder)
    return ["index"] if written and not (folder / "dataset.json").is_file() else list(LAYOUTS)


def _image_names(folder: Path) -> list[str]:
    """Paths of the image files below a folder, relative to it and with '/', sorted; hidden ones left out, links to folders followed."""
    found = [(place / name).relative_to(folder).as_posix() for place, names, _ in walk(folder) for name in names if name.endswith(ENDINGS) and name[0] != "."]
    return sorted(found)


def _with_modalities(entry: Entry, modalities: Sequence[str]) -> Entry:
    case = entry.case
    if modalities:
        if len(modalities) != len(case.modalities) and not (len(case.images) == 1 and case.modalities == ("",)):
            raise UserError(f"{len(modalities)} modalities were given, case {case.identifier} has {len(case.modalities)}", "option -modality", "name one each")
        return dataclasses.replace(entry, case=dataclasses.replace(case, modalities=tuple(modalities)))
    if not all(case.modalities):
        raise UserError("the folder does not tell the modality, which decides the normalisation", case.images[0], "add -modality CT (or MR, ...)")
    return entry


def _named_uniquely(entries: Sequence[Entry], folder: Path) -> list[Entry]:
    """Identifiers fit for file names; where two would be equal (on any file system) these take their paths as names."""
    names = [_safe(entry.case.identifier) for entry in entries]
    count = Counter(name.casefold() for name in names)
    paths = [_safe(_path_name(entry.case.images[0], folder)) if count[name.casefold()] > 1 else name for name, entry in zip(names, entries)]
    twice = [name for name, number in Counter(name.casefold() for name in paths).items() if number > 1]
    if twice:
        raise UserError(f"{len(twice)} names of cases are used twice, such as {twice[0]}", folder, "rename the files")
    return [dataclasses.replace(entry, case=dataclasses.replace(entry.case, identifier=name)) for name, entry in zip(paths, entries)]


def _path_name(path: Path, folder: Path) -> str:
    place = path.relative_to(folder) if path.is_relative_to(folder) else path
    return "__".join([*place.parent.parts, stem(place.name)])


def _safe(text: str, most: int = 80) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-") or "case"
    changed = not text.isascii() or len(name) > most  # different texts may have become the same
    return f"{name[: most - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if changed else name


_ENDING = r"(?P<ending>\.nii\.gz|\.nii|\.nrrd|\.mha)"
_HELD_OUT = re.compile(r"(?i)(?:^|/)(?:val|validation|test|testing|imagests)/")

Found = tuple[list[Entry], Mapping[str, Any]]


def _by_name(
    folder: Path,
    names: Sequence[str],
    image: str,
    label: str = "",
    modalities: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    test_label: str = "",
) -> Found:
    """Cases from the names of files.

    Args:
        folder, names: as for `Layout.find`.
        image: regular expression of an image's name with the group `case` and perhaps subject, session, channel, category, fold.
        label: what `re.Match.expand` makes the label's name of.
        modalities: channel -> modality, in the order of the channels; one unnamed channel by default.
        labels: names of the labels 0, 1, 2, ...
        test_label: as `label`, for test cases.
    """
    modalities = {"": ""} if modalities is None else modalities
    pattern, present = re.compile(image), set(names)
    cases: dict[str, dict[str, re.Match[str]]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            channel = match.groupdict().get("channel") or ""
            if channel not in modalities:
                return [], {}
            cases.setdefault(_in_channel(match, ""), {})[channel] = match
    used = [channel for channel in modalities if any(channel in matches for matches in cases.values())]
    entries = []
    for matches in cases.values():
        match = next(iter(matches.values()))
        parts = {key: value or "" for key, value in match.groupdict().items()}
        test = bool(_HELD_OUT.search(match.string))
        template = test_label if test and test_label else label
        target = match.expand(template) if template else ""
        case = Case(
            parts["case"],
            parts.get("subject") or parts["case"],
            parts.get("session") or "1",
            tuple(folder / _in_channel(match, channel) for channel in used),  # one that is missing is reported as such when it is read
            tuple(modalities[channel] for channel in used),
        )
        entries.append(Entry(case, folder / target if target in present else None, test, parts.get("category", ""), parts.get("fold", "")))
    return entries, {"labels": {name: number for number, name in enumerate(labels)}} if labels else {}


def _in_channel(match: re.Match[str], channel: str) -> str:
    """The name of the same case's file of another channel."""
    if "channel" not in match.re.groupindex:
        return match.string
    return match.string[: match.start("channel")] + channel + match.string[match.end("channel") :]


def _msd(folder: Path, names: Sequence[str]) -> Found:
    """The list in a Decathlon `dataset.json`; 4D images hold one volume per modality."""
    file = folder / "dataset.json"
    description = read_json(file) if file.is_file() else None
    if not isinstance(description, dict) or not isinstance(description.get("training"), list) or not isinstance(description.get("modality"), dict):
        return [], {}
    modalities = tuple(str(description["modality"][key]) for key in sorted(description["modality"], key=int))
    entries = []
    try:
        items = [
            ({"image": item} if isinstance(item, str) else item, test)
            for key, test in (("training", False), ("test", True))
            for item in description.get(key, [])
        ]
        for item, test in items:
            name = stem(Path(item["image"]).name)
            label = folder / item["label"] if item.get("label") else None
            entries.append(Entry(Case(name, name, "1", (folder / item["image"],), modalities), label, test))
        labels = {str(name): int(number) for number, name in (description.get("labels") or {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"dataset.json is malformed: {type(error).__name__} {error}", file, "restore the file of the download") from None
    return entries, {"labels": labels} if labels else {}


def _nnunet(folder: Path, names: Sequence[str]) -> Found:
    file = folder / "dataset.json"
    description = read_json(file) if file.is_file() else None
    if not isinstance(description, dict) or not isinstance(description.get("channel_names"), dict):
        return [], {}
    ending = re.escape(str(description.get("file_ending", ".nii.gz")))
    modalities = {f"{int(number):04d}": str(name) for number, name in description["channel_names"].items() if str(number).isdigit()}
    image, label = rf"images(?:Tr|Un|Ts)/(?P<case>[^/]+)_(?P<channel>\d{{4}})(?P<ending>{ending})", r"labelsTr/\g<case>\g<ending>"
    entries, _ = _by_name(folder, names, image, label, modalities, test_label=label.replace("Tr", "Ts"))
    if not entries:
        fix = f"name them CASE_{next(iter(modalities), '0000')}{description.get('file_ending', '.nii.gz')}"
        raise UserError(f"no images, or images of other channels than dataset.json names ({', '.join(modalities)})", folder, fix)
    return entries, {key: description[key] for key in ("labels", "regions_class_order") if key in description}


def _index(folder: Path, names: Sequence[str], processes: int = 1) -> Found:
    return [Entry(case) for case in read_index(folder, processes=processes)], {}


def _layout(pattern: str, image: str, relabel: Mapping[int, int] | None = None, **options: Any) -> Layout:
    return Layout(pattern, partial(_by_name, image=image, **options), relabel or {})


_CT = {"": "CT"}
_FLARE_ORGANS = (
    *("background", "liver", "right_kidney", "spleen", "pancreas", "aorta", "inferior_vena_cava", "right_adrenal_gland", "left_adrenal_gland"),
    *("gallbladder", "oesophagus", "stomach", "duodenum", "left_kidney"),
)

LAYOUTS: dict[str, Layout] = {
    "msd": Layout('dataset.json with "training": [{"image", "label"}] (Decathlon)', _msd),
    "nnunet": Layout('dataset.json with "channel_names" and imagesTr/CASE_0000.nii.gz', _nnunet),
    "brats18": _layout(
        "CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz, below HGG and LGG or not",
        r"(?P<folder>(?:.*/)?(?P<case>(?P<subject>[^/]+)_(?P<session>\d+)))/(?P=case)_(?P<channel>t1ce|t1|t2|flair)(?P<ending>\.nii(?:\.gz)?)",
        label=r"\g<folder>/\g<case>_seg\g<ending>",
        modalities={"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"},
        labels=("background", "necrotic_and_non_enhancing_core", "oedema", "enhancing_tumour"),
        relabel={4: 3},  # the data have no label 3, nnU-Net wants consecutive numbers
    ),
    "lits17": _layout(
        "{train,val}/ct/volume-N.nii with seg/segmentation-N.nii",
        r"(?P<root>(?:.*/)?(?:train|val|test))/ct/(?P<case>volume-(?P<number>\d+))(?P<ending>\.nii(?:\.gz)?)",
        label=r"\g<root>/seg/segmentation-\g<number>\g<ending>",
        modalities=_CT,
        labels=("background", "liver", "tumour"),
    ),
    "luna16": _layout("subset0..9/SERIES_UID.mhd with .raw", r"(?:.*/)?subset(?P<fold>\d)/(?P<case>[0-9.]+)\.mhd", modalities=_CT),
    "luna16_classes": _layout(
        "subsetN/labelK/PATIENT/IMAGE.nii.gz",
        r"(?:.*/)?subset(?P<fold>\d+)/label(?P<category>[^/]+)/(?P<subject>[^/]+)/(?P<case>[^/]+)" + _ENDING,
        modalities=_CT,
    ),
    "flare22": _layout(
        "any folders of CASE_0000.nii.gz, labels in a labels folder beside",
        r"(?P<root>(?:.*/)?)(?!labels/)[^/]+/(?P<case>[^/]+)_(?P<channel>\d{4})\.nii\.gz",
        label=r"\g<root>labels/\g<case>.nii.gz",
        modalities={"0000": "CT"},
        labels=_FLARE_ORGANS,
    ),
    "images_labels": _layout(
        "images/CASE.nii.gz, labels/CASE.nii.gz beside", r"(?P<root>(?:.*/)?)images/(?P<case>[^/]+)" + _ENDING, label=r"\g<root>labels/\g<case>\g<ending>"
    ),
    "index": Layout("pretrain_data.json, cases.csv, BIDS, DICOM or HDF5 tree, as nnssl_preprocess reads them", _index),
}
"""In the order in which they are tried."""
