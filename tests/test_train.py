"""Algorithm 1 and §3.6: the order of events, Eq. 9, the optimizer, checkpoints that resume."""
import math

import pytest
import torch
from conftest import NoWaiting, feature_batch

import checkpoint
import train
from advantage import language_advantage
from benchmark import Batches
from head import detection_loss
from model import TINY_VISION
from train import Run, lr_factor, vision_language_epoch, vision_only_epoch


def flags(*more):
    return train.get_args(["--dataset", "custom", "--features", "f", "--annotations", "a", "--descriptions", "d",
                           "--device", "cpu", "--epochs", "4", "--warmup-epochs", "1", "--lr", "1e-2", "--lr-lm", "1e-2",
                           "--ema", "0.5", *more])


@pytest.fixture
def make_run(make_model):
    def make(*more, **config):
        return Run(make_model(**config), flags(*more), steps_per_epoch=2)
    return make


@pytest.fixture
def loader():
    return Batches([feature_batch([12, 8], seed=1), feature_batch([10, 12], seed=2)])


def snapshot(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def test_algorithm1_vision_only_epoch_resets_accumulates_and_steps(make_run, loader):
    run = make_run()
    run.model.class_mean.total.fill_(1e6)
    run.model.class_mean.count.fill_(1)
    seen, events = [], []
    original = run.detection_loss
    def record(output, batch):
        dh = original(output, batch)
        seen.append((dh.frame_loss.clone(), run.frame_classes(batch), batch.mask))
        events.append(output.advantage)
        return dh
    run.detection_loss = record
    before = snapshot(run)
    vision_only_epoch(run, loader)
    assert run.global_step == 2 and events == [None, None]                       # line 4: no language
    loss, classes, mask = (torch.cat(x) for x in zip(*seen))
    for c in (1, 3):                                                             # line 5, and 3 is background
        chosen = mask & (classes == c)
        torch.testing.assert_close(run.model.class_mean.mean()[c], loss[chosen].mean())
    assert run.model.class_mean.count.tolist() == [0, 24, 0, 42 - 24]             # line 2: 1e6 is gone
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(n.startswith(("language.", "predict_advantage.")) for n in changed)
    assert "project.weight" in changed and "head.cls_head.out.weight" in changed  # line 6


def test_algorithm1_vision_language_epoch_uses_the_means_and_leaves_them(make_run, loader, monkeypatch):
    run = make_run()
    vision_only_epoch(run, loader)
    means, targets = run.model.class_mean.mean().clone(), []
    def record(class_mean, loss_vl, frame_class):
        assert torch.equal(class_mean, means)                                    # the mean of the epoch before
        targets.append(language_advantage(class_mean, loss_vl, frame_class))
        return targets[-1]
    monkeypatch.setattr(train, "language_advantage", record)
    before = snapshot(run)
    terms = vision_language_epoch(run, loader)
    assert torch.equal(run.model.class_mean.mean(), means) and len(targets) == 2
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    for name in ("language.special_tokens", "predict_advantage.fc.weight", "project.weight"):
        assert name in changed
    assert any("lora_" in n for n in changed) and not any("base_layer" in n for n in changed)
    assert {"loss_cls", "loss_loc", "loss_tg", "loss_adv", "lambda_lang"} <= set(terms)


@pytest.mark.parametrize("more", [[], ["--accumulate", "2"]])
def test_no_optimizer_step_waits_for_a_gpu(make_run, loader, more):
    """Both kinds of epoch with clipping, AdamW and the average; the log's look at the values is left out."""
    run = make_run(*more)
    run.look, run.end_epoch = lambda: None, lambda: None
    with NoWaiting():
        vision_only_epoch(run, loader)
        vision_language_epoch(run, loader)
    assert run.global_step == (2 if more else 4)


def test_eq9_is_the_weighted_sum(make_run, loader):
    run = make_run("--lambda-tg", "0.3", "--lambda-adv", "0.7", "--lambda-loc", "0.5")
    run.model.class_mean.previous.fill_(2.0)
    terms = vision_language_epoch(run, loader)
    expected = terms["loss_cls"] + 0.5 * terms["loss_loc"] + 0.3 * terms["loss_tg"] + 0.7 * terms["loss_adv"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)


def test_bfloat16_follows_the_losses_of_float32(make_run):
    """Ten steps of Algorithm 1 from frames, every loss within 3 %."""
    curves = {}
    for dtype in ("float32", "bfloat16"):
        run, losses = make_run("--warmup-epochs", "0", "--lr", "3e-3", "--lr-lm", "3e-3", feature_dim=0, vision=TINY_VISION,
                               dtype=dtype), []
        step = run.step
        run.step = lambda loss, **terms: (losses.append(loss.item()), step(loss, **terms))
        loader = Batches([feature_batch([16, 12], L=16), feature_batch([16, 16])])
        for i, batch in enumerate(loader):
            batch.inputs = torch.randint(0, 256, (2, 16, 3, 32, 32), generator=torch.Generator().manual_seed(i)).byte()
        torch.manual_seed(0)
        for epoch in range(5):
            (vision_only_epoch, vision_language_epoch)[epoch % 2](run, loader)
        curves[dtype] = torch.tensor(losses)
    assert len(curves["float32"]) == 10 and not torch.equal(*curves.values())
    assert (curves["float32"][6:8] < 0.99 * curves["float32"][2:4]).all()           # there is something to follow
    torch.testing.assert_close(curves["bfloat16"], curves["float32"], atol=0, rtol=0.03)


def test_eq9_target_advantage_has_no_gradient_but_lambda_has(make_run):
    """L_adv reaches the predictor, and not the head through its target."""
    run, batch = make_run(), feature_batch([12])
    output = run.model(batch)
    dh = run.detection_loss(output, batch)
    target = language_advantage(torch.ones(4), dh.frame_loss, run.frame_classes(batch))
    train.advantage_loss(output.advantage, target, batch.mask).backward()
    assert run.model.predict_advantage.fc.bias.grad.abs() > 0
    assert all(p.grad is None for p in run.model.head.parameters())


def test_epochs_alternate_and_fixed_lambda_zero_is_vision_only(tmp_path, make_model, monkeypatch):
    kinds = []
    for name in ("vision_only_epoch", "vision_language_epoch"):
        monkeypatch.setattr(train, name, lambda run, loader, name=name: (
            kinds.append(name), run.terms.append(torch.ones(1)), setattr(run, "started", 0), run.end_epoch())[-1])
    for function in ("save_checkpoint", "make_loader"):
        monkeypatch.setattr(train, function, lambda *a, **k: None)
    monkeypatch.setattr(train, "score_test_set", lambda *a: (None, None))
    monkeypatch.setattr(train.figures, "report", lambda path, *a: path.touch())
    data = type("", (), {"videos": [], "__len__": lambda self: 1})()
    for fixed, expected in ((None, [0, 1, 0, 1]), (0.0, [0, 0, 0, 0])):
        kinds.clear()
        run = Run(make_model(lambda_lang=fixed), flags(), 1)
        train.train(run, data, data, tmp_path)
        assert [k == "vision_language_epoch" for k in kinds] == expected


def test_frame_loss_sums_to_the_unnormalised_loss_when_every_point_covers_as_many_frames(make_model):
    """Item 4 of the design: the loss of frame l is the sum over levels of the point that covers it."""
    model, batch = make_model(levels=1), feature_batch([12, 8])
    output = model(batch, use_language=False)
    dh = detection_loss(output, batch.segments, batch.labels, model.head.loss_normalizer)
    torch.testing.assert_close(dh.frame_loss.sum(), dh.loss_dh * model.head.loss_normalizer)


def test_lr_is_a_linear_warm_up_then_a_cosine():
    factors = [lr_factor(s, 10, 7, 2) for s in range(70)]
    assert factors[0] == 0 and factors[19] == 1 and factors[20] == 1
    assert factors[10] == pytest.approx(10 / 19) and factors[45] == pytest.approx(0.5) and factors[69] < 0.01
    assert all(a >= b for a, b in zip(factors[20:], factors[21:]))


def test_parameter_groups_have_their_rates_and_decay_only_matrices(make_run):
    run = make_run("--lr", "3e-3", "--lr-lm", "2e-3", "--weight-decay", "0.07")
    names = {id(p): n for n, p in run.model.named_parameters()}
    seen = {}
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = (group["base_lr"], group["weight_decay"])
    assert set(seen) == {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert seen["project.weight"] == (3e-3, 0.07) and seen["project.bias"] == (3e-3, 0)
    assert seen["language.special_tokens"] == (3e-3, 0) and seen["head.scales"] == (3e-3, 0)
    assert seen["head.pyramid.stem.0.scale_mlp"] == (3e-3, 0) and seen["head.pyramid.embed_norm.0.weight"] == (3e-3, 0)
    assert {v for n, v in seen.items() if "lora_" in n} == {(2e-3, 0.07)}


def test_weight_average_by_hand(make_run, loader):
    run = make_run("--ema", "0.75")
    start = run.ema["project.bias"].clone()
    history = []
    original = run.optimizer.step
    run.optimizer.step = lambda: (original(), history.append(run.model.project.bias.detach().clone()))
    vision_only_epoch(run, loader)
    torch.testing.assert_close(run.ema["project.bias"], 0.75 ** 2 * start + 0.75 * 0.25 * history[0] + 0.25 * history[1])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_save_and_resume_equals_never_stopping(tmp_path, make_run, loader, stop_after):
    epochs = [vision_only_epoch, vision_language_epoch] * 2
    torch.manual_seed(7)
    whole = make_run()
    for epoch in epochs:
        epoch(whole, loader)
    torch.manual_seed(7)
    first = make_run()
    for epoch in epochs[:stop_after]:
        epoch(first, loader)
    train.save_checkpoint(tmp_path / "c.safetensors", first)
    torch.manual_seed(99)
    second = make_run(seed=5)
    train.load_checkpoint(tmp_path / "c.safetensors", second)
    assert (second.epoch, second.global_step) == (stop_after, 2 * stop_after)
    for epoch in epochs[stop_after:]:
        epoch(second, loader)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), second.model.state_dict().items()):
        assert torch.equal(a, b), name
    assert all(torch.equal(whole.ema[n], second.ema[n]) for n in whole.ema)


