"""Algorithm 1 and §3.6: the order of events, Eq. 9, the optimizer, checkpoints that resume."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, feature_batch

import evaluate
import train
from advantage import advantage_loss, language_advantage
from data import TALDataset
from head import detection_loss
from support import checkpoint
from support.annotations import InputError, Video
from support.flags import FEATURE_PRESETS, PRESETS
from support.weights import TINY_VISION
from train import TrainingState, lr_factor, vision_language_epoch, vision_only_epoch

def flags(*more):
    return train.get_args(["--dataset", "custom", "--features", "f", "--annotations", "a", "--descriptions", "d",
                           "--device", "cpu", "--epochs", "4", "--warmup-epochs", "1", "--lr", "1e-2", "--lr-lm", "1e-2",
                           "--ema", "0.5", *more])


@pytest.fixture
def make_state(make_model):
    def make(*more, **config):
        return TrainingState(make_model(**config), flags(*more), batches_per_epoch=2)
    return make


@pytest.fixture
def loader():
    return [feature_batch([12, 8], seed=1), feature_batch([10, 12], seed=2)]


@pytest.fixture
def windows(tmp_path):
    """A training set of 5 videos of random features: 3 batches of 2, 2 and 1 windows."""
    rng, videos = np.random.default_rng(0), []
    for n in range(5):
        np.save(tmp_path / f"{n}.npy", rng.normal(size=(14, 8)).astype(np.float32))
        videos.append(Video(f"{n}", 14.0, 1.0, "training", np.array([[2.0, 6.0 + n]]), ["Run"], tmp_path / f"{n}.npy"))
    return TALDataset(videos, CLASSES, window=12, training=True)


def run_epoch(state, number, batches):
    """Epoch `number` (0 is the first) of Algorithm 1."""
    if number % 2 == 0:
        vision_only_epoch(state.model, batches, state.backpropagate)
        state.end_epoch("vision-only")
    else:
        vision_language_epoch(state.model, batches, state.backpropagate, state.args.lambda_tg, state.args.lambda_adv)
        state.end_epoch("vision-language")


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def changed_since(before, model):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------------- Algorithm 1
def test_algorithm1_vision_only_epoch_resets_accumulates_and_steps(make_state, loader, monkeypatch):
    state = make_state()
    model, seen, events = state.model, [], []
    model.class_means.total.fill_(1e6)
    model.class_means.count.fill_(1)

    def record(output, batch, head):
        loss = detection_loss(output, batch, head)
        seen.append((loss.per_frame.clone(), batch.frame_class, batch.mask))
        events.append(output.advantage)
        return loss
    monkeypatch.setattr(train, "detection_loss", record)
    before = snapshot(model)
    vision_only_epoch(model, loader, state.backpropagate)
    assert state.step == 2 and events == [None, None]                            # line 4: no language
    loss, classes, mask = (torch.cat(x) for x in zip(*seen))
    for c in (1, 3):                                                             # line 5, and 3 is background
        chosen = mask & (classes == c)
        torch.testing.assert_close(model.class_means.mean()[c], loss[chosen].mean())
    assert model.class_means.count.tolist() == [0, 24, 0, 42 - 24]                # line 2: 1e6 is gone
    changed = changed_since(before, model)
    assert not any(n.startswith(("language.", "predict_advantage.")) for n in changed)
    assert "project.weight" in changed and "head.cls_head.out.weight" in changed  # line 6


def test_a_resumed_vision_only_epoch_keeps_the_class_means(make_state, loader):
    state = make_state()
    vision_only_epoch(state.model, loader[:1], state.backpropagate)
    first = state.model.class_means.count.clone()
    vision_only_epoch(state.model, loader[1:], state.backpropagate, resumed=True)
    assert first.sum() == 20 and state.model.class_means.count.sum() == 42
    vision_only_epoch(state.model, loader[1:], state.backpropagate)
    assert state.model.class_means.count.sum() == 22


def test_algorithm1_vision_language_epoch_uses_the_means_and_leaves_them(make_state, loader, monkeypatch):
    state = make_state()
    run_epoch(state, 0, loader)
    model = state.model
    means, targets = model.class_means.mean().clone(), []

    def record(class_mean, loss_vl, frame_class):
        assert torch.equal(class_mean, means)                                    # the mean of the epoch before
        targets.append(language_advantage(class_mean, loss_vl, frame_class))
        return targets[-1]
    monkeypatch.setattr(train, "language_advantage", record)
    before = snapshot(model)
    vision_language_epoch(model, loader, state.backpropagate)
    assert torch.equal(model.class_means.mean(), means) and len(targets) == 2
    changed = changed_since(before, model)
    for name in ("language.special_tokens", "predict_advantage.fc.weight", "project.weight"):
        assert name in changed
    assert any("lora_" in n for n in changed) and not any("base_layer" in n for n in changed)
    assert {"loss", "loss_cls", "loss_loc", "loss_tg", "loss_adv", "lambda_lang", "advantage"} == set(state.sums)


def test_eq9_is_the_weighted_sum(make_model, loader):
    model, seen = make_model(lambda_loc=0.5), []
    model.class_means.previous.fill_(2.0)
    vision_language_epoch(model, loader, lambda total, batch, **terms: seen.append((total, terms)), 0.3, 0.7)
    assert len(seen) == 2
    for total, terms in seen:
        expected = terms["loss_cls"] + 0.5 * terms["loss_loc"] + 0.3 * terms["loss_tg"] + 0.7 * terms["loss_adv"]
        torch.testing.assert_close(total, expected)


def test_eq9_has_the_weights_of_the_flags(make_model, windows, tmp_path):
    """In the log, whose terms are means over the batches; lambda and advantage over real frames."""
    args = flags("--lambda-tg", "0.3", "--lambda-adv", "0.7", "--epochs", "2", "--batch-size", "2")
    train.train(make_model(), windows, args, tmp_path)
    row = checkpoint.read_log(tmp_path / "log.jsonl")[1]
    assert row["loss"] == pytest.approx(row["loss_cls"] + row["loss_loc"] + 0.3 * row["loss_tg"] + 0.7 * row["loss_adv"])
    assert row["loss_tg"] > 1 and row["loss_adv"] > 0.1 and row["step"] == 6


def test_terms_of_the_log_count_real_frames_only(make_state):
    state, batch = make_state(), feature_batch([3, 4], L=8)
    term = torch.where(batch.mask, 2.0, 1e6)
    total = state.model.project.bias.sum() * 0 + 5
    state.backpropagate(total, batch, advantage=term, loss_tg=torch.tensor(3.0))
    assert state.sums == {"loss": 5, "advantage": 2, "loss_tg": 3}


def test_eq9_target_advantage_has_no_gradient_but_lambda_has(make_model):
    """L_adv reaches the predictor, and not the head through its target."""
    model, batch = make_model(), feature_batch([12])
    output = model(batch)
    loss = detection_loss(output, batch, model.head)
    target = language_advantage(torch.ones(4), loss.per_frame, batch.frame_class)
    advantage_loss(output.advantage, target, batch.mask).backward()
    assert model.predict_advantage.fc.bias.grad.abs() > 0
    assert all(p.grad is None for p in model.head.parameters())


def test_bfloat16_follows_the_losses_of_float32(make_state):
    """Ten steps of Algorithm 1 from frames, every loss within 3 %."""
    curves = {}
    for dtype in ("float32", "bfloat16"):
        state, losses = make_state("--warmup-epochs", "0", "--lr", "3e-3", "--lr-lm", "3e-3", feature_dim=0,
                                   vision=TINY_VISION, dtype=dtype), []
        backpropagate = state.backpropagate
        state.backpropagate = lambda total, batch, **terms: (losses.append(total.item()), backpropagate(total, batch, **terms))
        batches = [feature_batch([16, 12], L=16), feature_batch([16, 16])]
        for i, batch in enumerate(batches):
            batch.inputs = torch.randint(0, 256, (2, 16, 3, 32, 32), generator=torch.Generator().manual_seed(i)).byte()
        torch.manual_seed(0)
        for number in range(5):
            run_epoch(state, number, batches)
        curves[dtype] = torch.tensor(losses)
    assert len(curves["float32"]) == 10 and not torch.equal(*curves.values())
    assert (curves["float32"][6:8] < 0.99 * curves["float32"][2:4]).all()           # there is something to follow
    torch.testing.assert_close(curves["bfloat16"], curves["float32"], atol=0, rtol=0.03)


def test_epochs_alternate_and_without_language_all_are_vision_only(make_model, windows, tmp_path):
    for lm, expected in (({}, ["vision-only", "vision-language"] * 2), ({"lm": ""}, ["vision-only"] * 4)):
        out = tmp_path / f"out{len(lm)}"
        out.mkdir()
        state = train.train(make_model(**lm), windows, flags("--batch-size", "2"), out)
        rows = checkpoint.read_log(out / "log.jsonl")
        assert [row["kind"] for row in rows] == expected and [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert all(("class_mean" in row) == (row["kind"] == "vision-only") for row in rows)
        assert (state.epoch, state.step, state.batches_done) == (4, 12, 0)


def test_frame_loss_sums_to_the_unnormalised_loss_when_every_point_covers_as_many_frames(make_model):
    """Item 4 of the design: the loss of frame l is the sum over levels of the point that covers it."""
    model, batch = make_model(levels=1), feature_batch([12, 8])
    output = model(batch, use_language=False)
    loss = detection_loss(output, batch, model.head)
    torch.testing.assert_close(loss.per_frame.sum(), loss.total * model.head.loss_normalizer)


# ------------------------------------------------------------------------------------------- the optimizer
def test_lr_is_a_linear_warm_up_then_a_cosine():
    factors = [lr_factor(s, 10, 7, 2) for s in range(70)]
    assert factors[0] == 0 and factors[19] == 1 and factors[20] == 1
    assert factors[10] == pytest.approx(10 / 19) and factors[45] == pytest.approx(0.5) and factors[69] < 0.01
    assert all(a >= b for a, b in zip(factors[20:], factors[21:]))


@pytest.mark.parametrize("accumulate, steps", [(1, 2), (2, 1)])
def test_every_step_has_the_rate_of_its_number(make_state, loader, accumulate, steps):
    state, rates = make_state("--accumulate", str(accumulate), "--lr", "1e-2", "--lr-lm", "1e-3"), []
    original = state.optimizer.step
    state.optimizer.step = lambda: (rates.append({g["name"]: g["lr"] for g in state.optimizer.param_groups}), original())
    for number in range(4):
        run_epoch(state, number, loader)
    factors = [lr_factor(s, steps, 4, 1) for s in range(4 * steps)]
    assert [row["head"] for row in rates] == pytest.approx([1e-2 * factor for factor in factors])
    assert [row["lm"] for row in rates] == pytest.approx([1e-3 * factor for factor in factors])


def test_parameter_groups_have_their_rates_and_decay_only_matrices(make_state):
    state = make_state("--lr", "3e-3", "--lr-lm", "2e-3", "--weight-decay", "0.07")
    names = {id(p): n for n, p in state.model.named_parameters()}
    seen = {}
    for group in state.optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = (group["base_lr"], group["weight_decay"])
    assert set(seen) == {n for n, p in state.model.named_parameters() if p.requires_grad}
    assert seen["project.weight"] == (3e-3, 0.07) and seen["project.bias"] == (3e-3, 0)
    assert seen["language.special_tokens"] == (3e-3, 0) and seen["head.scales"] == (3e-3, 0)
    assert seen["head.pyramid.stem.0.scale_mlp"] == (3e-3, 0) and seen["head.pyramid.embed_norm.0.weight"] == (3e-3, 0)
    assert {v for n, v in seen.items() if "lora_" in n} == {(2e-3, 0.07)}


def test_weight_average_by_hand(make_state, loader):
    state = make_state("--ema", "0.75")
    start = state.ema["project.bias"].clone()
    history = []
    original = state.optimizer.step
    state.optimizer.step = lambda: (original(), history.append(state.model.project.bias.detach().clone()))
    vision_only_epoch(state.model, loader, state.backpropagate)
    torch.testing.assert_close(state.ema["project.bias"], 0.75 ** 2 * start + 0.75 * 0.25 * history[0] + 0.25 * history[1])


def test_accumulated_batches_make_one_step_of_their_mean_gradient(make_state, loader):
    """And at the end of an epoch the batches that are left over make one."""
    gradients = []
    for batches in (loader[:1], loader[1:], loader):
        state = make_state("--accumulate", str(len(batches)), "--clip", "1e9")
        state.batches_per_epoch = 3
        state.optimizer.step = lambda: gradients.append([p.grad.clone() for p in state.model.parameters() if p.grad is not None])
        state.model.eval()                                             # no drop path, M starts the same
        for n, batch in enumerate(batches):
            state.model.head.loss_normalizer.fill_(100)
            total = detection_loss(state.model(batch), batch, state.model.head).total
            assert len(gradients) < 3 and state.batches_done == n
            state.backpropagate(total, batch)
        assert state.step == 1
    for a, b, together in zip(*gradients, strict=True):
        torch.testing.assert_close(together, (a + b) / 2)
    state.backpropagate(total.detach().requires_grad_(), batch)        # the third and last batch of the epoch
    assert state.step == 2


# ------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_save_and_resume_equals_never_stopping(tmp_path, make_state, loader, stop_after):
    torch.manual_seed(7)
    whole = make_state()
    for number in range(4):
        run_epoch(whole, number, loader)
    torch.manual_seed(7)
    first = make_state()
    for number in range(stop_after):
        run_epoch(first, number, loader)
    checkpoint.save_checkpoint(tmp_path / "c.safetensors", first)
    torch.manual_seed(99)
    second = make_state(seed=5)
    checkpoint.resume(tmp_path / "c.safetensors", second)
    assert (second.epoch, second.step) == (stop_after, 2 * stop_after)
    for number in range(stop_after, 4):
        run_epoch(second, number, loader)
    same_tensors(whole.model.state_dict(), second.model.state_dict())
    same_tensors(whole.ema, second.ema)


class StopAt:
    """Signals of a run: one comes at step number `step`."""
    def __init__(self, step):
        self.step, self.asked = step, 0

    @property
    def received(self):
        self.asked += 1
        return 15 if self.asked >= self.step else 0


@pytest.mark.parametrize("stop_at", [1, 3, 5, 6, 10])             # steps 3 and 6 are the last of their epochs
def test_a_run_resumed_within_an_epoch_ends_with_the_same_bits(make_model, windows, tmp_path, stop_at):
    """4 epochs of 3 steps: the same weights, average, class means and log."""
    args, results = ["--batch-size", "2", "--save-every", "0"], []
    for stopped in (False, True):
        out = tmp_path / str(stopped)
        out.mkdir()
        model = make_model()
        torch.manual_seed(7)
        if stopped:
            with pytest.raises(checkpoint.Stopped):
                train.train(model, windows, flags(*args), out, StopAt(stop_at))
            progress = checkpoint.read_checkpoint(out / "checkpoint.safetensors").progress
            assert progress["step"] == stop_at and progress["windows"] == 2 * ((stop_at - 1) % 3 + 1)
            model = make_model(seed=5)
            torch.manual_seed(99)
        state = train.train(model, windows, flags(*args, *["--resume"] * stopped), out)
        log = checkpoint.read_log(out / "log.jsonl")
        results.append((model.state_dict(), state.ema, [{k: v for k, v in row.items() if k != "seconds"} for row in log]))
    same_tensors(results[0][0], results[1][0])
    same_tensors(results[0][1], results[1][1])
    assert results[0][2] == results[1][2] and len(results[0][2]) == 4


def test_checkpoint_holds_what_was_trained_and_opens_with_the_average(tmp_path, make_state, loader):
    state = make_state()
    for number in range(2):
        run_epoch(state, number, loader)
    checkpoint.save_checkpoint(tmp_path / "checkpoint.safetensors", state)
    tensors = checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors").tensors
    assert not any("base_layer" in n or "embed_tokens" in n or "lm_head" in n for n in tensors)
    asked = SimpleNamespace(checkpoint=str(tmp_path), lm=None, out=None, device="cpu")
    model, args, out = evaluate.open_checkpoint(asked)
    assert model.config == state.model.config and args.lr == 1e-2 and out == tmp_path
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.safetensors"]
    batch = feature_batch([12, 8])
    trained = state.model.eval()(batch).cls_logits
    state.model.load_state_dict(state.ema, strict=False)
    for a, b, c in zip(state.model(batch).cls_logits, model.eval()(batch).cls_logits, trained):
        assert torch.equal(a, b) and not torch.equal(b, c)


def test_checkpoint_of_another_configuration_names_the_difference(tmp_path, make_state):
    checkpoint.save_checkpoint(tmp_path / "c.safetensors", make_state())
    with pytest.raises(InputError, match="another in width"):
        checkpoint.resume(tmp_path / "c.safetensors", make_state(width=32))


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="c.safetensors: expected a checkpoint"):
        checkpoint.read_checkpoint(tmp_path / "c.safetensors")


# ------------------------------------------------------------------------------------------- not finite
def test_a_loss_that_is_not_finite_stops_with_its_terms_and_videos(make_state, loader):
    state = make_state()
    before = snapshot(state.model)
    loader[0].inputs[0, 0, 0] = math.nan
    loader[0].names = ["diving_7", "running_3"]
    with pytest.raises(InputError, match="step 1: expected a finite loss.*loss_cls nan.*videos diving_7, running_3"):
        vision_only_epoch(state.model, loader, state.backpropagate)
    assert state.step == 0 and changed_since(before, state.model) == set()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_finite_stops_too(make_state, loader, accumulate):
    state = make_state("--accumulate", str(accumulate))
    before = snapshot(state.model)
    state.model.project.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match="step 1: expected a finite loss and gradient, found loss \\d.*norm (inf|nan).*videos clip 0, clip 1"):
        vision_only_epoch(state.model, loader, state.backpropagate)
    assert state.step == 0 and state.batches_done == accumulate and changed_since(before, state.model) == set()


def test_a_run_that_stopped_there_goes_on_from_its_last_checkpoint(make_model, windows, tmp_path):
    args, good = ["--batch-size", "2", "--save-every", "1"], np.load(windows.videos[3].path)
    np.save(windows.videos[3].path, good * np.float32(1e30))             # finite features, the loss of which is not
    with pytest.raises(InputError, match="videos .*3"):
        train.train(make_model(), windows, flags(*args), tmp_path)
    progress = checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors").progress
    np.save(windows.videos[3].path, good)
    state = train.train(make_model(), windows, flags(*args, "--resume"), tmp_path)
    assert progress["step"] < 3 and (state.epoch, state.step) == (4, 12)
    assert all(math.isfinite(row["loss"]) for row in checkpoint.read_log(tmp_path / "log.jsonl"))
    assert all(t.isfinite().all() for t in state.ema.values())


# ------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("argv, message", [
    (["--dataset", "custom"], "either --videos DIR"), (["--features", "x"], "demo reads videos"),
    (["--lambda-lang", "1.5"], "0 to 1"), (["--epochs", "-1"], "--epochs: expected a whole number from 0"),
    (["--dataset", "custom", "--features", "x"], "--annotations"), (["--lambda-lang", "much"], "0 to 1"),
    (["--save-every", "-1"], "--save-every: expected a whole number from 0"),
    (["--ablation", "without-tg", "--lambda-lang", "0.4"], "leave out one of them"),
])
def test_flags_that_cannot_work_end_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.get_args(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_presets_set_existing_flags_only():
    known = vars(flags())                                              # of "custom", a preset without values
    for name, preset in [*PRESETS.items(), *FEATURE_PRESETS.items()]:
        assert set(preset) <= set(known), name
