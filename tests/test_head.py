"""§3.5 and Eq. 6: the detection head against hand-computed values and against ActionFormer's own outputs.

The goldens in ../shared/golden were made by running ActionFormer; tests that read them skip where they are
absent, and every fact is also tested without them.
"""
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import head
from evaluate import nms_per_class
from head import (
    DetectionHead,
    Output,
    TemporalPyramid,
    assign_targets,
    decode,
    default_ranges,
    detection_loss,
    diou_loss,
    pyramid_points,
    sigmoid_focal_loss,
    soft_nms,
    vote_segments,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
STRIDES = [1, 2, 4, 8, 16, 32]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: on a busy machine threads that wait for each other cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden(name):
    """The arrays of one golden file (float and int arrays as tensors), or skip."""
    if not (GOLDEN / name).exists():
        pytest.skip("../shared/golden is absent")
    return {k: torch.from_numpy(v) if v.dtype.kind in "fib" and v.ndim else v for k, v in np.load(GOLDEN / name).items()}


def golden_names(folder, pattern):
    return sorted(f"{folder}/{p.name}" for p in (GOLDEN / folder).glob(pattern)) or [f"{folder}/{pattern}"]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=tolerance, rtol=tolerance, check_dtype=False)


def small_head(window=0, in_dim=6, width=16, levels=4, classes=3, seed=0):
    """A small head whose every parameter is random: LayerNorm biases and residual scales away from their init."""
    torch.manual_seed(seed)
    model = DetectionHead(in_dim, classes, width, levels, num_heads=4, window=window, drop_path=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 and (p == 1).all() else 0.0))
    return model


