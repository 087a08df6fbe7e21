"""XCiT's layers: cross-covariance attention, local patch interaction, class attention, and the two blocks.

B images, N patch tokens, C channels, H heads, D channels of a head.
Attributes are named as in the published weights' keys.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

_NORM_EPS = 1e-6
_SHORTEST = 1e-12


class CrossCovarianceAttention(nn.Module):
    """Attention between the channels of a head instead of between tokens (XCiT, equations 2 and 3).

    Cost is linear in the number of tokens.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        batch, count, dim = x_BNC.shape
        qkv = self.qkv(x_BNC).reshape(batch, count, 3, self.num_heads, dim // self.num_heads)
        query_BHDN, key_BHDN, value_BHDN = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        logits_BHDD = _unit(query_BHDN) @ _unit(key_BHDN).transpose(-2, -1) * self.temperature
        mixed_BHDN = _softmax(logits_BHDD).to(value_BHDN.dtype) @ value_BHDN
        return self.proj(mixed_BHDN.permute(0, 3, 1, 2).reshape(batch, count, dim))


class LocalPatchInteraction(nn.Module):
    """Two depth-wise 3x3 convolutions, through which neighbouring patches see each other (section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x_BNC: Tensor, rows: int, cols: int) -> Tensor:
        batch, _, dim = x_BNC.shape
        grid = x_BNC.transpose(1, 2).reshape(batch, dim, rows, cols)
        grid = self.conv2(self.bn(self.act(self.conv1(grid))))
        return grid.flatten(2).transpose(1, 2)


class XCABlock(nn.Module):
    """Cross-covariance attention, local patch interaction and an MLP, each a scaled residual (section 3.3).

    Local patch interaction runs second but is numbered third, in the norms and scales of the published
    weights.

    Args:
        eta: initial value of the residual branches' scales.
        drop_path_rate: probability that an image skips a residual branch in training, in [0, 1).
    """

    def __init__(
        self, *, dim: int, num_heads: int, mlp_ratio: float, eta: float, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.attn = CrossCovarianceAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.local_mp = LocalPatchInteraction(dim)
        self.drop_path = DropPath(drop_path_rate)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.full((dim,), eta)) for _ in range(3))

    def forward(self, x_BNC: Tensor, rows: int, cols: int) -> Tensor:
        x_BNC = x_BNC + self.drop_path(self.gamma1 * self.attn(self.norm1(x_BNC)))
        x_BNC = x_BNC + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x_BNC), rows, cols))
        return x_BNC + self.drop_path(self.gamma2 * self.mlp(self.norm2(x_BNC)))


class ClassAttention(nn.Module):
    """Softmax attention with the class token as the only query (CaiT, section 3)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)  # key name of the published weights, used in three parts
        self.proj = nn.Linear(dim, dim)

    def weights(self, x_BNC: Tensor) -> Tensor:
        """Attention of the class token (token 0) to all tokens, itself first: (B, H, 1, N)."""
        query_BH1D = self._project(x_BNC[:, :1], part=0) * self.scale
        key_BHND = self._project(x_BNC, part=1)
        return _softmax(query_BH1D @ key_BHND.transpose(-2, -1))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """New class token, (B, 1, C)."""
        value_BHND = self._project(x_BNC, part=2)
        mixed_BH1D = self.weights(x_BNC).to(value_BHND.dtype) @ value_BHND
        return self.proj(mixed_BH1D.transpose(1, 2).flatten(2))

    def _project(self, x_BNC: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2) alone: (B, H, N, D)."""
        weight, bias = self.qkv.weight.chunk(3)[part], self.qkv.bias.chunk(3)[part]
        return F.linear(x_BNC, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the class token, after the patches have been processed (section 3.3).

    The published weights were trained with these departures from CaiT, which are kept so that they work:
    - patch tokens change too: the first residual adds their scaled norm to them;
    - the second residual starts from the normalised tokens, not from what went into the norm;
    - patch tokens, which skip the MLP, are added to themselves and so doubled;
    - `norm2` acts on all tokens or, without `tokens_norm`, on the class token only;
    - there is no drop path.

    Args:
        eta: initial value of the residual branches' scales.
        tokens_norm: whether `norm2` acts on the patch tokens too.
    """

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: float, eta: float, tokens_norm: bool) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), eta)) for _ in range(2))

    def forward(self, x_BNC: Tensor) -> Tensor:
        normed = self.norm1(x_BNC)
        x_BNC = x_BNC + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], dim=1)
        if self.tokens_norm:
            x_BNC = self.norm2(x_BNC)
            class_token, patches = x_BNC[:, :1], x_BNC[:, 1:]
        else:
            class_token, patches = self.norm2(x_BNC[:, :1]), x_BNC[:, 1:]
        return torch.cat([class_token + self.gamma2 * self.mlp(class_token), 2 * patches], dim=1)

    def attention_weights(self, x_BNC: Tensor) -> Tensor:
        """Weights with which this block's class token looks at all tokens, itself first: (B, H, 1, N)."""
        return self.attn.weights(self.norm1(x_BNC))


def _unit(x: Tensor) -> Tensor:
    """Vectors along the last axis scaled to length 1, as `F.normalize` does.

    A squared sum over many tokens overflows float16. `F.normalize` itself is ten times slower on a CPU here,
    where the tokens are not next to each other in memory.
    """
    wide = x.to(_at_least_float32(x))
    squared_length = wide.square().sum(dim=-1, keepdim=True).clamp(min=_SHORTEST**2)
    return (wide * squared_length.rsqrt()).to(x.dtype)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=_at_least_float32(logits))


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
