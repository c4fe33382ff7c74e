"""Parameter groups and the learning-rate schedule."""

import math

from timm.optim import param_groups_layer_decay, param_groups_weight_decay


def param_groups(model, weight_decay, layer_decay=None):
    """Groups for torch.optim.AdamW: [{'params', 'weight_decay'}], with layer_decay also 'lr_scale'.

    Every trained parameter is in exactly one group. Norms, biases and the names in model.no_weight_decay() do not
    decay. MFF's projections do, and so do its fusion logits, whose shape (K, 1, 1, 1) keeps them from counting as
    biases (mmpretrain configs/mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py, paramwise_cfg).

    layer_decay: 'lr_scale' layer_decay ** (depth + 1 - id) with id 0 for the embeddings, i + 1 for block i and
    depth + 1 for the norm and head (MAE, appendix A.1).

    Raises:
        ValueError: layer_decay for a model that does not say which parameter is in which layer, as timm's do.
    """
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=model.no_weight_decay())
    if not hasattr(model, 'group_matcher'):  # timm would silently scale everything by 1
        raise ValueError(f'{type(model).__name__} has no group_matcher, so layer_decay cannot tell its layers')
    return param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )


def learning_rate(step, schedule, scale=1.0):
    """The learning rate of one optimiser step, counted from 0, of a group with this lr_scale.

    Linear from warmup_from * lr to lr over the warm-up, which ends on its last step; then, decay='cosine', half a
    cosine from lr that would reach min_lr at total_steps (mmengine's LinearLR(start_factor=1e-4) and
    CosineAnnealingLR, per iteration), or, decay='linear', a line that reaches min_lr on the last step (mmengine's
    PolyLR with power 1).

    schedule: has lr, min_lr, total_steps, warmup_steps, warmup_from and decay, as engine.Schedule.
    """
    lr, min_lr, warmup = schedule.lr * scale, schedule.min_lr, schedule.warmup_steps
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
