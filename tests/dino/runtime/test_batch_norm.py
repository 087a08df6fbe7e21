"""Alone it is torch's batch norm; over two processes see test_equal_processes.py and below."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dino.runtime.batch_norm import CpuSyncBatchNorm, synchronised
from tests.two_processes import both_finish

CPU = torch.device("cpu")


def layers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), BatchNormAct2d(5))
    nn.init.uniform_(network[1].weight)
    nn.init.normal_(network[1].bias)
    return network


def test_plain_batch_norms_are_changed_in_place_and_keep_their_state():
    network = layers()
    before = copy.deepcopy(network.state_dict())
    kept = network[1].weight
    assert synchronised(network, CPU) is network
    assert type(network[1]) is CpuSyncBatchNorm and network[1].weight is kept
    assert type(network[3]) is BatchNormAct2d
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_on_gpus_the_layer_is_torchs():
    network = synchronised(layers(), torch.device("cuda", 0))
    assert isinstance(network[1], nn.SyncBatchNorm)
    assert isinstance(network[3], nn.SyncBatchNorm) and network[3].act is not None


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_torchs_batch_norm(training):
    ours, theirs = synchronised(layers(), CPU).train(training), layers().train(training)
    images = torch.randn(4, 3, 6, 5)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


_OVER_TWO = """
import torch
from torch import nn
from dino.runtime import distributed
from dino.runtime.batch_norm import CpuSyncBatchNorm

distributed.start(torch.device("cpu"))
rank = distributed.rank()
generator = torch.Generator().manual_seed(1)
for shape, sizes, momentum, affine in (
    ((7, 4, 3, 2), (4, 3), 0.1, True),  # as many pictures as the rank has
    ((6, 4), (1, 5), None, True),
    ((5, 4, 9), (3, 2), 0.3, False),
):
    values = 100 + 3 * torch.randn(*shape, generator=generator, dtype=torch.double)
    target = torch.randn(*shape, generator=generator, dtype=torch.double)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    whole = kind(4, momentum=momentum, affine=affine).double()
    if affine:
        nn.init.uniform_(whole.weight, generator=generator)
    ours = CpuSyncBatchNorm(4, momentum=momentum, affine=affine).double()
    ours.load_state_dict(whole.state_dict())
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    for _ in range(3):  # running statistics too
        own = values[mine].clone().requires_grad_()
        everything = values.clone().requires_grad_()
        output, expected = ours(own), whole(everything)
        torch.testing.assert_close(output, expected[mine])
        (output * target[mine]).sum().backward()
        (expected * target).sum().backward()
        torch.testing.assert_close(own.grad, everything.grad[mine])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    if affine:  # each rank's part of the gradient; their sum is the whole one
        parts = distributed.mean_over_ranks(torch.stack([ours.weight.grad, ours.bias.grad])) * 2
        torch.testing.assert_close(parts, torch.stack([whole.weight.grad, whole.bias.grad]))
    half = values[mine].bfloat16().requires_grad_()
    exact = CpuSyncBatchNorm(4)(values[mine].float())
    output = CpuSyncBatchNorm(4)(half)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.2)  # 100 in bf16 is exact to a quarter
    output.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()
print("DONE", rank)
distributed.stop()
"""


@pytest.mark.slow
def test_over_two_processes_it_is_batch_norm_of_all_their_pictures():
    both_finish(_OVER_TWO)
