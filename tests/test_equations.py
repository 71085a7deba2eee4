"""The paper's equations in its order, with values computed by hand: `pytest tests/test_equations.py -v`."""
import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, feature_batch

from advantage import (
    AdvantagePredictor,
    ClassMeans,
    advantage_loss,
    frame_classes,
    language_advantage,
)
from head import (
    Output,
    assign_targets,
    detection_loss,
    diou_loss,
    pyramid_points,
    sigmoid_focal_loss,
)
from model import aggregate, language_weight
from train import TrainingState, get_args, vision_language_epoch, vision_only_epoch
from vlm import NO_ACTION, instruction, prefix_lm_mask, proposal_text

def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), check_dtype=False, **tolerance)


# ------------------------------------------------------------------------------ §3.1 problem definition
def test_sec31_one_visual_feature_per_frame(make_model):
    """F_vis is (L, D), of mean 0 and variance 1 in every frame."""
    f_vis = make_model().visual(feature_batch([12, 8]))
    assert f_vis.shape == (2, 12, 32)
    close(f_vis.mean(-1), torch.zeros(2, 12), atol=1e-5, rtol=0)
    close(f_vis.var(-1, correction=0)[0], torch.ones(12), atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------ §3.2 language features
def test_sec32_prefix_mask():
    """Three tokens see each other, of which the second is padding; two of the answer are causal."""
    valid = torch.tensor([[True, False, True, True, True]])
    assert prefix_lm_mask(valid, 3)[0, 0].int().tolist() == [
        [1, 0, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]
    causal = prefix_lm_mask(torch.ones(1, 4, dtype=torch.bool), 0)
    assert torch.equal(causal[0, 0], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_sec32_descriptions_reach_every_special_token(make_model, layout):
    model, batch = make_model(layout=layout).eval(), feature_batch([8])
    f_vis = model.visual(batch)
    before = model.language(f_vis, batch.mask)
    model.language.set_descriptions(dict(zip(CLASSES, reversed(CLASSES.values()))))
    after = model.language(f_vis, batch.mask)
    for old, new in zip(before[:3], after[:3]):
        assert old.shape == (1, 8, 32) and ((old - new).abs().amax(-1) > 1e-6).all()


def test_appendix_b2_instruction_holds_every_description():
    text = instruction(CLASSES | {"Walk": ""})
    assert all(f"{label}: {sentence}" in text for label, sentence in CLASSES.items())
    assert text.endswith("\nWalk") and text.index("Jump") < text.index("Run")


# ------------------------------------------------------------------------------ §3.3 language advantage
def test_eq1_language_advantage():
    """Mean of the class minus the loss with language; background is the last class; no gradient."""
    loss_vl = torch.tensor([[0.5, 3.0, 0.25]], requires_grad=True)
    advantage = language_advantage(torch.tensor([2.0, 1.0, 0.1]), loss_vl, torch.tensor([[0, 1, 2]]))
    close(advantage, [[1.5, -2.0, -0.15]])
    assert not advantage.requires_grad


def test_eq1_class_of_a_frame_is_that_of_the_shortest_segment():
    segments = [torch.tensor([[0.0, 6.0], [2.0, 4.0]]), torch.zeros(0, 2)]
    classes = frame_classes(segments, [torch.tensor([0, 1]), torch.zeros(0).long()], 8, 3)
    assert classes.tolist() == [[0, 0, 1, 1, 1, 0, 0, 3], [3] * 8]


def test_eq2_advantage_predictor_starts_silent_and_is_linear():
    predict, f_adv = AdvantagePredictor(3), torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]])
    close(predict(f_adv), [[0.0, 0.0]])
    with torch.no_grad():
        predict.fc.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        predict.fc.bias.fill_(0.5)
    close(predict(f_adv), [[5.5, 2.5]])


def test_eq3_advantage_loss_is_the_mean_square_over_real_frames():
    predicted = torch.tensor([[1.0, 2.0, 9.0]], requires_grad=True)
    loss = advantage_loss(predicted, torch.tensor([[0.0, 4.0, 0.0]]), torch.tensor([[True, True, False]]))
    close(loss, 2.5)                                                        # (1 + 4) / 2
    loss.backward()
    close(predicted.grad, [[1.0, -2.0, 0.0]])
    empty = torch.zeros(1, 3, dtype=torch.bool)
    assert advantage_loss(predicted, torch.zeros(1, 3), empty) == 0