def clip(length, batch=1, dim=6, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def one_level_output(logits, offsets, mask):
    """(B, L, C), (B, L, 2), (B, L) at stride 1 as an Output."""
    return Output([logits], [offsets], pyramid_points(logits.shape[1], [1], [[0, 1e4]]), [mask])


def truth(segments, labels):
    """What detection_loss reads of a batch: one list of segments and one of labels per clip."""
    return SimpleNamespace(segments=[torch.tensor(s, dtype=torch.float32).reshape(-1, 2) for s in segments],
                           labels=[torch.tensor(y, dtype=torch.long) for y in labels])


def loss_head(normalizer, **options):
    """A head for what detection_loss reads of it: M, lambda_loc, label smoothing."""
    model = DetectionHead(1, 1, 4, 1, num_heads=1, **options)
    model.loss_normalizer.fill_(normalizer)
    return model


# ----------------------------------------------------------------- the reference's arithmetic, in short


def official(sd, x, mask, leak=True, heads=4):
    """ActionFormer's forward pass with global attention, written from its description, on its parameter names.

    x: (B, D, T), mask: (B, 1, T). leak=True masks the *output* of each convolution as ActionFormer does, so that
    LayerNorm's bias on padding is read by the next convolution; leak=False masks every *input* as head.py does.
    """
    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * sd[name + ".weight"] + sd[name + ".bias"]

    def conv(x, mask, name, stride=1, groups=1):
        x = x if leak else x * mask
        return F.conv1d(x, sd[name + ".weight"], sd.get(name + ".bias"), stride, 1, groups=groups) * mask[..., ::stride]

    def point(x, name):
        return F.conv1d(x, sd[name + ".weight"], sd[name + ".bias"])

    def block(x, mask, name, stride):
        y, out_mask = norm(x, name + ".ln1"), mask[..., ::stride]
        q, k, v = (point(norm(conv(y, mask, f"{name}.attn.{n}_conv.conv", stride, len(y[0])), f"{name}.attn.{n}_norm"),
                         f"{name}.attn.{n}").unflatten(1, (heads, -1)) for n in ("query", "key", "value"))
        weight = (q.mT @ k / math.sqrt(q.shape[2])).masked_fill(~out_mask[:, None], -math.inf).softmax(-1)
        y = point((v @ weight.mT).flatten(1, 2), name + ".attn.proj") * out_mask
        if stride > 1:
            x = F.max_pool1d(x if leak else x.masked_fill(~mask, -math.inf), 3, 2, 1)
        x = x.masked_fill(~out_mask, 0) + sd[name + ".drop_path_attn.scale"] * y
        y = point(F.gelu(point(norm(x, name + ".ln2"), name + ".mlp.0")), name + ".mlp.3") * out_mask
        return x + sd[name + ".drop_path_mlp.scale"] * y

    def conv_head(x, mask, name, last):
        for i in range(2):
            x = F.relu(norm(conv(x, mask, f"{name}.head.{i}.conv"), f"{name}.norm.{i}"))
        return conv(x, mask, f"{name}.{last}.conv")

    for i in range(2):
        x = F.relu(norm(conv(x, mask, f"backbone.embd.{i}.conv"), f"backbone.embd_norm.{i}"))
    for i in range(2):
        x = block(x, mask, f"backbone.stem.{i}", 1)
    levels = sum(k.startswith("reg_head.scale") for k in sd)
    xs, masks = [x], [mask]
    for i in range(levels - 1):
        xs.append(block(xs[-1], masks[-1], f"backbone.branch.{i}", 2))
        masks.append(masks[-1][..., ::2])
    xs = [norm(x, f"neck.fpn_norms.{i}") for i, x in enumerate(xs)]
    logits = [conv_head(x, m, "cls_head", "cls_head") for x, m in zip(xs, masks)]
    offsets = [F.relu(sd[f"reg_head.scale.{i}.scale"] * conv_head(x, m, "reg_head", "offset_head"))
               for i, (x, m) in enumerate(zip(xs, masks))]
    return (Output([x.mT for x in logits], [x.mT for x in offsets],
                   pyramid_points(mask.shape[2], STRIDES[:levels], default_ranges(levels)), [m[:, 0] for m in masks]),
            [x.mT for x in xs])


def official_name(name):
    """Our parameter name -> ActionFormer's. Shapes differ only by axes of size 1: see `from_official`."""
    part, *rest = name.split(".")
    if part == "scales":
        return "reg_head.scale"
    if part in ("cls_head", "loc_head"):
        theirs, last = ("cls_head", "cls_head") if part == "cls_head" else ("reg_head", "offset_head")
        kind, *rest = rest
        middle = {"hidden": lambda: f"head.{rest[0]}.conv.{rest[1]}", "norm": lambda: f"norm.{rest[0]}.{rest[1]}",
                  "out": lambda: f"{last}.conv.{rest[0]}"}[kind]()
        return f"{theirs}.{middle}"
    kind, index, *rest = rest  # pyramid.KIND.INDEX.rest
    if kind == "embed":
        return f"backbone.embd.{index}.conv.{rest[0]}"
    if kind in ("embed_norm", "level_norm"):
        return f"{'backbone.embd_norm' if kind == 'embed_norm' else 'neck.fpn_norms'}.{index}.{rest[0]}"
    rest = ".".join(rest)
    for ours, theirs in (("norm_attention", "ln1"), ("norm_mlp", "ln2"), ("mlp.2", "mlp.3"), ("attention.out", "attn.proj"),
                         ("scale_attention", "drop_path_attn.scale"), ("scale_mlp", "drop_path_mlp.scale"),
                         *((f"attention.conv.{i}", f"attn.{n}_conv.conv") for i, n in enumerate(("query", "key", "value"))),
                         *((f"attention.norm.{i}", f"attn.{n}_norm") for i, n in enumerate(("query", "key", "value"))),
                         *((f"attention.linear.{i}", f"attn.{n}") for i, n in enumerate(("query", "key", "value")))):
        rest = rest.replace(ours, theirs)
    return f"backbone.{kind}.{index}.{rest}"


def to_official(tensors):
    """{our name: tensor} -> {their name: tensor}, LayerNorm and scale as (1, W, 1), 1x1 convolutions as (O, I, 1)."""
    out = {}
    for name, x in tensors.items():
        theirs = official_name(name)
        if name == "scales":
            out |= {f"{theirs}.{i}.scale": v for i, v in enumerate(x)}
        elif x.ndim == 1 and ("norm" in theirs or ".ln" in theirs or "drop_path" in theirs):
            out[theirs] = x[None, :, None]
        else:
            out[theirs] = x[..., None] if x.ndim == 2 else x
    return out


def from_official(sd, model):
    """Load ActionFormer's parameters; every one of them must be used."""
    ours = dict(model.named_parameters())
    unused = set(sd)
    with torch.no_grad():
        for name, p in ours.items():
            theirs = official_name(name)
            keys = [f"{theirs}.{i}.scale" for i in range(len(p))] if name == "scales" else [theirs]
            p.copy_(torch.stack([sd[k] for k in keys]).reshape(p.shape))
            unused -= set(keys)
    assert not unused, f"not loaded: {sorted(unused)}"
    return model


def golden_model():
    g = golden("model/global_T64_forward.npz")
    sd = {k[3:]: v if torch.is_tensor(v) else torch.tensor(v) for k, v in g.items() if k.startswith("sd.")}
    return g, sd, from_official(sd, DetectionHead(24, 5, 32, window=0, drop_path=0.0))


def golden_output(g):
    """ActionFormer's own logits and offsets as an Output."""
    return Output([g[f"logits{i}"].mT for i in range(6)], [g[f"offsets{i}"].mT for i in range(6)],
                  pyramid_points(64, STRIDES, default_ranges(6)), [g[f"mask{i}"][:, 0] for i in range(6)])


# ------------------------------------------------------------------------------------ focal and DIoU


def test_eq6_focal_loss_hand_values():
    close(sigmoid_focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0])), [0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)])
    close(sigmoid_focal_loss(torch.zeros(1), torch.ones(1), alpha=-1, gamma=0), [math.log(2)])
    extreme = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = sigmoid_focal_loss(extreme, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    close(loss, [0, 0, 2500, 7500])
    loss.sum().backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (-1.0, 2.0), (0.25, 0.0), (0.5, 1.5)])
