"""The numbers of a run, its learning rate, and the parameter groups of its optimiser."""

import math
from dataclasses import dataclass

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from util import distributed
from util.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """The numbers that follow from flags, data and processes."""

    num_images: int
    total_batch_size: int  # images per step: batch_size x processes x accumulation
    batch_size: int  # images on a device at a time
    accumulation: int  # micro-batches of a device per optimiser step
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    lr: float  # at its peak
    min_lr: float
    warmup_from: float = 1e-4  # share of lr at which the warm-up starts
    decay: str = 'cosine'  # or 'linear'


def make_schedule(args, num_images, usual_batch=4096, at_least=1):
    """The schedule of a job.

    Args:
        usual_batch: without --total_batch_size, the batch is the largest power of two up to this
            one that leaves ten steps per epoch;
        at_least: but a multiple of these on each device.

    Raises:
        InputError: if batch, warm-up or learning rate do not fit.
    """
    world_size = distributed.world()[1]
    few = 2 ** int(math.log2(max(1, min(usual_batch, num_images // 10))))
    unit = at_least * world_size
    total = args.total_batch_size or max(unit, few - few % unit)
    if total > num_images:
        raise InputError(
            f'{args.data_path} has {num_images} images, too few for one step of {total} images '
            '(--total_batch_size)'
        )
    batch_size = split_batch(total, args.batch_size, world_size)
    steps_per_epoch = num_images // total
    warmup_epochs = args.epochs / 10 if args.warmup_epochs is None else args.warmup_epochs
    lr = args.blr * total / 256 if args.lr is None else args.lr
    if warmup_epochs > args.epochs or args.min_lr > lr:
        raise InputError(
            f'{warmup_epochs:g} epochs of warm-up are more than --epochs {args.epochs}, or '
            f'--min_lr {args.min_lr:g} is more than the learning rate, {lr:g}'
        )
    return Schedule(
        num_images=num_images,
        total_batch_size=total,
        batch_size=batch_size,
        accumulation=total // (batch_size * world_size),
        steps_per_epoch=steps_per_epoch,
        total_steps=args.epochs * steps_per_epoch,
        warmup_steps=int(warmup_epochs * steps_per_epoch),
        lr=lr,
        min_lr=args.min_lr,
    )


def split_batch(total, limit, world_size):
    """Images on a device at a time: the most, up to limit, that divide a process's share of total.

    Raises:
        InputError: if the total does not divide, or only into parts of half the limit or less.
    """
    share = total // world_size
    limit = min(limit or share, share)
    batch_size = max((n for n in range(1, limit + 1) if share % n == 0), default=0)
    if total % world_size or 2 * batch_size <= limit:
        raise InputError(
            f'--total_batch_size {total} is not --batch_size {limit} x {world_size} processes x a '
            'whole number of steps to accumulate'
        )
    return batch_size


def learning_rate(step, schedule, scale=1.0):
    """The learning rate of one optimiser step, counted from 0, of a group with this lr_scale.

    1. Linear from warmup_from * lr to lr, which the last step of the warm-up has.
    2. decay 'cosine': half a cosine from lr that would reach min_lr at total_steps (mmengine's
       LinearLR(start_factor=1e-4) and CosineAnnealingLR, per iteration).
       decay 'linear': a line that reaches min_lr on the last step (mmengine's PolyLR, power 1).
    """
    lr, warmup = schedule.lr * scale, schedule.warmup_steps
    min_lr = schedule.min_lr if scale else 0.0  # 0: the group stays as it is
    if step < warmup:
        return lr * (schedule.warmup_from + (1 - schedule.warmup_from) * step / max(1, warmup - 1))
    if schedule.decay == 'cosine':
        progress = (step - warmup) / max(1, schedule.total_steps - warmup)
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    progress = (step - warmup) / max(1, schedule.total_steps - warmup - 1)
    return lr + (min_lr - lr) * progress


def set_learning_rate(optimizer, schedule, step):
    """Set the rate of every group for one step."""
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(step, schedule, group.get('lr_scale', 1.0))


def param_groups(model, weight_decay, layer_decay=None):
    """Groups for torch.optim.AdamW: [{'params', 'weight_decay'}], with layer_decay also 'lr_scale'.

    Every trained parameter is in exactly one group. Norms, biases and the names in
    model.no_weight_decay() do not decay. MFF's projections do, and so do its fusion logits, whose
    shape (K, 1, 1, 1) keeps them from counting as biases (mmpretrain
    configs/mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py, paramwise_cfg).

    layer_decay: 'lr_scale' layer_decay ** (depth + 1 - id) with id 0 for the embeddings, i + 1 for
    block i and depth + 1 for the norm and head (MAE, appendix A.1). 0 trains norm and head alone.

    Raises:
        ValueError: layer_decay for a model without timm's group_matcher.
    """
    no_decay = model.no_weight_decay()
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    if not hasattr(model, 'group_matcher'):  # timm would silently scale everything by 1
        raise ValueError(f'{type(model).__name__} has no group_matcher, so no layers to decay by')
    return param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=no_decay, layer_decay=layer_decay
    )


def create_adamw(args, groups, lr, device):
    """AdamW on groups (param_groups), whose tensors are on device; fused where torch has that."""
    fused = device.type in ('cuda', 'cpu')
    return torch.optim.AdamW(groups, lr=lr, betas=args.betas, fused=fused)
