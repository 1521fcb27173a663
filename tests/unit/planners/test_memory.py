"""Estimated memory against what the allocator hands out during real training steps."""

import json

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nnssl_ext.nn.backbones.primus import PrimusBackbone
from nnssl_ext.nn.backbones.primus_v2 import PrimusV2Backbone
from nnssl_ext.nn.backbones.resenc import ResEncBackbone
from nnssl_ext.nn.backbones.resenc_slices import ResEncSlicesBackbone
from nnssl_ext.nn.backbones.segformer3d import SegFormer3DBackbone
from nnssl_ext.nn.pixel_head import Reconstruction
from nnssl_ext.planners import primus, resenc, segformer3d
from nnssl_ext.planners.memory import Footprint, precision
from nnssl_ext.trainers.mae import MaskedUNet


def step_peak_gb(model, forward, optimizer, image, dtype, trace):
    """Weights, gradients and moments, and the most that one further step holds beside them."""

    def step():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(image).float().square().mean()
        loss.backward()
        optimizer.step()

    step()  # gradients and moments exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    found.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    kept = [p.grad for p in model.parameters() if p.grad is not None] + [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return (sum(t.nbytes for t in [*model.parameters(), *kept]) + np.cumsum(changes).max()) / 1e9


@pytest.mark.parametrize("target", [4.0, 24.0])
@pytest.mark.parametrize(("size", "spacing", "patch"), [("nano", (1, 1, 1), (32, 48, 48)), ("tiny", (4, 1, 1), (8, 48, 48))])
def test_the_memory_of_a_unet_in_training_is_estimated_within_thirty_percent(size, spacing, patch, target, tmp_path):
    network = resenc.network(spacing, patch, size, target, 2)
    model = MaskedUNet(ResEncBackbone(1, patch, network.class_name, dict(network.kwargs), network.imports))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.99, nesterov=True)
    image = torch.randn(network.batch_size, 1, *patch)
    measured = step_peak_gb(
        model, lambda x: model.head(model.backbone.decode(model.backbone.pyramid(x))), optimizer, image, precision(target), tmp_path / "trace.json"
    )
    assert network.batch_size == 2 and network.memory_gb == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("target", [4.0, 24.0])
@pytest.mark.parametrize(("size", "spacing", "patch"), [("nano", (1, 1), (256, 192)), ("tiny", (2, 1), (96, 160))])
def test_the_memory_of_a_unet_on_slices_is_estimated_within_thirty_percent(size, spacing, patch, target, tmp_path):
    network = resenc.network(spacing, patch, size, target, 4)
    backbone = ResEncSlicesBackbone(1, (1, *patch), network.class_name, dict(network.kwargs), network.imports)
    optimizer = torch.optim.SGD(backbone.parameters(), 1e-3, momentum=0.99, nesterov=True)
    image = torch.randn(network.batch_size, 1, 1, *patch)
    measured = step_peak_gb(backbone, lambda x: backbone.decode(backbone.pyramid(x)), optimizer, image, precision(target), tmp_path / "trace.json")
    assert network.batch_size == 4 and network.memory_gb == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("target", [4.0, 24.0])
@pytest.mark.parametrize(
    ("backbone", "size", "spacing", "patch"),
    [
        (PrimusBackbone, "nano", (1, 1, 1), (64, 64, 64)),
        (PrimusBackbone, "tiny", (4, 1, 1), (12, 96, 64)),
        (PrimusV2Backbone, "nano", (1, 1, 1), (32, 32, 32)),
        (PrimusV2Backbone, "tiny", (1, 1, 1), (32, 48, 40)),
    ],
)
def test_the_memory_of_a_transformer_in_training_is_estimated_within_thirty_percent(backbone, size, spacing, patch, target, tmp_path):
    network = (primus.network if backbone is PrimusBackbone else primus.network_v2)(spacing, patch, size, target, 2)
    model = backbone(1, patch, network.class_name, dict(network.kwargs), network.imports)
    optimizer = torch.optim.AdamW(model.parameters())
    image = torch.randn(network.batch_size, 1, *patch)
    measured = step_peak_gb(model, model.tokens, optimizer, image, precision(target), tmp_path / "trace.json")
    assert network.batch_size == 2 and network.memory_gb == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("target", [4.0, 24.0])
@pytest.mark.parametrize(("size", "spacing", "patch"), [("nano", (1, 1, 1), (64, 64, 64)), ("tiny", (4, 1, 1), (16, 96, 64))])
def test_the_memory_of_a_segformer_in_training_is_estimated_within_thirty_percent(size, spacing, patch, target, tmp_path):
    network = segformer3d.network(spacing, patch, size, target, 2)
    model = Reconstruction(SegFormer3DBackbone(1, patch, network.class_name, dict(network.kwargs), network.imports), 1)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    image = torch.randn(network.batch_size, 1, *patch)
    measured = step_peak_gb(model, model, optimizer, image, precision(target), tmp_path / "trace.json")
    assert network.batch_size == 2 and network.memory_gb == pytest.approx(measured, rel=0.3)


def test_the_largest_batch_that_fits_is_planned_and_a_single_sample_at_least():
    footprint = Footprint(parameters=1e6, bytes_per_parameter=16, units=1e6, bytes_per_unit={"fp32": 100.0, "bf16": 50.0})
    assert footprint.batch(0.517, 64) == (5, 0.516)  # 0.016 GB for the weights, 0.1 GB for each sample
    assert footprint.batch(0.515, 64) == (4, 0.416)
    assert footprint.batch(0.517, 3) == (3, 0.316)
    assert footprint.batch(0.05, 64) == (1, 0.116)
    assert footprint.batch(6.017, 200) == (120, 6.016)  # a card: half of the bytes