# ------------------------------------------------------------------------------ §3.4 aggregation
def test_eq4_language_weight():
    """2 sigmoid(ReLU(A)) - 1: 0 for a negative advantage, 0.5 at ln 3, below 1; slope 1/2 at 0."""
    advantage = torch.tensor([[-5.0, 0.0, math.log(3), 10.0]], requires_grad=True)
    weight = language_weight(advantage)
    close(weight, [[0.0, 0.0, 0.5, 0.9999092]], atol=1e-6, rtol=0)
    weight.sum().backward()
    close(advantage.grad[0, :3], [0.0, 0.5, 0.375], atol=1e-6, rtol=0)


def test_eq5_aggregate_adds_weighted_language():
    f_vis, f_lang = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    close(aggregate(f_vis, f_lang, torch.tensor([[0.5, 0.0]])), [[[6.0, 12.0], [3.0, 4.0]]])


def test_eq5_silent_language_gives_the_vision_only_model(make_model):
    """At the start lambda is 0, so that both kinds of epoch see the same model."""
    model, batch = make_model().eval(), feature_batch([12, 8])
    full, alone = model(batch), model(batch, use_language=False)
    assert full.lambda_lang.eq(0).all() and alone.lambda_lang is None
    for a, b in zip(full.cls_logits + full.offsets, alone.cls_logits + alone.offsets):
        close(a, b, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------ §3.5 detection head
def test_eq6_focal_loss():
    """p = .5: alpha .25 of (1 - p)^2 (-ln p) for a target, .75 of it without; logit 2 by its formula."""
    loss = sigmoid_focal_loss(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 1.0]))
    p = 1 / (1 + math.exp(-2))
    close(loss, [0.0625 * math.log(2), 0.1875 * math.log(2), -0.25 * (1 - p) ** 2 * math.log(p)])


