import pytest
import torch

from dino.head import DinoHead
from dino.loss import dino_loss
from dino.memory import explaining_shortage, peak_memory, smaller_steps, step_memory
from dino.network import MultiCropNetwork
from dino.runtime.backbones import create_backbone
from dino.runtime.distributed import autocast
from dino.runtime.options import RankFailed

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


def test_the_peak_counts_what_was_freed_again():
    before = float(peak_memory(torch.device("cpu")).removesuffix(" GiB"))
    torch.ones(int((before + 0.3) * 2**28)).sum()  # of 4 bytes each
    assert float(peak_memory(torch.device("cpu")).removesuffix(" GiB")) > before + 0.29


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."
        ),
    ],
)
def test_too_little_memory_is_a_sentence_that_says_what_to_lower(error):
    with pytest.raises(RankFailed) as failure, explaining_shortage(8, smaller_steps(8, 2)):
        raise error
    assert str(failure.value) == (
        "this process has too little memory for 8 pictures at once: give --accumulate 4 and, without --batch_size, "
        "--batch_size_per_gpu 4, which leave a step its pictures; or --grad_checkpointing true, "
        "fewer --local_crops_number or a smaller --out_dim"
    )
    with (
        pytest.raises(RankFailed, match="for 1 pictures at once: give --grad_checkpointing"),
        explaining_shortage(1, smaller_steps(1, 2)),
    ):
        raise error


def test_a_real_shortage_is_recognised():
    with pytest.raises(RankFailed, match="too little memory"), explaining_shortage(8, "less"):
        torch.empty(2**60)


def test_other_errors_of_a_step_come_through():
    with pytest.raises(RuntimeError, match="shapes"), explaining_shortage(8, "less"):
        raise RuntimeError("shapes do not fit")