def test_eq6_focal_loss_golden(alpha, gamma):
    g = golden("losses/focal.npz")
    for kind, targets in (("hard", g["targets"]), ("smooth", g["targets_smooth"])):
        logits = g["logits"].clone().requires_grad_()
        loss = sigmoid_focal_loss(logits, targets, alpha, gamma)
        loss.sum().backward()
        close(loss, g[f"focal_{kind}_a{alpha}_g{gamma}"])
        close(logits.grad, g[f"grad_{kind}_a{alpha}_g{gamma}"])
    for t in (0, 1):
        close(sigmoid_focal_loss(g["logits_extreme"], torch.full((1, 5), float(t))), g[f"focal_extreme_t{t}"])


def test_eq6_diou_loss_hand_values():
    pred = torch.tensor([[2.0, 4], [1, 1], [0, 5], [0, 0], [3, 1]])
    target = torch.tensor([[2.0, 4], [2, 2], [5, 0], [2, 2], [1, 1]])
    # equal; same centre, half as long; touching: IoU 0, centres 5 apart in 10; empty prediction; shifted by 1 in 4
    close(diou_loss(pred, target), [0, 0.5, 1.25, 1, 1 - 2 / 4 + 1 / 16])


def test_eq6_diou_loss_is_finite_everywhere():
    grid = torch.tensor([0.0, 1e-30, 1e-9, 1e-6, 1.0, 1e4])
    every = torch.cartesian_prod(grid, grid, grid, grid)
    pred = every[:, :2].clone().requires_grad_()
    loss = diou_loss(pred, every[:, 2:])
    loss.sum().backward()
    assert loss.isfinite().all() and pred.grad.isfinite().all()
    assert loss.min() >= 0 and loss.max() <= 1.2501
    empty = every.sum(1) == 0  # 0/0: the constant 1, where the reference has a gradient of 5e7
    assert empty.sum() == 1 and loss[empty].item() == 1 and (pred.grad[empty] == 0).all()


def test_eq6_diou_loss_golden():
    g = golden("losses/diou.npz")
    pred = g["pred"].clone().requires_grad_()
    loss = diou_loss(pred, g["target"])
    loss.sum().backward()
    close(loss, g["diou"])
    close(pred.grad[1:], g["grad"][1:])
    assert g["grad"][0].abs().max() > 1e7 and (pred.grad[0] == 0).all()  # our departure: row 0 is 0/0


# --------------------------------------------------------------------------------- points and targets


def test_eq6_pyramid_points():
    fine, coarse = pyramid_points(4, [1, 2], [[0, 4], [4, 1e4]])
    close(fine, [[0, 0, 4, 1], [1, 0, 4, 1], [2, 0, 4, 1], [3, 0, 4, 1]])
    close(coarse, [[0, 4, 1e4, 2], [2, 4, 1e4, 2]])
    assert default_ranges(6) == [[0, 4], [4, 8], [8, 16], [16, 32], [32, 64], [64, 1e4]]
    assert default_ranges(2) == [[0, 4], [4, 1e4]] and default_ranges(1) == [[0, 1e4]]


def test_eq6_assign_targets_hand_values():
    points = pyramid_points(16, [1, 2], [[0, 4], [4, 1e4]])
    # Segment (2, 8): centre 5. Level 0 takes points with both distances <= 4 within 1.5: t = 4, 5, 6.
    # Level 1 (longer distance in [4, 1e4], within 3 of the centre and strictly inside): t = 4 (2, 4), 6 (4, 2).
    cls, offsets = assign_targets(points, torch.tensor([[2.0, 8.0]]), torch.tensor([1]), 3)
    assert cls.sum(1).nonzero()[:, 0].tolist() == [4, 5, 6, 16 + 2, 16 + 3]
    assert (cls.sum(0) == torch.tensor([0, 5, 0])).all()
    close(offsets[[4, 5, 6, 18, 19]], [[2, 4], [3, 3], [4, 2], [1, 2], [2, 1]])  # level 1 in strides of 2
    assert (offsets[cls.sum(1) == 0] == 0).all()
    cat = assign_targets(torch.cat(points), torch.tensor([[2.0, 8.0]]), torch.tensor([1]), 3)
    assert torch.equal(cls, cat[0]) and torch.equal(offsets, cat[1])


def test_eq6_assign_targets_shortest_ties_and_whole_segment():
    points = pyramid_points(16, [1], [[0, 1e4]])
    segments = torch.tensor([[0.5, 15.5], [7.0, 9.0], [7.0, 9.0005]])
    cls, offsets = assign_targets(points, segments, torch.tensor([0, 1, 2]), 4, radius=math.inf)
    close(cls[8], [0, 1, 1, 0])  # two within 1e-3 of the shortest: both classes
    close(offsets[8], [1, 1])
    # Strictly inside: 0 is in none, 7 is the edge of both short ones, 9 is the edge of one of them.
    assert cls[[0, 7, 9]].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_eq6_assign_targets_empty_clip():
    cls, offsets = assign_targets(pyramid_points(8, [1, 2], [[0, 4], [4, 8]]), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 3)
    assert cls.shape == (12, 3) and offsets.shape == (12, 2) and cls.sum() == 0 and offsets.sum() == 0


@pytest.mark.parametrize("length", [192, 2304])
def test_eq6_pyramid_points_golden(length):
    g = golden(f"points/points_T{length}.npz")
    for i, points in enumerate(pyramid_points(length, STRIDES, default_ranges(6))):
        assert torch.equal(points, g[f"l{i}"])


