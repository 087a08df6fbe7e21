"""Networks compiled for the sizes of their crops, once; counted by a compiler that changes nothing."""

import copy

import pytest
import torch

from dino.distillation import SelfDistillation
from dino.network import MultiCropNetwork
from tests.dino.test_distillation import PROTOTYPES, RATES, create_networks, create_views, state_of

# The compiler itself looks at it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def graphs():
    """Those that were compiled, in order, by a compiler to be passed as `backend`."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    yield compiled, backend
    torch._dynamo.reset()


def test_a_run_compiles_each_crop_size_once_and_the_head_again_when_its_last_layer_is_released(graphs):
    compiled, backend = graphs
    plain, ours = (
        SelfDistillation(*create_networks(), num_prototypes=PROTOTYPES, accumulate=2) for _ in range(2)
    )
    for network in (ours.student, ours.teacher):
        network.compile(backend=backend)
    counts = []
    for step in range(5):
        rates = RATES._replace(hold_last_layer=step < 2)
        expected, found = (each.step(create_views(step, images=4), rates) for each in (plain, ours))
        assert found.measures == pytest.approx(expected.measures, rel=1e-4)
        counts.append(len(compiled))
    # Two sizes and the head for the student, one and the head for the teacher.
    assert counts == [5, 5, 6, 6, 6]
    for (name, found), expected in zip(state_of(ours).items(), state_of(plain).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: n + text)


def test_looking_and_copies_do_not_compile_and_weights_keep_their_names(graphs):
    compiled, backend = graphs
    network, plain = (create_networks()[0] for _ in range(2))
    network.compile(backend=backend)
    assert network.is_compiled
    network.backbone.eval()(torch.randn(1, 3, 40, 24))
    probe = copy.deepcopy(network)
    assert not probe.is_compiled
    probe([torch.randn(2, 3, 16, 16)])
    assert compiled == []
    assert network.state_dict().keys() == plain.state_dict().keys()


def test_a_network_is_one_graph_in_half_precision(graphs):
    """What broke it up would start the device once more for each piece."""
    compiled, backend = graphs
    student, _ = create_networks(use_bn=True)
    whole = MultiCropNetwork(student.backbone, student.head)
    whole.compile(backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        whole(create_views()).logits_VBK.sum().backward()
    assert len(compiled) == 3
