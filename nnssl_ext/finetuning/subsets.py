"""Few labels: nested subsets of the cases that a fold of nnU-Net trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json
from nnssl_ext.core.paths import root
from nnssl_ext.core.rng import sample_rng
from nnssl_ext.finetuning.plans import labelled_cases

_SPLITS = "splits_final.json"
_FOLDS, _SEED, _RANDOM_SHARE = 5, 12345, 0.8  # nnU-Net's


def nested_subset(cases: Sequence[str], wanted: int | float) -> list[str]:
    """The first of `cases` in a shuffle that is always the same, so that smaller subsets lie within larger ones.

    The place of a case in the shuffle depends on its name alone: more cases in the dataset, or another fold, don't change the order of the others.

    Args:
        cases: identifiers.
        wanted: how many; a float is a fraction of them, rounded, at least one case.

    Returns:
        the chosen identifiers, in the order of `cases`.

    Raises:
        UserError: fewer cases than wanted.
    """
    count = wanted if isinstance(wanted, int) else max(1, math.floor(wanted * len(cases) + 0.5))
    if count > len(cases):
        raise UserError(f"{count} labelled cases are wanted; the fold trains on {len(cases)}", "option -n", "choose fewer, or another fold")
    chosen = set(sorted(cases, key=lambda case: float(sample_rng(0, 0, f"label {case}").random()))[:count])
    return [case for case in cases if case in chosen]


def training_cases(dataset: str, fold: str) -> list[str]:
    """What nnU-Net will train on in a fold, told before it preprocesses.

    Args:
        dataset: `DatasetXXX_NAME` in `$nnUNet_raw`.
        fold: "0" to "4", or "all".
    """
    cases = labelled_cases(root("nnUNet_raw") / dataset)
    if fold == "all":
        return cases
    files = [root(variable) / dataset / _SPLITS for variable in ("nnUNet_preprocessed", "nnUNet_raw")]  # it copies that of the dataset
    found = [read_json(file) for file in files if file.is_file()]
    splits = found[0] if found else generate_crossval_split(cases, seed=_SEED, n_splits=_FOLDS)
    return [str(case) for case in splits[int(fold)]["train"]] if int(fold) < len(splits) else cases[: int(len(cases) * _RANDOM_SHARE)]
