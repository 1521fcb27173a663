"""Input projections for another number of channels."""

import pytest
import torch

from nnssl_ext.nn.channels import repeat_channels


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_repeated_channels_answer_a_repeated_image_as_before(old, new):
    weight, image = torch.randn(5, old, 3, 3, 3, dtype=torch.float64), torch.randn(1, 1, 6, 6, 6, dtype=torch.float64)
    before = torch.conv3d(image.expand(-1, old, -1, -1, -1), weight)
    after = torch.conv3d(image.expand(-1, new, -1, -1, -1), repeat_channels(weight, new))
    torch.testing.assert_close(after, before)


def test_one_to_many_channels_is_the_weight_divided_by_their_number():
    weight = torch.randn(5, 1, 3, 3, 3)
    assert torch.equal(repeat_channels(weight, 4), weight.repeat(1, 4, 1, 1, 1) / 4)
