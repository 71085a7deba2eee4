"""advantage.py - the language advantage (paper §3.3, Eq. 1-3).
How much did language lower the loss of each frame? A vision-only epoch fills `ClassMeans`. The
vision-language epoch after it compares the loss of each frame with the mean of its class (Eq. 1),
and trains a linear layer on the hidden state of [adv] to predict the difference (Eq. 2, 3)."""
import torch
from torch import nn

class ClassMeans(nn.Module):
    """Mean vision-only loss of each class (Algorithm 1, lines 2 and 5); index C is background.
    Sums and counts are buffers, so a resumed run goes on with the same means. A class that the
    current epoch has not seen keeps the mean of the last that saw it (0 before there is one)."""
    def __init__(self, num_classes):
        super().__init__()
        for name in ("total", "count", "previous"):
            self.register_buffer(name, torch.zeros(num_classes + 1))

    def reset(self):
        """Start a new vision-only epoch."""
        self.previous.copy_(self.mean())
        self.total.zero_()
        self.count.zero_()

    @torch.no_grad()
    def add(self, frame_loss, frame_class, mask):
        """Add the losses of real frames to the sums of their classes.
        frame_loss: (B, L). frame_class: (B, L) int in 0..C. mask: (B, L) bool, False on padding."""
        frame_class = frame_class.flatten()
        real = mask.flatten().to(self.total.dtype)
        losses = frame_loss.flatten().to(self.total.dtype)
        self.total.index_add_(0, frame_class, losses * real)
        self.count.index_add_(0, frame_class, real)

    def mean(self):
        """(C + 1,) mean loss of each class, in units of the loss."""
        mean = self.total / self.count.clamp(min=1)
        return torch.where(self.count > 0, mean, self.previous)

def language_advantage(class_mean, loss_vl, frame_class):
    """Eq. 1: A_lang^(l) = mean vision-only loss of frame l's class - its loss with language.
    class_mean: (C + 1,). loss_vl: (B, L). frame_class: (B, L) int -> (B, L), without gradient.
    The paper does not define the loss of a single frame. Here it is the sum, over the levels of the
    pyramid, of the focal and DIoU loss of the point that covers the frame, before the division by M
    (head.py:points_to_frames)."""
    return (class_mean[frame_class] - loss_vl).detach()                                   # Eq. 1

class AdvantagePredictor(nn.Module):
    """Eq. 2: FC. It starts at zero: no advantage is expected, lambda is 0, language is silent."""
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 1)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, f_adv):
        """f_adv: (B, L, D), hidden states of [adv] -> predicted advantage (B, L)."""
        return self.fc(f_adv).squeeze(-1)                                                 # Eq. 2

def advantage_loss(predicted, target, mask):
    """Eq. 3: the mean squared error over real frames; 0 if there is none.
    predicted, target: (B, L). mask: (B, L) bool -> ()."""
    squared = (predicted - target) ** 2 * mask
    return squared.sum() / mask.sum().clamp(min=1)                                        # Eq. 3

def frame_classes(segments, labels, length, num_classes):
    """(B, L) class of each frame: that of the shortest segment that contains it.
    segments: B tensors (N, 2) in grid units. labels: B tensors (N,) int. A frame in no segment is
    background and gets num_classes."""
    frame_class = torch.full((len(segments), length), num_classes)
    t = torch.arange(length)
    for row, segment, label in zip(frame_class, segments, labels):
        spans = segment[:, 1] - segment[:, 0]
        for i in spans.argsort(stable=True).flip(0).tolist():            # the shortest comes last
            start, end = segment[i]
            row[(start <= t) & (t <= end)] = label[i]
    return frame_class
