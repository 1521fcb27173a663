"""Watches a training: figures of the features that the method computes anyway, and alarms in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nnssl_ext.data.loader import Batch
from nnssl_ext.nn import health
from nnssl_ext.nn.backbones.base import Backbone
from nnssl_ext.nn.distributed import local

STEPS = 64  # of an epoch are sampled, at most
VECTORS = 1024  # of a window, at most, and as many patch vectors
FEWEST = 64  # vectors of a window
IN_A_ROW = 3  # bad checks until the alarm
MATRICES = 16  # weights whose update is measured

COLLAPSE = "the features have collapsed: images can hardly be told apart any more"
REMEDY = "lower the learning rate, lengthen the warm-up, and check what keeps the method from collapsing (predictor, centring, temperature, batch size)"
KEPT = "checkpoint_best is not overwritten while this lasts"
SPREAD, INFORMATION = 0.1, 0.1  # std*sqrt(D), nat: below them vectors count as collapsed
DIRECTIONS, RANK = 1.5, 0.1  # participation ratio, RankMe over min(n, D): below both vectors count as collapsed onto one direction
FALL = 0.5  # features that no method declares must also have lost this share of the run's own largest spread


class HealthMonitor:
    """Collects features on sampled steps and judges them at the end of an epoch.

    On a sampled step, and on no other, the backbone's `tokens` and `pyramid` are replaced by versions that also hand over a
    few detached vectors of the step's first call: no extra forward, no double counting under activation checkpointing or
    accumulation, nothing left on the backbone between steps, no wait for the GPU before the epoch ends. A method adds what
    else it computes with `add` and `add_logits`, and single numbers with `note`. Vectors are collected until there are
    enough for a check, if need be over several short epochs, and dropped after it.

    Args:
        backbone: the trained one (of a teacher and a student: the student's).
        iterations: optimiser steps of an epoch.
        armed: optimiser step from which checks count for an alarm: the end of the warm-up.
        active: False on ranks other than 0: nothing is collected.

    Attributes:
        collapsed: whether the last check, armed or not, found the features collapsed. The loss may be at its lowest then: such
            a checkpoint is not worth keeping as the best.
    """

    def __init__(self, backbone: Backbone, iterations: int, armed: int = 0, active: bool = True) -> None:
        self.backbone, self.every, self.armed, self.active = backbone, -(-iterations // STEPS), armed, active
        self.per_step = -(-VECTORS // min(STEPS, iterations)) if iterations >= STEPS else VECTORS
        self.sampling, self.tapped = False, False
        self.vectors: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Any] = {}
        self.steps: dict[str, list[float]] = {"loss": [], "norm": [], "skipped": []}
        self.history: dict[str, list[float]] = {"loss": [], "norm": [], "spread": []}
        self.strikes: dict[str, int] = {}
        self.collapsed, self.declared = False, False

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Around optimiser step number `step` (counted from 0)."""
        if not self.active or step % self.every:
            yield
            return
        weights = [local(p.detach()) for p in self.backbone.parameters() if p.requires_grad and p.ndim > 1]
        weights = weights[:: -(-len(weights) // MATRICES)]
        before = [weight.clone() for weight in weights]
        self.sampling, self.tapped, self.step = True, False, step
        for name in ("tokens", "pyramid"):
            setattr(self.backbone, name, self._tapping(name))
        try:
            yield
        finally:
            self.sampling = False
            for name in ("tokens", "pyramid"):
                delattr(self.backbone, name)
        with torch.no_grad():
            moved, size = torch._foreach_norm(torch._foreach_sub(weights, before)), torch._foreach_norm(before)
            self._count("update_ratio", (torch.stack(moved) / torch.stack(size).clamp_min(1e-12)).float().mean())

    def seen(self, step: int, loss: float, norm: float, applied: bool, batch: Batch) -> None:
        """After every optimiser step.

        Args:
            loss, norm: total loss and gradient norm before clipping.
            applied: False for a skipped step.
            batch: its last batch.
        """
        if not self.active:
            return
        self.steps["skipped"].append(float(not applied))
        if applied:
            self.steps["loss"].append(loss)
            self.steps["norm"].append(norm)
        if step % self.every == 0:
            with torch.no_grad():
                for view in batch.values():
                    self._count("background", health.background_share(view.image[..., ::2, ::2, ::2]))  # an eighth of the voxels is enough for an estimate
                    if view.mask is not None:
                        self._count("mask_ratio", view.mask.float().mean())

    def add(self, name: str, vectors: Tensor) -> None:
        """Vectors (n, D) that the method computes, such as a projection; does nothing except on sampled steps."""
        if self.sampling:
            self.declared = True
            self._keep(name, vectors)

    def note(self, name: str, value: float | Tensor | Callable[[], Tensor]) -> None:
        """A number such as the momentum or the temperature, averaged over the epoch's sampled steps; does nothing on others.

        Args:
            value: what is costly to compute is given as a function, which is called on sampled steps only.
        """
        if self.sampling:
            value = value() if callable(value) else value
            self._count(name, value.detach() if isinstance(value, Tensor) else value)

    @torch.no_grad()
    def add_logits(self, name: str, student: Tensor, teacher: Tensor | None = None) -> None:
        """Logits over classes or prototypes; does nothing except on sampled steps.

        Args:
            student, teacher: (n, K), temperature and centre already applied. Entropies are the teacher's where there is one.
        """
        if not self.sampling:
            return
        self.declared = True
        logits = student.detach() if teacher is None else teacher.detach()
        p = logits.float().softmax(1)
        self._count(f"{name}/H_cond", health.conditional_entropy(logits))
        if teacher is not None:
            self._count(f"{name}/KL", health.divergence(teacher.detach(), student.detach()))
        n, mean, used = self.sums.get(f"{name} classes", (0, 0.0, 0.0))
        hits = torch.zeros_like(p[0]).index_add_(0, p.argmax(1), torch.ones_like(p[:, 0]))
        self.sums[f"{name} classes"] = (n + len(p), mean + p.sum(0), used + hits)

    def epoch(self, step: int, data_wait_share: float) -> tuple[dict[str, float], list[str]]:
        """Figures of the epoch, named "health/...", and alarms that are due.

        Args:
            step: optimiser steps done.
            data_wait_share: share of the epoch's time that was spent on waiting for data.
        """
        if not self.active:
            return {}, []
        figures = self._figures()
        steps, self.steps = self.steps, {"loss": [], "norm": [], "skipped": []}
        if steps["norm"]:
            figures["gradient_norm"] = median(steps["norm"])
        figures["skipped_steps"] = sum(steps["skipped"])
        bad = self._judge(figures, steps, data_wait_share)
        if "collapse" in bad:
            self.collapsed = bad["collapse"] is not None
        alarms = []
        for name, text in bad.items():
            self.strikes[name] = self.strikes.get(name, 0) + (text is not None) if step >= self.armed and text is not None else 0
            if text is not None and self.strikes[name] == IN_A_ROW:
                alarms.append(text)
        return {f"health/{name}": float(value) for name, value in figures.items()}, alarms

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued run needs; tensors and plain types."""
        return {name: getattr(self, name) for name in ("vectors", "sums", "steps", "history", "strikes", "collapsed", "declared")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(self.backbone.parameters()).device
        for name, value in state.items():
            setattr(self, name, _copied(value, device))

    def _tapping(self, name: str) -> Callable[..., Any]:
        original = getattr(self.backbone, name)

        def tapped(x: Tensor, *arguments: Any, **keywords: Any) -> Any:
            features = original(x, *arguments, **keywords)
            tap = torch.compiler.disable(self._tap) if torch.compiler.is_compiling() else self._tap  # the first one takes seconds to import
            tap(x, features, arguments[0] if arguments else keywords.get("keep"))
            return features

        return tapped

    @torch.no_grad()
    def _tap(self, x: Tensor, features: Any, keep: Tensor | None) -> None:
        if self.tapped:
            return
        self.tapped = True
        size = x.shape[2:] if x.ndim > 3 else self.backbone.patch_size  # of tokens that the method has embedded itself
        grid = [edge // stride for edge, stride in zip(size, self.backbone.strides[-1])]
        tokens = features[-1].flatten(2).mT if isinstance(features, list) else features  # (B, N, C)
        tokens = tokens.detach()[: self.per_step, -(math.prod(grid) if keep is None else keep.shape[1]) :]  # without register tokens
        count = tokens.shape[1]
        chosen = (torch.arange(min(count, max(2, self.per_step // len(tokens))), device=x.device) * _stride(count) + self.step) % count
        patches = tokens[:, chosen].float()
        self._keep("pooled", tokens.float().mean(1))
        self._keep("patches", patches.flatten(0, 1))
        within, between = health.patch_variances(patches)
        self._count("patch_variance_within", within)
        if len(tokens) > 1:
            self._count("patch_variance_between", between)
        if keep is not None or count == math.prod(grid):
            index = keep[: len(tokens), chosen] if keep is not None else chosen.expand(len(tokens), -1)
            place = torch.stack((index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]), -1)
            self._keep("positions", place.flatten(0, 1))

    def _keep(self, name: str, vectors: Tensor) -> None:
        self.vectors.setdefault(name, []).append(vectors.detach()[: self.per_step].float())

    def _count(self, name: str, value: Tensor | float) -> None:
        number, total = self.sums.get(name, (0, 0.0))
        self.sums[name] = (number + 1, total + value)

    def _figures(self) -> dict[str, float]:
        """Of what was collected; groups that hold enough vectors are judged and emptied."""
        found: dict[str, float] = {}
        ready = {name: torch.cat(list_) for name, list_ in self.vectors.items() if sum(map(len, list_)) >= FEWEST}
        positions = ready.pop("positions", None)
        for name, vectors in ready.items():
            x = vectors[-VECTORS:].cpu()
            finite = x.isfinite().all(1)
            x = x[finite]
            if len(x) < FEWEST:
                continue
            values = health.singular_values(x)
            found[f"{name}/std"], found[f"{name}/cosine"] = health.spread(x).item(), health.mean_cosine(x).item()
            found[f"{name}/rank_me"], found[f"{name}/dimensions"] = health.rank_me(values).item(), health.dimension_share(values).item()
            found[f"{name}/dead"], found[f"{name}/rank_share"] = health.dead_share(x).item(), found[f"{name}/rank_me"] / min(x.shape)
            found[f"{name}/directions"] = health.directions(x).item()
            if name == "patches" and positions is not None:
                found["position_r2"] = health.position_r2(x, positions[-VECTORS:].cpu()[finite]).item()
        for name in [*ready, "positions"] if "patches" in ready else ready:
            self.vectors.pop(name, None)
        for name, (number, *sums) in list(self.sums.items()):
            group = name.removesuffix(" classes")
            if name not in self.sums:
                continue  # reported with its group
            if group == name and f"{name.rpartition('/')[0]} classes" not in self.sums:
                found[name] = float(self.sums.pop(name)[1]) / number
            elif group != name and number >= FEWEST:
                total, hits = (value.cpu() for value in sums)
                scale = math.log(len(total))
                entropies = {key: self.sums.pop(f"{group}/{key}") for key in ("H_cond", "KL") if f"{group}/{key}" in self.sums}
                means = {key: float(value) / many for key, (many, value) in entropies.items()}
                marginal = health.marginal_entropy(total / number).item()
                found |= {f"{group}/H_cond": means["H_cond"] / scale, f"{group}/H_marg": marginal / scale, f"{group}/MI": marginal - means["H_cond"]}
                found |= {f"{group}/prototypes": (hits > 0).float().mean().item()} | ({f"{group}/KL": means["KL"]} if "KL" in means else {})
                del self.sums[name]
        return found

    def _judge(self, figures: dict[str, float], steps: dict[str, list[float]], wait: float) -> dict[str, str | None]:
        """What is wrong, by kind; None where a kind was checked and is fine, a kind that could not be checked is left out."""
        verdicts: dict[str, str | None] = {}
        if (signs := self._signs(figures)) is not None:
            verdicts["collapse"] = f"{COLLAPSE} ({'; '.join(signs)}); {REMEDY}; {KEPT}" if signs else None
        if "patches/dead" in figures:
            share = figures["patches/dead"]
            text = f"{share:.0%} of the encoder's output channels never change; lower the learning rate or the weight decay, and start anew"
            verdicts["dead units"] = text if share > 0.5 else None
        if wait or steps["skipped"]:
            text = f"the training waits for data {wait:.0%} of the time; use more loader processes (-o workers=...) or a faster disk"
            verdicts["data wait"] = text if wait > 0.3 else None
        if steps["skipped"]:
            share = sum(steps["skipped"]) / len(steps["skipped"])
            text = f"{share:.0%} of the steps were skipped because something was not finite; lower the learning rate or use -o precision=bf16"
            verdicts["skipped steps"] = text if share > 0.05 else None
        if steps["norm"]:
            norm, past = figures["gradient_norm"], self.history["norm"]
            usual = median(past) if past else norm
            exploded = norm > 10 * usual
            verdicts["gradient"] = f"the gradient norm is {norm:.3g}, usual is {usual:.3g}; lower the learning rate or -o clip=..." if exploded else None
            self.history["norm"] = (past if exploded else [*past, norm])[-20:]
            losses = [*self.history["loss"], sum(steps["loss"]) / len(steps["loss"])]
            self.history["loss"] = losses = [losses[0], *losses[1:][-10:]]
            flat = len(losses) == 11 and min(losses[1:]) >= losses[0]
            text = "the loss has not been below its first epoch's for ten epochs; raise or lower the learning rate, and look at the pictures of the input"
            if not self.declared:  # the loss of contrastive and distilling methods may rise while they learn
                verdicts["loss"] = text if flat else None
        return verdicts

    def _signs(self, figures: dict[str, float]) -> list[str] | None:
        """Signs of a collapse; None where too few vectors were there to tell.

        What a method declares (`add`, `add_logits`) is what it needs to keep apart, and has absolute limits. Where it declares
        nothing (reconstruction), only patches are looked at, whose rank is low by nature and whose spread depends on the
        network: they must be flat and have been twice as spread before.
        """
        groups = {name.rpartition("/")[0] for name in figures if name.endswith("/std")} - {"pooled", "patches"}
        informed = {name: value for name, value in figures.items() if name.endswith("/MI")}
        if groups or informed:
            narrow = {g for g in groups if figures[f"{g}/directions"] < DIRECTIONS and figures[f"{g}/rank_share"] < RANK}
            flat = [g for g in sorted(groups) if figures[f"{g}/std"] < SPREAD or g in narrow]
        elif "patches/std" in figures and not self.declared:
            spread = figures["patches/std"]
            self.history["spread"] = [max([spread, *self.history["spread"]])]
            flat = ["patches"] if spread < min(SPREAD, (1 - FALL) * self.history["spread"][0]) else []
        else:
            return None
        signs = [f"{g}: std*sqrt(D) {figures[f'{g}/std']:.2g}, RankMe {figures[f'{g}/rank_me']:.3g}, directions {figures[f'{g}/directions']:.3g}" for g in flat]
        return signs + [f"{name} {value:.2g} nat" for name, value in informed.items() if value < INFORMATION]


def _stride(count: int) -> int:
    """A step that visits every one of `count` places before the first is met again, far from 1."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _copied(part, device) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return type(value)(_copied(part, device) for part in value)  # type: ignore[call-arg]
    return value
