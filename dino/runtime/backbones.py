"""The only door from the method to a backbone: names, construction, weights, tokens, class attention.

Importing timm takes longer than importing torch, and XCiT does without: it is imported where another model is built.
"""

import difflib
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xcit
from dino.runtime.options import UserError
from xcit.weights import LoadReport, WeightsError, load_weights
from xcit.zoo import SUPERVISED

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

# (width, heads) of DINO's vision transformers, all 12 blocks deep (DINO, table 1; DeiT).
_VIT = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}

# The original still takes these.
OLD_NAMES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}

# Published ViT files hold position embeddings for this size; other sizes are interpolated from it.
_VIT_IMAGE_SIZE = 224


def list_backbones() -> list[str]:
    """XCiT's and DINO's own names; any name of `timm.list_models()` is accepted beside them."""
    return [*xcit.list_models(), *_VIT]


def create_backbone(arch: str, patch_size: int = 16, drop_path_rate: float = 0.0) -> nn.Module:
    """A backbone without a classification head, freshly initialised: (B, 3, H, W) -> (B, num_features).

    Args:
        arch: an XCiT name, `vit_tiny|small|base` or any timm name.
        patch_size: side of a patch in pixels, for `vit_*` only: the other names carry theirs.
        drop_path_rate: stochastic depth, in [0, 1).

    Raises:
        UserError: the name is not known; the nearest names are offered.
    """
    arch = OLD_NAMES.get(arch, arch)
    if arch in xcit.list_models(all=True):
        return xcit.create_model(arch, drop_path_rate=drop_path_rate)
    if arch in _VIT:
        from timm.models.vision_transformer import VisionTransformer

        width, heads = _VIT[arch]
        return VisionTransformer(
            img_size=_VIT_IMAGE_SIZE,
            patch_size=patch_size,
            embed_dim=width,
            num_heads=heads,
            num_classes=0,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
        )
    import timm

    if timm.is_model(arch):
        return _create_timm(arch, drop_path_rate)
    known = [*xcit.list_models(all=True), *_VIT, *timm.list_models()]
    nearest = difflib.get_close_matches(arch, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else f"known: {', '.join(list_backbones())}"
    raise UserError(f"unknown model '{arch}'; {hint} (any timm name works too)")


def create_published_classifier(name: str) -> tuple[nn.Module, LoadReport]:
    """A supervised XCiT with its head of 1,000 classes: images (B, 3, H, W) -> (B, 1000).

    Raises:
        UserError: there is none of that name, or its weights cannot be had.
    """
    if name not in SUPERVISED:
        raise UserError(f"there is no supervised XCiT '{name}'")
    model = xcit.create_model(SUPERVISED[name].architecture, num_classes=1000)
    return model, load_backbone_weights(model, name)


def create_timm_classifier(name: str) -> nn.Module:
    """A classifier of timm with the weights that timm offers for it: images (B, 3, H, W) -> (B, num_classes).

    Raises:
        UserError: there is no such model, or its weights cannot be had.
    """
    import timm

    try:
        return cast(nn.Module, timm.create_model(name, pretrained=True))
    except Exception as error:  # no such name, no such weights, no network: each package has its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name}: timm's weights cannot be had ({reason}); name a file of weights instead"
        ) from error


def _create_timm(arch: str, drop_path_rate: float) -> nn.Module:
    import timm

    # Not all of timm's families know these; a family's constructor refuses those that it does not know.
    wishes: list[dict[str, Any]] = [
        {"drop_path_rate": drop_path_rate, "dynamic_img_size": True},
        {"drop_path_rate": drop_path_rate},
    ]
    for options in wishes:
        try:
            return cast(nn.Module, timm.create_model(arch, num_classes=0, **options))
        except TypeError:
            continue
    return cast(nn.Module, timm.create_model(arch, num_classes=0))


def feature_width(backbone: nn.Module) -> int:
    """C of the features (B, C) that a backbone without a classification head returns."""
    # timm's head_hidden_size differs from num_features where a layer stands between pooling and classifier.
    return int(getattr(backbone, "head_hidden_size", None) or cast(Any, backbone).num_features)


def check_side(backbone: nn.Module, side: int, option: str) -> None:
    """Refuse square pictures of a side in pixels that the backbone does not take.

    Args:
        option: where the side comes from, for the error.

    Raises:
        UserError: the side is no multiple of a ViT's patch, or the model takes one other side only.
    """
    embedding = next(
        (module for module in backbone.modules() if _is_timms(module, "timm.layers", "PatchEmbed")), None
    )
    if embedding is None:
        return
    patch = embedding.patch_size[0]
    if embedding.strict_img_size and tuple(embedding.img_size) != (side, side):
        raise UserError(
            f"{option} {side}: {type(backbone).__name__} takes pictures of {embedding.img_size[0]} x "
            f"{embedding.img_size[1]} pixels only; XCiT, vit_* and convolutional networks take all sizes"
        )
    if not embedding.dynamic_img_pad and side % patch:
        nearest = max(round(side / patch), 1) * patch
        raise UserError(
            f"{option} {side}: must be a multiple of the patch's side, {patch} pixels; {nearest} is near"
        )


def load_backbone_weights(
    backbone: nn.Module, source: str | Path, *, key: str = "teacher", allow_partial: bool = False
) -> LoadReport:
    """Fill a backbone from a zoo name, a file or a URL in any layout that `xcit.weights` knows.

    Raises:
        UserError: the file cannot be had or read, or holds less than the whole backbone.
    """
    try:
        return load_weights(backbone, source, key=key, allow_partial=allow_partial)
    except WeightsError as error:
        raise UserError(str(error)) from error


