"""XCiT: Cross-Covariance Image Transformer (El-Nouby et al. 2021, https://arxiv.org/abs/2106.09681).

    model = xcit.create_model("xcit_small_12_p16", num_classes=1000)
    logits = model(images)                  # (B, 1000)
    maps = model.class_attention(images)    # (B, heads, rows, cols)

B images, N patch tokens, C channels.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from xcit.layers import ClassAttentionBlock
from xcit.trunk import INIT_STD, Trunk, frozen_statistics, init_linear

_CLASS_BLOCKS = 2


class XCiT(Trunk):
    """Images (B, in_chans, H, W), of any H and W, to logits (B, num_classes) or class tokens (B, C).

    Args:
        patch_size: 8 or 16 pixels.
        embed_dim: C, channels of a token.
        depth: number of cross-covariance blocks; two class-attention blocks follow.
        num_heads: attention heads; divides `embed_dim`.
        eta: initial scale of the residual branches; the paper has 1.0 up to 12 blocks and 1e-5 beyond.
        tokens_norm: whether class-attention blocks normalise the patch tokens too.
        num_classes: 0 for no head: the class token is returned.
        drop_path_rate: stochastic depth, the same in every cross-covariance block, in [0, 1).
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        eta: float,
        tokens_norm: bool = True,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            eta=eta,
            mlp_ratio=mlp_ratio,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
        )
        self.num_classes = num_classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(
                dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, eta=eta, tokens_norm=tokens_norm
            )
            for _ in range(_CLASS_BLOCKS)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = _head(embed_dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        self.init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes), or class tokens (B, C) without a head; the same in every mode."""
        return self.head(self._class_token_of(self.forward_patches(images)))

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, 1 + N, C), the class token first, patches row by row."""
        return self.features_of(self.forward_patches(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """From `forward_features`' tokens to logits, or to the class token with `pre_logits`."""
        class_token = tokens[:, 0]
        return class_token if pre_logits else self.head(class_token)

    def features_of(self, patches: Tensor) -> Tensor:
        """`forward_features` from what `forward_patches` gave, (B, rows, cols, C)."""
        tokens_BNC = self._with_class_token(patches.flatten(1, 2))
        for block in self.cls_attn_blocks:
            tokens_BNC = self._run(block, tokens_BNC)
        return self.norm(tokens_BNC)

    def _class_token_of(self, patches: Tensor) -> Tensor:
        """The first of `features_of`'s tokens, (B, C): the last block and norm need not do the patches."""
        tokens_BNC = self._with_class_token(patches.flatten(1, 2))
        *earlier, last = self.cls_attn_blocks
        for block in earlier:
            tokens_BNC = self._run(block, tokens_BNC)
        return self.norm(self._run(last, tokens_BNC, True)[:, 0])

    def class_attention(self, images: Tensor, block: int = -1) -> Tensor:
        """The class token's attention to each patch, float32 (B, heads, rows, cols).

        A head's weights sum to 1 less what the class token gives to itself. The model runs in the mode
        that it is in: call `eval()` first, or batch norm and drop path act as in training; what the model
        computes afterwards is the same either way.

        Args:
            block: class-attention block, 0 or 1, or counted from the end, -1 or -2.

        Raises:
            IndexError: there is no such block.
        """
        _check_class_block(block)
        with frozen_statistics(self):
            patches = self.forward_patches(images)
        return self.attention_to(patches, block)

    def attention_to(self, patches: Tensor, block: int = -1) -> Tensor:
        """`class_attention` from what `forward_patches` gave, (B, rows, cols, C).

        Raises:
            IndexError: there is no such block.
        """
        _check_class_block(block)
        tokens_BNC = self._with_class_token(patches.flatten(1, 2))
        *earlier, asked = self.cls_attn_blocks[: block % _CLASS_BLOCKS + 1]
        for each in earlier:
            tokens_BNC = self._run(each, tokens_BNC)
        weights = cast(ClassAttentionBlock, asked).attention_weights(tokens_BNC)
        return weights[:, :, 0, 1:].unflatten(-1, patches.shape[1:3]).float()

    def get_classifier(self) -> nn.Module:
        """The linear head, or `nn.Identity` without one."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one; 0 removes it.

        Args:
            global_pool: as in timm; there is one way here, `token`, which None and "" stand for too.
        """
        if global_pool not in (None, "", "token"):
            raise ValueError(f"XCiT pools by its class token, global_pool 'token'; got '{global_pool}'")
        device, dtype = self.cls_token.device, self.cls_token.dtype
        self.num_classes = num_classes
        self.head = _head(self.embed_dim, num_classes).to(device=device, dtype=dtype)
        self.head.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters beyond biases and scales that weight decay should leave alone."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameters' names by depth, as timm's layer-wise learning rates take them."""
        return {
            "stem": r"^cls_token|pos_embeder|patch_embed",
            "blocks": r"^blocks\.(\d+)" if not coarse else r"^blocks",
            "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _with_class_token(self, patches_BNC: Tensor) -> Tensor:
        class_token = self.cls_token.expand(patches_BNC.shape[0], -1, -1)
        return torch.cat([class_token, patches_BNC], dim=1)


def _check_class_block(block: int) -> None:
    if not -_CLASS_BLOCKS <= block < _CLASS_BLOCKS:
        raise IndexError(f"block must be -2, -1, 0 or 1 (there are {_CLASS_BLOCKS}), got {block}")


def _head(embed_dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
