import pytest
import torch

from dino.head import DinoHead
from dino.loss import dino_loss
from dino.memory import step_memory
from dino.network import MultiCropNetwork
from dino.runtime.backbones import create_backbone
from dino.runtime.distributed import autocast

SIZES = [48, 48, 32, 32]


def create_student(arch):
    backbone = create_backbone(arch)
    return MultiCropNetwork(backbone, DinoHead(backbone.num_features, 256, hidden_dim=64, bottleneck_dim=16))


def measured(student, batch_size, precision="fp32"):
    """Bytes of the tensors that a real step keeps for its backward pass, and those of four times the weights."""
    weights = {value.untyped_storage().data_ptr() for value in student.state_dict(keep_vars=True).values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = [torch.randn(batch_size, 3, size, size) for size in SIZES]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast(torch.device("cpu"), precision):
            logits = student(views).logits_VBK
        loss = dino_loss(logits, logits[:2].detach().softmax(-1), 0.1)
    assert loss.requires_grad  # alive until here, and with it all that is kept
    return sum(kept.values()) + 5 * sum(parameter.nbytes for parameter in student.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["xcit_pico_3_p8", "vit_tiny", "resnet10t"])
def test_the_estimate_is_near_what_a_real_step_keeps(arch, precision):
    student = create_student(arch)
    estimate = step_memory(student, SIZES, 4, low_precision=precision != "fp32")
    assert estimate == pytest.approx(measured(student, 4, precision), rel=0.1)


def test_activations_grow_linearly_with_the_batch_and_dominate_it():
    student = create_student("xcit_pico_3_p8")
    estimates = [step_memory(student, SIZES, batch_size, low_precision=False) for batch_size in (2, 4, 8)]
    assert estimates[2] - estimates[1] == pytest.approx(2 * (estimates[1] - estimates[0]), rel=0.02)
    assert estimates[2] > 2 * estimates[0]


def test_the_student_is_left_as_it_was():
    student = create_student("xcit_pico_3_p8").eval()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(0)
    step_memory(student, SIZES, 2, low_precision=False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not student.training and all(value.device.type == "cpu" for value in student.parameters())
