"""Every method's losses once more, with plain loops: what its formula says, one element after the other.

An oracle takes the trainer (in evaluation mode, fp64 or fp32) and a batch and returns the named losses that `step` must return.
It may call the trainer's model for features and predictions, but none of the package's losses, masks or token orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from nnssl_ext.data.loader import Batch, ViewBatch
from nnssl_ext.trainers.base import Losses, SSLTrainer

Oracle = Callable[[SSLTrainer, Batch], Losses]


def hidden_voxels(view: ViewBatch) -> Tensor:
    """The mask of a view for every voxel, (B, z, y, x) bool; blocks have equal edges but for the last of an axis."""
    assert view.mask is not None
    shape, grid = view.image.shape[2:], view.mask.shape[1:]
    edges = [math.ceil(size / cells) for size, cells in zip(shape, grid)]
    hidden = torch.zeros(len(view.image), *shape, dtype=torch.bool)
    for place in product(*map(range, shape)):
        hidden[(slice(None), *place)] = view.mask[(slice(None), *(p // e for p, e in zip(place, edges)))]
    return hidden


def mae(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Mean over hidden voxels and channels of the squared error of the whole reconstruction."""
    view = batch["image"]
    prediction, hidden = trainer.model.reconstruct(view.image, view.mask), hidden_voxels(view)
    terms = []
    for sample, z, y, x in hidden.nonzero().tolist():
        for channel in range(view.image.shape[1]):
            terms.append((prediction[sample, channel, z, y, x] - view.image[sample, channel, z, y, x]) ** 2)
    return {"total": _mean(terms)}


