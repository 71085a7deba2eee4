"""Eq. 4, 5 and the whole model: weights, aggregation, gradients, padding, the vision encoder."""
import pytest
import torch
from conftest import feature_batch

from model import Standardise, VisionEncoder, aggregate, language_weight
from support.checkpoint import model_state
from support.weights import TINY_VISION

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
    torch.nn.init.normal_(model.predict_advantage.fc.weight, std=0.1)
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


def test_without_a_language_model_the_output_is_that_of_vision_only(make_model):
    model, batch = make_model(lm="").eval(), feature_batch([8])
    assert model.language is None
    other = make_model().eval()
    other.load_state_dict(model.state_dict(), strict=False)
    output, vision = model(batch), other(batch, use_language=False)
    assert output.lambda_lang is None and output.advantage is None and output.text_loss is None
    for a, b in zip(output.cls_logits + output.offsets, vision.cls_logits + vision.offsets):
        assert torch.equal(a, b)


def test_output_shapes(make_model):
    output = make_model()(feature_batch([8, 12]))
    assert [tuple(x.shape) for x in output.cls_logits] == [(2, 12, 3), (2, 6, 3), (2, 3, 3)]
    assert [tuple(x.shape) for x in output.offsets] == [(2, 12, 2), (2, 6, 2), (2, 3, 2)]
    assert [tuple(x.shape) for x in output.points] == [(12, 4), (6, 4), (3, 4)]
    assert [x.sum().item() for x in output.mask] == [20, 10, 5] and output.text_loss.shape == ()


@pytest.mark.parametrize("layout, stride", [("frames-first", 1), ("text-first", 1), ("frames-first", 3), ("text-first", 4)])
def test_single_equals_batched(make_model, layout, stride):
    model = make_model(layout=layout, language_stride=stride)
    open_language(model.train())
    model(feature_batch([24], seed=1))                            # moves the statistics
    model.eval()
    both, alone = model(feature_batch([7, 24])), model(feature_batch([7]))
    assert both.lambda_lang[0, :7].max() > 0.01
    torch.testing.assert_close(both.lambda_lang[:1, :7], alone.lambda_lang[:, :7], atol=1e-5, rtol=1e-5)
    for name in ("cls_logits", "offsets"):
        for level, (a, b) in enumerate(zip(getattr(both, name), getattr(alone, name))):
            n = -(-7 // 2 ** level)
            torch.testing.assert_close(a[:1, :n], b[:, :n], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- the scale of F_lang
def real_frames(mean, scale, n=400, pad=0, seed=0):
    """(1, n + pad, 2) rows, mask; padding holds values that would ruin any mean."""
    f = mean + scale * torch.randn(1, n, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([f, torch.full((1, pad, 2), 1e6)], 1), (torch.arange(n + pad) < n)[None]


def test_standardise_by_hand():
    module, (yes, no) = Standardise(1, momentum=0.1).train(), (True, False)
    f = module(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([[yes, yes, no]]))          # mean 2, variance 1
    torch.testing.assert_close(f[0, :2, 0], torch.tensor([-1.0, 1.0]))
    f = module(torch.tensor([[[4.0], [8.0]]]), torch.tensor([[yes, yes]]))                       # mean 6, variance 4
    torch.testing.assert_close(f[0, :, 0], torch.tensor([-1.0, 1.0]))
    assert module.mean.item() == 4 and module.variance.item() == 2.5                             # both steps count alike
    for _ in range(20):
        module(torch.tensor([[[4.0], [8.0]]]), torch.tensor([[yes, yes]]))
    assert module.mean.item() == pytest.approx(6 - 4 / 10 * 0.9 ** 12)                           # 1/3 ... 1/10, then 1/10
    mean, variance = module.mean.item(), module.variance.item()
    f = module.eval()(torch.tensor([[[100.0], [5.0]]]), torch.tensor([[yes, yes]]))
    assert f[0, 0, 0].item() == pytest.approx((100 - mean) / (variance + 1e-6) ** 0.5, rel=1e-6)
    assert module.mean.item() == mean                                                            # the test moves nothing


def test_what_all_frames_share_vanishes_and_what_differs_has_unit_scale():
    mean, scale = torch.tensor([1000.0, -3.0]), torch.tensor([0.01, 20.0])
    module, (f, mask) = Standardise(2).train(), real_frames(mean, scale, pad=7)
    rows = module(f, mask)[mask]
    torch.testing.assert_close(rows.mean(0), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(2), atol=0.02, rtol=0)


def test_standardise_does_not_see_padding_and_takes_a_batch_without_frames():
    one, other = Standardise(2).train(), Standardise(2).train()
    for module, pad in ((one, 0), (other, 50)):
        module(*real_frames(3.0, 2.0, pad=pad))
        module(torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool))
    for a, b in zip(one.buffers(), other.buffers()):
        torch.testing.assert_close(a, b)
    assert one.steps == 1


def test_standardise_is_torchs_batch_norm_with_its_gradient():
    module, norm, (f, mask) = Standardise(2).train(), torch.nn.BatchNorm1d(2, eps=1e-6, affine=False), real_frames(3.0, 2.0, pad=5)
    weight, grads = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)), []
    f.requires_grad_()
    for out in (module(f, mask)[mask], norm(f[mask])):
        grads.append(torch.autograd.grad((out * weight).sum(), f)[0])
    torch.testing.assert_close(*grads)
    assert not list(module.parameters()) and not grads[0][~mask].any()


