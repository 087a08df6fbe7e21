"""What XCiT does to the patches: embedding, positions and cross-covariance blocks (XCiT, section 3).

B images, N patch tokens, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xcit.embedding import FourierPosition, PatchEmbedding
from xcit.layers import XCABlock

INIT_STD = 0.02


class Trunk(nn.Module):
    """Images (B, in_chans, H, W), of any H and W, to patch tokens; `XCiT` adds the class token, `Pyramid` levels.

    The linear layers are as PyTorch makes them until `init_weights`.

    Args:
        patch_size: 8 or 16 pixels.
        embed_dim: C, channels of a token.
        depth: number of cross-covariance blocks.
        num_heads: attention heads; divides `embed_dim`.
        eta: initial scale of the residual branches; the paper has 1.0 up to 12 blocks and 1e-5 beyond.
        drop_path_rate: stochastic depth, the same in every block, in [0, 1).
    """

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        eta: float,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.embed_dim = self.num_features = embed_dim
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbedding(patch_size=patch_size, embed_dim=embed_dim, in_chans=in_chans)
        self.pos_embeder = FourierPosition(embed_dim)  # spelled as in the published weights' keys
        self.blocks = nn.ModuleList(
            XCABlock(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                eta=eta,
                drop_path_rate=drop_path_rate,
            )
            for _ in range(depth)
        )

    def init_weights(self) -> None:
        """Truncated normal weights and zero biases for linear layers; others keep PyTorch's initialisation."""
        self.apply(init_linear)

    def forward(self, images: Tensor) -> Any:
        """Patch tokens after all blocks, (B, rows, cols, C)."""
        return self.forward_patches(images)

    def forward_patches(
        self, images: Tensor, *, grid: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Patch tokens after all cross-covariance blocks: (B, rows, cols, C).

        Args:
            grid: (rows, cols) in patches of the larger picture that `images` are cut from, for their positions;
                None: they are whole.
            corner: (row, col) in patches where the cut begins.
        """
        return self._after_blocks(images, [len(self.blocks) - 1], grid, corner)[0]

    def feature_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens after each of some blocks, as they are, without a norm: (B, C, rows, cols).

        Args:
            blocks: their numbers, from 0; those after the highest are not computed.

        Raises:
            IndexError: there is no such block.
        """
        if not blocks or min(blocks) < 0 or max(blocks) >= len(self.blocks):
            raise IndexError(f"blocks are numbered from 0 to {len(self.blocks) - 1}, got {list(blocks)}")
        numbers = sorted(set(blocks))
        after = dict(zip(numbers, self._after_blocks(images, numbers), strict=True))
        return [after[number].permute(0, 3, 1, 2) for number in blocks]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def _after_blocks(
        self,
        images: Tensor,
        numbers: Sequence[int],
        grid: tuple[int, int] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> list[Tensor]:
        """Patch tokens (B, rows, cols, C) after the blocks of these numbers."""
        if images.ndim != 4:
            raise ValueError(f"images must be (images, channels, height, width), got {tuple(images.shape)}")
        embedded = self.patch_embed(images)
        rows, cols = embedded.shape[-2:]
        embedded = embedded + self.pos_embeder(rows, cols, grid=grid, corner=corner)
        # Contiguous tokens once, or every layer would work on transposed memory.
        patches_BNC = embedded.flatten(2).transpose(1, 2).contiguous()
        kept = []
        for number, block in enumerate(list(self.blocks)[: max(numbers) + 1]):
            patches_BNC = self._run(block, patches_BNC, rows, cols)
            if number in numbers:
                kept.append(patches_BNC.unflatten(1, (rows, cols)))
        return kept

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), frozen_statistics(block)

        if (
            torch.compiler.is_compiling()
        ):  # the compiler takes no contexts, and recomputes without side effects
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def frozen_statistics(part: nn.Module) -> Iterator[None]:
    """Keep a forward that is recomputed, or only looks, from counting in batch norm's running statistics."""
    with ExitStack() as undo:
        for module in part.modules():
            counted = getattr(module, "num_batches_tracked", None)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and counted is not None:
                undo.callback(setattr, module, "momentum", module.momentum)
                undo.callback(setattr, module, "num_batches_tracked", counted)
                module.momentum, module.num_batches_tracked = 0.0, counted.clone()
        yield


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights and zero biases; other layers keep PyTorch's initialisation."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
