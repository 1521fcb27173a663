import io
import json

import torch

from nnssl_ext.core.adaptation import AdaptationPlan, EncoderKeys, decoder_modules

KEYS = EncoderKeys("encoder.stages", "encoder.stem", ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"))
PLAN = AdaptationPlan("ResidualEncoderUNet", {"n_stages": 6}, ("norm_op",), "3d_fullres", (3.0, 1.0, 1.0), (32, 64, 64), 2, KEYS)

# the fields that nnssl's and nnU-Net's readers of adapted checkpoints know, and our schema version
FIELDS = {
    "schema_version",
    "architecture_plans",
    "pretrain_plan",
    "pretrain_num_input_channels",
    "recommended_downstream_patchsize",
    "key_to_encoder",
    "key_to_stem",
    "keys_to_in_proj",
    "key_to_lpe",
}


def test_the_fields_are_frozen():
    content = PLAN.as_dict()
    assert set(content) == FIELDS
    assert set(content["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    assert content["pretrain_plan"] == {"configurations": {"3d_fullres": {"spacing": [3.0, 1.0, 1.0], "patch_size": [32, 64, 64]}}}
    assert content["keys_to_in_proj"] == list(KEYS.in_proj)
    assert content["key_to_lpe"] is None


def test_a_preset_without_arguments_and_a_plan_without_spacing_are_allowed():
    content = AdaptationPlan(
        "PrimusS", None, None, "noresample", None, (64, 64, 64), 1, EncoderKeys("eva", "down_projection", ("a",), "eva.pos_embed")
    ).as_dict()
    assert content["architecture_plans"]["arch_kwargs"] is None
    assert content["architecture_plans"]["arch_kwargs_requiring_import"] is None
    assert content["pretrain_plan"]["configurations"]["noresample"]["spacing"] is None
    assert content["key_to_lpe"] == "eva.pos_embed"


def test_only_plain_types_are_inside():
    assert json.loads(json.dumps(PLAN.as_dict())) == PLAN.as_dict()
    file = io.BytesIO()
    torch.save(PLAN.as_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == PLAN.as_dict()


def test_a_decoder_is_handed_over_but_for_its_segmentation_layers_and_the_encoder_in_it():
    unet = [
        "encoder.stem.convs.0.conv.weight",
        "decoder.encoder.stem.convs.0.conv.weight",
        "decoder.transpconvs.0.weight",
        "decoder.stages.0.convs.0.conv.bias",
    ]
    assert decoder_modules([*unet, "decoder.stages.1.convs.0.conv.bias", "decoder.seg_layers.0.weight"]) == ("decoder.stages", "decoder.transpconvs")
    assert decoder_modules(["eva.pos_embed", "up_projection.weight"]) == ()
