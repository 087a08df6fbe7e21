import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from dino.evaluation.extraction import Extractor, Preparation, standard_kinds
from dino.evaluation.kinds import CLASS_TOKEN, KINDS, LAST_BLOCKS, PATCH_MEAN, PATCH_TOKENS
from dino.runtime.backbones import create_backbone
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SMALL = Preparation(size=16)


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


class Scaled(Tokens):
    """As above, but times a factor for each picture of a call, in the order of the calls."""

    def __init__(self, *factors):
        super().__init__()
        self.factors = list(factors)

    def forward_features(self, images):
        factors = [self.factors.pop(0) if images.any() else 1.0 for _ in images]  # empty: asks for the shape
        return super().forward_features(images).float() * torch.tensor(factors)[:, None, None]


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    backbone = Tokens()
    backbone.norm.running_mean.uniform_()
    return backbone


@pytest.fixture
def vit():
    """Norms and scales of a trained network: fresh ones would hide a norm that is left out."""
    torch.manual_seed(0)
    vit = create_backbone("vit_tiny", 8)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def random_picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height))


def by_hand(picture, size, short):
    """DINO's preparation with Pillow and numpy: (3, size, size)."""
    width, height = picture.size
    long = int(short * max(width, height) / min(width, height))
    resized = picture.resize((long, short) if width > height else (short, long), PIL.Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    cropped = np.asarray(resized.crop((left, top, left + size, top + size)))
    return ((cropped / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "short"), [(224, 256), (32, 37), (96, 110)])
@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 301), (50, 50)])
def test_preprocessing_equals_pillow_by_hand(size, short, width, height):
    picture = random_picture(width, height, seed=0)
    prepared = Preparation(size=size).transform()(picture)
    np.testing.assert_allclose(prepared.numpy(), by_hand(picture, size, short), atol=1e-5)


def test_the_short_side_before_the_crop_follows_the_ratio():
    picture = random_picture(60, 90, seed=1)
    prepared = Preparation(size=32, resize_ratio=1.0).transform()(picture)
    np.testing.assert_allclose(prepared.numpy(), by_hand(picture, 32, 32), atol=1e-5)


# Python 3.12 warns of every fork of a process with threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (3, 2), (100, 0)])
def test_each_picture_comes_once_in_order_and_broken_ones_are_listed(backbone, batch_size, num_workers):
    pictures = Listed(8, broken=(0, 3, 4, 5))
    extractor = Extractor(backbone, SMALL, batch_size=batch_size, num_workers=num_workers)
    features = extractor.extract(pictures, progress=None)
    assert features.names == ["1.png", "2.png", "6.png", "7.png"]
    assert features.labels.tolist() == [1, 2, 0, 1] and features.labels.dtype == np.int64
    assert features.broken == [f"{index}.png: is empty" for index in (0, 3, 4, 5)]
    backbone.eval()
    for row, index in enumerate((1, 2, 6, 7)):
        with torch.no_grad():
            tokens = backbone.forward_features(SMALL.transform()(pictures.picture(index))[None])[0]
        np.testing.assert_allclose(features[CLASS_TOKEN][row], tokens[0], atol=1e-6)
        np.testing.assert_allclose(features[PATCH_MEAN][row], tokens[1:].mean(0), atol=1e-6)


def test_all_kinds_of_a_vit_equal_what_its_blocks_hand_on_and_its_norm_makes_of_it(vit):
    pictures = Listed(5)
    features = Extractor(vit, SMALL, batch_size=2).extract(pictures, KINDS, progress=None)
    seen = []
    for block in vit.blocks[-4:]:
        block.register_forward_hook(lambda _, __, tokens: seen.append(tokens))
    vit.eval()
    for row in range(5):
        seen.clear()
        image = torch.from_numpy(by_hand(pictures.picture(row), 16, 18)).float()[None]
        with torch.no_grad():
            class_token = vit(image)[0]
            after = [vit.norm(tokens)[0] for tokens in seen]
        close = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(features[CLASS_TOKEN][row], class_token, **close)
        np.testing.assert_allclose(features[PATCH_MEAN][row], after[-1][1:].mean(0), **close)
        np.testing.assert_allclose(features[LAST_BLOCKS][row], torch.cat([x[0] for x in after]), **close)
        np.testing.assert_allclose(features[PATCH_TOKENS][row], after[-1][1:], **close)
    assert features[LAST_BLOCKS].shape == (5, 4 * 192) and features[PATCH_TOKENS].shape == (5, 4, 192)


def test_a_kind_does_not_depend_on_the_kinds_beside_it(vit):
    extractor = Extractor(vit, SMALL)
    together = extractor.extract(Listed(2), KINDS, progress=None)
    for kind in KINDS:
        alone = extractor.extract(Listed(2), (kind,), progress=None)
        assert list(alone.rows) == [kind]
        np.testing.assert_allclose(alone[kind], together[kind], atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "reads"),
    [
        ("vit_tiny", True),
        ("deit_tiny_patch16_224", True),
        ("deit_tiny_distilled_patch16_224", False),  # its feature is the mean of two tokens
        ("vit_little_patch16_reg4_gap_256", False),
        ("xcit_pico_3_p8", False),
        ("resnet10t", False),
    ],
)
def test_last_blocks_are_standard_where_their_last_one_is_the_networks_own_feature(arch, reads):
    backbone = create_backbone(arch)
    expected = (CLASS_TOKEN, PATCH_MEAN, LAST_BLOCKS) if reads else (CLASS_TOKEN, PATCH_MEAN)
    assert standard_kinds(backbone) == expected
    if reads:
        features = Extractor(backbone, Preparation(size=32)).extract(Listed(2), expected, progress=None)
        width = features[CLASS_TOKEN].shape[1]
        np.testing.assert_array_equal(features[LAST_BLOCKS][:, -width:], features[CLASS_TOKEN])


