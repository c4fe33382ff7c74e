"""Learning rates against torch's schedulers, which mmengine's follow; batches and groups."""

from argparse import Namespace

import pytest
import torch

from util import distributed
from util.errors import InputError
from util.optim import Schedule, learning_rate, make_schedule, split_batch


def rates(total, warmup, lr, min_lr=0.0, **others):
    """The learning rate of every step of a schedule of which only these numbers matter."""
    schedule = Schedule(
        num_images=1, total_batch_size=1, batch_size=1, accumulation=1, steps_per_epoch=1,
        total_steps=total, warmup_steps=warmup, lr=lr, min_lr=min_lr, **others,
    )  # fmt: skip
    return [learning_rate(step, schedule) for step in range(total)]


@pytest.mark.parametrize('warmup, total, min_lr', [(40, 300, 0.0), (5, 60, 1e-6), (0, 12, 0.0)])
def test_schedule_is_linear_then_cosine(warmup, total, min_lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2.4e-3)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=max(1, warmup - 1))
    expected = []
    for _ in range(warmup):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        linear.step()
    optimizer.param_groups[0]['lr'] = 2.4e-3
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, min_lr)
    for _ in range(warmup, total):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        cosine.step()
    assert rates(total, warmup, 2.4e-3, min_lr) == pytest.approx(expected, rel=1e-9)


def test_linear_decay_reaches_its_end_on_the_last_step():
    """mmengine's PolyLR of power 1 begins on the step after the warm-up."""
    up = [1e-4 * (1e-6 + (1 - 1e-6) * i / 4) for i in range(5)]
    down = [1e-4 * (1 - i / 34) for i in range(35)]
    ours = rates(40, 5, 1e-4, warmup_from=1e-6, decay='linear')
    assert ours == pytest.approx(up + down, abs=1e-18)


@pytest.mark.parametrize(
    'total, limit, world_size, expected',
    [
        (4096, 512, 8, 512),
        (96, None, 2, 48),
        (16, 32, 2, 8),
        (4096, 48, 8, 32),
        (554, 256, 1, None),
        (10, None, 4, None),
    ],
)
def test_batch_on_a_device_divides_the_total(total, limit, world_size, expected):
    """The most up to the limit; a divisor of half of it or less is a mistake."""
    if expected is None:
        with pytest.raises(InputError, match=f'{total}'):
            split_batch(total, limit, world_size)
    else:
        assert split_batch(total, limit, world_size) == expected


@pytest.mark.parametrize('world_size', [1, 2, 3, 4])
@pytest.mark.parametrize('num_images', [*range(10, 20), 64, 1000])
def test_a_default_batch_is_never_refused(num_images, world_size, monkeypatch):
    """And has two images per device at least, which BatchNorm and Mixup need."""
    monkeypatch.setattr(distributed, 'world', lambda: (0, world_size))
    args = Namespace(
        total_batch_size=None, batch_size=None, epochs=2, warmup_epochs=None, blr=1, lr=None,
        min_lr=0.0, data_path='images',
    )  # fmt: skip
    schedule = make_schedule(args, num_images, at_least=2)
    assert schedule.batch_size % 2 == 0 and schedule.accumulation == 1
    assert schedule.total_batch_size == world_size * schedule.batch_size
