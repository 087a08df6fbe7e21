"""XCiT's layers: cross-covariance attention, local patch interaction, class attention, and the two blocks.

B images, N patch tokens, C channels, H heads, D channels of a head.
Attributes are named as in the published weights' keys.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from xcit.gram import gram_matrix, linear_of_picture
from xcit.linear import Linear, is_traced, linear

_NORM_EPS = 1e-6
_SHORTEST = 1e-12

# Tokens that go through a linear layer at once when nothing is kept for gradients: few enough to stay in the
# processor's cache, where memory that is new for every layer costs as much as the arithmetic.
_TOKENS_AT_ONCE = 2048

# The same for local patch interaction, which takes some rows twice where they are parted.
_TOKENS_OF_BAND = 8192

# Rows and columns to each side that local patch interaction sees: two convolutions of 3 x 3.
_LOCAL_REACH = 2

# So many tokens for each channel, and the way over the Gram matrix is shorter.
_MANY_TOKENS = 3


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, images skip residual branches by chance.

    Args:
        drop_prob: probability that an image skips a branch, in [0, 1).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    @property
    def active(self) -> bool:
        return self.training and self.drop_prob > 0

    def factors(self, x_BNC: Tensor) -> Tensor:
        """Newly drawn, of each image's branch: 0, or so much more than 1 that the mean is 1; (B, 1, 1)."""
        keep = 1 - self.drop_prob
        return x_BNC.new_empty(len(x_BNC), 1, 1).bernoulli_(keep).div_(keep)

    def residual(self, x_BNC: Tensor, scale: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x + scale * branch(x), for a branch in which every image is by itself.

        On a CPU what would be multiplied by 0 is not computed. Elsewhere finding out which images these are
        would take longer, and compiled code wants tensors of one shape.
        """
        if not self.active:
            return torch.addcmul(x_BNC, scale, branch(x_BNC))
        factors = self.factors(x_BNC)
        kept = factors.flatten().nonzero().flatten() if _on_cpu(x_BNC) else None
        if kept is None or not len(kept):  # with none kept, parameters still get a gradient, of 0
            return torch.addcmul(x_BNC, factors * scale, branch(x_BNC))
        computed = factors[kept] * scale * branch(x_BNC.index_select(0, kept))
        return x_BNC.to(computed.dtype).index_add(0, kept, computed)


class CrossCovarianceAttention(nn.Module):
    """Attention between the channels of a head instead of between tokens (XCiT, equations 2 and 3).

    Cost is linear in the number of tokens.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        batch, count, dim = x_BNC.shape
        qkv = self.qkv(x_BNC).reshape(batch, count, 3, self.num_heads, dim // self.num_heads)
        query_BHDN, key_BHDN, value_BHDN = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        logits_BHDD = _unit(query_BHDN) @ _unit(key_BHDN).transpose(-2, -1) * self.temperature
        mixed_BHDN = _softmax(logits_BHDD).to(value_BHDN.dtype) @ value_BHDN
        return self.proj(mixed_BHDN.permute(0, 3, 1, 2).reshape(batch, count, dim))

    def as_linear(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight (C, C) and bias (C,) of the linear layer that attention is for the tokens of one image.

        Args:
            parts: all of the image's tokens, (n, C) at a time.
        """
        gram_EE = torch.stack([gram_matrix(part_nC) for part_nC in parts]).sum(dim=0)
        return linear_of_picture(gram_EE, self.qkv, self.temperature, self.proj)


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
        if _on_cpu(x_BNC) and not (torch.is_grad_enabled() or self.drop_path.active):
            return self._forward_on_cpu(x_BNC, rows, cols)
        x_BNC = self.drop_path.residual(x_BNC, self.gamma1, lambda x: self.attn(self.norm1(x)))
        # Batch norm sees all images, also those that then skip the branch.
        scale = self.drop_path.factors(x_BNC) * self.gamma3 if self.drop_path.active else self.gamma3
        x_BNC = torch.addcmul(x_BNC, scale, self.local_mp(self.norm3(x_BNC), rows, cols))
        return self.drop_path.residual(x_BNC, self.gamma2, lambda x: self.mlp(self.norm2(x)))

    def _forward_on_cpu(self, x_BNC: Tensor, rows: int, cols: int) -> Tensor:
        """The same without gradients, with less new memory and, for many tokens, less arithmetic.

        A GPU would be started for each image and each few tokens.
        """
        x_BNC = x_BNC.contiguous()  # what is added in place is added to parts, which must not be copies
        if rows * cols >= _MANY_TOKENS * x_BNC.shape[-1]:
            x_BNC = self._attend_linearly(x_BNC)
        else:
            x_BNC = torch.addcmul(x_BNC, self.gamma1, self.attn(self.norm1(x_BNC)))
        self._interact_in_bands(x_BNC, rows, cols)
        for tokens in x_BNC.flatten(0, 1).split(_TOKENS_AT_ONCE):
            tokens.addcmul_(self.gamma2, self.mlp(self.norm2(tokens)))
        return x_BNC

    def _attend_linearly(self, x_BNC: Tensor) -> Tensor:
        """The residual of attention to many tokens. To normalise them twice costs less than to hold the result."""
        result_BNC = torch.empty_like(x_BNC, dtype=torch.promote_types(x_BNC.dtype, self.gamma1.dtype))
        for x_NC, result_NC in zip(x_BNC, result_BNC, strict=True):
            parts = x_NC.split(_TOKENS_AT_ONCE)
            narrow = _dtype_of_products_on_cpu(x_NC)
            with without_autocast(x_NC):
                normed = (self.norm1(part.to(self.gamma1.dtype)).to(narrow) for part in parts)
                weight, bias = self.attn.as_linear(normed)
            for part, result in zip(parts, result_NC.split(_TOKENS_AT_ONCE), strict=True):
                normed = self.norm1(part)
                attended = linear(normed, weight.to(normed.dtype), bias.to(normed.dtype))
                torch.addcmul(part, self.gamma1, attended, out=result)
        return result_BNC

    def _interact_in_bands(self, x_BNC: Tensor, rows: int, cols: int) -> None:
        """Add local patch interaction to x, for some rows at a time; those beside a cut are computed twice."""
        norm = self.local_mp.bn
        of_all_tokens = norm.training or norm.running_mean is None
        band = cols * (rows if of_all_tokens else max(_LOCAL_REACH, _TOKENS_OF_BAND // cols))
        reach = cols * _LOCAL_REACH
        above = x_BNC[:, :0]
        for first in range(0, rows * cols, band):
            here, below = x_BNC[:, first : first + band], x_BNC[:, first + band : first + band + reach]
            seen = torch.cat([above, here, below], dim=1)
            local = self.local_mp(self.norm3(seen), seen.shape[1] // cols, cols)
            start = above.shape[1]
            above = here[:, -reach:].clone()
            here.addcmul_(self.gamma3, local[:, start : start + here.shape[1]])


class ClassAttention(nn.Module):
    """Softmax attention with the class token as the only query (CaiT, section 3)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)  # key name of the published weights, used in three parts
        self.proj = Linear(dim, dim)

    def weights(self, x_BNC: Tensor) -> Tensor:
        """Attention of the class token (token 0) to all tokens, itself first: (B, H, 1, N)."""
        with without_autocast(x_BNC):
            x_BNC = x_BNC.to(self.qkv.weight.dtype)
            query_weight, key_weight, _ = self.qkv.weight.chunk(3)
            query_BC = F.linear(x_BNC[:, 0], query_weight, self.qkv.bias.chunk(3)[0]) * self.scale
            # One query and many keys: it goes through their weight, so that not every token has to. What the keys'
            # bias adds to the logits is the same for all tokens, and nothing after the softmax.
            query_BHC = torch.einsum("bhd,hdc->bhc", self._of_heads(query_BC), self._of_heads(key_weight, 0))
            return _softmax(query_BHC @ x_BNC.transpose(1, 2)).unsqueeze(2)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """New class token, (B, 1, C)."""
        weights_BHN = self.weights(x_BNC).squeeze(2)
        with without_autocast(x_BNC):
            value_weight = self.qkv.weight.chunk(3)[2]
            x_BNC = x_BNC.to(value_weight.dtype)
            # The weights sum to 1, so the mean of the values is the value of the mean token.
            mean_BHC = weights_BHN.to(x_BNC.dtype) @ x_BNC
            value_BHD = torch.einsum("bhc,hdc->bhd", mean_BHC, self._of_heads(value_weight, 0))
            mixed_BC = value_BHD.flatten(1) + self.qkv.bias.chunk(3)[2]
        return self.proj(mixed_BC).unsqueeze(1)

    def _of_heads(self, x: Tensor, dim: int = -1) -> Tensor:
        return x.unflatten(dim, (self.num_heads, -1))


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

    def forward(self, x_BNC: Tensor, class_only: bool = False) -> Tensor:
        """All tokens (B, N, C), or the class token alone (B, 1, C), for which less is to be computed."""
        normed = self.norm1(x_BNC)
        class_token = self.norm2(x_BNC[:, :1] + self.gamma1 * self.attn(normed))
        class_token = class_token + self.gamma2 * self.mlp(class_token)
        if class_only:
            return class_token
        patches = x_BNC[:, 1:] + self.gamma1 * normed[:, 1:]
        patches = self.norm2(patches) if self.tokens_norm else patches
        return torch.cat([class_token, 2 * patches], dim=1)

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


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not is_traced()


def _dtype_of_products_on_cpu(x: Tensor) -> torch.dtype:
    """bfloat16 under its autocast; sums over tokens would overflow float16."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        return torch.bfloat16
    return _at_least_float32(x)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