def test_last_blocks_of_another_network_are_refused_before_the_first_picture(backbone):
    with pytest.raises(UserError, match=r"^Tokens has no class token after each block; only ViTs have$"):
        Extractor(backbone, SMALL).extract(Listed(2), (LAST_BLOCKS,), progress=None)


@pytest.mark.parametrize(
    ("arch", "size", "reason"),
    [("levit_128s", 112, "must match the size"), ("crossvit_tiny_240", 240, "'list'")],
)
def test_a_network_that_has_no_features_of_a_size_is_refused_in_a_sentence(arch, size, reason):
    sentence = rf"makes no features of a picture of {size} x {size} pixels \(.*{reason}.*\): try the --image_size that"
    with pytest.raises(UserError, match=sentence):
        Extractor(create_backbone(arch), Preparation(size=size)).extract(Listed(1), progress=None)


def test_extraction_leaves_modes_statistics_gradients_and_random_state_alone(backbone):
    backbone.train()
    backbone.norm.eval()  # frozen by the caller
    statistics, random_state = backbone.norm.running_mean.clone(), torch.get_rng_state()
    Extractor(backbone, SMALL).extract(Listed(3), progress=None)
    assert backbone.training and backbone.drop.training and not backbone.norm.training
    assert torch.equal(statistics, backbone.norm.running_mean)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())


def test_a_network_can_be_trained_after_its_features_were_taken():
    backbone = create_backbone("xcit_pico_3_p8").train()
    Extractor(backbone, SMALL).extract(Listed(2), progress=None)
    backbone(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_modes_are_restored_when_extraction_fails(backbone):
    with pytest.raises(UserError, match=r"^none of the 2 pictures can be read; 0\.png: is empty$"):
        Extractor(backbone, SMALL).extract(Listed(2, broken=(0, 1)), progress=None)
    assert backbone.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_kept_as_float16_and_is_close_to_full_precision(backbone, precision):
    full = Extractor(backbone, SMALL).extract(Listed(3), progress=None)
    preparation = Preparation(size=16, precision=precision)
    half = Extractor(backbone, preparation).extract(Listed(3), progress=None)
    for kind in (CLASS_TOKEN, PATCH_MEAN):
        assert (full[kind].dtype, half[kind].dtype) == (np.float32, np.float16)
        assert not np.array_equal(half[kind], full[kind])
        np.testing.assert_allclose(half[kind], full[kind], atol=0.05)


def test_keeping_float16_costs_less_than_computing_in_bfloat16(vit):
    kinds = (PATCH_TOKENS,)
    kept, full = (
        Extractor(vit, Preparation(size=16, precision=precision)).extract(Listed(2), kinds, progress=None)
        for precision in ("bf16", "fp32")
    )
    images = torch.stack([SMALL.transform()(Listed(2).picture(index)) for index in range(2)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        computed = vit.eval().forward_features(images)[:, 1:].float().numpy()
    rounding = np.abs(kept[PATCH_TOKENS] - computed)
    assert 8 * rounding.mean() < np.abs(computed - full[PATCH_TOKENS]).mean()


@pytest.mark.parametrize(
    ("precision", "factor"),
    [("fp32", np.nan), ("fp32", np.inf), ("bf16", np.nan), ("bf16", 1e6), ("fp16", -1e6)],
)
def test_features_that_are_no_numbers_are_one_sentence_that_names_the_picture(precision, factor):
    extractor = Extractor(Scaled(1, 1, 1, factor, 1), Preparation(size=16, precision=precision), batch_size=3)
    sentence = (
        r"^the features of 4\.png are not finite \(nan or infinity\): the weights are damaged, or the precision "
        r"is too low \(try --precision fp32\)$"
    )
    with pytest.raises(UserError, match=sentence):
        extractor.extract(Listed(6, broken=(1,)), progress=None)


def test_large_features_stay_whole_in_full_precision():
    rows = Extractor(Scaled(1e6, 1e6), SMALL).extract(Listed(2), progress=None)[CLASS_TOKEN]
    assert rows.dtype == np.float32 and np.abs(rows).max() > np.finfo(np.float16).max


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_extractions_are_equal_to_the_last_bit(vit, precision):
    extractor = Extractor(vit, Preparation(size=16, precision=precision), batch_size=3)
    first, second = (extractor.extract(Listed(7), KINDS, progress=None) for _ in range(2))
    assert all(first[kind].tobytes() == second[kind].tobytes() for kind in KINDS)


def test_pictures_without_classes_have_no_labels_and_the_bar_can_be_seen(backbone, capsys):
    features = Extractor(backbone, SMALL).extract(Listed(2, labels=False), progress="val features")
    assert features.labels is None and len(features.names) == 2
    assert "val features: 100%" in capsys.readouterr().err
