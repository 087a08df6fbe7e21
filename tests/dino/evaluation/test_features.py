import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from dino.evaluation.features import eval_transform, extract_features
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Listed(Pictures):
    """Random pictures of various shapes; those in `broken` cannot be read."""

    def __init__(self, count, broken=(), labels=True):
        self.classes = ["a", "b", "c"] if labels else []
        self.labels = [index % 3 for index in range(count)] if labels else None
        self._count, self._broken = count, broken

    def __len__(self):
        return self._count

    def name(self, index):
        return f"{index}.png"

    def picture(self, index, *, at_least=None):
        if index in self._broken:
            raise BrokenImageError(self.name(index), "is empty")
        return random_picture(40 + index, 60 - index, seed=index)


class Tokens(nn.Module):
    """A class token and two patch tokens, by batch norm and dropout, which betray a wrong mode."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.mix = nn.Linear(3, 5)
        self.drop = nn.Dropout(0.5)

    def forward_features(self, images):
        pooled = self.norm(images).flatten(2)
        means = torch.stack([pooled.mean(2), pooled[..., 0], pooled[..., 1]], dim=1)
        return self.drop(self.mix(means))

    def forward_head(self, tokens, pre_logits=False):
        assert pre_logits
        return tokens[:, 0]


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    backbone = Tokens()
    backbone.norm.running_mean.uniform_()
    return backbone


def random_picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height))


@pytest.mark.parametrize(("size", "short"), [(224, 256), (32, 37), (96, 110)])
@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 301), (50, 50)])
def test_preprocessing_equals_pillow_by_hand(size, short, width, height):
    picture = random_picture(width, height, seed=0)
    long = int(short * max(width, height) / min(width, height))
    resized = picture.resize((long, short) if width > height else (short, long), PIL.Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    cropped = np.asarray(resized.crop((left, top, left + size, top + size)))
    expected = ((cropped / 255 - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(eval_transform(size)(picture).numpy(), expected, atol=1e-5)


# Python 3.12 warns of every fork of a process with threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (3, 2), (100, 0)])
def test_each_picture_comes_once_in_order_and_broken_ones_are_listed(backbone, batch_size, num_workers):
    pictures = Listed(8, broken=(0, 3, 4, 5))
    features = extract_features(
        backbone, pictures, size=16, batch_size=batch_size, num_workers=num_workers, progress=None
    )
    assert features.names == ["1.png", "2.png", "6.png", "7.png"]
    assert features.labels.tolist() == [1, 2, 0, 1] and features.labels.dtype == np.int64
    assert features.broken == [f"{index}.png: is empty" for index in (0, 3, 4, 5)]
    backbone.eval()
    for row, index in enumerate((1, 2, 6, 7)):
        with torch.no_grad():
            tokens = backbone.forward_features(eval_transform(16)(pictures.picture(index))[None])[0]
        np.testing.assert_allclose(features.class_token[row], tokens[0], atol=1e-6)
        np.testing.assert_allclose(features.patch_mean[row], tokens[1:].mean(0), atol=1e-6)


def test_extraction_leaves_modes_statistics_gradients_and_random_state_alone(backbone):
    backbone.train()
    backbone.norm.eval()  # frozen by the caller
    statistics, random_state = backbone.norm.running_mean.clone(), torch.get_rng_state()
    extract_features(backbone, Listed(3), size=16, progress=None)
    assert backbone.training and backbone.drop.training and not backbone.norm.training
    assert torch.equal(statistics, backbone.norm.running_mean)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())


def test_modes_are_restored_when_extraction_fails(backbone):
    with pytest.raises(UserError, match=r"^none of the 2 pictures can be read; 0\.png: is empty$"):
        extract_features(backbone, Listed(2, broken=(0, 1)), size=16, progress=None)
    assert backbone.training


def test_half_precision_gives_float32_close_to_full_precision(backbone):
    full = extract_features(backbone, Listed(3), size=16, progress=None)
    half = extract_features(backbone, Listed(3), size=16, precision="bf16", progress=None)
    assert half.class_token.dtype == half.patch_mean.dtype == np.float32
    assert not np.array_equal(half.class_token, full.class_token)
    np.testing.assert_allclose(half.class_token, full.class_token, atol=0.05)


def test_pictures_without_classes_have_no_labels_and_the_bar_can_be_seen(backbone, capsys):
    features = extract_features(backbone, Listed(2, labels=False), size=16, progress="val features")
    assert features.labels is None and len(features.names) == 2
    assert "val features: 100%" in capsys.readouterr().err
