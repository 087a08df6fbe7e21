import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import xcit
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.linear_classifier import (
    LinearClassifier,
    ProbedTokens,
    classifier_state,
    load_classifier,
    outputs_of,
    score,
)
from dino.runtime.options import UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import write_pictures


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=5, num_heads=3, num_classes=0, dynamic_img_size=True
    ).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def normed_block_outputs(vit, images):
    """Tokens after every block and the final norm, by hooks."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in vit.blocks
    ]
    vit.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [vit.norm(output) for output in outputs]


@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_a_vit_gives_the_class_tokens_of_its_last_blocks_side_by_side(vit, blocks):
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = torch.cat([tokens[:, 0] for tokens in normed_block_outputs(vit, images)[-blocks:]], dim=1)
        torch.testing.assert_close(ProbedTokens(blocks)(vit, images), expected)


def test_class_token_and_patch_mean_take_turns_channel_by_channel(vit):
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        last = normed_block_outputs(vit, images)[-1]
        given = ProbedTokens(1, patch_mean=True)(vit, images)
    assert given.shape == (2, 24)
    torch.testing.assert_close(given[:, ::2], last[:, 0])
    torch.testing.assert_close(given[:, 1::2], last[:, 1:].mean(dim=1))


def test_an_xcit_gives_its_class_token_whatever_the_number_of_blocks():
    model = xcit.create_model("xcit_pico_3_p8").eval()
    images = torch.randn(2, 3, 24, 16)
    with torch.no_grad():
        assert torch.equal(ProbedTokens(4)(model, images), model(images))


def test_more_blocks_than_there_are_and_a_mean_beside_several_are_refused(vit):
    with pytest.raises(UserError, match="the last 6 blocks are asked for, the ViT has 5"):
        ProbedTokens(6)(vit, torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match="--avgpool_patchtokens true goes with --n_last_blocks 1"):
        ProbedTokens(4, patch_mean=True)


def test_a_classifier_starts_small_without_bias_and_alike_for_a_seed():
    one, other = (LinearClassifier(300, 200, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.linear.weight, other.linear.weight)
    assert one.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not one.linear.bias.any()


def save_as_dino(path, classifier):
    """With what DINO's file holds besides, an argparse.Namespace excepted."""
    torch.save({"epoch": 100, "state_dict": classifier_state(classifier), "best_acc": 77.0}, path)


def test_a_classifier_in_dinos_file_is_read(tmp_path):
    classifier = LinearClassifier(4, 3)
    save_as_dino(tmp_path / "linear.pth", classifier)
    content = torch.load(tmp_path / "linear.pth", weights_only=True)
    assert content["state_dict"].keys() == {"module.linear.weight", "module.linear.bias"}
    loaded = load_classifier(str(tmp_path / "linear.pth"), 4)
    assert torch.equal(loaded.linear.weight, classifier.linear.weight)


def test_a_classifier_that_does_not_fit_is_refused(tmp_path):
    save_as_dino(tmp_path / "linear.pth", LinearClassifier(4, 3))
    message = "is for features 4 wide, this backbone gives 8: it belongs to another backbone, or to another --n_last"
    with pytest.raises(UserError, match=message):
        load_classifier(str(tmp_path / "linear.pth"), 8)
    torch.save({"model": {"norm.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no linear classifier"):
        load_classifier(str(tmp_path / "other.pth"), 4)
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a weights file, or it is damaged"):
        load_classifier(str(tmp_path / "damaged.pth"), 4)


def test_a_classifier_that_knows_its_classes_goes_by_their_names_alone():
    known = ("n15075141", "n01440764", "dogs")
    assert outputs_of(1000, known, ["dogs", "n15075141"], ["dogs", "n15075141"]).tolist() == [2, 0]
    with pytest.raises(
        UserError, match="not trained on 1 of the 2 classes of val, such as cats; it knows n150"
    ):
        outputs_of(1000, known, ["cats", "dogs"], ["cats", "dogs"])


def test_outputs_are_the_datas_classes_or_imagenets_by_name():
    assert outputs_of(3, (), ["b", "c"], ["a", "b", "c"]).tolist() == [1, 2]
    # tench, goldfish and the last of ImageNet-1k, toilet paper
    ends = ["n01440764", "n15075141"]
    assert outputs_of(1000, (), ends, ends).tolist() == [0, 999]
    with pytest.raises(UserError, match="the classifier has 1000 classes and the data 2: it was trained on"):
        outputs_of(1000, (), ["cats", "dogs"], ["cats", "dogs"])
    with pytest.raises(UserError, match=r"trained on other classes, or with --num_labels 7$"):
        outputs_of(7, (), ["cats", "dogs"], ["cats", "dogs"])
    assert outputs_of(7, (), ["dogs"], ["cats", "dogs"], num_labels=7).tolist() == [1]
    many = [f"{number:04}" for number in range(1000)]
    assert outputs_of(1000, (), many[5:7], many).tolist() == [5, 6]


@pytest.mark.parametrize(("classes", "batch"), [(2, 3), (7, 100)])
def test_scores_equal_a_loop_over_pictures_and_broken_ones_are_left_out(tmp_path, classes, batch):
    names = [f"class{number}" for number in range(classes)]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        for index in range(3):
            picture = np.random.default_rng(10 * number + index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{index}.png")
    (tmp_path / "class1" / "2.png").write_bytes(b"broken")
    pictures = open_pictures(str(tmp_path))
    backbone = xcit.create_model("xcit_pico_3_p8")
    classifier = LinearClassifier(96, classes)
    nn.init.normal_(classifier.linear.weight)
    extractor = Extractor(backbone, Preparation(size=16), batch_size=batch)
    numbers = np.arange(classes)[::-1].copy()
    scores = score(extractor, ProbedTokens(), classifier, pictures, numbers, progress=None)

    backbone.eval()
    losses, ranks, labels = [], [], []
    for index, label in enumerate(pictures.labels):
        if "class1/2" in pictures.name(index):
            continue
        image = extractor.preparation.transform()(pictures.picture(index))
        with torch.no_grad():
            logits = classifier(backbone(image[None]))[0]
        losses.append(F.cross_entropy(logits, torch.tensor(numbers[label])).item())
        order = sorted(range(classes), key=lambda output: -logits[output].item())
        ranks.append(order.index(numbers[label]))
        labels.append(numbers[label])
    assert scores.labels.tolist() == labels
    assert scores.top1 == pytest.approx(100 * np.mean(np.array(ranks) == 0))
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-4)
    if classes < 5:
        assert scores.top5 is None
    else:
        assert scores.top5 == pytest.approx(100 * np.mean(np.array(ranks) < 5))
    assert len(scores.broken) == 1 and "class1/2.png" in scores.broken[0]
    assert math.isfinite(scores.balanced)


def test_nothing_to_score_is_one_sentence(tmp_path):
    write_pictures(tmp_path, count=1)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    extractor = Extractor(xcit.create_model("xcit_pico_3_p8"), Preparation(size=16))
    with pytest.raises(UserError, match=r"none of the 2 pictures can be read; .*empty file"):
        score(
            extractor,
            ProbedTokens(),
            LinearClassifier(96, 2),
            open_pictures(str(tmp_path)),
            np.arange(2),
            progress=None,
        )
