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


def learning_rate(step, total_steps, warmup_steps, lr, min_lr=0.0):
    """The learning rate of one optimiser step, counted from 0.

    Linear from 1e-4 * lr to lr over the warm-up, which ends on its last step; then half a cosine from lr that would
    reach min_lr at total_steps. As mmengine's LinearLR(start_factor=1e-4) and CosineAnnealingLR, per iteration.
    """
    if step < warmup_steps:
        return lr * (1e-4 + (1 - 1e-4) * step / max(1, warmup_steps - 1))
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer, lr_at, step):
    """Set every group's lr: lr_at(step, lr_scale of the group)."""
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, group.get('lr_scale', 1.0))
