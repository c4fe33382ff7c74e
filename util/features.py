"""Features of a frozen encoder, and how well they tell classes apart: nearest neighbours, logistic regression.

Several processes share the work: each keeps the features of its own images, on the CPU, and compares or fits with
them; what they find is put together. The result does not depend on their number.
"""

import numpy as np
import torch
import torch.nn.functional as F

from util import distributed
from util.errors import InputError
from util.sources import Part, check_same_classes

HELD_OUT = 0.2  # share of the training images by which the penalty of logistic regression is chosen
PENALTIES = [10.0 ** (-power / 2) for power in range(13)]  # 1 to 1e-6


@torch.no_grad()
def extract(model, loader, autocast):
    """Features of the images of loader, which are this process's share, unmasked and after the final norm.

    Args:
        model: with forward_features, (N, C, H, W) -> (N, 1+L, D): MaskedAutoencoderMFF or timm's VisionTransformer.
        loader: data.Loader of images and labels, on the device of model, that leaves out unreadable images.

    Returns:
        features: {'cls token': (M, D), 'mean of patches': (M, D)}, float32 on the CPU.
        labels: (M,), on the CPU.

    Raises:
        RunError: if too many images cannot be read.
    """
    was_training, empty = model.training, torch.empty(0, model.cls_token.shape[-1])
    model.eval()
    cls_tokens, means, labels = [empty], [empty], [torch.empty(0, dtype=torch.long)]
    for imgs, target in loader:
        with autocast():
            tokens = model.forward_features(imgs)  # (N, 1+L, D)
        cls_tokens.append(tokens[:, 0].to('cpu', torch.float32, copy=True))  # a view would keep all tokens
        means.append(tokens[:, 1:].float().mean(1).cpu())
        labels.append(target.cpu())
    model.train(was_training)
    loader.bad.check(loader.bad.num_images - sum(distributed.gather(len(torch.cat(labels)))))
    return {'cls token': torch.cat(cls_tokens), 'mean of patches': torch.cat(means)}, torch.cat(labels)


def small_parts(train, val, num_train=2000, num_val=1000):
    """Fixed parts of two sources, small enough to be classified while training. InputError if there are no labels."""
    if train.labels is None or val is None or val.labels is None:
        raise InputError('--knn_every needs labelled training and validation images')
    check_same_classes(train.classes, val.classes, 'the training images', 'the validation images')
    return Part(train, spread(train.labels, num_train)), Part(val, spread(val.labels, num_val))


def spread(labels, count):
    """Indices of count images, or of all if there are fewer, in which each class (labels, (M,)) keeps its share."""
    order = np.argsort(labels, kind='stable')
    order = order[labels[order] >= 0]  # torch/stl10 has unlabelled images, too
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


# --- Nearest neighbours -------------------------------------------------------------------------------------------


def neighbour_accuracy(train, val, k, device='cpu'):
    """{feature: top-1 in percent} of val by the k nearest images of train, both as extract gives them."""
    (train, train_labels), (val, val_labels) = train, val
    accuracy = {}
    for name in train:
        queries, labels = (torch.cat(distributed.gather(share)) for share in (val[name], val_labels))
        predicted = nearest_neighbours(train[name], train_labels, queries, k, device)
        accuracy[name] = 100 * (predicted == labels).double().mean().item()
    return accuracy


@torch.no_grad()
def nearest_neighbours(bank, bank_labels, queries, k, device='cpu', temperature=0.07):
    """Classes (Q,) of queries (Q, D), the same on all processes, by the k with the largest cosine of all their banks.

    Each of the k votes exp(cosine / temperature) for its label: Wu et al. (2018), arXiv 1805.01978. bank (M, D) may be
    large: chunks of it visit the device.
    """
    queries = F.normalize(queries.to(device), dim=1)
    size = 1 + 2**25 // (1 + len(queries))  # of a chunk: at most 128 MB of cosines
    best = [(queries.new_empty(len(queries), 0), bank_labels.to(device).new_empty(len(queries), 0))]
    for chunk, labels in zip(bank.split(size), bank_labels.split(size)):
        cosine, index = (queries @ F.normalize(chunk.to(device), dim=1).T).topk(min(k, len(chunk)))  # (Q, k)
        best = [largest([*best, (cosine, labels.to(device)[index])], k)]
    cosine, labels = largest(distributed.gather(tuple(part.cpu() for part in best[0])), k)
    votes = cosine.new_zeros(len(queries), 1 + int(labels.max()))
    return votes.scatter_add_(1, labels, (cosine / temperature).exp()).argmax(1)


def largest(parts, k):
    """The k largest cosines (Q, k) and their labels (Q, k) out of several such pairs."""
    cosine, labels = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    cosine, index = cosine.topk(min(k, cosine.shape[1]))
    return cosine, labels.gather(1, index)


