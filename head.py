"""head.py - M_dh, the detection head (paper §3.5; ActionFormer, Zhang et al. 2022).

A feature pyramid turns the L frames of a window into points at S temporal scales. Every point says
which classes it sees (`cls_logits`) and how far away the start and the end of the action are
(`offsets`). Reading order: the head, its pyramid, the loss (Eq. 6), decoding, soft-NMS.

Dimensions: B batch, L frames of a window, L_s = L / 2^s points of level s, D feature width, W width
of the pyramid, C classes, S levels, P points of all levels, N segments. Time is in grid units
(1 unit = 1 frame of the window). A mask is True on real frames and False on padding. The input of
every convolution, pooling and attention is masked: a padded clip gives what it gives alone.
"""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


@dataclass
class Output:
    """All that the model predicts for a batch. The last three are None without language."""
    cls_logits: list                      # S x (B, L_s, C), 0 on padding
    offsets: list                         # S x (B, L_s, 2) >= 0, to start and end, in strides
    points: list                          # S x (L_s, 4) rows [t, range_lo, range_hi, stride]
    mask: list                            # S x (B, L_s) bool
    advantage: Tensor | None = None       # (B, L) predicted language advantage, Eq. 2
    lambda_lang: Tensor | None = None     # (B, L) in [0, 1), Eq. 4
    text_loss: Tensor | None = None       # () L_tg, Eq. 8, in training

    def clip(self, b: int) -> "Output":
        """The head's output for clip b alone, without the batch dimension."""
        parts = (self.cls_logits, self.offsets, self.mask)
        cls_logits, offsets, mask = ([level[b] for level in part] for part in parts)
        return replace(self, cls_logits=cls_logits, offsets=offsets, mask=mask)


class DetectionHead(nn.Module):
    """M_dh: two feature streams -> class logits and boundary offsets on a pyramid.

    in_dim: D. num_classes: C. width: W. levels: S, with strides 1, 2, .. 2^(S-1).
    window: attention window in steps of each level (odd), 0 = global attention.
    drop_path: probability that training skips a residual branch for a sample.
    ranges: per level [lo, hi], the boundary distances it is responsible for, in grid units.
    prior: probability that every class starts at; low, or background would swamp the first steps.
    lambda_loc, label_smoothing: of Eq. 6, see `detection_loss`.
    """

    def __init__(self, in_dim: int, num_classes: int, width: int = 512, levels: int = 6,
                 num_heads: int = 4, window: int = 19, drop_path: float = 0.1,
                 ranges: list | None = None, prior: float = 0.01, lambda_loc: float = 1.0,
                 label_smoothing: float = 0.0):
        super().__init__()
        self.strides = [2 ** s for s in range(levels)]               # frames between two points
        self.ranges = ranges or default_ranges(levels)
        self.lambda_loc, self.label_smoothing = lambda_loc, label_smoothing
        self.pyramid = TemporalPyramid(in_dim, width, levels, num_heads, window, drop_path)
        self.cls_head = ConvHead(width, num_classes, width)
        self.loc_head = ConvHead(width, 2, width)
        self.scales = nn.Parameter(torch.ones(levels))               # one factor a level on offsets
        self.register_buffer("loss_normalizer", torch.tensor(100.0))  # M of Eq. 6
        nn.init.constant_(self.cls_head.out.bias, -math.log((1 - prior) / prior))

    def forward(self, f_cls: Tensor, f_loc: Tensor, mask: Tensor) -> Output:
        """f_cls, f_loc: (B, L, D), F_cls and F_loc of Eq. 5. mask: (B, L) bool.

        Both streams pass the same pyramid; it runs once where both are one tensor.
        """
        p_cls, masks = self.pyramid(f_cls, mask)
        p_loc = p_cls if f_loc is f_cls else self.pyramid(f_loc, mask)[0]
        cls_logits = [self.cls_head(p, m) for p, m in zip(p_cls, masks)]
        offsets = [F.relu(scale * self.loc_head(p, m))
                   for scale, p, m in zip(self.scales, p_loc, masks)]
        points = pyramid_points(mask.size(1), self.strides, self.ranges, mask.device)
        return Output(cls_logits, offsets, points, masks)

    @torch.no_grad()
    def update_normalizer(self, num_positive: Tensor) -> None:
        """M of Eq. 6: an exponential mean (momentum .9) of the number of positive points."""
        self.loss_normalizer.lerp_(num_positive.clamp(min=1).to(self.loss_normalizer.dtype), 0.1)


