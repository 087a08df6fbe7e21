import pytest
import torch
from torch import nn

from dino.network import MultiCropNetwork


class Recorder(nn.Module):
    """Global mean of each channel, batch-normalised; remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.shown = []

    def forward(self, images):
        self.shown.append(tuple(images.shape))
        return self.norm(images).mean(dim=(2, 3)) + images.mean(dim=(2, 3))


@pytest.fixture
def network():
    return MultiCropNetwork(Recorder(), nn.Linear(3, 5))


def views_of(*sizes, images=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, 3, *size, generator=generator) + index for index, size in enumerate(sizes)]


def test_views_of_equal_height_and_width_share_one_forward(network):
    network(views_of((8, 8), (8, 8), (4, 4), (4, 4), (4, 4)))
    assert network.backbone.shown == [(4, 3, 8, 8), (6, 3, 4, 4)]


def test_views_of_equal_width_and_different_height_do_not_mix(network):
    output = network(views_of((8, 8), (4, 8)))
    assert network.backbone.shown == [(2, 3, 8, 8), (2, 3, 4, 8)]
    assert output.features_VBC.shape == (2, 2, 3) and output.logits_VBK.shape == (2, 2, 5)


def test_output_is_in_the_order_of_the_views_even_when_sizes_alternate(network):
    network.eval()
    views = views_of((8, 8), (4, 4), (8, 8), (6, 4), (4, 4))
    output = network(views)
    for index, view in enumerate(views):
        features = network.backbone(view)
        torch.testing.assert_close(output.features_VBC[index], features)
        torch.testing.assert_close(output.logits_VBK[index], network.head(features))


def test_batch_norm_sees_the_views_of_one_size_together(network):
    views = views_of((8, 8), (4, 4), (8, 8), (4, 4))
    network(views)
    alone = nn.BatchNorm2d(3)
    for size in ((0, 2), (1, 3)):
        alone(torch.cat([views[index] for index in size]))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(network.backbone.norm.state_dict()[name], value)


def test_the_head_normalises_over_all_views_at_once():
    network = MultiCropNetwork(Recorder(), nn.BatchNorm1d(3))
    network(views_of((8, 8), (4, 4)))
    assert network.head.num_batches_tracked == 1