# --- Logistic regression ------------------------------------------------------------------------------------------


def logistic_accuracy(train, val, device='cpu'):
    """{feature: top-1 in percent} of val by logistic regression on train, both as extract gives them.

    The penalty is chosen on a fixed held-out part of the training images: from the largest of PENALTIES down, until the
    loss rises. The model is then fitted to all training images.
    """
    (train, train_labels), (val, val_labels) = train, val
    device = 'cpu' if torch.device(device).type == 'mps' else device  # which has no float64
    rank, world_size = distributed.world()
    num_classes = 1 + max(distributed.gather(max(train_labels.tolist(), default=0)))
    draws = np.random.default_rng(0).random(len(train_labels) * world_size)[rank::world_size]
    held_out = torch.from_numpy(draws < HELD_OUT)
    accuracy = {}
    for name in train:
        x, y, val_x, val_y = (
            part.to(device, torch.float64 if part.is_floating_point() else torch.long)
            for part in (train[name], train_labels, val[name], val_labels)
        )
        mean, square = average(x, x.square())
        std = (square - mean.square()).clamp(min=1e-12).sqrt()
        x, val_x = (x - mean) / std, (val_x - mean) / std
        here = held_out.to(device)
        weight, lowest, chosen = x.new_zeros(x.shape[1] + 1, num_classes), float('inf'), PENALTIES[0]
        for penalty in PENALTIES:
            weight = fit_logistic(x[~here], y[~here], weight, penalty, tolerance=1e-4)  # enough to compare
            (loss,) = average(F.cross_entropy(logits(x[here], weight), y[here], reduction='none'))
            if loss > lowest:
                break
            lowest, chosen = loss, penalty
        weight = fit_logistic(x, y, weight, chosen)
        (share,) = average((logits(val_x, weight).argmax(1) == val_y).double())
        accuracy[name] = 100 * share.item()
    return accuracy


def logits(x, weight):
    """x (M, D), weight (D+1, classes), the last row of which is the bias -> (M, classes)."""
    return x @ weight[:-1] + weight[-1]


def average(*values):
    """The mean of each over its first dimension, over all processes; in float64."""
    sums = [distributed.sum_over_processes(value.sum(0)) for value in values]
    count = distributed.sum_over_processes(values[0].new_tensor(float(len(values[0]))))
    return [total / count for total in sums]


def fit_logistic(x, y, weight, penalty, tolerance=1e-7):
    """Multinomial logistic regression, fitted to convergence by L-BFGS; deterministic.

    Minimises the mean cross-entropy over the images of all processes + penalty / 2 * |weight|^2, bias left out, which
    is strictly convex in the weight. Features may be nearly collinear, so the search runs along their principal axes,
    scaled by about the curvature there; the minimum is the same.

    Args:
        x: (M, D) float64, standardised, of this process's images. y: (M,) their classes.
        weight: (D+1, classes) to start from, left as it is; the last row is the bias.
        tolerance: largest entry of the gradient at the end.

    Returns:
        weight (D+1, classes), the same on all processes.
    """
    count = sum(distributed.gather(len(y)))
    covariance = distributed.sum_over_processes(x.T @ x) / count
    variances, axes = torch.linalg.eigh(covariance)
    scale = (variances.clamp(min=0) / weight.shape[1] + penalty).rsqrt()
    transform = axes * scale  # (D, D): weight[:-1] = transform @ scaled[:-1]
    x = x @ transform
    scaled = torch.cat([axes.T @ weight[:-1] / scale[:, None], weight[-1:]]).requires_grad_()
    shrink = penalty * torch.cat([scale.square(), scale.new_zeros(1)])[:, None]  # of the squares of scaled
    options = {'tolerance_grad': tolerance, 'tolerance_change': 1e-15, 'history_size': 20}
    optimizer = torch.optim.LBFGS([scaled], max_iter=1000, max_eval=2000, line_search_fn='strong_wolfe', **options)

    def closure():
        scaled.grad, total = torch.zeros_like(scaled), x.new_zeros(1)
        for chunk, classes in zip(x.split(2**16), y.split(2**16)):
            loss = F.cross_entropy(logits(chunk, scaled), classes, reduction='sum') / count
            loss.backward()
            total += loss.detach()
        sums = distributed.sum_over_processes(torch.cat([scaled.grad.flatten(), total]))
        scaled.grad = sums[:-1].view_as(scaled) + shrink * scaled.detach()
        return sums[-1] + (shrink * scaled.detach().square()).sum() / 2

    optimizer.step(closure)
    scaled = scaled.detach()
    return torch.cat([transform @ scaled[:-1], scaled[-1:]])
