"""head.py - M_dh, the detection head (paper §3.5; ActionFormer, Zhang et al. 2022).
A feature pyramid turns the L frames of a window into points at S temporal scales. Every point says
which classes it sees (`cls_logits`), and how far away start and end of the action are (`offsets`).
Dimensions: B batch, L frames of a window, L_s = L / 2^s points of level s, D feature width, W width
of the pyramid, C classes, S levels, P points of all levels, N segments. Times are in grid units (1
unit = 1 frame). The input of every convolution, pooling and attention is masked (False on padding):
a padded clip gives what it gives alone."""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.arithmetic import attend, channels_last_conv, max_pool, zero_padding

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

    def clip(self, b):
        """The head's output for clip b alone, without the batch dimension."""
        fields = {}
        for name in ("cls_logits", "offsets", "mask"):
            fields[name] = [level[b] for level in getattr(self, name)]
        return replace(self, **fields)

class DetectionHead(nn.Module):
    """M_dh: two feature streams -> class logits and boundary offsets on a pyramid.
    in_dim: D. num_classes: C. width: W. levels: S, with strides 1, 2, .. 2^(S-1).
    window: attention window in steps of each level (odd), 0 = global attention.
    drop_path: probability that training skips a residual branch for a sample.
    ranges: per level [lo, hi], the boundary distances it is responsible for, in grid units.
    prior: probability that classes start at; low, or background would swamp the first steps."""
    def __init__(self, in_dim, num_classes, width=512, levels=6, num_heads=4, window=19,
                 drop_path=0.1, ranges=None, prior=0.01, lambda_loc=1.0, label_smoothing=0.0):
        super().__init__()
        self.strides = [2 ** s for s in range(levels)]                # frames between two points
        self.ranges = ranges or default_ranges(levels)
        self.lambda_loc = lambda_loc
        self.label_smoothing = label_smoothing
        self.pyramid = TemporalPyramid(in_dim, width, levels, num_heads, window, drop_path)
        self.cls_head = ConvHead(width, num_classes, width)
        self.loc_head = ConvHead(width, 2, width)
        self.scales = nn.Parameter(torch.ones(levels))                # of the offsets of a level
        self.register_buffer("loss_normalizer", torch.tensor(100.0))  # M of Eq. 6
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.constant_(self.cls_head.out.bias, -math.log((1 - prior) / prior))

    def forward(self, f_cls, f_loc, mask):
        """f_cls, f_loc: (B, L, D), F_cls and F_loc of Eq. 5. mask: (B, L) bool -> Output.
        Both streams pass the same pyramid; it runs once where both are one tensor."""
        p_cls, masks = self.pyramid(f_cls, mask)
        p_loc = p_cls if f_loc is f_cls else self.pyramid(f_loc, mask)[0]
        cls_logits, offsets = [], []
        for s, m in enumerate(masks):
            cls_logits.append(self.cls_head(p_cls[s], m))
            offsets.append(F.relu(self.scales[s] * self.loc_head(p_loc[s], m)))
        points = pyramid_points(mask.size(1), self.strides, self.ranges, mask.device)
        return Output(cls_logits, offsets, points, masks)

    @torch.no_grad()
    def update_normalizer(self, num_positive):
        """M of Eq. 6: an exponential mean (momentum .9) of the number of positive points."""
        M = self.loss_normalizer
        M.lerp_(num_positive.clamp(min=1).to(M.dtype), 0.1)

class TemporalPyramid(nn.Module):
    """f (B, L, D), mask (B, L) -> features S x (B, L_s, W), 0 on padding; masks S x (B, L_s).
    Two embedding convolutions, two blocks at stride 1, then S - 1 blocks that halve the length."""
    def __init__(self, in_dim, width, levels, num_heads, window, drop_path):
        super().__init__()
        self.embed = nn.ModuleList([Conv(dim, width, bias=False) for dim in (in_dim, width)])
        self.embed_norm = layer_norms(2, width)
        strides = [1, 1] + [2] * (levels - 1)
        blocks = [Block(width, num_heads, stride, window, drop_path) for stride in strides]
        self.stem = nn.ModuleList(blocks[:2])
        self.branch = nn.ModuleList(blocks[2:])
        self.level_norm = layer_norms(levels, width)

    def forward(self, f, mask):
        multiple = 2 ** len(self.branch)
        if f.size(1) % multiple:
            raise ValueError(f"expected a multiple of {multiple} frames, found {f.size(1)}")
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
    def __init__(self, width, num_heads, stride, window, drop_path):
        super().__init__()
        self.stride, self.drop_path = stride, drop_path
        self.norm_attention = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, stride, window)
        wider, back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(wider, nn.GELU(), back)
        self.scale_attention = nn.Parameter(torch.full((width,), 1e-4))
        self.scale_mlp = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x, mask):
        skip = x if self.stride == 1 else max_pool(x, mask)
        attended = self.attention(zero_padding(self.norm_attention(x), mask), mask)
        x = skip + self.residual_scale(self.scale_attention, len(x)) * attended
        return x + self.residual_scale(self.scale_mlp, len(x)) * self.mlp(self.norm_mlp(x))

    def residual_scale(self, scale, batch):
        """(W,) -> (W,), or (B, 1, W) with stochastic depth: 0, or larger by 1 / keep."""
        if not self.training or self.drop_path == 0:
            return scale
        keep = 1 - self.drop_path
        kept = torch.rand(batch, 1, 1, device=scale.device) < keep
        return scale * kept / keep

