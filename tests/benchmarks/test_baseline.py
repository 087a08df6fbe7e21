"""The textbook step and ours are the same step, so that their times can be compared."""

import pytest
import torch

from benchmarks import baseline
from benchmarks.baseline import TextbookLoss, TextbookStep, clip_gradients, textbook_names
from dino.distillation import Rates, SelfDistillation, teacher_of
from dino.head import DinoHead
from dino.network import MultiCropNetwork
from dino.runtime.backbones import create_backbone

ARCH = "xcit_nano_12_p16"
PROTOTYPES = 64
RATES = Rates(lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temperature=0.05, hold_last_layer=False)


def create_ours(clip_grad=3.0):
    torch.manual_seed(0)
    student, teacher = (
        MultiCropNetwork(create_backbone(ARCH), DinoHead(create_backbone(ARCH).num_features, PROTOTYPES))
        for _ in range(2)
    )
    with torch.no_grad():  # at their initial values norms and scales hide mistakes
        for parameter in student.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return SelfDistillation(
        student, teacher_of(student, teacher), num_prototypes=PROTOTYPES, clip_grad=clip_grad
    )


def create_textbook(ours):
    textbook = TextbookStep(
        ARCH,
        PROTOTYPES,
        drop_path_rate=0.0,
        teacher_temperature=RATES.teacher_temperature,
        lr=RATES.lr,
        weight_decay=RATES.weight_decay,
        momentum=RATES.momentum,
        clip_grad=ours.clip_grad,
    )
    textbook.copy_weights(ours.student.state_dict(), ours.teacher.state_dict())
    return textbook


def create_views(step=0):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 3, side, side, generator=generator) for side in [64] * 2 + [32] * 3]


def test_two_steps_equal_those_of_self_distillation():
    ours = create_ours()
    textbook = create_textbook(ours)
    for step in range(2):
        result = ours.step(create_views(step), RATES)
        assert textbook.step(create_views(step)) == pytest.approx(result.measures["loss"], rel=1e-5)
        if step == 0:
            gradients = {name: p.grad for name, p in ours.student.named_parameters() if p.requires_grad}
            expected = {name: p.grad for name, p in textbook.student.named_parameters() if p.requires_grad}
            assert relative_error(textbook_names(gradients), expected) <= 1e-5
    torch.testing.assert_close(ours.center.center, textbook.loss.center, rtol=1e-4, atol=1e-6)
    assert relative_error(textbook_names(ours.teacher.state_dict()), textbook.teacher.state_dict()) <= 1e-5


def relative_error(ours, expected):
    """Over all of them at once: some are zero by symmetry and hold nothing but rounding."""
    assert ours.keys() == expected.keys()
    off = sum((ours[name] - value).double().square().sum() for name, value in expected.items())
    return (off / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


def test_the_teacher_starts_from_the_student_and_has_no_drop_path():
    step = TextbookStep(ARCH, 8, drop_path_rate=0.3)
    for name, value in step.student.state_dict().items():
        assert torch.equal(value, step.teacher.state_dict()[name])
    rates = [
        {module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")}
        for network in (step.student, step.teacher)
    ]
    assert rates[0] == {0.3} and not any(rates[1])


def test_under_autocast_it_computes_in_bf16_and_trains():
    step = TextbookStep(ARCH, 8, autocast=torch.bfloat16)
    seen = []
    step.student.head.mlp[0].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    before = step.student.head.mlp[0].weight.clone()
    assert 0 < step.step(create_views()) < 10
    assert seen == [torch.bfloat16] and not torch.equal(step.student.head.mlp[0].weight, before)


def test_the_loss_is_that_of_the_paper_and_moves_the_center_by_the_mean():
    torch.manual_seed(0)
    loss = TextbookLoss(5, student_temperature=0.1, teacher_temperature=0.5)
    loss.center += torch.randn(1, 5)
    center = loss.center.clone()
    student, teacher = torch.randn(3, 2, 5), torch.randn(2, 2, 5)
    value = loss(student.flatten(0, 1), teacher.flatten(0, 1), 3)
    p_t, p_s = ((teacher - center) / 0.5).softmax(-1), (student / 0.1).softmax(-1)
    expected = [-(p_t[t] * p_s[v].log()).sum() / 2 for t in range(2) for v in range(3) if v != t]
    torch.testing.assert_close(value, sum(expected) / 4)
    torch.testing.assert_close(loss.center, 0.9 * center + 0.1 * teacher.mean((0, 1)))


def test_a_long_gradient_is_shortened_and_a_short_one_is_left():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    clip_gradients(parameters, 2.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 1.6]))
    assert torch.equal(parameters[1].grad, torch.tensor([0.3, 0.4])) and parameters[2].grad is None


def test_the_teacher_is_an_average():
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.75 * teacher.weight.detach() + 0.25 * student.weight.detach()
    baseline.update_teacher(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight.detach(), expected)