def test_eq6_diou_loss():
    """Equal: 0. Offsets (1, 1) and (1, 3): IoU 2/4, centres 1 apart in 4. One empty: IoU 0, centres 1 of 2."""
    pred = torch.tensor([[2.0, 3.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    target = torch.tensor([[2.0, 3.0], [1.0, 3.0], [0.0, 2.0], [0.0, 0.0]])
    close(diou_loss(pred, target), [0.0, 0.5 + 1 / 16, 1.25, 1.0])


def test_eq6_which_points_are_positive():
    """Segment 2-8 on level 0 (stride 1, up to 4 away): within 1.5 of its centre, strictly inside."""
    points = pyramid_points(12, [1], [[0, 4]])
    cls, offsets = assign_targets(points, torch.tensor([[2.0, 8.0]]), torch.tensor([1]), 2)
    assert cls[:, 1].nonzero().flatten().tolist() == [4, 5, 6] and cls[:, 0].sum() == 0
    close(offsets[4:7], [[2.0, 4.0], [3.0, 3.0], [4.0, 2.0]])


def test_eq6_detection_loss(make_model):
    """One level, 4 points, one class, logits 0: one positive whose segment is found exactly."""
    head = make_model(width=16).head
    head.loss_normalizer.fill_(20.0)
    points = pyramid_points(4, [1], [[0, 100]])
    offsets = torch.zeros(1, 4, 2)
    offsets[0, 1] = torch.tensor([1.0, 1.0])
    output = Output([torch.zeros(1, 4, 1)], [offsets], points, [torch.tensor([[True, True, True, False]])])
    batch = feature_batch([3], L=4, segments=[torch.tensor([[0.0, 2.0]])], labels=[torch.tensor([0])])
    loss = detection_loss(output, batch, head)
    M, ln2 = 0.9 * 20 + 0.1 * 1, math.log(2)                       # M first moves towards 1 positive point
    close(head.loss_normalizer, M)
    close(loss.cls, (0.0625 + 2 * 0.1875) * ln2 / M)               # padding counts nowhere
    close(loss.loc, 0.0)
    close(loss.total, loss.cls + loss.loc)
    close(loss.per_frame, [[0.1875 * ln2, 0.0625 * ln2, 0.1875 * ln2, 0.0]])
    batch.segments, batch.labels = [torch.zeros(0, 2)], [torch.zeros(0).long()]
    assert detection_loss(output, batch, head).loc == 0            # a clip without actions


# ------------------------------------------------------------------------------ §3.6 objectives
def test_eq7_answer_lists_the_proposals_in_order_of_start():
    assert proposal_text([[60.2, 74.8], [-0.4, 48.0]], ["Diving", "LongJump"]) == "LongJump: 0-48, Diving: 60-75."
    assert proposal_text([], []) == NO_ACTION


def test_eq8_text_loss_is_the_cross_entropy_of_the_answer_alone(make_model):
    """Equal logits give ln(vocabulary), however many tokens are masked by -100."""
    language = make_model().language
    language.logits = lambda hidden: torch.zeros(*hidden.shape[:2], 50)
    labels = torch.tensor([[-100, 7, 8, -100], [-100, 9, -100, -100]])
    close(language.text_loss(torch.zeros(2, 4, 32), labels), math.log(50))
    ids, valid, labels = language.answer_tokens(["Jump: 1-2.", "No action."], torch.ones(2, 3).bool())
    for row, label, real, text in zip(ids, labels, valid, ("Jump: 1-2.", "No action.")):
        counted = label[label != -100]
        assert language.tokenizer.decode(counted[:-1]) == text and counted[-1] == language.tokenizer.eos_token_id
        where = (label != -100).nonzero().flatten()
        assert torch.equal(row[where + 1], counted) and real[where + 1].all()       # each predicts the next


def make_state(model, *more):
    args = get_args(["--dataset", "custom", "--features", "f", "--annotations", "a", "--descriptions", "d",
                     "--device", "cpu", "--epochs", "4", "--warmup-epochs", "0", "--lr", "1e-3", *more])
    return TrainingState(model, args, batches_per_epoch=2)


def test_eq9_total_loss(make_model):
    """L = L_dh + lambda_tg L_tg + lambda_adv L_adv."""
    state, terms = make_state(make_model()), []
    batches = [feature_batch([12, 8], seed=1), feature_batch([10, 12], seed=2)]
    def record(total, batch, **parts):
        terms.append((total.item(), {name: part.detach() for name, part in parts.items()}))
    vision_language_epoch(state.model, batches, record, lambda_tg=0.3, lambda_adv=0.7)
    for total, part in terms:
        expected = part["loss_cls"] + part["loss_loc"] + 0.3 * part["loss_tg"] + 0.7 * part["loss_adv"]
        assert total == pytest.approx(expected.item(), rel=1e-5)
        assert part["loss_tg"] > 0 and part["loss_adv"] > 0


# ------------------------------------------------------------------------------ Algorithm 1
def test_algorithm1_line5_class_means():
    """Means of the losses of each class; a class that is not seen keeps its last mean; padding is left out."""
    means = ClassMeans(2)
    means.add(torch.tensor([[1.0, 3.0, 5.0, 99.0]]), torch.tensor([[0, 0, 2, 1]]),
              torch.tensor([[True, True, True, False]]))
    close(means.mean(), [2.0, 0.0, 5.0])
    means.reset()
    close(means.mean(), [2.0, 0.0, 5.0])
    means.add(torch.tensor([[4.0]]), torch.tensor([[1]]), torch.tensor([[True]]))
    close(means.mean(), [2.0, 4.0, 5.0])


def test_algorithm1_vision_only_epoch(make_model):
    """Lines 2-6: means start anew, language is neither run nor trained, everything else is."""
    model = make_model()
    state, before = make_state(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    model.class_means.total.fill_(1e6)
    vision_only_epoch(model, [feature_batch([12, 8], seed=1), feature_batch([10, 12], seed=2)], state.backpropagate)
    assert state.step == 2 and model.class_means.total.max() < 1e3
    assert model.class_means.count.tolist() == [0, 24, 0, 42 - 24]            # segment 1-6 of class 1 has 6 frames
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"project.weight", "head.cls_head.out.weight"} <= changed
    assert not any(n.startswith(("language.", "predict_advantage.")) for n in changed)


def test_algorithm1_vision_language_epoch(make_model):
    """Lines 10-16: the means of the epoch before give the target and stay; LoRA, tokens and FC are trained."""
    model = make_model()
    state, seen = make_state(model, "--lr-lm", "1e-3"), []
    model.class_means.previous.fill_(3.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    def record(total, batch, **terms):
        seen.append(terms["advantage"])
        state.backpropagate(total, batch, **terms)
    batches = [feature_batch([12, 8], seed=1), feature_batch([10, 12], seed=2)]
    vision_language_epoch(model, batches, record)
    close(model.class_means.mean(), [3.0] * 4)
    assert all((advantage <= 3.0).all() and not advantage.requires_grad for advantage in seen)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"language.special_tokens", "predict_advantage.fc.weight", "project.weight"} <= changed
    assert any("lora_B" in n for n in changed) and not any("base_layer" in n for n in changed)
    assert np.isfinite(list(state.sums.values())).all()