class TemporalPyramid(nn.Module):
    """f (B, L, D), mask (B, L) -> features S x (B, L_s, W), 0 on padding; masks S x (B, L_s).

    Two embedding convolutions, two blocks at stride 1, then S - 1 blocks that halve the length.
    """

    def __init__(self, in_dim: int, width: int, levels: int, num_heads: int, window: int,
                 drop_path: float):
        super().__init__()
        self.embed = nn.ModuleList([Conv(in_dim, width, bias=False),
                                    Conv(width, width, bias=False)])
        self.embed_norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        strides = [1, 1] + [2] * (levels - 1)
        blocks = [Block(width, num_heads, stride, window, drop_path) for stride in strides]
        self.stem, self.branch = nn.ModuleList(blocks[:2]), nn.ModuleList(blocks[2:])
        self.level_norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(levels)])

    def forward(self, f: Tensor, mask: Tensor) -> tuple[list, list]:
        multiple = 2 ** len(self.branch)
        if f.size(1) % multiple:
            raise ValueError(f"expected a window padded to a multiple of {multiple} frames, for a "
                             f"pyramid of {len(self.branch) + 1} levels, found {f.size(1)}")
        x = f.masked_fill(~mask[:, :, None], 0)     # no product: padding may hold NaN
        for conv, norm in zip(self.embed, self.embed_norm):
            x = zero_padding(F.relu(norm(conv(x))), mask)                              # (B, L, W)
        for block in self.stem:
            x = block(x, mask)
        xs, masks = [x], [mask]
        for block in self.branch:
            xs.append(block(xs[-1], masks[-1]))                                        # (B, L_s, W)
            masks.append(masks[-1][:, ::2])
        levels = zip(self.level_norm, xs, masks)
        return [zero_padding(norm(x), m) for norm, x, m in levels], masks


class Block(nn.Module):
    """Pre-norm transformer block: (B, L, W) -> (B, L / stride, W)."""

    def __init__(self, width: int, num_heads: int, stride: int, window: int, drop_path: float):
        super().__init__()
        self.stride, self.drop_path = stride, drop_path
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, stride, window)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))
        self.scale_attention = nn.Parameter(torch.full((width,), 1e-4))
        self.scale_mlp = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        skip = x if self.stride == 1 else max_pool(x, mask)
        attended = self.attention(zero_padding(self.norm_attention(x), mask), mask)
        x = skip + self.residual_scale(self.scale_attention, len(x)) * attended
        return x + self.residual_scale(self.scale_mlp, len(x)) * self.mlp(self.norm_mlp(x))

    def residual_scale(self, scale: Tensor, batch: int) -> Tensor:
        """(W,) -> (W,), or (B, 1, W) with stochastic depth: 0, or larger by 1 / keep."""
        if not self.training or self.drop_path == 0:
            return scale
        keep = 1 - self.drop_path
        kept = torch.rand(batch, 1, 1, device=scale.device) < keep
        return scale * kept / keep


