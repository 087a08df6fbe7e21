"""The published heads written down plainly, from tensors by mmsegmentation's names; and what these names are.

Everything here is computed with `torch.nn.functional` from four maps, in evaluation mode.
"""

import torch
import torch.nn.functional as F

LEVELS = 4


def conv_bn_relu(state, name, x, padding):
    x = F.conv2d(x, state[f"{name}.conv.weight"], padding=padding)
    mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return (x * state[f"{name}.bn.weight"][:, None, None] + state[f"{name}.bn.bias"][:, None, None]).relu()


def resize(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def classify(state, head, x):
    return F.conv2d(x, state[f"{head}.conv_seg.weight"], state[f"{head}.conv_seg.bias"])


def semantic_fpn(state, maps):
    def conv(name, x, padding):
        return F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=padding)

    laterals = [conv(f"neck.lateral_convs.{i}", maps[i], 0) for i in range(LEVELS)]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode="nearest")
    levels = [conv(f"neck.fpn_convs.{i}", laterals[i], 1) for i in range(LEVELS)]

    finest = conv_bn_relu(state, "decode_head.scale_heads.0.0", levels[0], 1)
    total = finest
    for i in (1, 2, 3):
        x = levels[i]
        for times in range(i):
            x = conv_bn_relu(state, f"decode_head.scale_heads.{i}.{2 * times}", x, 1)
            x = resize(x, (2 * x.shape[2], 2 * x.shape[3]))
        total = total + resize(x, finest.shape[2:])
    return classify(state, "decode_head", total)


def upernet(state, maps):
    head = "decode_head"
    pooled = [maps[3]]
    for i, cells in enumerate((1, 2, 3, 6)):
        x = conv_bn_relu(state, f"{head}.psp_modules.{i}.1", F.adaptive_avg_pool2d(maps[3], cells), 0)
        pooled.append(resize(x, maps[3].shape[2:]))
    laterals = [conv_bn_relu(state, f"{head}.lateral_convs.{i}", maps[i], 0) for i in range(3)]
    laterals.append(conv_bn_relu(state, f"{head}.bottleneck", torch.cat(pooled, dim=1), 1))
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + resize(laterals[i + 1], laterals[i].shape[2:])
    outs = [conv_bn_relu(state, f"{head}.fpn_convs.{i}", laterals[i], 1) for i in range(3)] + [laterals[3]]
    together = torch.cat([resize(x, outs[0].shape[2:]) for x in outs], dim=1)
    return classify(state, head, conv_bn_relu(state, f"{head}.fpn_bottleneck", together, 1))


def auxiliary(state, maps):
    return classify(state, "auxiliary_head", conv_bn_relu(state, "auxiliary_head.convs.0", maps[2], 1))


def _normalised(name, channels_in, channels, side):
    vectors = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return {f"{name}.conv.weight": (channels, channels_in, side, side)} | {
        f"{name}.{vector}": (channels,) for vector in vectors
    }


def _biased(name, channels_in, channels, side):
    return {f"{name}.weight": (channels, channels_in, side, side), f"{name}.bias": (channels,)}


def fpn_shapes(width, classes, channels=128):
    """Names and shapes of the published Semantic FPN, without its backbone."""
    shapes = _biased("decode_head.conv_seg", channels, classes, 1)
    for i in range(LEVELS):
        shapes |= _biased(f"neck.lateral_convs.{i}.conv", width, width, 1)
        shapes |= _biased(f"neck.fpn_convs.{i}.conv", width, width, 3)
        for times in range(max(i, 1)):
            before = channels if times else width
            shapes |= _normalised(f"decode_head.scale_heads.{i}.{2 * times}", before, channels, 3)
    return shapes


def upernet_shapes(width, classes, channels=512, auxiliary_channels=256):
    """Names and shapes of the published UPerNet, without its backbone."""
    head = "decode_head"
    shapes = _biased(f"{head}.conv_seg", channels, classes, 1)
    shapes |= _biased("auxiliary_head.conv_seg", auxiliary_channels, classes, 1)
    shapes |= _normalised("auxiliary_head.convs.0", width, auxiliary_channels, 3)
    shapes |= _normalised(f"{head}.bottleneck", width + 4 * channels, channels, 3)
    shapes |= _normalised(f"{head}.fpn_bottleneck", 4 * channels, channels, 3)
    for i in range(4):
        shapes |= _normalised(f"{head}.psp_modules.{i}.1", width, channels, 1)
    for i in range(3):
        shapes |= _normalised(f"{head}.lateral_convs.{i}", width, channels, 1)
        shapes |= _normalised(f"{head}.fpn_convs.{i}", channels, channels, 3)
    return shapes


def random_state(shapes, seed=0):
    """Tensors of these shapes; variances are positive, and weights small enough for moderate outputs."""
    noise = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=noise)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif len(shape) > 1:
            values = values / (values[0].numel() ** 0.5)
        state[name] = values
    return state
