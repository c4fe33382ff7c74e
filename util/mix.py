"""Mixup, CutMix and drop path, drawn by an image's place in the total batch.

timm draws them once per batch on a device, so that the result would depend on --batch_size and on the number of
processes. Here every pair of neighbours in the total batch is mixed by itself, and every image has its own drop-path
draws, both from generators seeded by (seed, step, place).
"""

import numpy as np
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.layers import DropPath


class Mix:
    """timm's Mixup and CutMix on pairs of neighbours: one of the two on every pair, half each if both are on.

    Args:
        mixup, cutmix: alpha of their Beta distributions, 0: off.
        smoothing: label smoothing.
    """

    def __init__(self, mixup, cutmix, smoothing, num_classes, seed):
        self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)
        self.seed = seed

    def __call__(self, imgs, labels, place):
        """imgs (N, C, H, W), labels (N,), N even -> mixed imgs, targets (N, classes). imgs is changed in place.

        place: (step, index in the total batch of the first image).
        """
        step, first = place
        targets = []
        for i in range(0, len(imgs), 2):
            np.random.seed(np.random.SeedSequence((self.seed, step, first + i)).generate_state(4))  # timm draws there
            _, target = self.mixup(imgs[i : i + 2], labels[i : i + 2])
            targets.append(target)
        return imgs, torch.cat(targets)


class PlacedDropPath:
    """Replaces every DropPath of a model by one whose draws are given: call draw before each training step.

    Stochastic depth (arXiv 1603.09382): a residual branch is dropped for a whole image with probability drop_prob,
    and scaled by 1 / (1 - drop_prob) otherwise.
    """

    def __init__(self, model, seed):
        self.seed, self.paths = seed, []
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, DropPath):
                    self.paths.append(GivenDropPath(child.drop_prob))
                    setattr(module, name, self.paths[-1])

    def draw(self, count, place, device):
        """Draw for `count` images. place: (step, index in the total batch of the first)."""
        if not self.paths:
            return
        step, first = place
        draws = np.random.default_rng((self.seed, step)).random((first + count, len(self.paths)))[first:]
        keep = 1 - np.array([path.drop_prob for path in self.paths])
        scales = torch.from_numpy(((draws < keep) / keep).astype(np.float32)).to(device)  # (N, paths)
        for path, scale in zip(self.paths, scales.unbind(1)):
            path.scale = scale


class GivenDropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob, self.scale = drop_prob, None

    def forward(self, x):
        """x (N, L, D), times scale (N,) in training."""
        return x * self.scale.to(x.dtype).view(-1, 1, 1) if self.training else x