@pytest.mark.parametrize("name", golden_names("points", "labels_*.npz"))
def test_eq6_assign_targets_golden(name):
    g = golden(name)
    points = pyramid_points(int(g["T"]), g["strides"].tolist(), g["regression_range"].tolist())
    radius = float(g["radius"]) if str(g["center_sample"]) == "radius" else math.inf
    cls, offsets = assign_targets(points, g["segments"], g["labels"], int(g["num_classes"]), radius)
    positive = cls.sum(1) > 0
    assert torch.equal(cls, g["cls_targets"]) and int(positive.sum()) == int(g["num_pos"])
    assert torch.equal(offsets[positive], g["reg_targets"][positive])


# ------------------------------------------------------------------------------------------- the loss


def test_eq6_detection_loss_hand_values():
    mask = torch.tensor([[True] * 6 + [False] * 2])
    offsets = torch.ones(1, 8, 2)
    model, batch = loss_head(10.0, lambda_loc=2.0), truth([[[2.0, 4.0]]], [[0]])
    # Segment (2, 4), class 0: the only point strictly inside is t = 3, with offsets (1, 1), which are predicted exactly.
    loss = detection_loss(one_level_output(torch.zeros(1, 8, 2), offsets, mask), batch, model)
    positive, negative = 0.0625 * math.log(2), 0.1875 * math.log(2)
    close(model.loss_normalizer, 0.9 * 10 + 0.1 * 1)  # one positive point; updated before use
    close(loss.cls, (positive + 11 * negative) / 9.1)
    close(loss.loc, 0.0)
    close(loss.per_frame, [[2 * negative] * 3 + [positive + negative] + [2 * negative] * 2 + [0, 0]])
    offsets[0, 3] = torch.tensor([0.5, 0.5])  # IoU .5, same centre
    loss = detection_loss(one_level_output(torch.zeros(1, 8, 2), offsets, mask), batch, model)
    close(model.loss_normalizer, 0.9 * 9.1 + 0.1)
    close(loss.loc, 0.5 / 8.29)
    close(loss.total, loss.cls + 2 * loss.loc)
    close(loss.per_frame[0, 3], positive + negative + 2 * 0.5)


def test_eq6_frame_loss_sums_the_levels():
    points = pyramid_points(4, [1, 2], [[0, 4], [4, 8]])
    mask = torch.tensor([[True, True, True, False]])
    logits = [torch.tensor([[[0.0], [1], [2], [3]]]), torch.tensor([[[4.0], [5]]])]
    logits[0].requires_grad_()
    output = Output(logits, [torch.zeros(1, 4, 2), torch.zeros(1, 2, 2)], points, [mask, mask[:, ::2]])
    loss = detection_loss(output, truth([[]], [[]]), loss_head(100.0))
    focal = sigmoid_focal_loss(torch.arange(6.0), torch.zeros(6))
    close(loss.per_frame, [[focal[0] + focal[4], focal[1] + focal[4], focal[2] + focal[5], 0]])
    assert not loss.per_frame.requires_grad and loss.total.requires_grad


def test_eq6_label_smoothing():
    logits, mask = torch.zeros(1, 4, 3), torch.ones(1, 4, dtype=torch.bool)
    loss = detection_loss(one_level_output(logits, torch.zeros(1, 4, 2), mask), truth([[]], [[]]),
                          loss_head(1.0, label_smoothing=0.1))
    close(loss.cls, 12 * sigmoid_focal_loss(torch.zeros(1), torch.tensor([0.1 / 4]))[0])


def test_eq6_class_agnostic_head_has_one_class_for_all():
    output = one_level_output(torch.zeros(1, 8, 1), torch.ones(1, 8, 2), torch.ones(1, 8, dtype=torch.bool))
    first, last = (detection_loss(output, truth([[[2.0, 4.0]]], [[label]]), loss_head(10.0)) for label in (0, 2))
    close(last.per_frame, first.per_frame)
    close(first.cls, (0.0625 + 7 * 0.1875) * math.log(2) / 9.1)  # one positive point of eight


def test_eq6_empty_clip_and_gradients():
    model, x, mask = small_head(), clip(16, batch=2), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    x.requires_grad_()
    y = x.detach().clone().requires_grad_()
    loss = detection_loss(model(x, y, mask), truth([[[3.0, 9.0], [1.0, 15.0]], []], [[0, 2], []]), model)
    assert model.loss_normalizer > 0.9 * 100 + 0.1 * 1.5  # more than one positive point
    loss.loc.backward(retain_graph=True)  # offsets come from f_loc only
    assert x.grad is None or x.grad.abs().sum() == 0
    assert y.grad[0].abs().sum() > 0 and y.grad[1].abs().sum() == 0  # no segment in clip 1
    model.zero_grad()
    loss.total.backward()
    assert x.grad[0].abs().sum() > 0 and x.grad[1, :9].abs().sum() > 0 and x.grad[1, 9:].abs().sum() == 0
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().sum() == 0]
    assert all("linear.1.bias" in n for n in missing), missing  # a key bias shifts all logits of a query alike: no effect

    before = model.loss_normalizer.clone()
    none = detection_loss(model(x, x, mask), truth([[], []], [[], []]), model)
    close(model.loss_normalizer, 0.9 * before + 0.1)  # max(number of positive points, 1)
    assert none.loc == 0 and none.total.isfinite()