class Attention(nn.Module):
    """Multi-head self-attention; q, k, v each pass a depthwise convolution first."""
    def __init__(self, width, num_heads, stride, window):
        super().__init__()
        self.num_heads, self.stride, self.window = num_heads, stride, window
        convs = [Conv(width, width, stride, groups=width, bias=False) for _ in "qkv"]
        self.conv = nn.ModuleList(convs)
        self.norm = layer_norms(3, width)
        self.linear = nn.ModuleList([nn.Linear(width, width) for _ in "qkv"])
        self.out = nn.Linear(width, width)

    def forward(self, x, mask):
        """x: (B, L, W), 0 on padding. mask: (B, L) -> (B, L / stride, W), finite on padding."""
        parts = zip(self.conv, self.norm, self.linear)
        q, k, v = (project(norm(conv(x))) for conv, norm, project in parts)
        mask = mask[:, ::self.stride]
        return self.out(attend(q, k, v, mask, self.num_heads, self.window))

class ConvHead(nn.Module):
    """Three convolutions, shared by all levels: (B, L_s, W) -> (B, L_s, out_dim), 0 on padding."""
    def __init__(self, in_dim, out_dim, width):
        super().__init__()
        self.hidden = nn.ModuleList([Conv(dim, width, bias=False) for dim in (in_dim, width)])
        self.norm = layer_norms(2, width)
        self.out = Conv(width, out_dim)

    def forward(self, x, mask):
        for conv, norm in zip(self.hidden, self.norm):
            x = zero_padding(F.relu(norm(conv(x))), mask)
        return zero_padding(self.out(x), mask)

class Conv(nn.Conv1d):
    """Conv1d with kernel 3 on (B, L, C) instead of torch's (B, C, L)."""
    def __init__(self, in_dim, out_dim, stride=1, groups=1, bias=True):
        super().__init__(in_dim, out_dim, 3, stride, padding=1, groups=groups, bias=bias)

    def forward(self, x):
        if self.groups > 1 or not torch.is_grad_enabled():
            return channels_last_conv(x, self)                         # the same, and faster
        return super().forward(x.mT).mT

def layer_norms(count, width):
    return nn.ModuleList([nn.LayerNorm(width) for _ in range(count)])

@dataclass
class DetectionLoss:
    total: Tensor         # () Eq. 6
    cls: Tensor           # () its first term: focal loss / M
    loc: Tensor           # () its second term before lambda_loc: DIoU loss of positive points / M
    per_frame: Tensor     # (B, L) not divided by M, without gradient, 0 on padding (for Eq. 1)

def detection_loss(output, batch, head):
    """Eq. 6: L_dh = 1/M * sum over points of (L_cls + lambda_loc * 1[positive] * L_loc).
    batch: segments, B tensors (N, 2) in grid units; labels, B tensors (N,) int. N may be 0.
    head: gives lambda_loc, label smoothing s in y(1-s) + s/(C+1), and M, which is updated first."""
    valid = torch.cat(output.mask, 1)                                                # (B, P)
    logits = torch.cat(output.cls_logits, 1)                                         # (B, P, C)
    offsets = torch.cat(output.offsets, 1)                                           # (B, P, 2)
    C, s = logits.size(-1), head.label_smoothing
    targets = []
    for segments, labels in zip(batch.segments, batch.labels, strict=True):
        labels = labels.clamp(max=C - 1)           # a class-agnostic head has one class for all
        targets.append(assign_targets(output.points, segments, labels, C))
    cls_targets, loc_targets = map(torch.stack, zip(*targets))               # (B, P, C), (B, P, 2)
    positive = (cls_targets.sum(-1) > 0) & valid                                     # (B, P)
    head.update_normalizer(positive.sum())
    M = head.loss_normalizer.clone()               # backward must not see a later update

    focal = sigmoid_focal_loss(logits, cls_targets * (1 - s) + s / (C + 1)).sum(-1)
    focal = focal.masked_fill(~valid, 0)                                             # (B, P)
    diou = diou_loss(offsets.flatten(0, 1), loc_targets.flatten(0, 1))
    diou = diou.view_as(focal).masked_fill(~positive, 0)                             # (B, P)
    loss_cls = focal.sum() / M
    loss_loc = diou.sum() / M
    total = loss_cls + head.lambda_loc * loss_loc                                    # Eq. 6
    per_point = focal + head.lambda_loc * diou
    return DetectionLoss(total, loss_cls, loss_loc, points_to_frames(per_point, output.mask))

