"""The plain implementation of DINOv2 that benchmarks compare with computes what ours computes."""

import pytest
import torch

from benchmarks import common, dinov2_gpu
from benchmarks.dinov2 import copy_weights, gflop, measure, work
from benchmarks.dinov2_plain import PlainDINOv2, PlainEncoder, PlainHead, PlainNetwork, sinkhorn
from nnssl_ext.nn.backbones.base import build_backbone
from nnssl_ext.nn.dinov2 import Crops, DINOv2Model, HeadSize, Network
from tests.make_data import tiny_plan

TEMPERATURE, PROTOTYPES = 0.05, 40
HIDDEN = {"every crop": (30, 40, 1, 64), "half of the crops": (20, 0, 0, 37)}


def both():
    """Our model and the plain one with equal weights; the teachers differ from the students."""
    torch.manual_seed(0)
    backbone = build_backbone(tiny_plan().configuration("3d_fullres"), "primus", 1)
    for block in backbone.net.eva.blocks:
        block.drop_path1, block.drop_path2 = torch.nn.Identity(), torch.nn.Identity()
    ours = DINOv2Model(Network(backbone, 2, HeadSize(32, 12, PROTOTYPES)), "centre").train()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    head = [PlainHead(48, 32, 12, PROTOTYPES) for _ in range(2)]
    plain = PlainDINOv2(PlainNetwork(PlainEncoder(16, 4, 48, 2, 2, 0.0), *head), PROTOTYPES, temperature=TEMPERATURE)
    copy_weights(ours.student, plain.student)
    copy_weights(ours.teacher.net, plain.teacher)
    return ours, plain


def crops(counts):
    generator = torch.Generator().manual_seed(1)
    mask = torch.stack([(torch.randperm(64, generator=generator) < count).reshape(4, 4, 4) for count in counts])
    large, small = (torch.randn(n, 1, size, size, size, generator=generator) for n, size in ((4, 16), (6, 8)))
    return Crops(large, mask, mask.flatten().nonzero()[:, 0], small)


@pytest.mark.parametrize("counts", HIDDEN.values(), ids=HIDDEN.keys())
def test_losses_and_gradients_are_ours_with_equal_weights(counts):
    ours, plain = both()
    batch = crops(counts)
    for _ in range(2):  # the centre has moved in the second one
        losses = ours(batch, TEMPERATURE).losses
        dino, ibot = plain.losses(batch.large, batch.small, batch.mask)
        assert losses["dino"].item() == pytest.approx(dino.item(), rel=1e-5) and losses["ibot"].item() == pytest.approx(ibot.item(), rel=1e-5)
        ours.centre.update()
        assert torch.allclose(ours.centre.value, plain.centre, atol=1e-7)
    (losses["dino"] + losses["ibot"]).backward()
    (dino + ibot).backward()
    expected = PlainNetwork(PlainEncoder(16, 4, 48, 2, 2, 0.0), *[PlainHead(48, 32, 12, PROTOTYPES) for _ in range(2)])
    for parameter in ours.student.parameters():
        parameter.data = parameter.grad
    copy_weights(ours.student, expected)
    for (name, parameter), gradient in zip(plain.student.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()) + 1e-7), name


def test_its_assignments_use_every_prototype_alike():
    torch.manual_seed(0)
    q = sinkhorn(torch.randn(60, 12), 0.5, iterations=50)
    assert torch.allclose(q.sum(1), torch.ones(60)) and torch.allclose(q.sum(0), torch.full((12,), 5.0), rtol=1e-3)


def test_a_step_lowers_the_loss_and_moves_the_teacher_a_little():
    _, plain = both()
    batch = crops(HIDDEN["every crop"])
    before, weight = sum(plain.losses(batch.large, batch.small, batch.mask)).item(), plain.teacher.encoder.mask_token.clone()
    old = plain.student.encoder.mask_token.detach().clone()
    for _ in range(5):
        plain.step(batch.large, batch.small, batch.mask)
    assert sum(plain.losses(batch.large, batch.small, batch.mask)).item() < before
    moved, toward = plain.teacher.encoder.mask_token - weight, old - weight
    assert 0.02 < float((moved @ toward) / (toward @ toward)) < 0.06  # 1 - .992^5 of the way


def test_fewer_hidden_tokens_are_fewer_operations_and_a_full_head_has_the_most():
    counted = [gflop(work(side, ("quick", masks, 0.0)), 1) for side, masks in (("ours", "default"), ("ours", "same"), ("peer", "same"))]
    assert 0 < counted[0] < counted[1] < counted[2]


@pytest.mark.slow
def test_the_benchmark_runs_and_names_every_figure(monkeypatch):
    monkeypatch.setattr(common, "THREADS", 1)
    result = measure("quick", repetitions=1).as_dict()
    assert result["ratio"] > 0 and result["detail"]["same_masks"]["ratio"] > 0
    assert set(result["detail"]["above_base_share"]) == {"ours default", "ours same"}
    assert 0 < result["detail"]["heads_share"]["ours"] < result["detail"]["heads_share"]["ours_same_masks"] < 1
    assert 0.15 <= result["detail"]["hidden_share"]["ours"] <= 0.3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_throughput_on_a_card_is_measured_with_the_loader(device, monkeypatch):
    monkeypatch.setattr(dinov2_gpu, "WARM_UP", 1)
    found = dinov2_gpu.throughput(common.NoiseStore((32, 32, 32)), device, "nano", 16, batch=2, steps=2, workers=0, compiled=False)
    assert found["samples_per_s"] > 0 and 0 < found["data_wait_share"] < 1 and found["gflop_per_step"] > 0
