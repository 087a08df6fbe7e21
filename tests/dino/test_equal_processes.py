"""Two processes, each with half of the batch, do what one does with the whole of it."""

import pytest

from tests.two_processes import both_finish

_METHOD = """
import math
import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from dino.distillation import Rates, SelfDistillation, teacher_of
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.kinds import CLASS_TOKEN
from dino.evaluation.knn import knn_accuracy
from dino.head import DinoHead
from dino.network import MultiCropNetwork
from dino.runtime import distributed
from dino.runtime.backbones import create_backbone
from dino.runtime.batch_norm import synchronised
from dino.runtime.demo_pictures import DemoPictures
from dino.runtime.pictures import Spread
from dino.teacher import Center, sinkhorn_knopp

torch.set_num_threads(1)
cpu = torch.device("cpu")
generator = torch.Generator().manual_seed(0)
logits = torch.rand(2, 8, 5, generator=generator) * 2 - 1
sizes = (16, 16, 8, 8)
views = [[torch.randn(8, 3, s, s, generator=generator).double() for s in sizes] for _ in range(4)]
rates = Rates(1e-3, 0.1, 0.9, 0.04, False)
pictures = Spread(DemoPictures("val"), 70)

def network(arch):
    if arch == "xcit":
        backbone = create_backbone("xcit_pico_3_p8")
    else:
        backbone = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0, dynamic_img_size=True
        )
    head = DinoHead(backbone.num_features, 12, hidden_dim=20, bottleneck_dim=8, use_bn=arch == "xcit")
    with torch.no_grad():  # at their initial values norms and scales hide mistakes
        for name, value in [*backbone.named_parameters(), *head.named_parameters()]:
            if value.ndim == 1 and "last_layer" not in name:
                value.add_(0.1 * torch.randn_like(value))
    # float64: where a gradient is zero by symmetry, Adam would blow up float32's rounding to full steps.
    return MultiCropNetwork(backbone, head).double()

def train(part, arch, **options):
    torch.manual_seed(0)
    student = network(arch)
    teacher = teacher_of(student, network(arch))
    if distributed.world_size() > 1:
        student, teacher = synchronised(student, cpu), synchronised(teacher, cpu)
    distillation = SelfDistillation(student, teacher, num_prototypes=12, clip_grad=0.05, **options)
    measures = []
    for number, step in enumerate(views):
        hold = rates._replace(hold_last_layer=number == 1)
        of_step = distillation.step([view[part] for view in step], hold).measures
        measures.append([of_step[name] for name in ("loss", "kl", "teacher_entropy", "loss_over_ln_k")])
    return distillation, torch.tensor(measures)

def compared():
    center = Center(5)
    center.update(logits[:, mine])
    yield "center", center.center
    yield "sinkhorn", sinkhorn_knopp(logits[:, mine], 0.05)
    for name, arch, options in (
        ("vit", "vit", {}),
        ("xcit, batch norm", "xcit", {}),
        ("sgd", "xcit", {"optimizer": "sgd"}),
        ("sinkhorn_knopp", "vit", {"centering": "sinkhorn_knopp"}),
        ("koleo", "xcit", {"koleo_weight": 0.1}),
        ("in parts", "vit", {"accumulate": 2}),
        ("balanced in parts", "vit", {"accumulate": 2, "centering": "sinkhorn_knopp"}),
    ):
        distillation, measures = train(mine, arch, **options)
        yield name + " measures", measures
        yield name + " center", distillation.center.center
        for network in (distillation.student, distillation.teacher):
            state = [value.flatten().double() for value in network.state_dict().values()]
            yield name + " weights and statistics", torch.cat(state)
            gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            yield name + " gradients", torch.cat(gradients) if gradients else torch.zeros(1)
    extractor = Extractor(distillation.teacher.backbone.float(), Preparation(size=16), batch_size=8)
    features = extractor.extract(pictures, (CLASS_TOKEN,), progress=None)
    yield "features", torch.from_numpy(features[CLASS_TOKEN])
    score = knn_accuracy(features[CLASS_TOKEN], features.labels, features[CLASS_TOKEN], features.labels, ks=(5,))
    yield "k-NN", torch.tensor(score[5].top1)

mine = slice(0, 8)
alone = dict(enumerate(compared()))
distributed.start(cpu)
rank = distributed.rank()
mine = slice(4 * rank, 4 * rank + 4)
for number, (name, value) in enumerate(compared()):
    expected = alone[number][1]
    if name == "sinkhorn":
        expected = expected[:, mine]
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=lambda text, name=name: name + ": " + text)
assert number == len(alone) - 1 and number > 40

# What is not finite in one process is skipped in both, and both go on alike.
distillation, _ = train(mine, "xcit")
before = nn.utils.parameters_to_vector(distillation.student.parameters()).detach().clone()
poisoned = [view[mine].clone() for view in views[0]]
poisoned[1][0] = math.nan if rank == 1 else poisoned[1][0]
assert not distillation.step(poisoned, rates).finite
assert torch.equal(nn.utils.parameters_to_vector(distillation.student.parameters()), before)
assert distillation.step([view[mine] for view in views[1]], rates).finite
distributed.stop()
print("DONE", rank)
"""

_REDUCTIONS = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import torch.distributed as dist
from dino.distillation import Rates, SelfDistillation, teacher_of
from dino.head import DinoHead
from dino.network import MultiCropNetwork
from dino.runtime import distributed
from dino.runtime.backbones import create_backbone
from dino.runtime.batch_norm import synchronised

def network():
    backbone = create_backbone("xcit_pico_3_p8")
    return MultiCropNetwork(backbone, DinoHead(96, 12, hidden_dim=20, bottleneck_dim=8))

distributed.start(torch.device("cpu"))
torch.manual_seed(0)
student = network()
teacher = teacher_of(student, network())
distillation = SelfDistillation(student, teacher, num_prototypes=12, accumulate=3)
assert not isinstance(distillation.teacher, DistributedDataParallel)
reduced = []
def count(self, bucket):
    reduced.append(sum(gradient.numel() for gradient in bucket.gradients()))
    future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return future.then(lambda f: f.value()[0])

views = [torch.randn(6, 3, size, size) for size in (16, 16, 8)]
trained = [p for p in student.parameters() if p.requires_grad]
everything = sum(p.numel() for p in trained)
prototypes = student.head.last_layer.weight_v.numel()
for hold, expected in ((True, everything - prototypes), (False, everything), (True, everything - prototypes)):
    rates = Rates(1e-3, 0.1, 0.9, 0.04, hold)
    distillation._hold_last_layer(hold)
    distillation._parallel_student.register_comm_hook(None, count)
    for _ in range(2):
        reduced.clear()
        distillation.step(views, rates)
        assert sum(reduced) == expected, (sum(reduced), expected)
print("DONE", distributed.rank())
distributed.stop()
"""


@pytest.mark.slow
def test_loss_gradients_center_teacher_and_k_nn_equal_those_of_one_process():
    both_finish(_METHOD)


@pytest.mark.slow
def test_gradients_are_reduced_once_in_a_step_and_not_for_a_held_layer():
    both_finish(_REDUCTIONS)
