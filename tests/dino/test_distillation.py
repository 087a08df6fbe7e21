"""One step of the method against a naive oracle, and what a step does when things go wrong."""

import copy
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dino.distillation import Rates, SelfDistillation, teacher_of
from dino.head import DinoHead
from dino.loss import koleo_loss
from dino.network import MultiCropNetwork
from dino.runtime.backbones import create_backbone

PROTOTYPES = 12
RATES = Rates(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temperature=0.04, hold_last_layer=False)


class Oracle:
    """Algorithm 1 of the paper in slow loops; of the code under test it uses only the networks' forward."""

    def __init__(self, student, teacher):
        self.student, self.teacher = student, teacher
        self.center = torch.zeros(PROTOTYPES, dtype=torch.float64)
        self.first, self.second, self.updates = {}, {}, {}

    def step(self, views, rates, clip):
        teachers = self.teacher.head(self.teacher.backbone(torch.cat(views[:2]))).chunk(2)
        features = [self.student.backbone(torch.cat(views[:2])), self.student.backbone(torch.cat(views[2:]))]
        students = self.student.head(torch.cat(features)).chunk(len(views))
        loss = self.loss(teachers, students, rates.teacher_temperature)

        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        with torch.no_grad():
            for name, parameter in trained.items():
                gradient = gradients[name]
                length = gradient.square().sum().sqrt()
                if length > clip:
                    gradient = gradient * clip / length
                if not (rates.hold_last_layer and name.startswith("head.last_layer")):
                    decay = 0.0 if name.endswith(".bias") or parameter.ndim == 1 else rates.weight_decay
                    self.adamw(name, parameter, gradient, rates.lr, decay)
            students_parameters = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                mean = rates.momentum * parameter + (1 - rates.momentum) * students_parameters[name]
                parameter.copy_(mean)
            outputs = [logits for view in teachers for logits in view]
            self.center = 0.9 * self.center + 0.1 * sum(outputs) / len(outputs)
        return loss.item()

    def loss(self, teachers, students, teacher_temperature):
        costs = []
        for t, teacher in enumerate(teachers):
            for s, student in enumerate(students):
                if s == t:
                    continue
                for picture in range(len(teacher)):
                    target = ((teacher[picture].detach() - self.center) / teacher_temperature).exp()
                    output = (student[picture] / 0.1).exp()
                    costs.append(-(target / target.sum() * (output / output.sum()).log()).sum())
        return sum(costs) / len(costs)

    def adamw(self, name, parameter, gradient, lr, decay):
        self.updates[name] = self.updates.get(name, 0) + 1
        self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * gradient
        self.second[name] = 0.999 * self.second.get(name, 0.0) + 0.001 * gradient**2
        mean = self.first[name] / (1 - 0.9 ** self.updates[name])
        variance = self.second[name] / (1 - 0.999 ** self.updates[name])
        parameter.copy_(parameter - lr * decay * parameter - lr * mean / (variance.sqrt() + 1e-8))


def vit():
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=True,
    )


def create_networks(arch="xcit", **head_options):
    torch.manual_seed(0)
    networks = []
    for _ in range(2):
        backbone = create_backbone("xcit_pico_3_p8") if arch == "xcit" else vit()
        head = DinoHead(backbone.num_features, PROTOTYPES, hidden_dim=20, bottleneck_dim=8, **head_options)
        networks.append(MultiCropNetwork(backbone, head))
    student, teacher = networks
    with torch.no_grad():  # at their initial values norms, scales and statistics hide mistakes
        for name, value in student.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.add_(
                    0.3 * torch.rand_like(value) if "running" in name else 0.1 * torch.randn_like(value)
                )
    return student, teacher_of(student, teacher)


def create_views(seed=0, images=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(32, 32)] * 2 + [(16, 16)] * 3
    return [torch.randn(images, 3, *size, generator=generator) for size in sizes]


def create_distillation(arch="xcit", **options):
    return SelfDistillation(*create_networks(arch), num_prototypes=PROTOTYPES, **options)


def state_of(distillation):
    """Copies of everything that a step changes, by name."""
    networks = {"student": distillation.student, "teacher": distillation.teacher}
    state = {
        f"{key}.{name}": v for key, network in networks.items() for name, v in network.state_dict().items()
    }
    for number, moments in distillation.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    return {name: value.clone() for name, value in (state | {"center": distillation.center.center}).items()}


