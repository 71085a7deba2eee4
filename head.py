"""M_dh: the detection head (§3.5 of the paper; ActionFormer, Zhang et al. 2022).

A feature pyramid turns the L frames of a window into points at 6 temporal scales. Every point says
which classes it sees (`cls_logits`) and how far away the start and the end of the action are
(`offsets`). Reading order: the head, its pyramid, the loss (Eq. 6), decoding and soft-NMS.

B batch, L frames of a window, D feature width, W pyramid width, C classes, S levels,
P points of all levels, N segments. Time is in level-0 grid units (1 unit = 1 frame of the window)
unless said otherwise. A mask is True on real frames, False on padding.

Departure from ActionFormer: it masks the output of a convolution; the LayerNorm after it adds its bias to
the padding, and the next convolution reads that beyond the end of the clip. Here the *input* of every
convolution, max-pool and attention is masked: a clip in a padded batch gives what it gives alone.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class HeadOutput(NamedTuple):
    cls_logits: list[Tensor]  # S x (B, L_s, C), 0 on padding
    offsets: list[Tensor]     # S x (B, L_s, 2), distance to start and end >= 0, in strides of the level
    points: list[Tensor]      # S x (L_s, 4), rows [t, range_lo, range_hi, stride]
    mask: list[Tensor]        # S x (B, L_s) bool


class DetectionLoss(NamedTuple):
    loss_dh: Tensor       # (), Eq. 6
    loss_cls: Tensor      # (), its first term: focal loss / M
    loss_loc: Tensor      # (), its second term before lambda_loc: DIoU loss of the positives / M
    frame_loss: Tensor    # (B, L), unnormalised, without gradient, 0 on padding (feeds Eq. 1)
    num_positive: Tensor  # (), positive points of the batch, in all processes


class DetectionHead(nn.Module):
    """M_dh of §3.5: two feature streams -> class logits and boundary offsets on a pyramid.

    in_dim: D.  num_classes: C.  width: W.  levels: S, strides 1, 2, .. 2**(S-1).
    window: attention window in steps of each level (odd, a step sees window // 2 to each side); 0 = global.
    drop_path: probability that a residual branch is skipped for a sample while training.
    ranges: per level [lo, hi], the longest boundary distance it is responsible for, in grid units.
    prior: probability that every class starts at.
    """

    def __init__(self, in_dim: int, num_classes: int, width: int = 512, levels: int = 6, num_heads: int = 4,
                 window: int = 19, drop_path: float = 0.1, ranges: list | None = None, prior: float = 0.01):
        super().__init__()
        self.ranges = default_ranges(levels) if ranges is None else [list(r) for r in ranges]
        if len(self.ranges) != levels:
            raise ValueError(f"ranges has {len(self.ranges)} rows but the pyramid has {levels} levels")
        self.pyramid = TemporalPyramid(in_dim, width, levels, num_heads, window, drop_path)
        self.cls_head = ConvHead(width, num_classes, width)
        self.loc_head = ConvHead(width, 2, width)
        self.scales = nn.Parameter(torch.ones(levels))  # one factor per level on the raw offsets
        self.register_buffer("loss_normalizer", torch.tensor(100.0))  # M of Eq. 6
        # Every class starts at the probability `prior`, so that the background does not swamp the first steps.
        nn.init.constant_(self.cls_head.out.bias, -math.log((1 - prior) / prior))

    def strides(self) -> list[int]:
        """Frames between two points, per level: [1, 2, 4, ..]."""
        return [2 ** s for s in range(len(self.ranges))]

    def forward(self, f_cls: Tensor, f_loc: Tensor, mask: Tensor) -> HeadOutput:
        """f_cls, f_loc: (B, L, D), F_cls and F_loc of Eq. 5; mask: (B, L) bool.

        Both streams pass the same pyramid (shared weights); `f_loc is f_cls` runs it once.
        Raises ValueError where L does not fit the pyramid.
        """
        p_cls, masks = self.pyramid(f_cls, mask)
        p_loc = p_cls if f_loc is f_cls else self.pyramid(f_loc, mask)[0]
        cls_logits = [self.cls_head(p, m) for p, m in zip(p_cls, masks)]
        offsets = [F.relu(scale * self.loc_head(p, m)) for scale, p, m in zip(self.scales, p_loc, masks)]
        points = pyramid_points(mask.shape[1], self.strides(), self.ranges, device=mask.device)
        return HeadOutput(cls_logits, offsets, points, masks)


class TemporalPyramid(nn.Module):
    """(f (B, L, D), mask (B, L)) -> (features: S x (B, L_s, W), masks: S x (B, L_s)), L_s = L / 2**s.

    Two embedding convolutions, two blocks at stride 1, S-1 that halve the length; features are 0 on padding.
    """

    def __init__(self, in_dim: int, width: int = 512, levels: int = 6, num_heads: int = 4, window: int = 19,
                 drop_path: float = 0.1, stem_blocks: int = 2):
        super().__init__()
        self.embed = nn.ModuleList([Conv(in_dim, width, bias=False), Conv(width, width, bias=False)])
        self.embed_norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.stem = nn.ModuleList([Block(width, num_heads, 1, window, drop_path) for _ in range(stem_blocks)])
        self.branch = nn.ModuleList([Block(width, num_heads, 2, window, drop_path) for _ in range(levels - 1)])
        self.level_norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(levels)])

    def forward(self, f: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        multiple = 2 ** len(self.branch)
        if f.shape[1] % multiple:
            raise ValueError(f"the window has {f.shape[1]} frames, but a pyramid of {len(self.branch) + 1} levels "
                             f"needs a multiple of {multiple}: pad the window (mask False on the padding)")
        x = f.masked_fill(~mask[:, :, None], 0)  # not a product: padding may hold anything, NaN included
        for conv, norm in zip(self.embed, self.embed_norm):
            x = zero_padding(F.relu(norm(conv(x))), mask)  # (B, L, W)
        for block in self.stem:
            x = block(x, mask)
        xs, masks = [x], [mask]
        for block in self.branch:
            xs.append(block(xs[-1], masks[-1]))  # (B, L_s, W)
            masks.append(masks[-1][:, ::2])
        return [zero_padding(norm(x), m) for norm, x, m in zip(self.level_norm, xs, masks)], masks


class Block(nn.Module):
    """Pre-norm transformer block; stride 2 halves the length (B, L, W) -> (B, L / stride, W)."""

    def __init__(self, width: int, num_heads: int, stride: int, window: int, drop_path: float):
        super().__init__()
        self.stride, self.drop_path = stride, drop_path
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, stride, window)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale_attention = nn.Parameter(torch.full((width,), 1e-4))
        self.scale_mlp = nn.Parameter(torch.full((width,), 1e-4))
        nn.init.zeros_(self.mlp[0].bias), nn.init.zeros_(self.mlp[2].bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        skip = x if self.stride == 1 else max_pool(x, mask)
        attended = self.attention(zero_padding(self.norm_attention(x), mask), mask)
        x = torch.addcmul(skip, attended, self.residual_scale(self.scale_attention, len(x)))
        return torch.addcmul(x, self.mlp(self.norm_mlp(x)), self.residual_scale(self.scale_mlp, len(x)))

    def residual_scale(self, scale: Tensor, batch: int) -> Tensor:
        """(W,) -> (W,), or (B, 1, W) with stochastic depth: whole samples are 0, the others 1/keep larger."""
        if not self.training or self.drop_path == 0:
            return scale
        keep = 1 - self.drop_path
        kept = torch.rand(batch, 1, 1, device=scale.device) < keep
        return scale * kept / keep


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v each see their neighbours by a depthwise convolution first."""

    def __init__(self, width: int, num_heads: int, stride: int, window: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.stride, self.window = num_heads, stride, window
        self.conv = nn.ModuleList([Conv(width, width, stride, groups=width, bias=False) for _ in "qkv"])
        self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in "qkv"])
        self.linear = nn.ModuleList([nn.Linear(width, width) for _ in "qkv"])
        self.out = nn.Linear(width, width)
        for linear in (*self.linear, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, W), 0 on padding; mask: (B, L) -> (B, L / stride, W), finite on padding."""
        q, k, v = (linear(norm(conv(x))) for conv, norm, linear in zip(self.conv, self.norm, self.linear))
        mask = mask[:, ::self.stride]
        attend = window_attention if self.window else global_attention
        return self.out(attend(q, k, v, mask, self.num_heads, self.window))


class ConvHead(nn.Module):
    """Three convolutions, shared by all levels: (B, L_s, W), mask (B, L_s) -> (B, L_s, out_dim), both 0 on padding."""

    def __init__(self, in_dim: int, out_dim: int, width: int):
        super().__init__()
        self.hidden = nn.ModuleList([Conv(in_dim, width, bias=False), Conv(width, width, bias=False)])
        self.norm = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.out = Conv(width, out_dim)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for conv, norm in zip(self.hidden, self.norm):
            x = zero_padding(F.relu(norm(conv(x))), mask)
        return zero_padding(self.out(x), mask)


class Conv(nn.Conv1d):
    """Conv1d with kernel 3 on (B, L, C): no transposed copies, for (B, C, 1, L) of it is channels-last."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1, groups: int = 1, bias: bool = True):
        super().__init__(in_dim, out_dim, 3, stride, padding=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.groups == self.stride[0] == 1 and not torch.is_grad_enabled():
            out = minimal_filtering(x, self.weight)
        else:
            out = self.convolve(x)
        return out if self.bias is None else out + self.bias

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution without its bias: (B, L, in_dim) -> (B, L / stride, out_dim)."""
        # Not by einops: its strides for a batch of 1 hide the channels-last layout, and cost a copy.
        x, weight = x.mT[:, :, None], self.weight[:, :, None]
        # On a CPU oneDNN's weight gradient is twice as fast in slices of 512 channels as on all 2048.
        size = 512 if x.device.type == "cpu" and self.groups == 1 else x.shape[1]
        first, *rest = (F.conv2d(part, w, None, (1, self.stride[0]), (0, 1), groups=self.groups)
                        for part, w in zip(x.split(size, 1), weight.split(size, 1)))
        return rearrange(sum(rest, first), "b c 1 l -> b l c")


def minimal_filtering(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with kernel 3, zeros beyond both ends, by 4 products for 2 outputs instead of 6 (Winograd's F(2, 3)).

    x: (B, L, C), weight: (W, C, 3) -> (B, L, W), what conv1d gives up to rounding. For inference on a CPU, where the
    products are nearly all of the time.
    """
    length, (first, middle, last) = x.shape[1], weight.unbind(2)
    x = F.pad(x, (0, 0, 1, 1 + length % 2))
    even, odd = x[:, ::2], x[:, 1::2]
    before, here, after, beyond = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
    total, half = (first + last) / 2, middle / 2
    a, b, c, d = (F.linear(before - after, first), F.linear(here + after, total + half),
                  F.linear(after - here, total - half), F.linear(here - beyond, last))
    return torch.stack([a + b + c, b - c - d], 2).flatten(1, 2)[:, :length]


def detection_loss(output: HeadOutput, segments: list[Tensor], labels: list[Tensor], normalizer: Tensor,
                   lambda_loc: float = 1.0, label_smoothing: float = 0.0, radius: float = 1.5,
                   update_normalizer: bool = True) -> DetectionLoss:
    """Eq. 6: L_dh = 1/M * sum over points of (L_cls + lambda_loc * 1[positive] * L_loc).

    segments: B x (N_b, 2), grid units; labels: B x (N_b,) int; N_b = 0 is a clip without actions.
    normalizer: M, `DetectionHead.loss_normalizer`, an exponential mean (momentum .9) of the number of
    positive points (at least 1); it is updated in place before its use unless `update_normalizer` is False.
    With several processes the points of all count, and the loss is as many times larger: gradients are averaged.
    label_smoothing: s in y(1-s) + s/(C+1).
    """
    device, num_classes = output.cls_logits[0].device, output.cls_logits[0].shape[-1]
    points, valid = torch.cat(output.points), torch.cat(output.mask, 1)  # (P, 4), (B, P)
    logits, offsets = torch.cat(output.cls_logits, 1), torch.cat(output.offsets, 1)  # (B, P, C), (B, P, 2)
    assigned = [assign_targets(points, s.to(device), y.to(device), num_classes, radius)
                for s, y in zip(segments, labels, strict=True)]
    cls_targets, loc_targets = (torch.stack(t) for t in zip(*assigned))  # (B, P, C), (B, P, 2)
    positive = (cls_targets.sum(-1) > 0) & valid
    num_positive, processes = positive.sum(), dist.get_world_size() if dist.is_initialized() else 1
    if processes > 1:
        dist.all_reduce(num_positive)
    if update_normalizer:
        normalizer.lerp_(num_positive.clamp(min=1).to(normalizer.dtype), 0.1)

    cls_targets = cls_targets * (1 - label_smoothing) + label_smoothing / (num_classes + 1)
    # Masked sums instead of boolean indexing: no shape depends on the data, so a GPU is never waited for.
    focal = sigmoid_focal_loss(logits, cls_targets).sum(-1).masked_fill(~valid, 0)  # (B, P)
    diou = diou_loss(offsets.flatten(0, 1), loc_targets.flatten(0, 1)).view_as(focal).masked_fill(~positive, 0)
    m = normalizer / processes  # a copy: backward must not see a later update
    # Eq. 6
    loss_cls, loss_loc = focal.sum() / m, diou.sum() / m
    loss_dh = loss_cls + lambda_loc * loss_loc
    frame_loss = points_to_frames((focal + lambda_loc * diou).detach(), output.mask)
    return DetectionLoss(loss_dh, loss_cls, loss_loc, frame_loss, num_positive)


def points_to_frames(point_loss: Tensor, masks: list[Tensor]) -> Tensor:
    """(B, P) -> (B, L): frame l gets the sum over levels of the point l // stride. 0 on padding."""
    length = masks[0].shape[1]
    levels = point_loss.split([m.shape[1] for m in masks], 1)
    per_frame = sum(repeat(x, "b l -> b (l r)", r=length // x.shape[1]) for x in levels)
    return per_frame.masked_fill(~masks[0], 0)


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017), elementwise: alpha_t (1 - p_t)^gamma * cross-entropy, in float32 or better.

    logits, targets: same shape, targets in [0, 1] (soft targets allowed). alpha < 0 = no class balance.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    targets = targets.to(logits.dtype)
    p = logits.sigmoid()
    miss = p + targets - 2 * p * targets  # 1 - p_t
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * miss ** gamma
    return loss if alpha < 0 else loss * (alpha * targets + (1 - alpha) * (1 - targets))


def diou_loss(pred_offsets: Tensor, target_offsets: Tensor, eps: float = 1e-8) -> Tensor:
    """DIoU loss of intervals around one point: 1 - IoU + (distance of centres / enclosing length)^2.

    pred_offsets, target_offsets: (N, 2), distances to start and end >= 0 -> (N,) in [0, 1.25].
    Both intervals contain the point, so their union and their enclosing interval have the same length.
    Where that length is below eps (a zero-length prediction on a zero-length target) the IoU is 0/0: the
    loss is the constant 1 there and its gradient is 0 (ActionFormer's would be 0.5 / eps = 5e7).
    """
    pred, target = pred_offsets, target_offsets.to(pred_offsets.dtype)
    if pred.dtype in (torch.float16, torch.bfloat16):
        pred, target = pred.float(), target.float()
    inter = torch.minimum(pred, target).sum(-1)
    union = torch.maximum(pred, target).sum(-1)  # = enclosing length
    degenerate = union < eps
    union = union.masked_fill(degenerate, 1)
    shift = 0.5 * ((pred[:, 1] - pred[:, 0]) - (target[:, 1] - target[:, 0]))
    return (1 - inter / union + (shift / union) ** 2).masked_fill(degenerate, 1)


def assign_targets(points: list[Tensor] | Tensor, segments: Tensor, labels: Tensor, num_classes: int,
                   radius: float = 1.5) -> tuple[Tensor, Tensor]:
    """Which ground truth each point has to find -> (cls (P, C) in {0, 1}, offsets (P, 2) in strides).

    points: what `pyramid_points` returns, or its concatenation (P, 4). segments: (N, 2), labels: (N,).
    A segment claims a point that is strictly inside it, within radius * stride of its centre
    (radius = inf: anywhere inside), and whose longer boundary distance is in the level's range. Of several
    the shortest gives the offsets, and the classes of all within 1e-3 of its length are set.
    Offsets are 0 at points that no segment claims.
    """
    points = points if isinstance(points, Tensor) else torch.cat(list(points))
    t, low, high, stride = points[:, :, None].unbind(1)  # (P, 1) each
    if len(segments) == 0:
        return points.new_zeros(len(points), num_classes), points.new_zeros(len(points), 2)
    start, end = segments.to(points.dtype).unbind(1)  # (N,)
    centre = 0.5 * (start + end)
    inside = (t > torch.maximum(start, centre - stride * radius)) & (t < torch.minimum(end, centre + stride * radius))
    reach = torch.maximum(t - start, end - t)
    claims = inside & (reach >= low) & (reach <= high)  # (P, N)
    lengths = (end - start).expand_as(reach).masked_fill(~claims, math.inf)
    shortest, which = lengths.min(1)  # (P,)
    tied = claims & (lengths <= shortest[:, None] + 1e-3)
    one_hot = labels[:, None] == torch.arange(num_classes, device=labels.device)  # (N, C)
    cls = (tied.to(points.dtype) @ one_hot.to(points.dtype)).clamp(max=1)
    offsets = torch.stack([t[:, 0] - start[which], end[which] - t[:, 0]], 1) / stride
    return cls, offsets.masked_fill(~claims.any(1, keepdim=True), 0)


def pyramid_points(length: int, strides: list[int], ranges: list, device=None) -> list[Tensor]:
    """The points of all levels: S x (length / stride, 4), rows [t = i * stride, range_lo, range_hi, stride]."""
    points = []
    for stride, (low, high) in zip(strides, ranges, strict=True):
        t = torch.arange(0, length, stride, dtype=torch.float32, device=device)
        points.append(torch.stack([t, *(torch.full_like(t, v) for v in (low, high, stride))], 1))
    return points


def default_ranges(levels: int) -> list[list[float]]:
    """[0,4] [4,8] [8,16] .. doubling, the last one open up to 1e4 (grid units)."""
    edges = [0.0] + [4.0 * 2 ** s for s in range(levels - 1)] + [1e4]
    return [list(pair) for pair in zip(edges, edges[1:])]


def decode(cls_logits: list[Tensor], offsets: list[Tensor], points: list[Tensor], mask: list[Tensor],
           min_score: float = 0.001, top_k: int = 2000, external_scores: Tensor | None = None,
           min_length: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """One clip's outputs -> detections before NMS: (segments (N, 2) in grid units, scores (N,), labels (N,)).

    cls_logits: S x (L_s, C), offsets: S x (L_s, 2), points: S x (L_s, 4), mask: S x (L_s,).
    Per level: scores above min_score, the best top_k of them, and of these the segments longer than
    min_length (grid units). external_scores: (K,) video-level class scores, multiplied with the sigmoid
    (C = K, or C = 1 for a class-agnostic head, which then gives K classes).
    """
    found = []
    for logits, offset, point, valid in zip(cls_logits, offsets, points, mask, strict=True):
        score = logits.detach().float().sigmoid()  # (L_s, C)
        if external_scores is not None:
            score = score * external_scores.to(score)
        flat = score.masked_fill(~valid[:, None], 0).flatten()
        flat, order = flat.sort(descending=True, stable=True)
        keep = order[:top_k][flat[:top_k] > min_score]
        where, label = keep // score.shape[1], keep % score.shape[1]
        left, right = (offset.detach().float()[where] * point[where, 3:]).unbind(1)
        segment = torch.stack([point[where, 0] - left, point[where, 0] + right], 1)
        long = (segment[:, 1] - segment[:, 0]) > min_length
        found.append((segment[long], score.flatten()[keep][long], label[long]))
    return tuple(torch.cat(x) for x in zip(*found))


def nms_per_class(segments: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float = 0.1,
                  sigma: float = 0.5, min_score: float = 0.001, method: str = "gaussian",
                  voting_threshold: float = 0.0, max_per_class: int = 0, max_per_video: int = 200
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-NMS within each class -> (segments (M, 2), scores (M,), labels (M,)), best score first.

    segments: (N, 2), scores: (N,), labels: (N,) int. voting_threshold: tIoU of `vote_segments` among the
    detections of the class (0 = off). max_per_class, max_per_video: at most so many are kept (0 = no limit).
    The classes advance together, one pick of each at a time, which gives what one class after the other gives.
    """
    if len(segments) == 0:
        return segments.reshape(0, 2), scores, labels
    # numpy from here on: one thread, no start-up cost for thousands of small operations
    segs, confidences = segments.detach().cpu().float().numpy(), scores.detach().cpu().float().numpy()
    classes, counts = np.unique(labels.cpu().numpy(), return_counts=True)
    members = np.split(np.argsort(labels.cpu().numpy(), kind="stable"), counts.cumsum()[:-1])
    size = max(map(len, members))
    index = np.full((len(members), size), -1)  # (classes, N), -1 where a class has fewer detections
    for row, member in zip(index, members):
        row[:len(member)] = member
    limit = min(x for x in (max_per_class, max_per_video, size) if x > 0)
    picked, decayed = soft_nms_rounds(segs[index], np.where(index < 0, -1, confidences[index]),
                                      iou_threshold, sigma, min_score, method, limit, max_per_video)
    rows, rounds = np.nonzero(picked >= 0)
    kept = torch.from_numpy(index[rows, picked[rows, rounds]]).to(segments.device)
    new_scores = torch.from_numpy(decayed[rows, rounds]).to(scores)
    new_segments, new_labels = segments[kept], labels[kept]
    if voting_threshold > 0:
        for label in classes.tolist():
            own, all_own = new_labels == label, labels == label
            new_segments[own] = vote_segments(new_segments[own], segments[all_own], scores[all_own], voting_threshold)
    order = new_scores.argsort(descending=True, stable=True)[:max_per_video or None]
    return new_segments[order], new_scores[order], new_labels[order]


def soft_nms(segments: Tensor, scores: Tensor, iou_threshold: float = 0.1, sigma: float = 0.5,
             min_score: float = 0.001, method: str = "gaussian") -> tuple[Tensor, Tensor, Tensor]:
    """Soft-NMS (Bodla et al. 2017) of one class -> (segments (M, 2), decayed scores (M,), indices (M,)), in pick order.

    Repeatedly picks the best score and multiplies the others by a weight of their tIoU with the pick:
    gaussian exp(-tIoU^2 / sigma); linear 1 - tIoU, hard 0, both only where tIoU >= iou_threshold.
    What falls below min_score is dropped; the very first pick never is, as in ActionFormer.
    """
    if len(segments) == 0:
        return segments.reshape(0, 2), scores, torch.zeros(0, dtype=torch.long, device=segments.device)
    picked, decayed = soft_nms_rounds(segments.detach().cpu().float().numpy()[None],
                                      scores.detach().cpu().float().numpy()[None],
                                      iou_threshold, sigma, min_score, method, len(segments))
    indices = torch.from_numpy(picked[0]).to(segments.device)
    return segments[indices], torch.from_numpy(decayed[0]).to(scores), indices


def soft_nms_rounds(segments: np.ndarray, scores: np.ndarray, iou_threshold: float, sigma: float, min_score: float,
                    method: str, limit: int, max_total: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Soft-NMS of K independent sets at once -> (picks (K, R), -1 = none; their decayed scores (K, R)).

    segments: (K, N, 2), scores: (K, N) float32, -1 = no detection there. Every round picks one of each set,
    `limit` rounds at most; with max_total > 0 it stops once the best max_total picks of all sets are certain.
    """
    if method not in ("gaussian", "linear", "hard"):
        raise ValueError(f"soft-NMS method '{method}': choose gaussian, linear or hard")
    K, N = scores.shape
    left = np.empty((4, K, N), np.float32)  # start, end, score and column (exact below 2**24) of what is left
    left[0], left[1], left[2], left[3] = segments[..., 0], segments[..., 1], scores, np.arange(N)
    rows, picks, values = np.arange(K), np.full((K, limit), -1), np.full((K, limit), -1, np.float32)
    for i in range(limit):
        # Swap the best to the front, as the reference does: equal scores are then picked in its order.
        best = left[2].argmax(1)
        pick = left[:, rows, best]  # (4, K)
        left[:, rows, best] = left[:, :, 0]
        start, end, value, column = pick[..., None]
        taken = value >= (max(min_score, 0) if i else 0)
        # No later pick scores above value.max().
        if not taken.any() or 0 < max_total <= np.count_nonzero(values[:, :i] > value.max()):
            break
        picks[:, i], values[:, i] = np.where(taken, (column, value), -1)[..., 0]
        left = left[:, :, 1:]
        if left.shape[2] == 0:
            break
        decay_scores(start, end, *left[:3], iou_threshold, sigma, method)
        if i % 16 == 0:  # forget what has fallen below min_score
            alive = left[2] >= max(min_score, 0)
            size = max(1, alive.sum(1).max())
            if size < 0.8 * alive.shape[1]:  # worth the copies
                order = np.argsort(~alive, axis=1, kind="stable")[:, :size]
                left = np.take_along_axis(left, order[None], 2)
    used = max(1, np.count_nonzero((picks >= 0).any(0)))
    return picks[:, :used], values[:, :used]


def decay_scores(start: np.ndarray, end: np.ndarray, starts: np.ndarray, ends: np.ndarray, scores: np.ndarray,
                 iou_threshold: float, sigma: float, method: str) -> None:
    """The decay of one round, in place: picks start, end (K, 1); starts, ends, scores (K, N)."""
    inter = np.minimum(ends, end)
    inter -= np.maximum(starts, start)
    np.maximum(inter, 0, out=inter)
    union = ends - starts
    union += end - start + np.float32(1e-6)
    union -= inter
    tiou = np.divide(inter, union, out=inter)
    if method == "gaussian":
        weight = np.square(tiou, out=tiou)
        weight *= -1 / sigma
        scores *= np.exp(weight, out=weight)
    else:
        lost = tiou if method == "linear" else 1
        scores *= 1 - np.where((tiou >= iou_threshold) & (scores >= 0), lost, 0).astype(np.float32)


def vote_segments(kept: Tensor, segments: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Segment voting: each kept segment becomes the mean of its neighbours, weighted by score * tIoU.

    kept: (M, 2); segments: (N, 2), scores: (N,), all detections before NMS -> (M, 2). Neighbours have
    tIoU >= threshold; a kept segment without any (or only with score 0) stays as it is.
    """
    start = torch.maximum(kept[:, None, 0], segments[None, :, 0])
    end = torch.minimum(kept[:, None, 1], segments[None, :, 1])
    inter = (end - start).clamp(min=0)  # (M, N)
    union = (kept[:, 1] - kept[:, 0])[:, None] + (segments[:, 1] - segments[:, 0])[None] - inter
    tiou = inter / union.clamp(min=1e-6)
    weight = tiou * scores * (tiou >= threshold)
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 0, weight @ segments / total.clamp(min=1e-12), kept)


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, L, D), finite, with zeros where mask (B, L) is False."""
    return x * mask[:, :, None].to(x.dtype)


def max_pool(x: Tensor, mask: Tensor) -> Tensor:
    """Max over steps 2i-1, 2i, 2i+1 of (B, L, W), padding left out -> (B, L / 2, W), 0 where step 2i is padding."""
    even, odd = x.masked_fill(~mask[:, :, None], -math.inf).unflatten(1, (-1, 2)).unbind(2)
    before = F.pad(odd[:, :-1], (0, 0, 1, 0), value=-math.inf)
    return torch.maximum(torch.maximum(even, odd), before).masked_fill(~mask[:, ::2, None], 0)  # not -inf * 0


def global_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_heads: int, window: int = 0) -> Tensor:
    """Every step sees every real step: q, k, v (B, L, W), mask (B, L) -> (B, L, W)."""
    seen = mask | ~mask.any(1, keepdim=True)  # a clip of padding only sees itself: a softmax over nothing is NaN
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=num_heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
    return rearrange(out, "b h l d -> b l (h d)")


def window_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_heads: int, window: int,
                     chunk: int = 32) -> Tensor:
    """Step i sees the real steps j with |i - j| <= window // 2; memory is linear in L.

    q, k, v (B, L, W), mask (B, L) -> (B, L, W). Chunks of queries meet the keys of their chunk and `half`
    more on each side; the band is a mask inside. Padded steps give something finite.
    """
    B, L, _ = q.shape
    half = window // 2
    chunk = max(chunk, 2 * half)
    n = math.ceil(L / chunk)
    q, k, v = (F.pad(x, (0, 0, 0, n * chunk - L)).unflatten(1, (n, chunk)) for x in (q, k, v))
    mask = F.pad(mask, (0, n * chunk - L)).unflatten(1, (n, chunk))

    i = torch.arange(chunk, device=q.device)[:, None] + half
    j = torch.arange(chunk + 2 * half, device=q.device)
    near = with_neighbours(mask[..., None], half)[..., 0]  # (B, n, chunk + 2 half)
    # A step always sees itself: for real steps nothing new, for padding it keeps the softmax from being empty.
    seen = ((i - j).abs() <= half) & near[:, :, None] | (i == j)
    q, k, v = (rearrange(x, "b n c (h d) -> (b n) h c d", h=num_heads)
               for x in (q, with_neighbours(k, half), with_neighbours(v, half)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=rearrange(seen, "b n i j -> (b n) 1 i j"))
    return rearrange(out, "(b n) h c d -> b (n c) (h d)", b=B)[:, :L]


def with_neighbours(x: Tensor, half: int) -> Tensor:
    """(B, n, c, D) chunks -> (B, n, half + c + half, D): each with the end of the last and the start of the next."""
    first, middle, last = x.split([half, x.shape[2] - 2 * half, half], 2)
    before, after = F.pad(last[:, :-1], (0, 0, 0, 0, 1, 0)), F.pad(first[:, 1:], (0, 0, 0, 0, 0, 1))
    return torch.cat([before, first, middle, last, after], 2)