def test_eq6_normalizer_is_saved():
    model = small_head()
    model.loss_normalizer.fill_(42.0)
    other = small_head(seed=5)
    other.load_state_dict(model.state_dict())
    assert other.loss_normalizer == 42.0 and DetectionHead(4, 2, 8, 2).loss_normalizer == 100.0


# ------------------------------------------------------------------------------ the pyramid and the head


def test_eq6_head_shapes_and_initial_values():
    model = DetectionHead(6, 3, width=16, levels=4).eval()
    x, mask = clip(16, batch=2), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    out = model(x, x, mask)
    assert model.strides == [1, 2, 4, 8]
    for s, (logits, offsets, points, m) in enumerate(zip(out.cls_logits, out.offsets, out.points, out.mask)):
        n = 16 // 2 ** s
        assert (logits.shape, offsets.shape, points.shape, m.shape) == ((2, n, 3), (2, n, 2), (n, 4), (2, n))
        assert (offsets >= 0).all() and (logits[1, ~m[1]] == 0).all() and torch.equal(m, mask[:, ::2 ** s])
        assert (logits[m].sigmoid() - 0.01).abs().max() < 0.03  # class bias -log(99)
    assert all((b.scale_mlp == 1e-4).all() and (b.scale_attention == 1e-4).all()
               for b in (*model.pyramid.stem, *model.pyramid.branch))


def test_eq6_head_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 8"):
        small_head()(clip(12), clip(12), torch.ones(1, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="shorter"):
        DetectionHead(4, 2, 8, levels=3, ranges=[[0, 4]])(clip(8, dim=4), clip(8, dim=4), torch.ones(1, 8, dtype=torch.bool))


def test_output_of_one_clip():
    model, x, mask = small_head(), clip(16, batch=2), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    out = model(x, x, mask)
    one = out.clip(1)
    for s in range(4):
        assert torch.equal(one.cls_logits[s], out.cls_logits[s][1]) and torch.equal(one.offsets[s], out.offsets[s][1])
        assert torch.equal(one.mask[s], out.mask[s][1]) and torch.equal(one.points[s], out.points[s])


def test_eq6_two_streams_share_one_pyramid(monkeypatch):
    model, x, y, mask = small_head(), clip(16), clip(16, seed=2), torch.ones(1, 16, dtype=torch.bool)
    calls, run = [], TemporalPyramid.forward
    monkeypatch.setattr(TemporalPyramid, "forward", lambda self, *a: calls.append(1) or run(self, *a))
    both, same = model(x, y, mask), model(x, x, mask)
    assert len(calls) == 3  # two for two streams, one where both are the same tensor
    close(both.cls_logits[0], same.cls_logits[0])
    close(both.offsets[0], model(y, y, mask).offsets[0])
    assert (both.offsets[0] - same.offsets[0]).abs().max() > 1e-2


@pytest.mark.parametrize("window", [0, 5, 19])
@pytest.mark.parametrize("valid", [64, 41, 8, 1])
def test_eq6_padding_never_leaks(window, valid):
    """One clip alone (padded as little as the pyramid allows) equals the same clip in a longer batch, every level."""
    model, x = small_head(window), clip(valid)
    alone = math.ceil(valid / 8) * 8
    outputs = []
    for length, filler in ((alone, 0.0), (96, math.nan)):  # whatever lies on padding
        f = torch.full((2, length, 6), filler)
        f[:, :valid], mask = x, (torch.arange(length) < valid).repeat(2, 1)
        if length > alone:
            f[1], mask[1] = clip(length, seed=3)[0], True  # beside a clip that fills the window
        outputs.append(model(f, f, mask))
    for s in range(4):
        n = -(-valid // 2 ** s)
        for a, b in ((o[s][0, :n], p[s][0, :n]) for o, p in ((outputs[0].cls_logits, outputs[1].cls_logits),
                                                              (outputs[0].offsets, outputs[1].offsets))):
            close(a, b, 2e-5)
        assert outputs[1].cls_logits[s][0, n:].abs().sum() == 0


def test_eq6_padding_leaks_in_the_reference_and_here_not():
    """Same weights, same arithmetic, one difference: masking inputs (ours) instead of outputs (ActionFormer)."""
    model, x = small_head(), clip(16, batch=2)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    sd = to_official(dict(model.named_parameters()))
    ours = model(x, x, mask)
    clean, _ = official(sd, (x * mask[..., None]).mT, mask[:, None], leak=False)
    leaky, _ = official(sd, (x * mask[..., None]).mT, mask[:, None], leak=True)
    for s in range(4):
        for a, b, c in ((ours.cls_logits, clean.cls_logits, leaky.cls_logits), (ours.offsets, clean.offsets, leaky.offsets)):
            close(a[s], b[s], 2e-5)
            close(a[s][0], c[s][0], 2e-5)  # no padding: no difference
    assert (ours.cls_logits[0][1] - leaky.cls_logits[0][1]).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [16, 256])
@pytest.mark.parametrize("window", [0, 1, 3, 19, 41])
def test_attention_equals_dense_band(window, chunk):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 77, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 77, dtype=torch.bool)
    mask[1, 50:] = False
    i = torch.arange(77)
    near = (i[:, None] - i).abs() <= window // 2 if window else torch.ones(77, 77, dtype=torch.bool)
    band = near & mask[:, None]  # (B, L, L)
    logits = torch.einsum("bihd,bjhd->bhij", *(x.unflatten(2, (2, 4)) for x in (q, k))) / 2
    dense = logits.masked_fill(~band[:, None], -1e30).softmax(-1)
    dense = torch.einsum("bhij,bjhd->bihd", dense, v.unflatten(2, (2, 4))).flatten(2)
    ours = head.attend(q, k, v, mask, 2, window, chunk)
    assert ours.isfinite().all()
    close(ours[mask], dense[mask])
    g = torch.randn_like(q) * mask[..., None]
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(dense, (q, k, v), g)):
        close(a, b)