def test_standardised_features_reach_the_head_and_the_predictor(make_model):
    """The language model adds a large constant to every frame: neither output nor advantage may move."""
    model, batch = make_model().train(), feature_batch([12, 9])
    open_language(model)
    read_out = model.language.read_out
    outputs = []
    for shift in (0.0, 1000.0):
        model.language.read_out = lambda *states: [f + shift for f in read_out(*states)]
        for module in (model.standardise_cls, model.standardise_loc, model.standardise_adv):
            module.steps.zero_()
        torch.manual_seed(0)
        outputs.append(model(batch))
    torch.testing.assert_close(outputs[0].advantage, outputs[1].advantage, atol=2e-2, rtol=0)
    torch.testing.assert_close(outputs[0].cls_logits[0], outputs[1].cls_logits[0], atol=2e-2, rtol=0)


def test_the_statistics_are_in_the_checkpoint_and_common_to_all_processes(make_model):
    model = make_model()
    names = {name for name, _ in model.named_buffers() if name.startswith("standardise_")}
    assert len(names) == 9 and names <= set(model_state(model))
    assert len(model.running_means()) == 10 and len(make_model(lm="").running_means()) == 1


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
    compiled.eval().language.keep_prompt()
    with torch.no_grad():
        compiled(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[0]
    torch._dynamo.reset()


def test_every_kind_of_layer_is_compiled(make_model, monkeypatch):
    """More kinds than the 8 of a function that torch compiles by itself; beyond the limit it would raise here."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    model, before = make_model(feature_dim=0, vision=TINY_VISION), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.compile_layers(backend="eager")
    for training, lengths in ((True, [16, 16]), (True, [12]), (False, [16, 16])):      # the last batch may be one window
        batch = feature_batch(lengths, L=16)
        batch.inputs = torch.zeros(len(lengths), 16, 3, 32, 32).byte()
        with torch.set_grad_enabled(training):
            model.train(training)(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before > 8         # the counter is of all tests
    torch._dynamo.reset()


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
    steps = encoder.backbone(pixels).last_hidden_state[0].reshape(8, 4, 96).mean(1)           # (8, V)
    out = encoder(frames, torch.ones(1, 16, dtype=torch.bool))[0]
    torch.testing.assert_close(out[0], steps[0])
    torch.testing.assert_close(out[1], 0.75 * steps[0] + 0.25 * steps[1])
    torch.testing.assert_close(out[15], steps[7])


def test_vision_encoder_has_no_norm_over_tokens():
    assert vision().backbone.layernorm is None


def test_vision_encoder_says_what_length_it_takes():
    with pytest.raises(ValueError, match="multiple of 16"):
        vision()(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8), torch.ones(1, 8, dtype=torch.bool))