@torch.no_grad()
def points_to_frames(point_loss, masks):
    """(B, P) -> (B, L): frame l gets the sum over levels of the point l // stride; 0 on padding."""
    L = masks[0].size(1)
    per_frame = 0
    for level in point_loss.split([m.size(1) for m in masks], dim=1):
        per_frame = per_frame + level.repeat_interleave(L // level.size(1), dim=1)
    return per_frame.masked_fill(~masks[0], 0)

def sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """Focal loss (Lin et al. 2017), elementwise: alpha_t (1 - p_t)^gamma * cross-entropy.
    logits, targets: same shape, targets in [0, 1]. alpha < 0: no class balance."""
    p = logits.sigmoid()
    miss = p + targets - 2 * p * targets                                             # 1 - p_t
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = entropy * miss ** gamma
    if alpha < 0:
        return loss
    return loss * (alpha * targets + (1 - alpha) * (1 - targets))

def diou_loss(pred_offsets, target_offsets, eps=1e-8):
    """DIoU loss of intervals around one point: 1 - IoU + (centre distance / enclosing length)^2.
    pred_offsets, target_offsets: (N, 2), distances to start and end >= 0 -> (N,) in [0, 1.25].
    Both contain the point, so their union is as long as their enclosing interval. Where it is
    shorter than eps, the loss is 1 without gradient (ActionFormer's would be 0.5 / eps = 5e7)."""
    inter = torch.minimum(pred_offsets, target_offsets).sum(-1)
    union = torch.maximum(pred_offsets, target_offsets).sum(-1)              # = enclosing length
    degenerate = union < eps
    union = union.masked_fill(degenerate, 1)
    left, right = (pred_offsets - target_offsets).unbind(-1)
    shift = 0.5 * (right - left)                                             # of the centres
    loss = 1 - inter / union + (shift / union) ** 2
    return loss.masked_fill(degenerate, 1)

def assign_targets(points, segments, labels, num_classes, radius=1.5):
    """Which ground truth each point has to find -> cls (P, C) in {0, 1}, offsets (P, 2) in strides.
    points: `pyramid_points`, or its concatenation (P, 4). segments: (N, 2). labels: (N,).
    A segment claims a point that is strictly inside it, within radius * stride of its centre, and
    whose longer boundary distance is in the range of the level. Of several segments the shortest
    gives the offsets, and the classes of all within 1e-3 of its length are set. Else both are 0."""
    if not torch.is_tensor(points):
        points = torch.cat(points)
    if len(segments) == 0:
        return points.new_zeros(len(points), num_classes), points.new_zeros(len(points), 2)
    t, low, high, stride = points[:, :, None].unbind(1)                      # (P, 1) each
    start, end = segments.to(points.dtype).unbind(1)                         # (N,)
    centre = 0.5 * (start + end)
    first = torch.maximum(start, centre - radius * stride)                   # (P, N)
    last = torch.minimum(end, centre + radius * stride)
    inside = (t > first) & (t < last)
    longer = torch.maximum(t - start, end - t)
    claims = inside & (longer >= low) & (longer <= high)
    lengths = torch.where(claims, end - start, math.inf)
    shortest, which = lengths.min(1)                                         # (P,)
    tied = claims & (lengths <= shortest[:, None] + 1e-3)
    one_hot = F.one_hot(labels, num_classes).to(points.dtype)                # (N, C)
    cls = (tied.to(points.dtype) @ one_hot).clamp(max=1)
    left = t[:, 0] - start[which]
    right = end[which] - t[:, 0]
    offsets = torch.stack([left, right], 1) / stride
    return cls, offsets.masked_fill(~claims.any(1, keepdim=True), 0)

def pyramid_points(length, strides, ranges, device=None):
    """The points of all levels: S x (length / stride, 4), rows [t, range_lo, range_hi, stride]."""
    points = []
    for stride, (low, high) in zip(strides, ranges, strict=True):
        t = torch.arange(0, length, stride, dtype=torch.float32, device=device)
        columns = [t] + [torch.full_like(t, value) for value in (low, high, stride)]
        points.append(torch.stack(columns, 1))
    return points

def default_ranges(levels):
    """[0, 4] [4, 8] [8, 16] .. doubling, the last one open up to 1e4 (grid units)."""
    edges = [0.0] + [4.0 * 2 ** s for s in range(levels - 1)] + [1e4]
    return [[low, high] for low, high in zip(edges, edges[1:])]

def decode(output, min_score=0.001, top_k=2000, external_scores=None, min_length=0.05):
    """One clip (`Output.clip`) -> detections before NMS: segments (N, 2), scores (N,), labels (N,).
    Each level gives its best top_k scores above min_score, of segments longer than min_length (grid
    units). external_scores: (K,) video-level class scores, multiplied with the sigmoid: C = K, or
    C = 1 for a class-agnostic head, which then gives K classes."""
    found = []
    levels = zip(output.cls_logits, output.offsets, output.points, output.mask, strict=True)
    for logits, offset, point, valid in levels:
        score = logits.detach().float().sigmoid()                            # (L_s, C)
        if external_scores is not None:
            score = score * external_scores.to(score)
        C = score.size(1)
        score = score.masked_fill(~valid[:, None], 0).flatten()
        score, order = score.sort(descending=True, stable=True)
        score = score[:top_k]
        score = score[score > min_score]
        order = order[:len(score)]
        row, label = order // C, order % C
        left, right = (offset.detach().float()[row] * point[row, 3:]).unbind(1)
        t = point[row, 0]
        segment = torch.stack([t - left, t + right], 1)
        long = left + right > min_length
        found.append((segment[long], score[long], label[long]))
    return tuple(torch.cat(part) for part in zip(*found))

def soft_nms(segments, scores, iou_threshold=0.1, sigma=0.5, min_score=0.001, method="gaussian",
             limit=0):
    """Soft-NMS (Bodla et al. 2017) of one class -> segments (M, 2), decayed scores (M,), indices.
    It picks the best score again and again, and multiplies the others by a weight of their tIoU
    with the pick: gaussian exp(-tIoU^2 / sigma); linear 1 - tIoU or hard 0 from iou_threshold on.
    Results are in pick order, at most `limit` (0 = all), none but the first below min_score."""
    # numpy: torch takes several times as long for thousands of such small operations.
    start, end = segments.numpy(force=True).astype(np.float32).T.copy()
    score = scores.numpy(force=True).astype(np.float32)
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
        latest_start = np.maximum(start[1:], start[0])
        earliest_end = np.minimum(end[1:], end[0])
        inter = (earliest_end - latest_start).clip(min=0)
        length = end - start
        union = length[1:] + (length[0] + np.float32(1e-6)) - inter
        tiou = inter / union
        if method == "gaussian":
            weight = np.exp(-tiou ** 2 / np.float32(sigma))
        else:
            lost = {"linear": tiou, "hard": 1}[method]
            weight = np.where(tiou >= iou_threshold, 1 - lost, 1).astype(np.float32)
        start, end, score, index = start[1:], end[1:], score[1:] * weight, index[1:]
        if len(picks) % 8 == 0:                          # forget what no later pick can take
            left = score >= min_score
            start, end, score, index = start[left], end[left], score[left], index[left]
    picks = torch.tensor(np.array(picks, np.int64), device=segments.device)
    return segments[picks], torch.tensor(np.array(decayed, np.float32)).to(scores), picks

def temporal_iou(a, b):
    """IoU of every segment of a (N, 2) with every one of b (M, 2), in one unit: (N, M) in [0, 1].
    A segment of zero (or negative) length has IoU 0 with all."""
    a = torch.as_tensor(a)[:, None]                                          # (N, 1, 2)
    b = torch.as_tensor(b)[None]                                             # (1, M, 2)
    start = torch.maximum(a[..., 0], b[..., 0])
    end = torch.minimum(a[..., 1], b[..., 1])
    inter = (end - start).clamp(min=0)                                       # (N, M)
    union = a.diff()[..., 0] + b.diff()[..., 0] - inter
    return torch.where(inter > 0, inter / union, 0)

def vote_segments(kept, segments, scores, threshold):
    """Segment voting: a kept segment becomes the mean of its neighbours, weighted by score * tIoU.
    kept: (M, 2). segments: (N, 2), scores: (N,), all detections before NMS -> (M, 2). Neighbours
    have tIoU >= threshold. A kept segment without any stays as it is."""
    tiou = temporal_iou(kept, segments)                                      # (M, N)
    weight = tiou * scores * (tiou >= threshold)
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 0, weight @ segments / total.clamp(min=1e-12), kept)
