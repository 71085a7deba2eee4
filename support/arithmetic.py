"""support/arithmetic.py - operations of the detection head. A mask (B, L) is False on padding."""
import math

import torch
import torch.nn.functional as F
from einops import rearrange

def zero_padding(x, mask):
    """x (B, L, D), finite, with zeros where mask (B, L) is False."""
    return x * mask[:, :, None].to(x.dtype)

def max_pool(x, mask):
    """Max over steps 2i-1, 2i, 2i+1, without padding: (B, L, W) -> (B, L / 2, W)."""
    real = x.masked_fill(~mask[:, :, None], -math.inf)
    pooled = F.max_pool1d(real.mT, 3, stride=2, padding=1).mT
    return pooled.masked_fill(~mask[:, ::2, None], 0)

def attend(q, k, v, mask, num_heads, window, chunk=256):
    """Step i sees the real steps j with |i - j| <= window // 2, or all real steps if window is 0.
    q, k, v: (B, L, W). mask: (B, L) -> (B, L, W), finite on padding. A chunk of queries at a time
    meets the keys in its reach, so that memory is linear in L."""
    L = q.size(1)
    half = window // 2 if window else L
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=num_heads) for x in (q, k, v))
    step = torch.arange(L, device=q.device)
    out = []
    for start in range(0, L, chunk):
        here = slice(start, start + chunk)
        reach = slice(max(0, start - half), start + chunk + half)
        distance = (step[here, None] - step[None, reach]).abs()
        # A step always sees itself, so that the softmax of a padded step is not empty.
        seen = (distance <= half) & mask[:, None, reach] | (distance == 0)             # (B, i, j)
        keys, values = k[:, :, reach], v[:, :, reach]
        out.append(F.scaled_dot_product_attention(q[:, :, here], keys, values, seen[:, None]))
    return rearrange(torch.cat(out, 2), "b h l d -> b l (h d)")

def channels_last_conv(x, layer):
    """torch's Conv1d `layer` on (B, L, C) -> (B, L / stride, W). As channels-last (B, C, 1, L)
    there is no transposed copy: on a CPU, depthwise layers are 10 times as fast."""
    x, weight = x.mT[:, :, None], layer.weight[:, :, None]
    stride, padding = (1, layer.stride[0]), (0, layer.padding[0])
    out = F.conv2d(x, weight, layer.bias, stride, padding, groups=layer.groups)
    return out[:, :, 0].mT

def mean_of_groups(f, mask, size: int):
    """Means over the real frames of each group of `size`: f (B, L, D), mask (B, L) bool ->
    (B, n, D), and which groups hold a real frame (B, n); n = L / size, rounded up."""
    missing = -f.size(1) % size
    real = F.pad(mask, (0, missing)).unflatten(1, (-1, size))              # (B, n, size)
    total = F.pad(f * mask[..., None], (0, 0, 0, missing)).unflatten(1, (-1, size)).sum(2)
    return total / real.sum(2, keepdim=True).clamp(min=1), real.any(2)

def stretch(steps, real, length: int):
    """Interpolate steps (B, n, D), of which `real` (B,) are no padding, linearly to (B, length, D).
    Padding takes the last real step, or it would be mixed into the last real frame."""
    index = torch.arange(steps.size(1), device=steps.device)
    index = index.minimum((real[:, None] - 1).clamp(min=0))                # (B, n)
    steps = steps.gather(1, index[..., None].expand_as(steps))
    return F.interpolate(steps.mT, length, mode="linear").mT