def croco(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Mean over hidden voxels and channels of the squared error of the completed view, over the variance of the voxel's token and channel."""
    first, terms = batch["first"], []
    completed = trainer.model.reconstruct(first.image, first.mask, batch["second"].image, trainer.places(batch))
    edges = [size // cells for size, cells in zip(first.image.shape[2:], first.mask.shape[1:])]
    for sample, *cell in first.mask.nonzero().tolist():
        token = tuple(slice(c * e, (c + 1) * e) for c, e in zip(cell, edges))
        for channel in range(first.image.shape[1]):
            values, found = first.image[(sample, channel, *token)], completed[(sample, channel, *token)]
            variance = sum((value - values.mean()) ** 2 for value in values.flatten()) / values.numel() + 1e-6
            terms += [(found[place] - values[place]) ** 2 / variance for place in product(*map(range, edges))]
    return {"total": _mean(terms)}


def gvsl(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Voxel by voxel: where the moving crop is read, the squared correlation around it, the error of the restored crop; differences of the flow."""
    target, moving = batch["target"].image, batch["moving"].image
    restored, flow, displacement = trainer.model(batch["image"].image, moving)
    errors = [(restored[place] - target[place]) ** 2 for place in product(*map(range, target.shape))]
    similarity, restoration, smoothness = 1 - _correlation(target, moving, displacement), _mean(errors), _slopes(flow)
    return {"total": similarity + restoration + smoothness, "similarity": similarity, "restoration": restoration, "smoothness": smoothness}


def _correlation(target: Tensor, moving: Tensor, displacement: Tensor) -> Tensor:
    """Mean squared correlation around each voxel of a volume and a moved one."""
    correlations = []
    for i, channel in product(*map(range, target.shape[:2])):
        one, other = target[i, channel], _trilinear(moving[i, channel], displacement[i])
        spread = [1e-4 * ((x - x.mean()) ** 2).mean() + 1e-10 for x in (one, other)]
        for place in product(*map(range, target.shape[2:])):
            window = tuple(slice(max(0, p - 4), p + 5) for p in place)
            a, b = one[window] - one[window].mean(), other[window] - other[window].mean()
            correlations.append((a * b).mean() ** 2 / (((a * a).mean() + spread[0]) * ((b * b).mean() + spread[1])))
    return _mean(correlations)


def _slopes(flow: Tensor) -> Tensor:
    """Mean squared difference of neighbours, averaged over the axes."""
    axes = (2, 3, 4)
    return _mean([_mean([(flow.select(axis, k + 1) - flow.select(axis, k)).square().mean() for k in range(flow.shape[axis] - 1)]) for axis in axes])


def _trilinear(volume: Tensor, displacement: Tensor) -> Tensor:
    """A volume (z, y, x) where its displacement (3, z, y, x) leads to; outside of it the nearest voxel counts."""
    grid = torch.meshgrid(*(torch.arange(n) for n in volume.shape), indexing="ij")
    return _interpolated(volume, torch.stack([axis + offset for axis, offset in zip(grid, displacement)]))


def _interpolated(volume: Tensor, places: Tensor) -> Tensor:
    """A volume (z, y, x) at places (3, ...); outside of it the nearest voxel counts."""
    places = torch.stack([place.clamp(0, n - 1) for place, n in zip(places, volume.shape)])
    first = [place.detach().floor().long().clamp(max=n - 2) for place, n in zip(places, volume.shape)]
    terms = []
    for corner in product((0, 1), repeat=3):
        z, y, x = (place - low if c else 1 - (place - low) for place, low, c in zip(places, first, corner))
        terms.append(z * y * x * volume[tuple(low + c for low, c in zip(first, corner))])
    return _sum(terms)


def registration_pretext(trainer: SSLTrainer, batch: Batch) -> Losses:
    """The velocity, doubled up seven times, as the displacement of each voxel; then voxel by voxel as GVSL's, and how far off the known ones are."""
    fixed, moving, true = (batch[name].image for name in ("fixed", "moving", "displacement"))
    velocity = trainer.model(fixed, moving)[0]
    steps = velocity / 128
    for _ in range(7):
        steps = torch.stack([step + torch.stack([_trilinear(component, step) for component in step]) for step in steps])
    shape, coarse, lengths = fixed.shape[2:], velocity.shape[2:], []
    grid = torch.meshgrid(*(torch.arange(n, dtype=velocity.dtype) for n in shape), indexing="ij")
    to_coarse = torch.stack([((axis + 0.5) * cells / n - 0.5) for axis, cells, n in zip(grid, coarse, shape)])
    displacement = torch.stack([torch.stack([_interpolated(u, to_coarse) * n / cells for u, n, cells in zip(step, shape, coarse)]) for step in steps])
    for i in range(len(fixed)):
        if batch["fixed"].cases[i] == batch["moving"].cases[i]:
            lengths.append(sum(((displacement[i, axis] - true[i, axis]) ** 2 for axis in range(3)), torch.zeros(())).sqrt().mean())
        else:
            lengths.append(torch.zeros(()))
    similarity, smoothness, end_point = 1 - _correlation(fixed, moving, displacement), _slopes(velocity), _mean(lengths)
    return {"total": similarity + smoothness + end_point, "similarity": similarity, "smoothness": smoothness, "end_point": end_point}


def models_genesis(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Mean over all voxels and channels of the squared error of what the corrupted crop is restored to."""
    restored, target = trainer.model(batch["image"].image), batch["target"].image
    return {"total": _mean([(restored[place] - target[place]) ** 2 for place in product(*map(range, target.shape))])}


def recon_contrast(trainer: SSLTrainer, batch: Batch) -> Losses:
    """r + c * r: mean absolute error of the first reconstruction, and the contrast of both, in double precision."""
    target = batch["target"].image
    first, second = (trainer.model(batch[name].image) for name in ("image_0", "image_1"))
    error = _mean([(first[place] - target[place]).abs() for place in product(*map(range, target.shape))])
    contrast = _contrast(first.flatten(1), second.flatten(1), 0.005, [trainer.store.subject(case) for case in batch["target"].cases])
    return {"total": error + contrast * error, "reconstruction": error, "contrast": contrast}


def sim_mim(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Mean over hidden voxels and channels of the absolute error."""
    view = batch["image"]
    prediction = trainer.model(view.image, view.mask)
    terms = []
    for sample, z, y, x in hidden_voxels(view).nonzero().tolist():
        for channel in range(view.image.shape[1]):
            error = prediction[sample, channel, z, y, x] - view.image[sample, channel, z, y, x]
            terms.append(error if error > 0 else -error)
    return {"total": _mean(terms)}


def swin_unetr(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Of both versions: absolute error to the clean crop that is turned as the affine says, -log of the share of the right turn, contrast of the pairs."""
    clean, count = batch["target"].image, len(batch["target"].image)
    p, q = (axis + 1 for axis in trainer.turning.plane)
    errors, told, versions = [], [], []
    for name in ("image_0", "image_1"):
        seen = batch[name].image.clone()
        for i, *place in batch[name].mask.nonzero().tolist():
            seen[(i, slice(None), *place)] = clean[(i + 1 if i % 2 == 0 and i + 1 < count else i - 1, slice(None), *place)]
        versions.append(seen)
    found = [part.chunk(2) for part in trainer.model(torch.cat(versions))]  # together: a U-Net's averages are normalised over all
    for name, restored, logits in zip(("image_0", "image_1"), *found[:2]):
        for i in range(count):
            between = torch.linalg.inv(batch["target"].affine[i, :, :3]) @ batch[name].affine[i, :, :3]
            candidates = [torch.tensor(np.linalg.matrix_power(_quarter(trainer.turning.plane), k)) for k in range(4)]
            (times,) = [k for k, candidate in enumerate(candidates) if torch.allclose(candidate, between)]
            target = clean[i]
            for _ in range(times):
                target = target.transpose(p, q).flip(p)
            errors += [(restored[i][place] - target[place]).abs() for place in product(*map(range, target.shape))]
            told.append(-(logits[i, times].exp() / _sum([value.exp() for value in logits[i]])).log())
    contrast = _contrast(*found[2], 0.5, [trainer.store.subject(case) for case in batch["target"].cases])
    error, turn = _mean(errors), _mean(told)
    return {"total": error + turn + contrast, "reconstruction": error, "rotation": turn, "contrast": contrast}


def pixel_cluster(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Voxel by voxel: where it lies in the other crop, if it does, and minus the log of the share of what that crop is labelled there."""
    losses = []
    for name, other in (("first", "second"), ("second", "first")):
        shares = trainer.model(batch[name].image).exp()
        shares = shares / shares.sum(1, keepdim=True)
        for i in range(len(shares)):
            matrices = [np.vstack((view.affine[i].numpy(), (0, 0, 0, 1))) for view in (batch[name], batch[other])]
            carry, labels, terms = np.linalg.inv(matrices[1]) @ matrices[0], batch[f"{other}_labels"].image[i, 0], []
            for place in product(*map(range, labels.shape)):
                there = [round(v) for v in (carry @ (*place, 1))[:3].tolist()]
                if all(0 <= p < n for p, n in zip(there, labels.shape)) and labels[tuple(there)] > 0:
                    terms.append(-shares[(i, int(labels[tuple(there)]) - 1, *place)].log())
            losses.append(_mean(terms))
    return {"total": _mean(losses)}


def _quarter(plane: tuple[int, int]) -> np.ndarray:
    """Where a voxel of a volume that is turned once comes from, about the middle."""
    matrix = np.eye(3)
    matrix[plane[0], plane[0]] = matrix[plane[1], plane[1]] = 0
    matrix[plane[0], plane[1]], matrix[plane[1], plane[0]] = 1, -1
    return matrix


def voco(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Overlaps of boxes, cosines and logarithms of every target and base crop, one after the other."""
    model, names = trainer.model, list(batch)
    student, teacher = model(torch.stack([batch[name].image for name in names]))
    targets, bases = ([number for number, name in enumerate(names) if name.startswith(kind)] for kind in ("target", "base"))

    def faces(number: int, sample: int, axis: int) -> tuple[float, float]:
        view = batch[names[number]]
        ends = sorted(float(view.affine[sample, axis, axis]) * (place - 0.5) + float(view.affine[sample, axis, 3]) for place in (0, view.image.shape[2 + axis]))
        return ends[0], ends[1]

    def overlap(target: int, base: int, sample: int) -> float:
        share = 1.0
        for axis in range(3):
            (low, high), (first, last) = (faces(number, sample, axis) for number in (target, base))
            share *= max(0.0, min(high, last) - max(low, first)) / (high - low)
        return share

    def row(said: list[Tensor], wanted: list[Tensor]) -> Tensor:
        near = [-o * (1 - (o - s).abs() + 1e-6).clamp(max=1).log() for s, o in zip(said, wanted)]
        far = [-(1 - s + 1e-6).clamp(max=1).log() for s, o in zip(said, wanted) if o == 0]
        return (_sum(near) / _sum(wanted) if any(o > 0 for o in wanted) else 0) + (_mean(far) if far else 0)

    def like(a: Tensor, b: Tensor) -> Tensor:
        return _cosine(a, b).clamp(min=0, max=1)

    intra, inter, crowding = [], [], []
    for sample in range(len(student)):
        other = (sample + 1) % len(student)
        for target in targets:
            shares = [student.new_tensor(overlap(target, base, sample)) for base in bases]
            intra.append(row([like(student[sample, target], teacher[sample, base]) for base in bases], shares))
            told, heard = ([like(x[sample, target], teacher[other, base]) for base in bases] for x in (student, teacher))
            inter.append(row(told, heard))
        crowding += [like(student[sample, i], student[sample, j]) ** 2 for i in bases for j in bases if i < j]
    losses = {"intra": _mean(intra), "inter": _mean(inter), "crowding": _mean(crowding)}
    return {"total": _sum(list(losses.values())), **losses}


def volume_fusion(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Cross-entropy and Dice of the fused volumes, voxel by voxel."""
    foreground, background, label = (batch[name].image for name in ("foreground", "background", "label"))
    fused, count = background.clone(), trainer.config.classes
    places = list(product(*map(range, label.shape[2:])))
    for b, (z, y, x) in product(range(len(label)), places):
        weight = float(label[b, 0, z, y, x]) / (count - 1)
        fused[b, :, z, y, x] = weight * foreground[b, :, z, y, x] + (1 - weight) * background[b, :, z, y, x]
    logits, logs, means = trainer.model(fused), [], []
    for b in range(len(label)):
        shares, dices, classes = [], [], [int(label[b, 0, z, y, x]) for z, y, x in places]
        for (z, y, x), k in zip(places, classes):
            powers = logits[b, :, z, y, x].exp()
            shares.append(powers / powers.sum())
            logs.append(shares[-1][k].log())
        for k in sorted(set(classes)):
            hit = _sum([share[k] for share, true in zip(shares, classes) if true == k])
            dices.append(2 * hit / (_sum([share[k] for share in shares]) + classes.count(k)))
        means.append(_mean(dices))
    return {"total": -_mean(logs) + 1 - _mean(means)}


def sim_clr(trainer: SSLTrainer, batch: Batch) -> Losses:
    """-log of the share of the other crop among it and the crops of all other subjects."""
    first, second = (trainer.model(batch[name].image) for name in ("first", "second"))
    return {"total": _contrast(first, second, 0.5, [trainer.store.subject(case) for case in batch["first"].cases])}


def sim_siam_iou(trainer: SSLTrainer, batch: Batch) -> Losses:
    """-cosine of each prediction and the other crop's projection, which gets no gradient."""
    model = trainer.model
    a, b = (model.projector(model.backbone.pooled(batch[name].image)) for name in ("first", "second"))
    pairs = [(model.predictor(one), other.detach()) for one, other in ((a, b), (b, a))]
    return {"total": -_mean([_cosine(p, z) for pair in pairs for p, z in zip(*pair)])}


def dino_iou(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Cross-entropy of what the teacher says of a large crop and the student of each other crop, sample by sample."""
    model, views = trainer.model, [view.image for view in batch.values()]
    first, last = trainer.settings.temperatures
    tau = first + (last - first) * trainer.next_step / trainer.total_steps

    def cosines(net, images: list[Tensor]) -> list[list[Tensor]]:
        features = [[*net.backbone.pyramid(image)[-1].flatten(2).mean(2)] for image in images]
        if trainer.family == "resenc":
            together = [x for view in features for x in view]
            mean = _mean(together)
            spread = (_mean([(x - mean) ** 2 for x in together]) + 1e-5).sqrt()
            features = [[(x - mean) / spread for x in view] for view in features]
        vectors = [[net.head.mlp(x[None])[0] for x in view] for view in features]
        return [[torch.stack([_cosine(vector, row) for row in net.head.prototypes]) for vector in view] for view in vectors]

    with torch.no_grad():
        told = [[((t - model.centre.value) / tau).softmax(0) for t in view] for view in cosines(model.teacher.net, views[:2])]
    heard = [[(s / 0.1).log_softmax(0) for s in view] for part in (views[:2], views[2:]) for view in cosines(model.student, part)]
    terms = []
    for t, s, sample in product(range(2), range(len(views)), range(len(views[0]))):
        if t != s:
            terms.append(-(told[t][sample] * heard[s][sample]).sum())
    return {"total": _mean(terms)}


def pcrl_v2(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Every scale, small crop, sample and voxel, one after the other."""
    model, target = trainer.model, batch["target"].image
    names = ["global_0", "global_1", *(name for name in batch if name.startswith("local_"))]
    maps = {name: model.maps(batch[name].image) for name in names}
    alike: dict[str, list[Tensor]] = {"global": [], "local": []}
    errors: list[Tensor] = []
    for number, (compare, restore) in enumerate(zip(model.comparisons, model.restorations)):
        z = {name: compare.projector(maps[name][number].flatten(2).mean(2)) for name in names}
        p = {name: compare.predictor(z[name]) for name in names}

        def cs(a: str, b: str, z=z, p=p) -> Tensor:
            return _mean([-(_cosine(p[a][i], z[b][i].detach()) + _cosine(p[b][i], z[a][i].detach())) / 2 for i in range(len(target))])

        alike["global"].append(cs("global_0", "global_1"))
        alike["local"].append(_sum([cs("global_0", name) + cs("global_1", name) for name in names[2:]]) / (2 * len(names[2:])))
        errors.append(_squared(restore(maps["global_0"][number]), target))
    losses = {"restoration": _squared(model.last(maps["global_0"][-1]), target), "middle": _mean(errors)}
    losses |= {name: _mean(terms) for name, terms in alike.items()}
    beta = (1 + math.cos(math.pi * trainer.next_step / trainer.total_steps)) / 2
    return {"total": losses["restoration"] + losses["global"] + beta * losses["middle"] + losses["local"], **losses}


def _squared(restored: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of an image's voxels and the means of the target's blocks that they cover."""
    edges = [n // m for n, m in zip(target.shape[2:], restored.shape[2:])]
    terms = []
    for b, c, *place in product(*map(range, restored.shape)):
        block = target[(b, c, *(slice(p * edge, (p + 1) * edge) for p, edge in zip(place, edges)))]
        terms.append((restored[(b, c, *place)] - block.mean()) ** 2)
    return _mean(terms)


def toy_ema(trainer: SSLTrainer, batch: Batch) -> Losses:
    """1 - cosine of the prediction and the teacher's projection."""
    model, (a, b) = trainer.model, _pair(batch)
    with torch.no_grad():
        targets = model.teacher.net(b)
    return {"total": 1 - _mean([_cosine(p, t) for p, t in zip(model.predictor(model.student(a)), targets)])}


def toy_predictor(trainer: SSLTrainer, batch: Batch) -> Losses:
    """-cosine of the prediction and the other view's projection, which gets no gradient."""
    model, (a, b) = trainer.model, _pair(batch)
    return {"total": -_mean([_cosine(p, z) for p, z in zip(model.predictor(model.student(a)), model.student(b).detach())])}


def toy_queue(trainer: SSLTrainer, batch: Batch) -> Losses:
    """-log of the key's share of exp(cosine / 0.2) among key and queue."""
    model, (a, b) = trainer.model, _pair(batch)
    with torch.no_grad():
        keys = model.teacher.net(b)
    terms = []
    for query, key in zip(model.student(a), keys):
        scores = [(_cosine(query, other) / 0.2).exp() for other in (key, *model.queue.to(key.dtype))]
        terms.append(-(scores[0] / _sum(scores)).log())
    return {"total": _mean(terms)}


def toy_centre(trainer: SSLTrainer, batch: Batch) -> Losses:
    """-sum over prototypes of softmax((t - c) / 0.04) * log softmax(s / 0.1)."""
    model, (a, b) = trainer.model, _pair(batch)
    with torch.no_grad():
        teachers = model.teacher.net(b)
    terms = []
    for student, teacher in zip(model.student(a), teachers):
        s = [value / 0.1 for value in student]
        t = [(value - c) / 0.04 for value, c in zip(teacher, model.centre)]
        highest = max(t)
        weights = [(value - highest).exp() for value in t]
        normaliser = _sum([value.exp() for value in s]).log()
        terms.append(-_sum([w / _sum(weights) * (value - normaliser) for w, value in zip(weights, s)]))
    return {"total": _mean(terms)}


def dinov2(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Cross-entropies of every pair of views and of every hidden token, one after the other; targets by Sinkhorn on probabilities, not in logarithms."""
    model, large = trainer.model, [batch["global_0"], batch["global_1"]]
    small = [view.image for name, view in batch.items() if name.startswith("local_")]
    first, last = trainer.settings.temperatures
    tau = first + (last - first) * trainer.next_step / trainer.total_steps
    teacher, student = model.teacher.net, model.student

    def logits(head, x: Tensor) -> Tensor:
        z = head(x[None])[0]
        return torch.stack([_sum(list(z * row)) / row.square().sum().sqrt() for row in head.prototypes])

    with torch.no_grad():
        told = [teacher(view.image) for view in large]
        said = [[((logits(teacher.dino_head, x) - model.centre.value) / tau).softmax(0) for x in summaries] for summaries, _ in told]
    seen = [student(view.image, view.mask) for view in large]
    heard = [[(logits(student.dino_head, x) / 0.1).log_softmax(0) for x in summaries] for summaries in [s for s, _ in seen] + [student(x)[0] for x in small]]
    pairs = [(i, j) for i in range(2) for j in range(len(heard)) if i != j]
    dino = _mean([-(said[i][b] * heard[j][b]).sum() for i, j in pairs for b in range(len(heard[0]))])

    places = [(v, b, n) for v, view in enumerate(large) for b, mask in enumerate(view.mask.flatten(1).tolist()) for n, hidden in enumerate(mask) if hidden]
    with torch.no_grad():
        scores = torch.stack([logits(teacher.ibot_head, told[v][1][b, n]) for v, b, n in places]).double()
        shares = ((scores - scores.max()) / tau).exp()
        for _ in range(3):
            shares = shares / shares.sum(0)
            shares = shares / shares.sum(1, keepdim=True)
    terms = []
    for target, (v, b, n) in zip(shares, places):
        guess = (logits(student.ibot_head, seen[v][1][b, n]) / 0.1).log_softmax(0)
        terms.append(-(target.to(guess.dtype) * guess).sum() / sum(place[:2] == (v, b) for place in places))
    ibot = _sum(terms) / (2 * len(large[0].image))
    return {"total": dino + ibot, "dino": dino, "ibot": ibot}


def patch_cluster(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Places from the first to the last cell centre that both crops have, axis by axis; each vector's cross-entropy, one after the other."""
    model, views = trainer.model, [batch["first"], batch["second"]]
    maps = [model.backbone.pyramid(view.image)[-1] for view in views]
    shape, edges, vectors = maps[0].shape[2:], trainer.backbone.strides[-1], [[], []]
    for sample in range(len(maps[0])):
        cells: list[list[list[float]]] = [[], []]
        for axis, (n, edge) in enumerate(zip(shape, edges)):
            lines = [(float(view.affine[sample, axis, axis]), float(view.affine[sample, axis, 3])) for view in views]
            ends = [sorted(slope * ((cell + 0.5) * edge - 0.5) + start for cell in (0, n - 1)) for slope, start in lines]
            low, high = max(end[0] for end in ends), min(end[1] for end in ends)
            for view, (slope, start) in enumerate(lines):
                cells[view].append([((low + (high - low) * k / (n - 1) - start) / slope + 0.5) / edge - 0.5 for k in range(n)])
        for view in range(2):
            vectors[view] += [_unit(model.head.mlp(_read(maps[view][sample], place))) for place in product(*cells[view])]
    prototypes = [_unit(row) for row in model.head.prototypes]
    cosines = [torch.stack([torch.stack([(vector * prototype).sum() for prototype in prototypes]) for vector in view]) for view in vectors]
    terms = []
    for told, heard in (cosines, cosines[::-1]):
        shares = (told.detach().double() / 0.05).exp()
        for _ in range(3):
            shares = shares / shares.sum(0)
            shares = shares / shares.sum(1, keepdim=True)
        for target, row in zip(shares, heard):
            guess = (row / 0.1).exp()
            terms.append(-(target.to(row.dtype) * (guess / guess.sum()).log()).sum())
    return {"total": _mean(terms)}


def _read(values: Tensor, place: Sequence[float]) -> Tensor:
    """A map (C, d, h, w) between its cells, by the eight around a place."""
    first = [min(max(int(p), 0), n - 2) for p, n in zip(place, values.shape[1:])]
    terms = []
    for corner in product((0, 1), repeat=3):
        weight = math.prod(p - low if c else 1 - (p - low) for p, low, c in zip(place, first, corner))
        terms.append(weight * values[(slice(None), *(low + c for low, c in zip(first, corner)))])
    return _sum(terms)


def _unit(row: Tensor) -> Tensor:
    return row / row.square().sum().sqrt()


def bilateral_dense_contrast(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Place after place of a grid over what both crops share: its likeness to all that the other crop has, but for what lies about its mirror image."""
    model, views, sides = trainer.model, [batch["global_0"], batch["global_1"]], []
    maps = [model.backbone.pyramid(view.image) for view in views]
    decodes = "decoder" in model.backbone.supports
    maps = [[model.narrow(model.backbone.decode(levels))] for levels in maps] if decodes else maps
    cells = [(1, 1, 1)] if decodes else model.backbone.strides
    for sample in range(len(views[0].image)):
        affines = [np.vstack((view.affine[sample].numpy(), [0, 0, 0, 1])) for view in views]
        to_other, size, edges = np.linalg.inv(affines[1]) @ affines[0], views[0].image.shape[2:], cells[0]
        ends = [((e - 1) / 2, n - 1 - (e - 1) / 2) for n, e in zip(size, edges)]
        corners = [np.linalg.inv(to_other) @ [*corner, 1] for corner in product(*ends)]
        lows = [max(low, min(corner[axis] for corner in corners)) for axis, (low, _) in enumerate(ends)]
        highs = [min(high, max(corner[axis] for corner in corners)) for axis, (_, high) in enumerate(ends)]
        per_axis = next(n for n in (3, 2, 1) if math.prod(min(n, s // e) for s, e in zip(size, edges)) <= trainer.config.voxels)
        counts = [min(per_axis, n // e) for n, e in zip(size, edges)]
        lines = [[low + (high - low) * (k + 0.5) / n for k in range(n)] for low, high, n in zip(lows, highs, counts)]
        pairs = [(np.array(place), (to_other @ [*place, 1])[:3]) for place in product(*lines)]
        pairs = [pair for pair in pairs if all(low - 1e-6 <= p <= high + 1e-6 for p, (low, high) in zip(pair[1], ends))]
        case = [(affines[0] @ [*first, 1])[:3] for first, _ in pairs]
        mirror = [np.array([z, y, trainer.store.shape(0)[2] - 1 - x]) for z, y, x in case]  # of these cases, x of the array is that of the world
        vectors = []
        for levels, places in zip(maps, zip(*pairs)):
            read = [[_inner(level[sample], [(p + 0.5) / e - 0.5 for p, e in zip(place, cell)]) for level, cell in zip(levels, cells)] for place in places]
            vectors.append([_unit(model.projector(torch.cat(features))) for features in read])
        for asked, told in (vectors, vectors[::-1]):
            terms = []
            for i, vector in enumerate(asked):
                shares = {}
                for k, other in enumerate(told):
                    if k == i or 3.0 * np.linalg.norm(mirror[i] - case[k]) > trainer.config.radius:  # voxels of 3 mm
                        shares[k] = ((vector * other).sum() / trainer.config.temperature).exp()
                terms.append(-(shares[i] / _sum(list(shares.values()))).log())
            sides.append(_mean(terms))
    return {"total": _mean(sides)}


def _inner(values: Tensor, place: Sequence[float]) -> Tensor:
    """A map (C, d, h, w) between its cells; beyond the outermost ones what these hold."""
    return _read(values, [min(max(p, 0.0), n - 1.0) for p, n in zip(place, values.shape[1:])])


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["a"].image, batch["b"].image


def _contrast(a: Tensor, b: Tensor, temperature: float, subjects: list[str]) -> Tensor:
    """Mean over vectors of -log of the share of the other version among it and all vectors of other subjects, by the sum of exponentials."""
    vectors = [row.double() / row.double().square().sum().sqrt() for row in (*a, *b)]
    terms = []
    for i, anchor in enumerate(vectors):
        positive = ((anchor * vectors[i - len(a)]).sum() / temperature).exp()
        others = [((anchor * v).sum() / temperature).exp() for k, v in enumerate(vectors) if subjects[k % len(a)] != subjects[i % len(a)]]
        terms.append(-(positive / _sum([positive, *others])).log())
    return _mean(terms)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0] * 0
    for term in terms:
        total = total + term
    return total


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return _sum(terms) / len(terms)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    inner, aa, bb = (_sum([x * y for x, y in zip(*pair)]) for pair in ((a, b), (a, a), (b, b)))
    return inner / (aa * bb).sqrt()


def multi_mae(trainer: SSLTrainer, batch: Batch) -> Losses:
    """Modality by modality and sample by sample, where the sample has the modality: mean over hidden voxels of the squared error of the normalised block."""
    names = trainer.modalities
    image, grid = torch.cat([batch[name].image for name in names], 1), trainer.backbone.grid
    predicted = trainer.model.reconstruct(image, torch.stack([batch[name].mask for name in names], 1))
    losses: dict[str, Tensor] = {}
    for m, name in enumerate(names):
        errors = []
        for i, case in enumerate(batch[name].cases):
            terms = [image.new_zeros(())]
            if name in trainer.store.info(case)["modalities"]:
                terms = []
                for place in product(*map(range, grid)):
                    if batch[name].mask[(i, *place)]:
                        block = tuple(slice(p * t, (p + 1) * t) for p, t in zip(place, trainer.backbone.token))
                        values, guess = image[(i, m, *block)].flatten(), predicted[(i, m, *block)].flatten()
                        mean = _sum(list(values)) / len(values)
                        deviation = (_sum([(v - mean) ** 2 for v in values]) / len(values) + 1e-6).sqrt()
                        terms += [((v - mean) / deviation - g) ** 2 for v, g in zip(values, guess)]
            errors.append(_mean(terms))
        losses[name] = _mean(errors)
    return {"total": _sum(list(losses.values())), **losses}


ORACLES: dict[str, Oracle] = {
    "MultiMAETrainer": multi_mae,
    "MAETrainer": mae,
    "SimMIMTrainer": sim_mim,
    "VoCoTrainer": voco,
    "VolumeFusionTrainer": volume_fusion,
    "SparkMAETrainer": mae,
    "GVSLTrainer": gvsl,
    "RegistrationPretextTrainer": registration_pretext,
    "CroCo3DTrainer": croco,
    "ModelsGenesisTrainer": models_genesis,
    "PixelClusterTrainer": pixel_cluster,
    "ReconContrastTrainer": recon_contrast,
    "SwinUNETRPretrainTrainer": swin_unetr,
    "DINOv2Trainer": dinov2,
    "DINOv2HighResTrainer": dinov2,
    "SimCLRTrainer": sim_clr,
    "SimSiamIoUTrainer": sim_siam_iou,
    "DINOIoUTrainer": dino_iou,
    "PCRLv2Trainer": pcrl_v2,
    "PatchClusterTrainer": patch_cluster,
    "BilateralDenseContrastTrainer": bilateral_dense_contrast,
    "ToyEMATrainer": toy_ema,
    "ToyPredictorTrainer": toy_predictor,
    "ToyQueueTrainer": toy_queue,
    "ToyCentreTrainer": toy_centre,
}