@pytest.mark.parametrize("window", [0, 5])
def test_a_clip_of_padding_only_is_finite(window):
    model, x, mask = small_head(window), clip(16, batch=2), torch.ones(2, 16, dtype=torch.bool)
    mask[1] = False
    x.requires_grad_()
    out = model(x, x, mask)
    loss = detection_loss(out, truth([[[2.0, 6.0]], []], [[1], []]), model)
    loss.total.backward()
    assert loss.total.isfinite() and loss.per_frame[1].sum() == 0
    assert x.grad.isfinite().all() and x.grad[1].abs().sum() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_max_pool_leaves_padding_out():
    x = torch.tensor([[-5.0, -3, -4, -1, 7, 9]]).reshape(1, 6, 1)
    close(head.max_pool(x, torch.ones(1, 6, dtype=torch.bool))[0, :, 0], [-3, -1, 9])
    close(head.max_pool(x, torch.tensor([[True] * 3 + [False] * 3]))[0, :, 0], [-3, -3, 0])


def test_drop_path_drops_whole_samples_and_is_off_in_eval():
    torch.manual_seed(0)
    block = head.Block(8, 2, 1, 0, drop_path=0.5)
    kept = block.train().residual_scale(torch.ones(8), 4000)
    assert kept.shape == (4000, 1, 8) and set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept == kept[..., :1]).all() and abs(kept.mean().item() - 1) < 0.05  # per sample, right on average
    assert torch.equal(block.eval().residual_scale(torch.ones(8), 4000), torch.ones(8))


def test_eq6_heads_golden():
    g = golden("model/heads.npz")
    cls_head, loc_head = head.ConvHead(16, 5, 24), head.ConvHead(16, 2, 24)
    for module, prefix in ((cls_head, "cls_head"), (loc_head, "loc_head")):
        for name, p in module.named_parameters():
            p.data.copy_(g[official_name(f"{prefix}.{name}")].reshape(p.shape))
    largest = 0.0
    for i in range(6):
        x, mask = g[f"feat{i}"].mT, g[f"mask{i}"][:, 0]
        logits, offsets = cls_head(x, mask), F.relu(torch.tensor(g[f"reg_head.scale.{i}.scale"]) * loc_head(x, mask))
        # Three k3 convolutions read 3 steps: a leak from padding reaches no further than that.
        inner = F.max_pool1d((~mask).float(), 7, 1, 3) == 0
        for ours, theirs in ((logits, g[f"logits{i}"].mT), (offsets, g[f"offsets{i}"].mT)):
            close(ours[inner], theirs[inner], 1e-4)
            largest = max(largest, (ours - theirs).abs()[mask & ~inner].max().item() if (mask & ~inner).any() else 0)
    assert largest > 1e-3  # the reference's leak at the last 3 steps of a padded clip


def test_eq6_pyramid_and_head_golden():
    g, sd, model = golden_model()
    x, mask = g["x"].mT, g["mask"][:, 0]
    features, masks = model.pyramid(x, mask)
    ours = model(x, x, mask)
    theirs, leaky_features = official(sd, g["x"], g["mask"], leak=True)
    clean, _ = official(sd, g["x"], g["mask"], leak=False)
    for i in range(6):
        assert torch.equal(masks[i], g[f"mask{i}"][:, 0])
        # Sample 0 fills the window: equal everywhere. Sample 1 (41 of 64) differs by the leak and by nothing else:
        close(features[i][0], g[f"fpn{i}"][0].mT, 1e-4)
        close(ours.cls_logits[i][0], g[f"logits64_{i}"][0].mT, 1e-4)
        close(ours.offsets[i][0], g[f"offsets64_{i}"][0].mT, 1e-4)
        close(theirs.cls_logits[i], g[f"logits64_{i}"].mT, 1e-4)  # ... with the leak, the arithmetic gives the golden,
        close(theirs.offsets[i], g[f"offsets64_{i}"].mT, 1e-4)
        close(ours.cls_logits[i], clean.cls_logits[i], 1e-4)      # ... without it, ours.
        close(ours.offsets[i], clean.offsets[i], 1e-4)
        close(leaky_features[i], g[f"fpn{i}"].mT, 1e-4)