def tensors_sha256(backbone: nn.Module) -> str:
    """Checksum of all parameters and buffers, which tells backbones apart wherever their weights came from."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokens(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone's own feature (B, C), and its patch tokens (B, N, C) after the final norm.

    The feature is the class token of XCiT and most ViTs, and the pooled one of other networks.
    """
    features = cast(Any, backbone).forward_features(images)
    feature = cast(Any, backbone).forward_head(features, pre_logits=True)
    if features.ndim == 4:
        channels_last = str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC"
        return feature, features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    has_class_token = getattr(backbone, "cls_token", None) is not None
    return feature, features[:, int(getattr(backbone, "num_prefix_tokens", has_class_token)) :]


def reads_blocks(backbone: nn.Module) -> bool:
    """Whether `last_blocks` can answer: a ViT whose feature is its class token, and not the mean with another."""
    return (
        is_vit(backbone)
        and backbone.global_pool == "token"
        and not _is_timms(backbone, "timm.models.deit", "VisionTransformerDistilled")
    )


def is_vit(backbone: nn.Module) -> "TypeGuard[VisionTransformer]":
    """Whether it is a VisionTransformer of timm, or derived from it."""
    return _is_timms(backbone, "timm.models.vision_transformer", "VisionTransformer")


def _is_timms(module: nn.Module, home: str, kind: str) -> TypeGuard[Any]:
    """Whether it is of a class in a file of timm; who has not imported that file has no such module."""
    imported = sys.modules.get(home)
    return imported is not None and isinstance(module, getattr(imported, kind))


def last_blocks(backbone: nn.Module, images: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Class token (B, C) and patch tokens (B, N, C) after each of a ViT's last `count` blocks and the final norm.

    Raises:
        UserError: it is no such ViT, or has fewer blocks.
    """
    if not reads_blocks(backbone):
        raise UserError(f"{type(backbone).__name__} has no class token after each block; only ViTs have")
    vit = cast("VisionTransformer", backbone)
    if not 1 <= count <= len(vit.blocks):
        raise UserError(f"the last {count} blocks are asked for, the ViT has {len(vit.blocks)}")
    blocks = vit.get_intermediate_layers(images, count, return_prefix_tokens=True, norm=True)
    return [(prefix[:, 0], patches) for patches, prefix in blocks]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule's own mode, since a caller may have frozen some of them."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def has_class_attention(backbone: nn.Module) -> bool:
    """Whether `class_attention` can answer: XCiT, or a timm ViT with a class token and one attention per block."""
    return hasattr(backbone, "class_attention") or (
        is_vit(backbone)
        and backbone.cls_token is not None
        and all(hasattr(getattr(block, "attn", None), "qkv") for block in backbone.blocks)
    )


def check_class_attention(backbone: nn.Module) -> None:
    """Refuse a backbone without class attention.

    Raises:
        UserError: it has none.
    """
    if not has_class_attention(backbone):
        raise UserError(
            f"there is no class attention to draw in {type(backbone).__name__}: --arch takes XCiT's names, such as "
            "xcit_small_12_p16, vit_tiny, vit_small, vit_base, and those of timm's VisionTransformers with a class "
            "token, such as vit_small_patch14_dinov2"
        )


def class_attention(backbone: nn.Module, images: Tensor, block: int = -1) -> Tensor:
    """Weights of the class token on the patches, float32 (B, heads, rows, cols).

    Args:
        block: which of XCiT's class-attention blocks, or of a ViT's blocks; -1 = the last.

    Raises:
        UserError: the backbone has no class attention.
        IndexError: there is no such block.
    """
    if hasattr(backbone, "class_attention"):
        return cast(Any, backbone).class_attention(images, block=block)
    check_class_attention(backbone)
    return _vit_class_attention(cast("VisionTransformer", backbone), images, block)


class _Reached(Exception):  # noqa: N818 - ends a forward pass that has come as far as it is needed
    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def _tokens_into(module: nn.Module, backbone: "VisionTransformer", images: Tensor) -> Tensor:
    """What a part of the backbone is given, (B, N, C); of the rest, nothing is computed."""

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    hook = module.register_forward_pre_hook(stop)
    try:
        backbone.forward_features(images)
    except _Reached as reached:
        return reached.tokens
    finally:
        hook.remove()
    raise AssertionError("the forward pass of the backbone leaves out one of its blocks")


def _vit_class_attention(backbone: "VisionTransformer", images: Tensor, block: int) -> Tensor:
    """A block's class row, as one query against all keys: no tokens x tokens matrix."""
    attention = backbone.blocks[block].attn
    tokens_BNC = _tokens_into(attention, backbone, images)
    projection = attention.qkv
    biases = (None, None, None) if projection.bias is None else projection.bias.chunk(3)
    query, key = (
        F.linear(part, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part, weight, bias in zip(
            (tokens_BNC[:, :1], tokens_BNC), projection.weight.chunk(3)[:2], biases[:2], strict=True
        )
    )
    query, key = attention.q_norm(query), attention.k_norm(key)
    logits = (query.float() * attention.scale) @ key.float().transpose(-2, -1)
    weights = logits.softmax(dim=-1)[:, :, 0, backbone.num_prefix_tokens :]
    rows, cols = backbone.patch_embed.dynamic_feat_size(images.shape[-2:])
    return weights.unflatten(-1, (rows, cols))