def test_checkpoint_holds_what_was_trained_and_loads_with_the_average(tmp_path, make_run, loader):
    run = make_run()
    vision_only_epoch(run, loader)
    vision_language_epoch(run, loader)
    train.save_checkpoint(tmp_path / "c.safetensors", run)
    header, tensors = checkpoint.read_checkpoint(tmp_path / "c.safetensors")
    assert not any("base_layer" in n or "embed_tokens" in n or "lm_head" in n for n in tensors)
    model, args = train.load_checkpoint(tmp_path / "c.safetensors")
    assert model.config == run.model.config and args.lr == 1e-2 and list(tmp_path.iterdir()) == [tmp_path / "c.safetensors"]
    checkpoint.use_average(run)
    batch = feature_batch([12, 8])
    for a, b in zip(run.model.eval()(batch).cls_logits, model.eval()(batch).cls_logits):
        assert torch.equal(a, b)


def test_checkpoint_of_another_configuration_names_the_difference(tmp_path, make_run):
    train.save_checkpoint(tmp_path / "c.safetensors", make_run())
    with pytest.raises(train.InputError, match="another in width"):
        train.load_checkpoint(tmp_path / "c.safetensors", make_run(width=32))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(train.InputError, match="c.safetensors: expected a checkpoint"):
        train.load_checkpoint(tmp_path / "c.safetensors")


def test_a_loss_that_is_not_finite_stops_with_its_terms(make_run, loader):
    run = make_run()
    loader[0].inputs[0, 0, 0] = math.nan
    with pytest.raises(train.InputError, match="step 1: expected a finite loss.*loss_cls nan"):
        vision_only_epoch(run, loader)


@pytest.mark.parametrize("argv, message", [
    (["--dataset", "custom"], "either --videos DIR"), (["--features", "x"], "demo reads videos"),
    (["--lambda-lang", "1.5"], "0 to 1"), (["--epochs", "-1"], "--epochs: expected 0"),
    (["--dataset", "custom", "--features", "x"], "--annotations"), (["--lambda-lang", "much"], "0 to 1"),
    (["--save-every", "-1"], "--save-every: expected 0"),
])
def test_flags_that_cannot_work_end_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.get_args(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_presets_set_existing_flags_only():
    for name, preset in train.PRESETS.items():
        known = vars(train.get_args(["--dataset", "demo"]))
        assert set(preset) <= set(known), name
