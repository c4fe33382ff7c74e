"""Features of a frozen encoder, and how well nearest neighbours tell classes apart by them.

Several processes share the work: each keeps the features of its own images, on the CPU.
"""

import numpy as np
import torch
import torch.nn.functional as F

from util import distributed


@torch.no_grad()
def extract(model, batches, autocast):
    """Features of this process's share of the images: nothing masked, after the final norm.

    Args:
        model: with forward_features, (N, C, H, W) -> (N, 1+L, D).
        batches: (images, labels), as engine.evaluation_batches gives them.

    Returns:
        features: {'cls token': (M, D), 'mean of patches': (M, D)}, float32 on the CPU.
        labels: (M,), on the CPU.
    """
    model.eval()
    empty = torch.empty(0, model.cls_token.shape[-1])
    cls_tokens, means, labels = [empty], [empty], [torch.empty(0, dtype=torch.long)]
    for images, targets in batches:
        with autocast():
            tokens = model.forward_features(images).float()  # (N, 1+L, D)
        cls_tokens.append(tokens[:, 0].to('cpu', copy=True))  # a view would keep all tokens
        means.append(tokens[:, 1:].mean(1).cpu())
        labels.append(targets.cpu())
    features = {'cls token': torch.cat(cls_tokens), 'mean of patches': torch.cat(means)}
    return features, torch.cat(labels)


def neighbour_accuracy(train, val, k, device):
    """{feature: top-1 in percent} of val by the k nearest images of train, both from extract."""
    (train, train_labels), (val, val_labels) = train, val
    labels = torch.cat(distributed.gather(val_labels))
    result = {}
    for name in train:
        queries = torch.cat(distributed.gather(val[name]))
        predicted = nearest_neighbours(train[name], train_labels, queries, k, device)
        result[name] = 100 * (predicted == labels).double().mean().item()
    return result


@torch.no_grad()
def nearest_neighbours(bank, bank_labels, queries, k, device, temperature=0.07):
    """Classes (Q,) of queries (Q, D) by the k nearest in the banks of all processes, by cosine.

    Each votes exp(cosine / temperature) for its label: Wu et al. (2018), arXiv 1805.01978.
    bank (M, D) may be large: chunks of it visit the device.
    """
    queries = F.normalize(queries.to(device), dim=1)
    size = 1 + 2**25 // (1 + len(queries))  # of a chunk: at most 128 MB of cosines
    best = queries.new_empty(len(queries), 0), bank_labels.new_empty(len(queries), 0).to(device)
    for chunk, labels in zip(bank.split(size), bank_labels.split(size)):
        cosine, index = (queries @ F.normalize(chunk.to(device), dim=1).T).topk(min(k, len(chunk)))
        best = largest([best, (cosine, labels.to(device)[index])], k)
    predicted = []
    for cosine, labels in zip(best[0].cpu().split(4096), best[1].int().cpu().split(4096)):
        cosine, labels = largest(distributed.gather((cosine, labels)), k)
        votes = cosine.new_zeros(len(cosine), 1 + int(labels.max()))
        votes.scatter_add_(1, labels.long(), (cosine / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def largest(parts, k):
    """The k largest cosines (Q, k) and their labels (Q, k) out of several such pairs."""
    cosine, labels = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    cosine, index = cosine.topk(min(k, cosine.shape[1]))
    return cosine, labels.gather(1, index)


def spread(labels, count):
    """Indices of count images, at most, in which each class of labels (M,) keeps its share."""
    order = np.argsort(labels, kind='stable')
    order = order[labels[order] >= 0]  # torch/stl10 has unlabelled images, too
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
