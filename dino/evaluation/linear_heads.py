"""Linear heads on cached features, trained by SGD at many learning rates at once.

All heads of an input see the same batches, so their weights stand side by side in one matrix and one product
serves all. No gradient crosses from one head to another: each is trained as it would be alone.

B = pictures of a batch, C = channels, R = rates, L = classes, N = R * L
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino.schedules import cosine

# As DINO's linear evaluation: the batch that a learning rate is for, momentum, deviation of the first weights.
_PICTURES_PER_RATE = 256
_MOMENTUM = 0.9
_FIRST_DEVIATION = 0.01

# Rows that are read at once for the statistics; bounds the float64 copy.
_ROWS_PER_BLOCK = 4096

# Weights whose gradient is computed and used at once: as many as stay in a processor's cache from one to the other.
_WEIGHTS_PER_UPDATE = 2**21

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A channel whose deviation is a smaller part of its mean is constant up to the rounding of float32.
_ROUNDING = float(np.finfo(np.float32).eps)

# Numbers below the normal ones of float32 slow some processors down; no weight feels a gradient this small.
_SMALLEST_PROBABILITY = 1e-30


@dataclass(frozen=True)
class Recipe:
    """How heads are trained, the same for every input.

    Args:
        precision: "fp32", "bf16" or "fp16" of the products with the weights; loss and update are float32.
        seed: of the first weights and of the order of the pictures.
    """

    num_classes: int
    epochs: int
    batch_size: int
    device: torch.device
    precision: str
    seed: int

    def steps(self, pictures: int) -> int:
        return self.epochs * self._batches_per_epoch(pictures)

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in a new order every epoch, in batches of one size up to a picture: no small rest."""
        generator = np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            yield from np.array_split(generator.permutation(rows), self._batches_per_epoch(len(rows)))

    def _batches_per_epoch(self, pictures: int) -> int:
        return -(-pictures // self.batch_size)


class Standardise:
    """Takes off the mean of the training features (n, C) and divides by their deviation, in float32.

    A channel that is constant in training becomes 0 everywhere: it says nothing.
    """

    def __init__(self, train: np.ndarray, device: torch.device) -> None:
        mean, deviation = _moments(train)
        self.width = len(mean)
        varies = deviation > _ROUNDING * np.abs(mean)
        factor = np.divide(1.0, deviation, where=varies, out=np.zeros_like(deviation))
        self._mean = torch.from_numpy(mean.astype(np.float32)).to(device)
        self._factor = torch.from_numpy(factor.astype(np.float32)).to(device)

    def __call__(self, features: np.ndarray) -> Tensor:
        """(B, C) on the device; `features` are left as they are."""
        x_BC = torch.from_numpy(np.require(features, requirements="W")).to(self._mean.device).float()
        return (x_BC - self._mean).mul_(self._factor)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (C,), float64, in one reading: the pairwise formula of Chan, Golub and LeVeque, 1979."""
    count, mean, squares = 0, np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for start in range(0, len(features), _ROWS_PER_BLOCK):
        block = features[start : start + _ROWS_PER_BLOCK].astype(np.float64)
        total = count + len(block)
        block_mean = block.mean(axis=0)
        shift = block_mean - mean
        squares += np.square(block - block_mean).sum(axis=0) + shift**2 * (count * len(block) / total)
        mean += shift * (len(block) / total)
        count = total
    return mean, np.sqrt(squares / count)


class Heads:
    """The heads of one input, one for each rate, with SGD written out: autograd would keep every logit.

    Args:
        standardise: of the input; the heads take its features as they were extracted.
        rates: learning rates for batches of 256; they are used times batch_size / 256.
    """

    def __init__(self, standardise: Standardise, rates: Sequence[float], recipe: Recipe) -> None:
        size = (standardise.width, recipe.num_classes)
        first = np.random.default_rng(recipe.seed).normal(0, _FIRST_DEVIATION, size).astype(np.float32)
        self.weight_CN = torch.from_numpy(np.tile(first, len(rates))).to(recipe.device)
        self.bias_N = torch.zeros(self.weight_CN.shape[1], device=recipe.device)
        self._weight_momentum = torch.zeros_like(self.weight_CN)
        self._bias_momentum = torch.zeros_like(self.bias_N)
        scaled = [rate * recipe.batch_size / _PICTURES_PER_RATE for rate in rates]
        rate_R = torch.tensor(scaled, dtype=torch.float32, device=recipe.device)
        self._rate_N = rate_R.repeat_interleave(recipe.num_classes)
        self._shape = (len(rates), recipe.num_classes)
        self._standardise, self._dtype = standardise, _DTYPES[recipe.precision]
        # What the products are given; of float32 the weights themselves.
        self._factor_CN = self.weight_CN.to(self._dtype)
        self._channels_per_update = max(1, _WEIGHTS_PER_UPDATE // self.weight_CN.shape[1])

    def logits(self, features: np.ndarray) -> Tensor:
        """(B, R, L) float32 of features (B, C)."""
        x_BC = self._standardise(features).to(self._dtype)
        return (
            torch.addmm(self.bias_N.to(self._dtype), x_BC, self._factor_CN).float().unflatten(1, self._shape)
        )

    def step(self, features: np.ndarray, labels_B: Tensor, decay: float) -> None:
        """One step on the cross-entropy, whose gradient by the logits is softmax minus one-hot.

        Args:
            features: (B, C).
            labels_B: int64, on the heads' device.
            decay: what the learning rates are multiplied with at this step.
        """
        x_BC = self._standardise(features).to(self._dtype)
        error_BN = self._error(x_BC, labels_B)
        mean = 1 / len(labels_B)
        rate_N = self._rate_N * -decay
        self._bias_momentum.mul_(_MOMENTUM).add_(error_BN.sum(dim=0), alpha=mean)
        self.bias_N.addcmul_(self._bias_momentum, rate_N)
        if self._dtype == torch.float32:
            self._weight_momentum.addmm_(x_BC.t(), error_BN, beta=_MOMENTUM, alpha=mean)
            self.weight_CN.addcmul_(self._weight_momentum, rate_N)
        else:
            self._step_in_low_precision(x_BC, error_BN.to(self._dtype), mean, rate_N)

    def _error(self, x_BC: Tensor, labels_B: Tensor) -> Tensor:
        """(B, N) float32: the gradient of the sum over B by the logits."""
        logits_BN = torch.addmm(self.bias_N.to(self._dtype), x_BC, self._factor_CN)
        error_BRL = logits_BN.unflatten(1, self._shape).softmax(dim=-1, dtype=torch.float32)
        error_BRL.clamp_(min=_SMALLEST_PROBABILITY)
        error_BRL[torch.arange(len(labels_B), device=labels_B.device), :, labels_B] -= 1
        return error_BRL.flatten(1)

    def _step_in_low_precision(self, x_BC: Tensor, error_BN: Tensor, mean: float, rate_N: Tensor) -> None:
        parts = (self.weight_CN, self._weight_momentum, self._factor_CN, x_BC.t())
        for weight, momentum, factor, x_cB in zip(
            *(part.split(self._channels_per_update) for part in parts), strict=True
        ):
            momentum.mul_(_MOMENTUM).add_(x_cB @ error_BN, alpha=mean)
            factor.copy_(weight.addcmul_(momentum, rate_N))


def train_heads(
    features: Mapping[str, np.ndarray],
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    standardise: Mapping[str, Standardise],
    rates: Mapping[str, Sequence[float]],
    recipe: Recipe,
    advance: Callable[[], object],
) -> dict[str, Heads]:
    """Heads of every input at its own rates, trained together in one pass over some pictures.

    An input's heads are the same whatever other inputs are trained beside them.

    Args:
        features: by name of the input, (n, C); read batch by batch.
        labels: (n,) int64 in [0, num_classes).
        rows: the pictures to train on.
        standardise, rates: by name of the input.
        advance: called after every batch.
    """
    heads = {name: Heads(standardise[name], rates[name], recipe) for name in features}
    decays = cosine(1.0, 0.0, recipe.steps(len(rows)))
    for batch, decay in zip(recipe.batches(rows), decays, strict=True):
        labels_B = torch.from_numpy(labels[batch]).to(recipe.device)
        for name, part in features.items():
            heads[name].step(part[batch], labels_B, float(decay))
        advance()
    return heads