def test_eq6_detection_loss_golden():
    """The losses on ActionFormer's outputs, and the gradients of all its parameters, leak included."""
    g, sd, model = golden_model()
    t = golden("model/global_T64_train.npz")
    batch = SimpleNamespace(segments=[t["segments0"], t["segments1"]], labels=[t["labels0"], t["labels1"]])
    loss = detection_loss(golden_output(g), batch, model)
    close(loss.cls, t["cls_loss"].item(), 1e-5)
    close(loss.loc, t["reg_loss"].item(), 1e-5)
    close(loss.total, t["final_loss"].item(), 1e-5)
    close(model.loss_normalizer, t["loss_normalizer_after"].item())

    leaves = {k: v.clone().requires_grad_() for k, v in sd.items()}
    detection_loss(official(leaves, g["x"], g["mask"], leak=True)[0], batch, loss_head(100.0)).total.backward()
    for name, leaf in leaves.items():
        close(leaf.grad, torch.as_tensor(t[f"grad.{name}"]), 1e-4)
    close(torch.stack([v.grad.norm() for v in leaves.values()]).norm(), t["grad_norm"].item(), 1e-4)


def test_eq6_gradients_equal_the_reference_arithmetic():
    """What the golden cannot show because of the leak: our gradients are those of the same arithmetic without it."""
    model, x = small_head(), clip(16, batch=2)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 11:] = False
    batch = truth([[[2.0, 7.0], [1.0, 15.0]], [[3.0, 9.0]]], [[0, 1], [2]])
    detection_loss(model(x, x, mask), batch, loss_head(10.0)).total.backward()
    copied = copy.deepcopy(model)
    copied.zero_grad()
    clean, _ = official(to_official(dict(copied.named_parameters())), x.mT, mask[:, None], leak=False)
    detection_loss(clean, batch, loss_head(10.0)).total.backward()
    for (name, p), q in zip(model.named_parameters(), copied.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=lambda s: f"{name}: {s}")


# ------------------------------------------------------------------------------ decoding and soft-NMS


def test_decode_hand_values():
    points = pyramid_points(4, [1, 2], [[0, 4], [4, 8]])
    logits = [torch.full((4, 2), -20.0), torch.full((2, 2), -20.0)]
    logits[0][1, 0], logits[0][2, 1], logits[0][3, 0], logits[1][1, 1] = 0.0, 1.0, 5.0, -1.0
    offsets = [torch.ones(4, 2), torch.tensor([[1.0, 1.0], [0.5, 2.0]])]
    offsets[0][2] = 0.02  # shorter than .05: dropped
    mask = [torch.tensor([True, True, True, False]), torch.tensor([True, True])]  # step 3 is padding
    one = Output(logits, offsets, points, mask)
    segments, scores, labels = decode(one)
    close(segments, [[0, 2], [2 - 0.5 * 2, 2 + 2.0 * 2]])
    close(scores, torch.tensor([0.0, -1.0]).sigmoid())
    assert labels.tolist() == [0, 1]
    assert len(decode(one, min_score=0.9)[0]) == 0
    best = decode(Output(logits, [torch.ones(4, 2), torch.ones(2, 2)], points, mask), top_k=1)  # the best of each level
    close(best[1], torch.tensor([1.0, -1.0]).sigmoid())


def test_decode_external_scores():
    points = pyramid_points(2, [1], [[0, 4]])
    one = Output([torch.zeros(2, 1)], [torch.ones(2, 2)], points, [torch.tensor([True, True])])
    segments, scores, labels = decode(one, external_scores=torch.tensor([0.2, 0.0, 0.8]))
    close(scores, [0.4, 0.4, 0.1, 0.1])
    assert labels.tolist() == [2, 2, 0, 0]  # a class-agnostic head takes the classes of the video


def test_decode_and_nms_golden():
    g, t = golden("model/global_T64_forward.npz"), golden("model/global_T64_infer.npz")
    segments, scores, labels = decode(golden_output(g).clip(1))
    close(segments, t["raw_segments"], 1e-4)
    close(scores, t["raw_scores"])
    assert torch.equal(labels, t["raw_labels"])
    segments, scores, labels = nms_per_class(segments, scores, labels)
    seconds = ((segments * t["feat_stride"].item() + 0.5 * t["num_frames"].item()) / t["fps"].item()).clamp(0, t["duration"].item())
    close(seconds, t["segments"], 1e-4)
    close(scores, t["scores"])
    assert torch.equal(labels, t["labels"])


SEGMENTS = torch.tensor([[0.0, 10], [0, 5], [20, 30], [1, 10]])
SCORES = torch.tensor([0.9, 0.8, 0.3, 0.5])


@pytest.mark.parametrize("method, expected", [
    ("gaussian", {0: 0.9, 1: 0.8 * math.exp(-0.25 / 0.5), 2: 0.3, 3: 0.5 * math.exp(-0.81 / 0.5) * math.exp(-0.16 / 0.5)}),
    ("linear", {0: 0.9, 1: 0.8 * 0.5, 2: 0.3, 3: 0.5 * 0.1 * 0.6}),
    ("hard", {0: 0.9, 2: 0.3})])