@pytest.mark.parametrize(
    ("arch", "head_options", "checkpointing"),
    [
        ("xcit", {}, False),
        ("xcit", {"use_bn": True, "norm_last_layer": False}, True),
        ("vit", {"norm_last_layer": False}, False),
    ],
)
def test_five_steps_equal_the_naive_oracle(arch, head_options, checkpointing):
    # float64: where a gradient is zero by symmetry, Adam would blow up float32's rounding to full steps.
    student, teacher = (network.double() for network in create_networks(arch, **head_options))
    oracle = Oracle(copy.deepcopy(student), copy.deepcopy(teacher))
    start = {name: value.clone() for name, value in student.state_dict().items()}
    if checkpointing:
        student.backbone.set_grad_checkpointing()
    ours = SelfDistillation(student, teacher, num_prototypes=PROTOTYPES, clip_grad=0.05)
    for step in range(5):
        rates = Rates(
            lr=3e-4 * (step + 1),
            weight_decay=0.4 - 0.05 * step,
            momentum=0.9 + 0.02 * step,
            teacher_temperature=0.04 + 0.01 * step,
            hold_last_layer=step < 2,
        )
        views = [view.double() for view in create_views(step)]
        result = ours.step(views, rates)
        assert result.finite
        assert result.measures["loss"] == pytest.approx(oracle.step(views, rates, clip=0.05), abs=1e-5)
        torch.testing.assert_close(ours.center.center[0].double(), oracle.center, rtol=0, atol=1e-5)
    for network, expected in ((student, oracle.student), (teacher, oracle.teacher)):
        for name, value in expected.state_dict().items():
            actual = network.state_dict()[name]
            torch.testing.assert_close(
                actual, value, rtol=0, atol=1e-5, msg=lambda text, name=name: name + text
            )
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == set(start) - (
        {"head.last_layer.weight_g"} if "norm_last_layer" not in head_options else set()
    )


def test_the_last_layer_is_held_only_while_told():
    networks = create_networks(norm_last_layer=False)
    distillation = SelfDistillation(*networks, num_prototypes=PROTOTYPES)
    before = state_of(distillation)
    held = {"student.head.last_layer.weight_v", "student.head.last_layer.weight_g"}
    for _ in range(2):
        distillation.step(create_views(), RATES._replace(hold_last_layer=True))
    after = state_of(distillation)
    students = {name for name in before if name.startswith("student.") and "num_batches" not in name}
    assert {name for name in students if torch.equal(after[name], before[name])} == held  # not even decayed
    distillation.step(create_views(), RATES)
    assert not any(torch.equal(state_of(distillation)[name], before[name]) for name in held)
    distillation.step(create_views(), RATES._replace(hold_last_layer=True))
    assert distillation.student.head.last_layer.weight_v.grad is None, "it is not computed"


