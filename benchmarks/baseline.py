"""The textbook DINO step that ours is measured against: timm's XCiT, and the paper's Algorithm 1 line by line.

Written plainly and as the original does it, with what it does not do in groups or at once done one by one: the loss
over pairs of views, clipping and the teacher's average over parameters, AdamW as torch has it by default.

V = student's views, T = teacher's views, B = images, K = prototypes
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

_TEACHER_VIEWS = 2


class TextbookHead(nn.Module):
    """DINO's head as torch's own modules make it (DINO, appendix C): (n, in_dim) -> (n, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(length)
        length.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))


class TextbookNetwork(nn.Module):
    """Views in consecutive groups of one size through the backbone, all features together through the head."""

    def __init__(self, arch: str, out_dim: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.backbone = timm.create_model(f"{arch}_224", num_classes=0, drop_path_rate=drop_path_rate)
        self.head = TextbookHead(self.backbone.num_features, out_dim)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """V views (B, 3, H, W) -> logits (V * B, K)."""
        features = []
        start = 0
        for end in range(1, len(views) + 1):
            if end == len(views) or views[end].shape[-1] != views[start].shape[-1]:
                features.append(self.backbone(torch.cat(list(views[start:end]))))
                start = end
        return self.head(torch.cat(features))


class TextbookLoss(nn.Module):
    """Cross-entropy of every teacher's view with every other student's view (DINO, eq. 2-4); moves the center."""

    def __init__(
        self,
        out_dim: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        """Logits of both, (V * B, K) and (T * B, K) -> a scalar."""
        student_views = (student / self.student_temperature).chunk(views)
        targets = F.softmax((teacher - self.center) / self.teacher_temperature, dim=-1).detach()
        total = torch.zeros((), device=student.device)
        pairs = 0
        for t, target in enumerate(targets.chunk(_TEACHER_VIEWS)):
            for v, logits in enumerate(student_views):
                if v == t:
                    continue
                total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                pairs += 1
        self.update_center(teacher)
        return total / pairs

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        batch_center = torch.sum(teacher, dim=0, keepdim=True) / len(teacher)
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)


class TextbookStep:
    """Student, teacher, loss and optimizer, and one step of Algorithm 1.

    Args:
        arch: of XCiT, by its name without a size.
        autocast: dtype that both networks and the loss are computed in where autocast does so; None = float32.
            With float16 the loss is scaled.
        clip_grad: longest gradient of a parameter; 0 = no clipping.
    """

    def __init__(
        self,
        arch: str,
        out_dim: int,
        drop_path_rate: float = 0.1,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        *,
        teacher_temperature: float = 0.04,
        lr: float = 5e-4,
        weight_decay: float = 0.04,
        momentum: float = 0.996,
        clip_grad: float = 3.0,
    ) -> None:
        self.device = torch.device(device)
        self.autocast = autocast
        self.momentum = momentum
        self.clip_grad = clip_grad
        self.student = TextbookNetwork(arch, out_dim, drop_path_rate).to(self.device)
        self.teacher = TextbookNetwork(arch, out_dim).to(self.device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss = TextbookLoss(out_dim, teacher_temperature=teacher_temperature).to(self.device)
        self.optimizer = create_optimizer(self.student, lr, weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)

    def copy_weights(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Take over those of our networks, given as their state dicts."""
        self.student.load_state_dict(textbook_names(student))
        self.teacher.load_state_dict(textbook_names(teacher))

    def step(self, views: Sequence[Tensor]) -> float:
        """Views (B, 3, H, W), the two global ones first, on any device -> the loss."""
        views = [view.to(self.device, non_blocking=True) for view in views]
        with self._precision():
            teacher = self.teacher(views[:_TEACHER_VIEWS])
            student = self.student(views)
            loss = self.loss(student, teacher, len(views))
        value = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip_grad:
            clip_gradients(self.student.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        update_teacher(self.teacher, self.student, self.momentum)
        return value

    def _precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def create_optimizer(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's AdamW, all else by default; biases and one-dimensional parameters are not decayed."""
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if name.endswith(".bias") or p.ndim == 1]
    decayed = [p for name, p in trained if not (name.endswith(".bias") or p.ndim == 1)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Each parameter's gradient to at most `max_norm`, one after the other."""
    for parameter in parameters:
        if parameter.grad is not None:
            scale = max_norm / (parameter.grad.norm(2) + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, one parameter after the other."""
    for follower, leader in zip(teacher.parameters(), student.parameters(), strict=True):
        follower.mul_(momentum).add_((1 - momentum) * leader.detach())


def textbook_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of our network under the names of `TextbookNetwork`."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        name = name.replace("last_layer.weight_g", "last_layer.parametrizations.weight.original0")
        name = name.replace("last_layer.weight_v", "last_layer.parametrizations.weight.original1")
        if "cls_attn_blocks" in name and ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{letter}.")] = part
        else:
            renamed[name] = value
    return renamed