class Attention(nn.Module):
    """Multi-head self-attention; q, k, v each pass a depthwise convolution first."""

    def __init__(self, width: int, num_heads: int, stride: int, window: int):
        super().__init__()
        self.num_heads, self.stride, self.window = num_heads, stride, window
        convs = [Conv(width, width, stride, groups=width, bias=False) for _ in "qkv"]
        self.conv = nn.ModuleList(convs)
        self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in "qkv"])
        self.linear = nn.ModuleList([linear(width, width) for _ in "qkv"])
        self.out = linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, W), 0 on padding. mask: (B, L) -> (B, L / stride, W), finite on padding."""
        parts = zip(self.conv, self.norm, self.linear)
        q, k, v = (project(norm(conv(x))) for conv, norm, project in parts)
        return self.out(attend(q, k, v, mask[:, ::self.stride], self.num_heads, self.window))


class ConvHead(nn.Module):
    """Three convolutions, shared by all levels: (B, L_s, W) -> (B, L_s, out_dim), 0 on padding."""

    def __init__(self, in_dim: int, out_dim: int, width: int):
        super().__init__()
        self.hidden = nn.ModuleList([Conv(in_dim, width, bias=False),
                                     Conv(width, width, bias=False)])
        self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.out = Conv(width, out_dim)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for conv, norm in zip(self.hidden, self.norm):
            x = zero_padding(F.relu(norm(conv(x))), mask)
        return zero_padding(self.out(x), mask)


class Conv(nn.Conv1d):
    """Conv1d with kernel 3 on (B, L, C) instead of torch's (B, C, L)."""

    def __init__(self, in_dim: int, out_dim: int, stride=1, groups=1, bias=True):
        super().__init__(in_dim, out_dim, 3, stride, padding=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


def linear(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer whose bias starts at 0."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass
class DetectionLoss:
    """L_dh and its parts."""
    total: Tensor         # () Eq. 6
    cls: Tensor           # () its first term: focal loss / M
    loc: Tensor           # () its second term before lambda_loc: DIoU loss of positive points / M
    per_frame: Tensor     # (B, L) not divided by M, without gradient, 0 on padding (for Eq. 1)


def detection_loss(output: Output, batch, head: DetectionHead) -> DetectionLoss:
    """Eq. 6: L_dh = 1/M * sum over points of (L_cls + lambda_loc * 1[positive] * L_loc).

    batch: segments, B tensors (N, 2) in grid units; labels, B tensors (N,) int. N may be 0.
    head: gives lambda_loc, label smoothing s in y(1-s) + s/(C+1), and M, which is updated first.
    """
    points, valid = torch.cat(output.points), torch.cat(output.mask, 1)        # (P, 4), (B, P)
    logits, offsets = torch.cat(output.cls_logits, 1), torch.cat(output.offsets, 1)
    C = logits.size(-1)
    targets = []
    for segments, labels in zip(batch.segments, batch.labels, strict=True):
        labels = labels.clamp(max=C - 1)           # a class-agnostic head has one class for all
        targets.append(assign_targets(points, segments, labels, C))
    cls_targets, loc_targets = (torch.stack(part) for part in zip(*targets))  # (B, P, C), (B, P, 2)
    positive = (cls_targets.sum(-1) > 0) & valid                                        # (B, P)
    head.update_normalizer(positive.sum())
    M = head.loss_normalizer.clone()               # backward must not see a later update

    s = head.label_smoothing
    focal = sigmoid_focal_loss(logits, cls_targets * (1 - s) + s / (C + 1)).sum(-1)
    focal = focal.masked_fill(~valid, 0)                                                # (B, P)
    diou = diou_loss(offsets.flatten(0, 1), loc_targets.flatten(0, 1)).view_as(focal)
    diou = diou.masked_fill(~positive, 0)                                               # (B, P)
    loss_cls, loss_loc = focal.sum() / M, diou.sum() / M
    total = loss_cls + head.lambda_loc * loss_loc                                       # Eq. 6
    per_frame = points_to_frames((focal + head.lambda_loc * diou).detach(), output.mask)
    return DetectionLoss(total, loss_cls, loss_loc, per_frame)


def points_to_frames(point_loss: Tensor, masks: list) -> Tensor:
    """(B, P) -> (B, L): frame l gets the sum over levels of the point l // stride; 0 on padding."""
    L = masks[0].size(1)
    per_frame = 0
    for level in point_loss.split([m.size(1) for m in masks], dim=1):
        per_frame = per_frame + repeat(level, "b l -> b (l r)", r=L // level.size(1))
    return per_frame.masked_fill(~masks[0], 0)


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25,
                       gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017), elementwise: alpha_t (1 - p_t)^gamma * cross-entropy.

    logits, targets: same shape, targets in [0, 1]. alpha < 0: no class balance.
    """
    p = logits.sigmoid()
    miss = p + targets - 2 * p * targets                                     # 1 - p_t
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * miss ** gamma
    if alpha < 0:
        return loss
    return loss * (alpha * targets + (1 - alpha) * (1 - targets))


def diou_loss(pred_offsets: Tensor, target_offsets: Tensor, eps: float = 1e-8) -> Tensor:
    """DIoU loss of intervals around one point: 1 - IoU + (centre distance / enclosing length)^2.

    pred_offsets, target_offsets: (N, 2), distances to start and end >= 0 -> (N,) in [0, 1.25].
    Both contain the point, so their union is as long as their enclosing interval. Where it is
    shorter than eps, the loss is 1 without gradient (ActionFormer's would be 0.5 / eps = 5e7).
    """
    pred, target = pred_offsets, target_offsets
    inter = torch.minimum(pred, target).sum(-1)
    union = torch.maximum(pred, target).sum(-1)                              # = enclosing length
    degenerate = union < eps
    union = union.masked_fill(degenerate, 1)
    shift = 0.5 * ((pred[:, 1] - pred[:, 0]) - (target[:, 1] - target[:, 0]))
    return (1 - inter / union + (shift / union) ** 2).masked_fill(degenerate, 1)


def assign_targets(points, segments: Tensor, labels: Tensor, num_classes: int,
                   radius: float = 1.5) -> tuple[Tensor, Tensor]:
    """Which ground truth each point has to find -> cls (P, C) in {0, 1}, offsets (P, 2) in strides.

    points: `pyramid_points`, or its concatenation (P, 4). segments: (N, 2). labels: (N,).
    A segment claims a point that is strictly inside it, within radius * stride of its centre, and
    whose longer boundary distance is in the range of the level. Of several segments the shortest
    gives the offsets, and the classes of all within 1e-3 of its length are set. Else both are 0.
    """
    points = torch.cat(list(points)) if isinstance(points, (list, tuple)) else points
    if len(segments) == 0:
        return points.new_zeros(len(points), num_classes), points.new_zeros(len(points), 2)
    t, low, high, stride = points[:, :, None].unbind(1)                      # (P, 1) each
    start, end = segments.to(points.dtype).unbind(1)                         # (N,)
    centre, reach = 0.5 * (start + end), radius * stride
    inside = (t > torch.maximum(start, centre - reach)) & (t < torch.minimum(end, centre + reach))
    longer = torch.maximum(t - start, end - t)
    claims = inside & (longer >= low) & (longer <= high)                     # (P, N)
    lengths = (end - start).expand_as(longer).masked_fill(~claims, math.inf)
    shortest, which = lengths.min(1)                                         # (P,)
    tied = claims & (lengths <= shortest[:, None] + 1e-3)
    one_hot = labels[:, None] == torch.arange(num_classes, device=labels.device)       # (N, C)
    cls = (tied.to(points.dtype) @ one_hot.to(points.dtype)).clamp(max=1)
    offsets = torch.stack([t[:, 0] - start[which], end[which] - t[:, 0]], 1) / stride
    return cls, offsets.masked_fill(~claims.any(1, keepdim=True), 0)


def pyramid_points(length: int, strides: list, ranges: list, device=None) -> list:
    """The points of all levels: S x (length / stride, 4), rows [t, range_lo, range_hi, stride]."""
    points = []
    for stride, (low, high) in zip(strides, ranges, strict=True):
        t = torch.arange(0, length, stride, dtype=torch.float32, device=device)
        points.append(torch.stack([t, *(torch.full_like(t, v) for v in (low, high, stride))], 1))
    return points


def default_ranges(levels: int) -> list:
    """[0, 4] [4, 8] [8, 16] .. doubling, the last one open up to 1e4 (grid units)."""
    edges = [0.0, *(4.0 * 2 ** s for s in range(levels - 1)), 1e4]
    return [[low, high] for low, high in zip(edges, edges[1:])]


def decode(output: Output, min_score: float = 0.001, top_k: int = 2000,
           external_scores: Tensor | None = None, min_length: float = 0.05):
    """One clip (`Output.clip`) -> detections before NMS: segments (N, 2), scores (N,), labels (N,).

    Segments are in grid units. Each level gives its best top_k scores above min_score, of segments
    longer than min_length. external_scores: (K,) video-level class scores, multiplied with the
    sigmoid: C = K, or C = 1 for a class-agnostic head, which then gives K classes.
    """
    found = []
    levels = zip(output.cls_logits, output.offsets, output.points, output.mask, strict=True)
    for logits, offset, point, valid in levels:
        score = logits.detach().float().sigmoid()                            # (L_s, C)
        if external_scores is not None:
            score = score * external_scores.to(score)
        C = score.size(1)
        flat = score.masked_fill(~valid[:, None], 0).flatten()
        flat, order = flat.sort(descending=True, stable=True)
        keep = order[:top_k][flat[:top_k] > min_score]
        row, label = keep // C, keep % C
        left, right = (offset.detach().float()[row] * point[row, 3:]).unbind(1)
        segment = torch.stack([point[row, 0] - left, point[row, 0] + right], 1)
        long = (segment[:, 1] - segment[:, 0]) > min_length
        found.append((segment[long], score.flatten()[keep][long], label[long]))
    return tuple(torch.cat(part) for part in zip(*found))


def soft_nms(segments: Tensor, scores: Tensor, iou_threshold: float = 0.1, sigma: float = 0.5,
             min_score: float = 0.001, method: str = "gaussian", limit: int = 0):
    """Soft-NMS (Bodla et al. 2017) of one class -> segments (M, 2), decayed scores (M,), indices.

    It picks the best score again and again, and multiplies the others by a weight of their tIoU
    with the pick: gaussian exp(-tIoU^2 / sigma); linear 1 - tIoU or hard 0 from iou_threshold on.
    Results are in pick order, at most `limit` (0 = all), none but the first below min_score.
    """
    if method not in ("gaussian", "linear", "hard"):
        raise ValueError(f"soft-NMS: expected gaussian, linear or hard, found {method}")
    # numpy: torch takes several times as long for thousands of such small operations.
    start, end = segments.detach().cpu().numpy().astype(np.float32).T.copy()
    score = scores.detach().cpu().numpy().astype(np.float32)
    index = np.arange(len(score))
    picks, decayed = [], []
    while len(score) and (not limit or len(picks) < limit):
        best = score.argmax()
        if picks and score[best] < min_score:
            break
        for values in (start, end, score, index):        # to the front, for the reference's order
            values[0], values[best] = values[best], values[0]
        picks.append(index[0])
        decayed.append(score[0])
        inter = (np.minimum(end[1:], end[0]) - np.maximum(start[1:], start[0])).clip(min=0)
        union = (end[1:] - start[1:]) + (end[0] - start[0] + np.float32(1e-6)) - inter
        tiou = inter / union
        start, end, score, index = start[1:], end[1:], score[1:], index[1:]
        if method == "gaussian":
            score = score * np.exp(-tiou ** 2 / np.float32(sigma))
        else:
            lost = tiou if method == "linear" else 1
            score = score * np.where(tiou >= iou_threshold, 1 - lost, 1).astype(np.float32)
        if len(picks) % 8 == 0:                          # forget the scores that no pick can take
            left = score >= min_score
            start, end, score, index = start[left], end[left], score[left], index[left]
    picks = torch.tensor(np.array(picks, np.int64), device=segments.device)
    return segments[picks], torch.tensor(np.array(decayed, np.float32)).to(scores), picks


def vote_segments(kept: Tensor, segments: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Segment voting: a kept segment becomes the mean of its neighbours, weighted by score * tIoU.

    kept: (M, 2). segments: (N, 2), scores: (N,), all detections before NMS -> (M, 2). Neighbours
    have tIoU >= threshold. A kept segment without any stays as it is.
    """
    start = torch.maximum(kept[:, None, 0], segments[None, :, 0])
    end = torch.minimum(kept[:, None, 1], segments[None, :, 1])
    inter = (end - start).clamp(min=0)                                       # (M, N)
    union = (kept[:, 1] - kept[:, 0])[:, None] + (segments[:, 1] - segments[:, 0]) - inter
    tiou = inter / union.clamp(min=1e-6)
    weight = tiou * scores * (tiou >= threshold)
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 0, weight @ segments / total.clamp(min=1e-12), kept)


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, L, D), finite, with zeros where mask (B, L) is False."""
    return x * mask[:, :, None].to(x.dtype)


def max_pool(x: Tensor, mask: Tensor) -> Tensor:
    """Max over steps 2i-1, 2i, 2i+1, without padding: (B, L, W) -> (B, L / 2, W)."""
    real = x.masked_fill(~mask[:, :, None], -math.inf)
    pooled = F.max_pool1d(real.mT, 3, stride=2, padding=1).mT
    return pooled.masked_fill(~mask[:, ::2, None], 0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_heads: int, window: int,
           chunk: int = 256) -> Tensor:
    """Step i sees the real steps j with |i - j| <= window // 2, or all real steps if window is 0.

    q, k, v: (B, L, W). mask: (B, L) -> (B, L, W), finite on padding. A chunk of queries at a time
    meets the keys in its reach, so that memory is linear in L.
    """
    L = q.size(1)
    half = window // 2 if window else L
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=num_heads) for x in (q, k, v))
    step, out = torch.arange(L, device=q.device), []
    for start in range(0, L, chunk):
        here = slice(start, start + chunk)
        reach = slice(max(0, start - half), start + chunk + half)
        distance = (step[here, None] - step[None, reach]).abs()
        # A step always sees itself, so that the softmax of a padded step is not empty.
        seen = (distance <= half) & mask[:, None, reach] | (distance == 0)             # (B, i, j)
        out.append(F.scaled_dot_product_attention(q[:, :, here], k[:, :, reach], v[:, :, reach],
                                                  attn_mask=seen[:, None]))
    return rearrange(torch.cat(out, 2), "b h l d -> b l (h d)")