def test_soft_nms_hand_values(method, expected):
    segments, scores, indices = soft_nms(SEGMENTS, SCORES, iou_threshold=0.3, method=method)  # tIoU .5, 0, .9; .4
    assert indices.tolist() == sorted(expected, key=lambda i: -expected[i])
    close(scores, [expected[i] for i in indices.tolist()])
    assert torch.equal(segments, SEGMENTS[indices])
    with pytest.raises((KeyError, ValueError), match="cubic"):
        soft_nms(SEGMENTS, SCORES, method="cubic")


def test_soft_nms_limits():
    assert [len(x) for x in soft_nms(torch.zeros(0, 2), torch.zeros(0))] == [0, 0, 0]
    assert soft_nms(SEGMENTS, SCORES, min_score=0.95)[2].tolist() == [0]  # the first pick always stays
    assert soft_nms(SEGMENTS, SCORES, limit=2)[2].tolist() == [0, 1]
    point = torch.tensor([[3.0, 3.0], [3.0, 3.0]])  # zero length: no overlap, no NaN
    close(soft_nms(point, torch.tensor([0.5, 0.4]))[1], [0.5, 0.4])
    segments, scores, indices = soft_nms(torch.tensor([[0.0, 1]]).repeat(4, 1), torch.full((4,), 0.5), method="hard", min_score=0.0)
    assert sorted(indices.tolist()) == [0, 1, 2, 3] and scores.tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize("name", golden_names("nms", "softnms_*.npz"))
def test_soft_nms_golden(name):
    g = golden(name)
    segments, scores, indices = soft_nms(g["segs"], g["scores"], float(g["iou_threshold"]), float(g["sigma"]),
                                         float(g["min_score"]), ["hard", "linear", "gaussian"][int(g["method"])])
    assert torch.equal(indices, g["inds"]) and torch.equal(segments, g["dets"][:, :2])
    close(scores, g["dets"][:, 2])


def random_detections(n=600, classes=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(n, generator=g) * 50
    return (torch.stack([start, start + 1 + torch.rand(n, generator=g) * 20], 1), torch.rand(n, generator=g),
            (torch.rand(n, generator=g) ** 2 * classes).long() * 3)  # uneven classes, with gaps between their numbers


@pytest.mark.parametrize("method", ["gaussian", "linear", "hard"])
@pytest.mark.parametrize("voting, per_class, per_video", [(0.0, 0, 0), (0.0, 0, 40), (0.7, 25, 100)])
def test_nms_per_class_equals_one_class_after_the_other(method, voting, per_class, per_video):
    segments, scores, labels = random_detections()
    expected = []
    for label in labels.unique():
        own = labels == label
        s, c, _ = soft_nms(segments[own], scores[own], method=method)
        s = vote_segments(s, segments[own], scores[own], voting) if voting else s
        expected.append((s[:per_class or None], c[:per_class or None], label.expand(len(c))[:per_class or None]))
    s, c, y = (torch.cat(x) for x in zip(*expected))
    order = c.argsort(descending=True, stable=True)[:per_video or None]
    got = nms_per_class(segments, scores, labels, method=method, voting=voting, max_per_class=per_class,
                        max_per_video=per_video)
    close(got[0], s[order], 1e-4)
    assert torch.equal(got[1], c[order]) and torch.equal(got[2], y[order])


def test_nms_per_class_empty():
    out = nms_per_class(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert [tuple(x.shape) for x in out] == [(0, 2), (0,), (0,)]


def test_soft_nms_equals_a_plain_loop():
    segments, scores, _ = random_detections(200)
    left, kept, s = list(range(200)), [], scores.tolist()
    while left:
        best = max(left, key=lambda i: s[i])
        left.remove(best)
        kept.append(best)
        for i in left:
            inter = max(0.0, float(min(segments[i, 1], segments[best, 1]) - max(segments[i, 0], segments[best, 0])))
            union = float(segments[i, 1] - segments[i, 0] + segments[best, 1] - segments[best, 0]) - inter
            s[i] *= math.exp(-((inter / union) ** 2) / 0.5)
        left = [i for i in left if s[i] >= 0.001]
    out = soft_nms(segments, scores)
    assert out[2].tolist() == kept
    close(out[1], [s[i] for i in kept])


def test_vote_segments_hand_values():
    kept, segments = torch.tensor([[0.0, 10], [50, 60]]), torch.tensor([[0.0, 10], [0, 8], [40, 45]])
    voted = vote_segments(kept, segments, torch.tensor([0.5, 1.0, 0.9]), 0.7)
    close(voted, [[0, (0.5 * 10 + 0.8 * 8) / 1.3], [50, 60]])  # weights .5 * 1 and 1 * .8; the second has no neighbour
    assert vote_segments(torch.zeros(0, 2), segments, SCORES[:3], 0.7).shape == (0, 2)
    close(vote_segments(kept, torch.zeros(0, 2), torch.zeros(0), 0.7), kept)


@pytest.mark.parametrize("threshold", ["0.5", "0.7", "0.9"])
def test_vote_segments_golden(threshold):
    g = golden(f"nms/voting_{threshold}.npz")
    close(vote_segments(g["nms_segs"], g["all_segs"], g["all_scores"], float(g["thr"])), g["out_actionformer"])