@pytest.mark.parametrize(
    "options", [{}, {"centering": "sinkhorn_knopp"}, {"optimizer": "sgd", "clip_grad": 0}]
)
@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_a_step_in_parts_is_the_step_at_once(accumulate, options):
    # A ViT, which has no batch norm; float64 for the same reason as above.
    student, teacher = (network.double() for network in create_networks("vit"))
    pair = [copy.deepcopy((student, teacher)) for _ in range(2)]
    whole = SelfDistillation(*pair[0], num_prototypes=PROTOTYPES, **options)
    parts = SelfDistillation(*pair[1], num_prototypes=PROTOTYPES, accumulate=accumulate, **options)
    for step in range(3):
        views = [view.double() for view in create_views(step, images=6)]
        rates = RATES._replace(hold_last_layer=step == 0)
        measures, in_parts = (d.step(views, rates).measures for d in (whole, parts))
        for name in ("loss", "kl", "teacher_entropy", "loss_over_ln_k"):
            assert in_parts[name] == pytest.approx(measures[name], abs=1e-6)
    after = state_of(parts)
    for name, value in state_of(whole).items():
        torch.testing.assert_close(
            after[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: name + text
        )


def test_a_part_that_is_not_finite_spoils_the_step_and_changes_nothing():
    student, teacher = create_networks()
    distillation = SelfDistillation(student, teacher, num_prototypes=PROTOTYPES, accumulate=3)
    before = state_of(distillation)
    views = create_views(images=6)
    views[2][3] = math.nan
    assert not distillation.step(views, RATES).finite
    after = state_of(distillation)
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def test_parts_need_less_memory():
    def kept(accumulate):
        """Bytes that wait for the backward pass, at most."""
        student, teacher = create_networks()
        distillation = SelfDistillation(student, teacher, num_prototypes=PROTOTYPES, accumulate=accumulate)
        waiting, most = [0], [0]

        def keep(tensor):
            waiting[0] += tensor.nbytes
            most[0] = max(most[0], waiting[0])
            return tensor.nbytes, tensor

        def give_back(packed):
            waiting[0] -= packed[0]
            return packed[1]

        with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            distillation.step(create_views(images=12), RATES)
        return most[0]

    assert kept(4) < 0.4 * kept(1)


def test_no_gradient_reaches_the_teacher():
    distillation = create_distillation()
    distillation.step(create_views(), RATES)
    assert all(p.grad is None and not p.requires_grad for p in distillation.teacher.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("poisoned", ["views", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poisoned, precision):
    distillation = create_distillation(precision=precision)
    while not distillation.step(create_views(), RATES).finite:
        pass  # fp16 looks for its scale
    before, scale = state_of(distillation), distillation.scaler.get_scale()
    views = create_views(1)
    if poisoned == "views":
        views[3][1] = math.nan
        result = distillation.step(views, RATES)
        assert math.isnan(result.measures["loss"])
    else:
        hook = distillation.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
        result = distillation.step(views, RATES)
        hook.remove()
        assert math.isfinite(result.measures["loss"])
    assert not result.finite
    after = state_of(distillation)
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
    if precision == "fp16":
        assert distillation.scaler.get_scale() < scale
    assert distillation.step(create_views(2), RATES).finite
    assert not torch.equal(state_of(distillation)["center"], before["center"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float32(precision):
    exact, half = create_distillation(), create_distillation(precision=precision)
    loss = exact.step(create_views(), RATES).measures["loss"]
    result = half.step(create_views(), RATES)
    assert result.measures["loss"] == pytest.approx(loss, rel=0.02)
    while not result.finite:
        result = half.step(create_views(), RATES)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in half.student.parameters())
    first = half.student.backbone.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(first, exact.student.backbone.blocks[0].mlp.fc1.weight, rtol=0, atol=3e-3)


@pytest.mark.parametrize("arch", ["xcit", "vit"])
@pytest.mark.parametrize("options", [{}, {"centering": "sinkhorn_knopp"}, {"koleo_weight": 0.1}])
def test_training_on_one_batch_brings_the_student_closer_to_the_teacher(arch, options):
    distillation = create_distillation(arch, **options)
    distances = [distillation.step(create_views(), RATES).measures["kl"] for _ in range(7)]
    assert distances[-1] < 0.9 * distances[0]


def test_koleo_adds_its_weight_times_the_sum_over_the_global_views():
    views = create_views()
    plain, spread = create_distillation(), create_distillation(koleo_weight=0.25)
    features = create_networks()[0](views).features_VBC
    expected = 0.25 * (koleo_loss(features[0]) + koleo_loss(features[1])).item()
    without, together = plain.step(views, RATES).measures, spread.step(views, RATES).measures
    assert together["loss"] - without["loss"] == pytest.approx(expected, abs=1e-5)
    assert together["loss_over_ln_k"] == pytest.approx(without["loss_over_ln_k"], abs=1e-6)


def test_sinkhorn_targets_do_not_depend_on_the_center():
    distillation = create_distillation(centering="sinkhorn_knopp")
    logits = torch.randn(2, 3, PROTOTYPES)
    before = distillation.targets(logits, 0.04)
    distillation.center.center += torch.randn(PROTOTYPES)
    assert torch.equal(distillation.targets(logits, 0.04), before)


def test_zero_clips_nothing():
    views = create_views()
    free, clipped, loose = (create_distillation(optimizer="sgd", clip_grad=clip) for clip in (0, 1e-3, 1e6))
    for distillation in (free, clipped, loose):
        distillation.step(views, RATES)
    weights = [d.student.head.mlp[0].weight for d in (free, clipped, loose)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_a_student_that_is_its_own_teacher_is_refused():
    student, teacher = create_networks()
    with pytest.raises(AssertionError, match="student and teacher share weights"):
        SelfDistillation(student, student, num_prototypes=PROTOTYPES)
    teacher.backbone = student.backbone
    with pytest.raises(AssertionError, match="student and teacher share weights"):
        SelfDistillation(student, teacher, num_prototypes=PROTOTYPES)
    assert next(student.parameters()).requires_grad
