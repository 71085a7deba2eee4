"""Eq. 4, 5 and the whole model: weights, aggregation, gradients, padding, the vision encoder."""
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import NoWaiting, feature_batch

from advantage import advantage_loss, frame_classes, language_advantage
from data import Window
from head import detection_loss
from model import TINY_VISION, VisionEncoder, aggregate, language_weight


def test_eq4_language_weight_by_hand_and_limits():
    weight = language_weight(torch.tensor([[-5.0, 0.0, 1.0, 3.0]]))
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.0, 0.46211716, 0.90514825]]))      # tanh(A / 2)
    assert language_weight(torch.tensor([[10.0]])).item() < 1


def test_eq4_gradient_is_half_at_zero_and_none_below():
    advantage = torch.tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
    language_weight(advantage).sum().backward()
    torch.testing.assert_close(advantage.grad, torch.tensor([[0.0, 0.5, 0.20998716]]))          # 2 s (1 - s)


def test_eq5_aggregate_by_hand():
    f_vis, f_lang = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    out = aggregate(f_vis, f_lang, torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(out, torch.tensor([[[6.0, 12.0], [3.0, 4.0]]]))


def open_language(model):
    """Make the predictor expect an advantage, so that language takes part."""
    torch.nn.init.normal_(model.predict_advantage.fc.weight, std=0.5)
    torch.nn.init.constant_(model.predict_advantage.fc.bias, 0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_language_starts_silent(make_model):
    model, batch = make_model().eval(), feature_batch([8, 12])
    vision, full = model(batch, use_language=False), model(batch)
    assert torch.equal(full.lambda_lang, torch.zeros(2, 12)) and full.advantage.shape == (2, 12)
    for a, b in zip(vision.cls_logits + vision.offsets, full.cls_logits + full.offsets):
        assert torch.equal(a, b)


def test_vision_only_does_not_run_the_language_model(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.language, "forward", lambda *args: pytest.fail("the language model ran"))
    output = model(feature_batch([8]), use_language=False)
    assert output.advantage is None and output.lambda_lang is None and output.text_loss is None


def test_fixed_lambda_zero_has_no_language_model(make_model):
    model = make_model(lambda_lang=0.0)
    assert model.language is None and model(feature_batch([8])).lambda_lang is None


def test_fixed_lambda_is_the_weight_at_every_real_frame(make_model):
    output = make_model(lambda_lang=0.4)(feature_batch([6], L=8))
    torch.testing.assert_close(output.lambda_lang, torch.tensor([[0.4] * 6 + [0.0] * 2]))


def test_output_shapes(make_model):
    output = make_model()(feature_batch([8, 12]))
    assert [tuple(x.shape) for x in output.cls_logits] == [(2, 12, 3), (2, 6, 3), (2, 3, 3)]
    assert [tuple(x.shape) for x in output.offsets] == [(2, 12, 2), (2, 6, 2), (2, 3, 2)]
    assert [tuple(x.shape) for x in output.points] == [(12, 4), (6, 4), (3, 4)]
    assert [x.sum().item() for x in output.mask] == [20, 10, 5] and output.text_loss.shape == ()


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_single_equals_batched(make_model, layout):
    model = make_model(layout=layout).eval()
    open_language(model)
    both, alone = model(feature_batch([7, 24])), model(feature_batch([7]))
    assert both.lambda_lang[0, :7].max() > 0.01
    torch.testing.assert_close(both.lambda_lang[:1, :7], alone.lambda_lang[:, :7], atol=1e-5, rtol=1e-5)
    for name in ("cls_logits", "offsets"):
        for level, (a, b) in enumerate(zip(getattr(both, name), getattr(alone, name))):
            n = -(-7 // 2 ** level)
            torch.testing.assert_close(a[:1, :n], b[:, :n], atol=1e-4, rtol=1e-4)


def test_gradients_of_the_detection_loss_reach_every_part(make_model):
    model = make_model()
    open_language(model)
    output = model(feature_batch([12, 12]))
    (sum(x.square().sum() for x in output.cls_logits + output.offsets) + output.text_loss).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert lacking == []


def test_detection_loss_reaches_the_predictor_where_it_starts(make_model):
    """'Learnable lambda without L_adv' (Table 4) would never leave 0 with a ReLU of slope 0 there."""
    model = make_model()
    output = model(feature_batch([12]))
    sum(x.square().sum() for x in output.cls_logits).backward()
    assert model.predict_advantage.fc.bias.grad.abs() > 0


def test_compiled_layers_give_the_same_and_take_answers_of_any_length(make_model):
    """By the backend that needs no C++ compiler; nothing is compiled after the first step."""
    plain, compiled, graphs = make_model(layout="text-first"), make_model(layout="text-first"), []
    torch._dynamo.reset()
    compiled.compile_layers(backend="eager")
    for model in (plain, compiled):
        torch.manual_seed(0)
        open_language(model)
        model.checkpointing()
        model.head.eval()
    for n in range(1, 5):                                               # actions in each answer
        batch = feature_batch([12, 8], segments=[torch.tensor([[1.0, 6.0]] * n)] * 2, labels=[torch.ones(n).long()] * 2)
        losses, gradients = [], []
        for model in (plain, compiled):
            model.zero_grad()
            output = model(batch)
            losses.append(sum(x.square().sum() for x in output.cls_logits + output.offsets) + output.text_loss)
            losses[-1].backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    with compiled.language.cached_prompt():
        compiled.eval()(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[0]
    torch._dynamo.reset()


def test_every_kind_of_layer_is_compiled(make_model, monkeypatch):
    """More kinds than the 8 of a function that torch compiles by itself; beyond the limit it would raise here."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    model, before = make_model(feature_dim=0, vision=TINY_VISION), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_layers(backend="eager")
    for lengths, (layout, training) in itertools.product(([16, 16], [16, 12]), (("frames-first", True), ("frames-first", False),
                                                                             ("text-first", False))):
        batch = feature_batch(lengths, L=16)
        batch.inputs, batch.padded = torch.zeros(2, 16, 3, 32, 32).byte(), min(lengths) < 16
        model.language.layout = layout
        with torch.set_grad_enabled(training):
            model.train(training)(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before > 8         # the counter is of all tests
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", [{}, {"layout": "text-first"}, {"lambda_lang": "generated"}, {"use_vision": False},
                                     {"feature_dim": 0, "vision": TINY_VISION}])
def test_no_step_waits_for_a_gpu(make_model, changes):
    """Model, losses and backward of both kinds of epoch; the frames of one clip are padding."""
    model = make_model(**changes)
    model.checkpointing()
    batch = feature_batch([16, 12], L=16, segments=[torch.tensor([[1.0, 6.0]]), torch.zeros(0, 2)],
                          labels=[torch.tensor([1]), torch.zeros(0, dtype=torch.long)])
    if model.vision is not None:
        batch.inputs = torch.zeros(2, 16, 3, 32, 32, dtype=torch.uint8)
    with NoWaiting():
        for use_language in (False, True):
            output = model(batch, use_language)
            dh = detection_loss(output, batch.segments, batch.labels, model.head.loss_normalizer)
            frame_class = frame_classes(batch.segments, batch.labels, 16, 3)
            loss = dh.loss_dh
            if use_language:
                target = language_advantage(model.class_mean.mean(), dh.frame_loss, frame_class)
                loss = loss + output.text_loss + advantage_loss(output.advantage, target, batch.mask)
            else:
                model.class_mean.update(dh.frame_loss, frame_class, batch.mask)
            loss.backward()


def test_answers_are_written_from_what_stayed_on_the_cpu(make_model):
    model, batch = make_model(), feature_batch([8])
    window = Window(None, 0, 8, None, batch.segments[0], batch.labels[0])
    moved = replace(batch, windows=[window]).to("meta")             # nothing can be read from there
    assert moved.segments[0].is_meta and model.answers(moved) == model.answers(batch) == ["Run: 1-6."]


def test_no_waiting_notices():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises(pytest.fail.Exception), NoWaiting():
            wait()


def test_calibrate_gives_the_projection_zero_mean_and_the_scale_of_a_linear_layer(make_model):
    model, batch = make_model(), feature_batch([200, 160])
    batch.inputs = batch.inputs * 1000 + 50000
    model.calibrate([batch])
    before = model.project(batch.inputs)[batch.mask]
    assert before.mean(0).abs().max() < 1e-2 and 0.2 < before.std() < 1.5


def vision(**changes):
    torch.manual_seed(0)
    return VisionEncoder(TINY_VISION | changes).eval()


def test_vision_encoder_gives_one_feature_per_frame():
    frames = torch.randint(0, 256, (2, 32, 3, 32, 32), dtype=torch.uint8)
    assert vision()(frames, torch.ones(2, 32, dtype=torch.bool)).shape == (2, 32, 96)


def test_vision_encoder_single_equals_batched_under_padding():
    encoder = vision()
    frames = torch.randint(0, 256, (2, 48, 3, 32, 32), dtype=torch.uint8)
    for length in (9, 16):
        frames[0, length:] = 0
        mask = torch.arange(48)[None] < torch.tensor([[length], [48]])
        both, alone = encoder(frames, mask), encoder(frames[:1, :16], mask[:1, :16])
        torch.testing.assert_close(both[0, :length], alone[0, :length], atol=1e-5, rtol=1e-5)


def test_vision_encoder_is_videomae_pooled_over_space_and_interpolated_in_time():
    encoder = vision()
    frames = torch.randint(0, 256, (1, 16, 3, 32, 32), dtype=torch.uint8)
    pixels = (frames / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) \
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    steps = encoder.videomae(pixels).last_hidden_state[0].reshape(8, 4, 96).mean(1)           # (8, V)
    out = encoder(frames, torch.ones(1, 16, dtype=torch.bool))[0]
    torch.testing.assert_close(out[0], steps[0])
    torch.testing.assert_close(out[1], 0.75 * steps[0] + 0.25 * steps[1])
    torch.testing.assert_close(out[15], steps[7])


def test_vision_encoder_has_no_norm_over_tokens():
    assert vision().videomae.layernorm is None


def test_vision_encoder_says_what_length_it_takes():
    with pytest.raises(ValueError, match="multiple of 16"):
        vision()(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8), torch.ones(1, 8, dtype=torch.bool))


# ------------------------------------------------------------------------------------------- ablations
def test_table2_without_vision_only_language_reaches_the_head(make_model):
    model, batch = make_model(use_vision=False).eval(), feature_batch([8])
    output = model(batch)
    lang = model.normalise(model.language(model.normalise(model.project(batch.inputs)), batch.mask).f_lang_cls)
    torch.testing.assert_close(output.lambda_lang, torch.ones(1, 8))
    torch.testing.assert_close(output.cls_logits[0], model.head(lang, lang, batch.mask).cls_logits[0])


def test_table4_generated_weight_is_the_probability_of_yes_against_no(make_model):
    model, batch = make_model(lambda_lang="generated").eval(), feature_batch([6], L=8)
    output = model(batch)
    hidden = model.language(model.normalise(model.project(batch.inputs)), batch.mask).f_adv
    logits = model.language.lm.get_base_model().lm_head(hidden)
    yes, no = (model.language.tokenizer(word).input_ids[-1] for word in (" yes", " no"))
    expected = logits[..., [yes, no]].softmax(-1)[..., 0] * batch.mask
    assert yes != no
    torch.testing.assert_close(output.lambda_lang, expected)
    output.cls_logits[0].sum().backward()                           # trains the language model through the weight
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("tokens, columns", [("special", (1, 2, 3)), ("shared", (1, 1, 1)), ("vision", (0, 0, 0))])
def test_table9_tokens_whose_hidden_states_are_the_features(make_model, tokens, columns):
    model, batch = make_model(lang_tokens=tokens).eval(), feature_batch([8])
    seen = []
    model.language.lm.get_base_model().model.register_forward_hook(lambda m, i, o: seen.append(o.last_hidden_state))
    features = model.language(model.normalise(model.project(batch.inputs)), batch.mask)
    for feature, column in zip(features, columns):
        torch.testing.assert_close(feature, seen[0][:, column:32:4])
