"""Reading a checkpoint, and the reference transform of its tensors."""

import pytest
import torch

from nnssl_ext.core.errors import UserError
from nnssl_ext.finetuning.pretrained import Pretrained, adapt
from nnssl_ext.nn.tokens import resize_positions
from nnssl_ext.trainers.checkpoint import load_checkpoint, save_checkpoint
from tests.make_nnunet import make_checkpoint


def test_adapt_changes_nothing_at_the_same_shape(tmp_path):
    for family in ("resenc", "primus"):
        pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", family, channels=2))
        adapted = adapt(pretrained, 2, pretrained.config.patch_size)
        assert adapted.resized == adapted.repeated == ()
        assert all(torch.equal(adapted.tensors[key], value) for key, value in pretrained.weights.items())


def test_adapt_changes_only_stem_and_positions(tmp_path):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "primus"))
    adapted = adapt(pretrained, 3, (32, 48, 32))
    assert adapted.repeated == ("down_projection.proj.weight",) and adapted.resized == ("eva.pos_embed",)
    assert torch.equal(adapted.tensors["eva.pos_embed"], resize_positions(pretrained.weights["eva.pos_embed"], (4, 4, 4), (4, 6, 4)))
    others = pretrained.weights.keys() - {"down_projection.proj.weight", "eva.pos_embed"}
    assert all(torch.equal(adapted.tensors[key], pretrained.weights[key]) for key in others)


def test_positions_follow_the_grid_even_when_the_number_of_tokens_stays(tmp_path):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "primus"))
    adapted = adapt(pretrained, 1, (16, 64, 32))
    assert adapted.resized == ("eva.pos_embed",)
    assert not torch.equal(adapted.tensors["eva.pos_embed"], pretrained.weights["eva.pos_embed"])


def test_all_aliases_of_the_stem_are_repeated(tmp_path):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc"))
    adapted = adapt(pretrained, 2, (32, 32, 32))
    assert set(adapted.repeated) == {"encoder.stem.convs.0.conv.weight", "encoder.stem.convs.0.all_modules.0.weight"}


def test_the_identity_depends_on_the_weights_not_on_the_file(tmp_path):
    one = Pretrained.load(make_checkpoint(tmp_path / "a.pth", "resenc"))
    copy = Pretrained.load(make_checkpoint(tmp_path / "b.pth", "resenc"))
    other = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", transfer="encoder+decoder"))
    assert one.identity == copy.identity != other.identity
    one.weights["encoder.stem.convs.0.conv.weight"][0, 0, 0, 0, 0] += 1
    assert one.identity != copy.identity


def test_the_decoder_is_transferred_without_segmentation_layers_where_it_was_trained(tmp_path):
    keys = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "resenc", transfer="encoder+decoder")).weights
    assert any(key.startswith("decoder.stages") for key in keys) and any(key.startswith("decoder.transpconvs") for key in keys)
    assert not any("seg_layers" in key or key.startswith("decoder.encoder") for key in keys)


def test_nan_in_the_weights_is_refused(tmp_path):
    content = load_checkpoint(make_checkpoint(tmp_path / "c.pth", "primus"))
    content["network_weights"]["eva.pos_embed"][0, 0, 0] = float("nan")
    save_checkpoint(tmp_path / "nan.pth", content)
    with pytest.raises(UserError, match="NaN"):
        Pretrained.load(tmp_path / "nan.pth")


def test_a_checkpoint_without_a_plan_is_refused(tmp_path):
    content = load_checkpoint(make_checkpoint(tmp_path / "c.pth", "primus"))
    del content["plan"]
    save_checkpoint(tmp_path / "bare.pth", content)
    with pytest.raises(UserError, match="lacks plan"):
        Pretrained.load(tmp_path / "bare.pth")


def test_a_segformer_takes_a_patch_whose_deepest_map_is_one_cell_and_hands_over_its_decoder(tmp_path):
    pretrained = Pretrained.load(make_checkpoint(tmp_path / "c.pth", "segformer3d", transfer="encoder+decoder"))
    pretrained.check_patch_size((16, 16, 16))
    assert pretrained.modules == ("encoder.stem", "encoder.stages", "decoder.fuse", "decoder.norm", "decoder.stages")
    assert not any("seg_layers" in key for key in pretrained.weights)
    adapted = adapt(pretrained, 3, (64, 96, 32))
    assert adapted.resized == () and adapted.repeated == ("encoder.stem.projection.weight",)


@pytest.mark.parametrize(("family", "patch"), [("primus", (32, 36, 32)), ("resenc", (32, 36, 32)), ("resenc", (8, 8, 8)), ("segformer3d", (32, 40, 32))])
def test_impossible_patch_sizes_are_refused(tmp_path, family, patch):
    with pytest.raises(UserError, match="divisible|one voxel"):
        Pretrained.load(make_checkpoint(tmp_path / "c.pth", family)).check_patch_size(patch)
