"""From the fingerprint to the plan: spacing, patch size, normalisation and networks, each decision in plain words."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import read_json, sha256_json
from nnssl_ext.core.paths import preprocessed_folder
from nnssl_ext.core.plan import ConfigPlan, NetworkPlan, Normalization, Plan
from nnssl_ext.core.registry import find_class
from nnssl_ext.planners import primus, resenc, segformer3d, slices
from nnssl_ext.planners.memory import precision
from nnssl_ext.preprocessing.crop import is_ct

ANISOTROPY = 3.0  # an axis counts as coarse when its spacing is over three times that of the others (nnU-Net)
LOWRES_COVERAGE = 0.25  # 3d_lowres is planned when the patch covers less of the median case
CPU_MEMORY_GB = 4.0
Vector = tuple[float, ...]
_WHY_SPACING = {
    "3d_fullres": "the median of the cases",
    "3d_lowres": "coarse enough for a patch to see a quarter of the median case",
    "onemmiso": "1 mm along all axes",
    "median": "the median of the cases, as it is",
}


class Planner:
    """Derives a plan from a fingerprint. Subclass it and override a method to change one decision.

    Args:
        fingerprint: content of dataset_fingerprint.json.
        memory_gb: memory target in GB.
    """

    families: dict[str, Callable[..., NetworkPlan | None]] = {
        "resenc": resenc.network,
        "primus": primus.network,
        "primus_v2": primus.network_v2,
        "segformer3d": segformer3d.network,
    }
    # smallest memory target in GB -> size, largest patch in voxels, largest batch. Below 6 GB speed on a CPU decides, not memory.
    sizes: dict[str, tuple[tuple[float, str], ...]] = {
        "resenc": ((0, "nano"), (2, "tiny"), (6, "S"), (8, "M"), (20, "L")),
        "primus": ((0, "nano"), (2, "tiny"), (6, "S"), (12, "B"), (20, "M"), (40, "L")),
        "primus_v2": ((0, "nano"), (2, "tiny"), (6, "S"), (12, "B"), (20, "M"), (40, "L")),
        "segformer3d": ((0, "nano"), (2, "tiny"), (6, "S"), (12, "M"), (20, "L")),
    }
    limits: tuple[tuple[float, int, int], ...] = ((0, 32**3, 4), (1, 48**3, 4), (2, 64**3, 4), (6, 192**3, 64))

    def __init__(self, fingerprint: dict[str, Any], memory_gb: float) -> None:
        self.fingerprint, self.memory_gb = fingerprint, memory_gb
        if not fingerprint["cases"]:
            raise UserError(
                "the fingerprint holds no readable case", fingerprint.get("dataset_name", ""), "see its 'failed' list, mend the files, extract it again"
            )
        self.spacings, self.shapes = (np.array([case[key] for case in fingerprint["cases"].values()], float) for key in ("spacing", "shape_after_crop"))
        self.decisions: list[str] = []

    def plan(self, plans_name: str) -> Plan:
        """All configurations, all backbone families; slices are read by U-Nets alone."""
        normalization = {modality: self.normalization(modality) for modality in sorted(self.fingerprint["intensities"])}
        for modality, scheme in normalization.items():
            self.decisions.append(f"normalisation of {modality}: {_describe(scheme)}")
        if len(normalization) > 1:
            self.decisions.append(f"normalisation: the collection mixes {', '.join(normalization)}; every image is normalised by its own modality's rule")
        place = "a CPU, in float32" if precision(self.memory_gb) == "fp32" else "a card, in bfloat16 (float32 would take more than planned)"
        self.decisions.append(f"memory: {self.memory_gb:g} GB of {place}; no token is dropped and there is no second network (teacher)")
        median = np.median(self.spacings, axis=0)
        target = tuple(self.target_spacing())
        configurations = {"3d_fullres": self._configuration("3d_fullres", target, plans_name, normalization)}
        lowres = self._lowres_spacing(configurations["3d_fullres"])
        if lowres is not None:
            configurations["3d_lowres"] = self._configuration("3d_lowres", lowres, plans_name, normalization)
        configurations["onemmiso"] = self._configuration("onemmiso", (1.0, 1.0, 1.0), plans_name, normalization)
        configurations["median"] = self._configuration("median", tuple(median), plans_name, normalization)
        configurations["noresample"] = self._configuration("noresample", None, plans_name, normalization)
        if "resenc" in self.families:
            size = self._size("resenc")
            found = slices.configuration(target, self.spacings, self.shapes, size, self.memory_gb, plans_name, normalization)
            configurations[slices.CONFIGURATION], why = found
            self.decisions += why
        return Plan(
            dataset_name=self.fingerprint["dataset_name"],
            plans_name=plans_name,
            planner=type(self).__name__,
            channels=int(self.fingerprint["channels"]),
            gpu_memory_target_gb=float(self.memory_gb),
            fingerprint_sha256=sha256_json(self.fingerprint),
            decisions=tuple(self.decisions),
            configurations=configurations,
        )

    def normalization(self, modality: str) -> Normalization:
        """CT: clip to the foreground's percentiles, global z-score; "noNorm": none; everything else: z-score in the body."""
        if modality.lower() == "nonorm":
            return Normalization("none")
        found = self.fingerprint["intensities"][modality]
        mean, std, low, high = (found[key] for key in ("mean", "std", "percentile_00_5", "percentile_99_5"))
        if not is_ct(modality) or not np.isfinite((mean, std, low, high)).all() or low >= high or std <= 0:  # a CT of one value: nothing to clip to
            return Normalization("zscore")
        return Normalization("ct", mean, std, low, high)

    def target_spacing(self) -> np.ndarray:
        """Median spacing in mm; a coarse axis (spacing and voxel count) takes its 10th percentile, but stays the coarsest.

        Source: Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, online methods.
        """
        target = np.median(self.spacings, axis=0)
        size = np.median(self.shapes, axis=0)
        worst = int(target.argmax())
        others = [axis for axis in range(3) if axis != worst]
        if target[worst] > ANISOTROPY * target[others].max() and size[worst] * ANISOTROPY < size[others].min():
            finer = float(np.percentile(self.spacings[:, worst], 10))
            target[worst] = max(finer, target[others].max() + 1e-5)
            self.decisions.append(f"3d_fullres: axis {worst} is coarse, its spacing is the 10th percentile of the cases: {target[worst]:.3g} mm")
        return target

    def patch_size(self, spacing: Sequence[float], median_shape: Sequence[int]) -> tuple[int, ...]:
        """The largest patch, about cubic in mm and no larger than the median case, that fits memory and size limits.

        Every axis is a multiple of the ResEnc strides and of the Primus token, so that all families share it.

        Args:
            spacing: mm, (z, y, x).
            median_shape: voxels, (z, y, x).
        """
        aspect = 1 / np.asarray(spacing, float)
        edge = self._limit(1) ** (1 / 3)
        wanted = np.minimum(np.maximum(1, np.round(aspect * edge / np.prod(aspect) ** (1 / 3))), median_shape)
        token = np.array(primus.token_size(spacing))
        patch = self._rounded(wanted, spacing, token)
        while not self._fits(patch, spacing) and (patch > 2 * token).any():
            divisor = self._divisor(patch, spacing, token)
            ratio = np.where(patch > 2 * token, patch / np.asarray(median_shape), 0)
            axis = int(ratio.argmax())
            smaller = patch.astype(float)
            smaller[axis] = max(2 * token[axis], patch[axis] - divisor[axis])
            rounded = self._rounded(smaller, spacing, token)
            if np.prod(rounded) >= np.prod(patch):  # rounding went up again: take half of the axis, always allowed
                smaller[axis] = max(token[axis], patch[axis] // 2)
                rounded = self._rounded(smaller, spacing, token)
            if np.prod(rounded) >= np.prod(patch):
                break
            patch = rounded
        return tuple(int(p) for p in patch)

    def _configuration(self, name: str, spacing: Vector | None, plans_name: str, normalization: dict[str, Normalization]) -> ConfigPlan:
        mm = tuple(float(s) for s in (np.median(self.spacings, axis=0) if spacing is None else spacing))
        shapes = self.shapes if spacing is None else np.maximum(1, np.round(self.spacings / mm * self.shapes))  # core.geometry.resampled_shape of all cases
        median_shape = np.maximum(1, np.round(np.median(shapes, axis=0))).astype(int).tolist()
        patch = self.patch_size(mm, median_shape)
        batch_limit = max(2, min(self._limit(2), len(self.shapes)))
        found = {family: self._network(family, mm, patch, batch_limit) for family in self.families}
        networks = {family: network for family, network in found.items() if network is not None}
        size = f"median case {_by(median_shape)} voxels, patch {_by(patch)}"
        text = "each case's own spacing" if spacing is None else f"spacing {_by(np.round(mm, 3))} mm ({_WHY_SPACING[name]})"
        self.decisions.append(f"{name}: {text}, {size}")
        self.decisions.append(f"{name}: patch {_by(np.round(np.multiply(patch, mm)))} mm, {self._why_patch(patch, mm, median_shape)}")
        local = primus.local_crop(patch, primus.token_size(mm))
        self.decisions.append(
            f"{name}: multi-crop methods see global crops of {_by(patch)} and local ones of {_by(local)} voxels, tokens of {_by(primus.token_size(mm))}"
        )
        for family, network in networks.items():
            memory = f"about {network.memory_gb:.2f} of {self.memory_gb:g} GB{self._why_batch(network, batch_limit)}"
            self.decisions.append(f"{name}: {family} {network.size}, batch {network.batch_size}, {memory}")
        strides = networks["resenc"].kwargs["strides"] if "resenc" in networks else []
        if strides:
            total = np.prod(strides, axis=0)
            self.decisions.append(
                f"{name}: resenc has {len(strides)} stages and halves down to maps of {_by(np.asarray(patch) // total)}; coarse axes are halved later"
            )
        stored = float(shapes.prod(1).sum()) * int(self.fingerprint["channels"])
        self.decisions.append(f"{name}: {stored:.3g} voxels to store, {4 * stored / 1e9:.2g} GB before compression")
        return ConfigPlan(
            data_identifier=f"{plans_name}_{name}",
            spacing=None if spacing is None else (mm[0], mm[1], mm[2]),
            patch_size=(patch[0], patch[1], patch[2]),
            median_shape=(median_shape[0], median_shape[1], median_shape[2]),
            normalization=normalization,
            resampling={"order": 3, "order_z": 0, "force_separate_z": None},
            networks=networks,
        )

    def _why_patch(self, patch: Sequence[int], spacing: Sequence[float], median_shape: Sequence[int]) -> str:
        """What kept the patch from being one step larger along the axis of which it shows the smallest share."""
        if all(p >= n for p, n in zip(patch, median_shape)):
            return "it holds the whole median case (smaller cases are padded)"
        token = np.array(primus.token_size(spacing))
        larger = np.array(patch)
        axis = int((larger / np.asarray(median_shape)).argmin())
        larger[axis] += self._divisor(larger, spacing, token)[axis]
        larger = self._rounded(larger, spacing, token)
        if np.prod(larger) > self._limit(1):
            return f"limited to {self._limit(1):,} voxels, which train at a good pace with {self.memory_gb:g} GB"
        if not self._fits(larger, spacing):
            return f"limited by memory: {self.memory_gb:g} GB must hold two samples of each family, {_by(larger)} would not fit"
        return f"about a cube in mm, cut to the median case; {_by(larger)} would fit, but be longer than that"

    def _why_batch(self, network: NetworkPlan, batch_limit: int) -> str:
        if network.batch_size == batch_limit:
            return " (no larger batch: as many as there are cases, or as train at a good pace)"
        return " (as many samples as fit)" if network.memory_gb <= self.memory_gb else " (more than the target: no smaller network is known)"

    def _network(self, family: str, spacing: Sequence[float], patch: Sequence[int], batch_limit: int) -> NetworkPlan | None:
        """The family's largest size that trains two samples within the memory target; the smallest when none does, None where the family has none."""
        for size in reversed(self._sizes(family)):
            network = self.families[family](spacing, patch, size, self.memory_gb, batch_limit)
            if network is None or (network.batch_size >= 2 and network.memory_gb <= self.memory_gb):
                break
        return network

    def _lowres_spacing(self, fullres: ConfigPlan) -> Vector | None:
        """Spacing in mm at which the patch covers a quarter of the median case; None when 3d_fullres does already."""
        spacing = np.asarray(fullres.spacing, float)
        median, patch = np.asarray(fullres.median_shape, float), np.asarray(fullres.patch_size, float)
        if np.prod(patch) >= LOWRES_COVERAGE * np.prod(median):
            self.decisions.append("3d_lowres: not planned, the patch of 3d_fullres covers a quarter of the median case or more")
            return None
        while np.prod(np.minimum(patch, median)) < LOWRES_COVERAGE * np.prod(median):
            finest = spacing < 2 * spacing.min()  # coarse axes wait until the others have caught up
            median = np.where(finest, median / 1.03, median)
            spacing = np.where(finest, spacing * 1.03, spacing)
        if 2 * np.prod(median) > np.prod(fullres.median_shape):
            self.decisions.append("3d_lowres: not planned, it would hold more than half the voxels of 3d_fullres")
            return None
        return tuple(float(s) for s in spacing)

    def _sizes(self, family: str) -> list[str]:
        """Sizes that the memory target allows, the smallest first."""
        return [size for at_least, size in self.sizes[family] if self.memory_gb >= at_least]

    def _size(self, family: str) -> str:
        return self._sizes(family)[-1]

    def _limit(self, column: int) -> int:
        return int([row[column] for row in self.limits if self.memory_gb >= row[0]][-1])

    def _divisor(self, patch: np.ndarray, spacing: Sequence[float], token: np.ndarray) -> np.ndarray:
        stages = len(resenc.SIZES[self._size("resenc")]["blocks"])
        strides, _ = resenc.topology(spacing, [int(p) for p in patch], stages)
        return np.lcm(np.prod(np.asarray(strides), axis=0), token)

    def _rounded(self, patch: np.ndarray, spacing: Sequence[float], token: np.ndarray) -> np.ndarray:
        """Rounded up to multiples of strides and token; repeated, since a larger patch may be pooled more often."""
        rounded = np.maximum(np.ceil(patch / token), 1).astype(int) * token
        for _ in range(8):
            divisor = self._divisor(rounded, spacing, token)
            if not (rounded % divisor).any():
                return rounded
            rounded = np.ceil(rounded / divisor).astype(int) * divisor
        raise AssertionError(f"no patch near {patch} is divisible by its own strides")

    def _fits(self, patch: np.ndarray, spacing: Sequence[float]) -> bool:
        """Whether two samples train within the target: of the ResEnc U-Net that the target calls for, and of some network of every other family."""
        if np.prod(patch) > self._limit(1):
            return False
        shape, smallest = [int(p) for p in patch], {family: self._sizes(family)[0] for family in self.families}
        sizes = {**smallest, "resenc": self._size("resenc")} if "resenc" in self.families else smallest
        networks = [self.families[family](spacing, shape, size, self.memory_gb, 2) for family, size in sizes.items()]
        return all(network is None or (network.batch_size >= 2 and network.memory_gb <= self.memory_gb) for network in networks)


def plan_experiment(dataset_name: str, planner: str = "Planner", plans_name: str = "nnsslPlans", gpu_memory_target_gb: float | None = None) -> Plan:
    """Plan a dataset whose fingerprint was extracted, and save the plan beside the fingerprint.

    Args:
        dataset_name: `DatasetXXX_NAME`.
        planner: class name of a `Planner`, built-in or from $nnssl_extPath.
        plans_name: the file is `PLANS_NAME.json`.
        gpu_memory_target_gb: default: the card's memory, 4 GB without one.
    """
    folder = preprocessed_folder(dataset_name)
    file = folder / "dataset_fingerprint.json"
    if not file.is_file():
        raise UserError("the dataset has no fingerprint yet", file, f"nnssl_extract_fingerprint -d {dataset_name}")
    cls = find_class(planner, Planner, "nnssl_ext.planners", with_base=True)
    memory = card_memory_gb() if gpu_memory_target_gb is None else gpu_memory_target_gb
    if memory <= 0:
        raise UserError(f"the memory target must be positive, not {memory:g} GB", "option -gpu_memory_target")
    plan: Plan = cls(read_json(file), memory).plan(plans_name)
    plan.save(folder / f"{plans_name}.json")
    return plan


def card_memory_gb() -> float:
    """Memory of the first graphics card in GB, as its driver's tool says; 4 without one (small networks for the CPU)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return CPU_MEMORY_GB
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return round(int(answer[0]) / 1024, 1)
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return CPU_MEMORY_GB


def _by(values: Sequence[Any] | np.ndarray) -> str:
    return "x".join(f"{v:g}" for v in values)


def _describe(scheme: Normalization) -> str:
    if scheme.scheme == "ct":
        clip = f"clip to [{scheme.low:g}, {scheme.high:g}] (0.5-99.5 % of all bodies)"
        return f"Hounsfield units are comparable: {clip}, subtract {scheme.mean:.4g}, divide by {scheme.std:.4g}"
    return {
        "zscore": "z-score in each case's body, since its intensities have no common scale",
        "percentile": "0.5-99.5 % of the body to [0, 1]",
        "none": "none",
    }.get(scheme.scheme, scheme.scheme)
