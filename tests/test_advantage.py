"""Eq. 1-3: class means, language advantage, its prediction and its loss, on hand-computed values."""
import torch

from advantage import (
    AdvantagePredictor,
    ClassMeans,
    advantage_loss,
    frame_classes,
    language_advantage,
)

def test_class_means_are_the_means_of_each_class_over_real_frames():
    means = ClassMeans(2)
    loss = torch.tensor([[1.0, 3.0, 5.0, 100.0], [2.0, 4.0, 6.0, 8.0]])
    frame_class = torch.tensor([[0, 0, 2, 1], [0, 1, 1, 2]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    means.add(loss, frame_class, mask)
    torch.testing.assert_close(means.mean(), torch.tensor([2.0, 5.0, 6.5]))


def test_class_means_accumulate_over_calls_and_restart_at_reset():
    means = ClassMeans(1)
    one = torch.ones(1, 2, dtype=torch.bool)
    means.add(torch.tensor([[1.0, 9.0]]), torch.tensor([[0, 1]]), one)
    means.add(torch.tensor([[5.0, 7.0]]), torch.tensor([[0, 0]]), one)
    torch.testing.assert_close(means.mean(), torch.tensor([13 / 3, 9.0]))
    means.reset()
    means.add(torch.tensor([[2.0, 4.0]]), torch.tensor([[0, 0]]), one)
    torch.testing.assert_close(means.mean(), torch.tensor([3.0, 9.0]))      # background: not seen, keeps its mean


def test_class_mean_of_a_class_never_seen_is_zero():
    assert ClassMeans(3).mean().tolist() == [0, 0, 0, 0]


def test_class_means_survive_save_and_load():
    means, other = ClassMeans(2), ClassMeans(2)
    means.add(torch.rand(2, 5), torch.randint(0, 3, (2, 5)), torch.ones(2, 5, dtype=torch.bool))
    other.load_state_dict(means.state_dict())
    assert torch.equal(other.mean(), means.mean())


def test_class_means_ignore_gradients():
    means = ClassMeans(1)
    means.add(torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, dtype=torch.long),
              torch.ones(1, 2, dtype=torch.bool))
    assert not means.total.requires_grad


def test_frame_class_is_that_of_the_shortest_segment_or_background():
    segments = [torch.tensor([[1.0, 6.0], [3.0, 4.0]]), torch.zeros(0, 2)]
    labels = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.long)]
    assert frame_classes(segments, labels, 8, 2).tolist() == [[2, 0, 0, 1, 1, 0, 0, 2], [2] * 8]


def test_eq1_language_advantage_by_hand_and_without_gradient():
    class_mean = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    loss_vl = torch.tensor([[0.25, 3.0, 0.5]], requires_grad=True)
    advantage = language_advantage(class_mean, loss_vl, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(advantage, torch.tensor([[0.75, -1.0, 0.0]]))
    assert not advantage.requires_grad


def test_eq2_predictor_starts_at_zero_and_is_linear():
    predictor = AdvantagePredictor(4)
    x = torch.randn(2, 3, 4)
    assert torch.equal(predictor(x), torch.zeros(2, 3))
    predictor.fc.weight.data = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    predictor.fc.bias.data.fill_(0.5)
    torch.testing.assert_close(predictor(x), x[..., 0] + 2 * x[..., 1] - x[..., 3] + 0.5)


def test_eq3_advantage_loss_by_hand_ignores_padding():
    predicted, target = torch.tensor([[1.0, 2.0, 7.0]]), torch.tensor([[0.0, 5.0, -7.0]])
    mask = torch.tensor([[True, True, False]])
    assert advantage_loss(predicted, target, mask).item() == 5.0                      # (1 + 9) / 2


def test_eq3_gradient_reaches_the_prediction_at_real_frames_only():
    predicted = torch.tensor([[1.0, 2.0, 7.0]], requires_grad=True)
    advantage_loss(predicted, torch.zeros(1, 3), torch.tensor([[True, True, False]])).backward()
    torch.testing.assert_close(predicted.grad, torch.tensor([[1.0, 2.0, 0.0]]))      # 2 (x - t) / 2


def test_eq3_of_an_empty_mask_is_zero():
    assert advantage_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)).item() == 0
