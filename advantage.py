"""advantage.py - language advantage (paper §3.3, Eq. 1-3): how much did language lower the loss of each frame?

Vision-only epochs fill `ClassMeanLoss`; vision-language epochs compare each frame's loss with its class's mean
(Eq. 1), and train a linear layer on [adv]'s hidden state to predict the difference (Eq. 2, 3).
"""
import torch
import torch.distributed as dist
from torch import nn

from data import mean_over_all


class ClassMeanLoss(nn.Module):
    """Mean vision-only loss of each class (Algorithm 1, lines 2 and 5); index C is background.

    Sums and counts are buffers, so a resumed run continues with the same means. A class that the running epoch has
    not seen keeps the mean of the last epoch that saw it (0 before there is one).
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("total", torch.zeros(num_classes + 1))
        self.register_buffer("count", torch.zeros(num_classes + 1))
        self.register_buffer("previous", torch.zeros(num_classes + 1))
        self.register_buffer("recent", torch.zeros(2, num_classes + 1), persistent=False)      # of this process

    def reset(self) -> None:
        """Start a new vision-only epoch."""
        self.previous.copy_(self.mean())
        self.total.zero_()
        self.count.zero_()

    @torch.no_grad()
    def update(self, frame_loss: torch.Tensor, frame_class: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the losses (B, L) of real frames (mask (B, L)) to the sums of their classes (B, L) in 0..C."""
        real = mask.flatten().to(self.total.dtype)
        values = torch.stack([frame_loss.flatten().to(self.total.dtype) * real, real])    # (2, B L)
        self.recent.index_add_(1, frame_class.flatten(), values)
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Add what all processes have seen since the last call: the sums are the same in each, at every step, so that
        a checkpoint in the middle of an epoch holds them."""
        if dist.is_initialized():
            dist.all_reduce(self.recent)
        self.total += self.recent[0]
        self.count += self.recent[1]
        self.recent.zero_()

    def mean(self) -> torch.Tensor:
        """(C + 1,) mean loss of each class."""
        return torch.where(self.count > 0, self.total / self.count.clamp(min=1), self.previous)


def frame_classes(segments: list, labels: list, length: int, num_classes: int) -> torch.Tensor:
    """(B, L) class of each frame: that of the shortest segment that contains it, num_classes (background) if none.

    segments: B tensors (N_b, 2) in grid units; labels: B tensors (N_b,).
    """
    rows = []
    for segment, label in zip(segments, labels):
        if len(segment) == 0:
            rows.append(torch.full((length,), num_classes, device=segment.device))
            continue
        t = torch.arange(length, device=segment.device)[:, None]                          # (L, 1)
        inside = (segment[:, 0] <= t) & (t <= segment[:, 1])                              # (L, N)
        spans = (segment[:, 1] - segment[:, 0]).expand(length, -1).masked_fill(~inside, float("inf"))
        shortest, index = spans.min(dim=1)
        rows.append(torch.where(shortest.isinf(), num_classes, label[index]))
    return torch.stack(rows)


def language_advantage(class_mean: torch.Tensor, loss_vl: torch.Tensor, frame_class: torch.Tensor) -> torch.Tensor:
    """Eq. 1: A_lang^(l) = mean vision-only loss of frame l's class - its loss with language. No gradient.

    class_mean (C + 1,), loss_vl (B, L), frame_class (B, L) int -> (B, L), in units of the loss.
    """
    return (class_mean[frame_class] - loss_vl).detach()                                   # Eq. 1


class AdvantagePredictor(nn.Module):
    """Eq. 2: FC. Starts at zero: no advantage is expected, so lambda is 0 and language starts silent."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(dim, 1)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, f_adv: torch.Tensor) -> torch.Tensor:
        """f_adv (B, L, D) -> predicted advantage (B, L)."""
        return self.fc(f_adv).squeeze(-1)                                                 # Eq. 2


def advantage_loss(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Eq. 3: mean over real frames of the squared error; predicted, target, mask (bool) all (B, L). 0 if none.
    With several processes: see `mean_over_all`."""
    squared = (predicted - target) ** 2 * mask
    return mean_over_all(squared.sum(), mask.sum())                                       # Eq. 3
