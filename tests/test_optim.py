"""The learning-rate schedule against torch's schedulers, which mmengine's follow."""

import pytest
import torch

from util.errors import InputError
from util.optim import Schedule, learning_rate, param_groups, split_batch


def rate(step, total, warmup, lr, min_lr=0.0, **others):
    """learning_rate of a schedule of which only these numbers matter."""
    schedule = Schedule(
        num_images=1, total_batch_size=1, batch_size=1, accumulation=1, steps_per_epoch=1,
        total_steps=total, warmup_steps=warmup, lr=lr, min_lr=min_lr, **others,
    )  # fmt: skip
    return learning_rate(step, schedule)


@pytest.mark.parametrize('warmup, total, min_lr', [(40, 300, 0.0), (5, 60, 1e-6), (1, 12, 0.0)])
def test_schedule_is_linear_then_cosine(warmup, total, min_lr):
    lr = 2.4e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=max(1, warmup - 1))
    expected = []
    for _ in range(warmup):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        linear.step()
    optimizer.param_groups[0]['lr'] = lr
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, min_lr)
    for _ in range(warmup, total):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        cosine.step()
    ours = [rate(step, total, warmup, lr, min_lr) for step in range(total)]
    assert ours == pytest.approx(expected, rel=1e-9)


def test_schedule_at_the_published_recipe():
    """300 epochs of 312 steps: 1e-4 of the peak at first, the peak after 40 epochs, half of it in the middle."""
    total, warmup = 300 * 312, 40 * 312
    rates = [rate(step, total, warmup, 2.4e-3) for step in range(total)]
    assert rates[0] == pytest.approx(2.4e-7)
    assert rates[warmup - 1] == rates[warmup] == pytest.approx(2.4e-3) == max(rates)
    assert rates[(warmup + total) // 2] == pytest.approx(1.2e-3)
    assert 0 < rates[-1] < 1e-11


def test_no_warmup_starts_at_the_peak():
    assert rate(0, 10, 0, 1.0) == 1.0


@pytest.mark.parametrize('warmup, total', [(5, 40), (0, 7)])
def test_linear_decay_reaches_its_end_on_the_last_step(warmup, total):
    """mmengine's PolyLR with power 1 begins on the step after the warm-up and ends on the last one."""
    rates = [rate(step, total, warmup, 1e-4, warmup_from=1e-6, decay='linear') for step in range(total)]
    down = [1e-4 * (1 - i / (total - warmup - 1)) for i in range(total - warmup)]
    assert rates[warmup:] == pytest.approx(down, abs=1e-18)
    if warmup:
        assert rates[:warmup] == pytest.approx([1e-4 * (1e-6 + (1 - 1e-6) * i / (warmup - 1)) for i in range(warmup)])


def test_layer_decay_needs_a_model_that_knows_its_layers():
    class Plain(torch.nn.Linear):
        def no_weight_decay(self):
            return set()

    with pytest.raises(ValueError, match='group_matcher'):
        param_groups(Plain(2, 2), 0.05, layer_decay=0.65)


@pytest.mark.parametrize(
    'total, limit, world_size, expected',
    [(4096, 512, 8, 512), (4096, 256, 1, 256), (96, None, 2, 48), (16, 32, 1, 16), (16, 32, 2, 8), (4096, 48, 8, 32)],
)
def test_batch_size_is_an_upper_bound(total, limit, world_size, expected):
    assert split_batch(total, limit, world_size) == expected
    assert total % (expected * world_size) == 0


@pytest.mark.parametrize('total, limit, world_size', [(554, 256, 1), (17, 6, 1), (10, None, 4)])
def test_total_batch_suggestions_would_do(total, limit, world_size):
    with pytest.raises(InputError) as error:
        split_batch(total, limit, world_size)
    suggestions = [int(word) for word in str(error.value).split(';')[1].replace(',', ' ').split() if word.isdigit()]
    assert suggestions
    for number in suggestions:
        if limit:
            assert split_batch(total, number, world_size) == number
        else:
            split_batch(number, None, world_size)
