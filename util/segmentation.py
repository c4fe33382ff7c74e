"""Semantic segmentation: samples, loss, sliding window and IoU, as in mmsegmentation's configs/mae."""

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.utils.checkpoint import checkpoint

from util import data, distributed, transforms
from util.transforms import IGNORE, PADDING, fitted_size

AUX_WEIGHT = 0.4
enlarge = partial(interpolate, mode='bilinear', align_corners=False)  # (x, size)
CHUNK_BYTES = 256e6  # of enlarged logits at a time


class PairSamples(data.Samples):
    """(epoch, index) -> (transformed image, transformed mask, problem), as data.Samples."""

    def __getitem__(self, key):
        epoch, index = key
        image, mask, problem = self.read(epoch, index)
        if self.transform is not None:  # None in evaluation
            data.seed_generators(self.seed, epoch, index)
            image, mask = self.transform(image, mask)
        return image, mask, problem


def fill_padding(imgs, masks):
    """On the device: normalised images (N, C, H, W) with 0 beside the image, and masks (N, H, W) int64 with IGNORE."""
    beside = masks == PADDING
    return imgs.masked_fill(beside[:, None], 0.0), masks.masked_fill(beside, IGNORE).long()


# --- Loss -----------------------------------------------------------------------------------------------------


def segmentation_loss(logits, aux_logits, masks):
    """Cross entropy of the head, plus AUX_WEIGHT times that of the auxiliary head.

    logits, aux_logits: (N, K, h, w) at any resolution; masks (N, H, W) int64, with IGNORE.
    """
    return pixel_loss(logits, masks) + AUX_WEIGHT * pixel_loss(aux_logits, masks)


def pixel_loss(logits, masks):
    """Cross entropy of the enlarged logits, divided by ALL pixels, ignored ones included, as the reference does.

    A few images at a time, whose enlarged logits the backward pass computes again: those of 150 classes at 512 x 512
    take 157 MB per image, and would be kept several times for the whole batch.
    """
    count = max(1, int(CHUNK_BYTES / (4 * logits.shape[1] * masks[0].numel())))
    losses = [
        checkpoint(loss_sum, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(logits.split(count), masks.split(count))
    ]
    return sum(losses) / masks.numel()


def loss_sum(logits, masks):
    return cross_entropy(enlarge(logits, masks.shape[-2:]), masks, ignore_index=IGNORE, reduction='sum')


# --- Inference ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """How whole images are segmented."""

    size: tuple  # (H, W), the model's input
    stride: tuple
    scale: tuple  # (long, short) side that images are fitted into
    ratios: tuple = (1.0,)  # of the scale: the probabilities of several are averaged
    flip: bool = False  # and those of the mirrored image


def segment(model, imgs, window, size):
    """The class of every pixel: imgs (1, C, h, w) normalised -> (1, *size), for an annotation of this size.

    Rows are enlarged first, then columns, a strip at a time: 150 classes of a large photo would not fit into memory.
    """
    maps = []  # of scales and mirror images: (1, K, H, w)
    for ratio in window.ratios:
        fitted = fitted_size(imgs.shape[-2:], window.scale, ratio)
        resized = enlarge(imgs, fitted)
        for mirrored in (False, True) if window.flip else (False,):
            logits = slide(model, resized.flip(-1) if mirrored else resized, window.size, window.stride)
            maps.append(enlarge(logits.flip(-1) if mirrored else logits, (size[0], fitted[1])))
    rows = max(1, int(CHUNK_BYTES / (4 * maps[0].shape[1] * size[1])))
    strips = []
    for parts in zip(*(logits.split(rows, dim=2) for logits in maps)):
        probabilities = sum(enlarge(part, (part.shape[2], size[1])).softmax(1) for part in parts)
        strips.append(probabilities.argmax(1))
    return torch.cat(strips, dim=1)


def slide(model, imgs, size, stride):
    """Logits of windows over imgs (1, C, h, w), averaged where they overlap -> (1, K, h, w) float.

    The last window of a row ends with the image. An image smaller than a window is padded to it with 0.
    """
    height, width = imgs.shape[-2:]
    imgs = pad(imgs, (0, max(0, size[1] - width), 0, max(0, size[0] - height)))
    total, count = 0.0, imgs.new_zeros(imgs.shape[-2:])
    for top in starts(imgs.shape[-2], size[0], stride[0]):
        for left in starts(imgs.shape[-1], size[1], stride[1]):
            rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
            logits = model(imgs[..., rows, columns]).float()
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, logits.shape[1], *imgs.shape[-2:])
            total[..., rows, columns] += logits
            count[rows, columns] += 1
    return (total / count)[..., :height, :width]


def starts(length, size, stride):
    """Where windows of a size begin along a side: every stride, the last one so that it ends with the side."""
    number = -(-(length - size) // stride) + 1
    return [min(i * stride, length - size) for i in range(number)]


# --- Scores ---------------------------------------------------------------------------------------------------


def confusion_matrix(predicted, masks, num_classes):
    """(K, K) int64: pixels by class, rows, and predicted class, columns. Both (..., H, W); IGNORE is left out."""
    counted = masks != IGNORE
    pairs = masks[counted].long() * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion):
    """{'miou', 'macc', 'pixel_acc', 'iou': (K,), 'acc': (K,)} in percent.

    IoU is nan for a class that is neither there nor predicted, accuracy for one that is not there; means leave nan out.
    """
    confusion = confusion.double().cpu()
    right, there, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, acc = 100 * right / (there + predicted - right), 100 * right / there
    return {
        'miou': iou.nanmean().item(),
        'macc': acc.nanmean().item(),
        'pixel_acc': (100 * right.sum() / there.sum()).item(),
        'iou': iou,
        'acc': acc,
    }


# --- Evaluation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, loader, window, classes, autocast):
    """{'val_miou', 'val_macc', 'val_pixel_acc', 'val_iou/CLASS' ...} in percent, over the images of all processes.

    Raises:
        RunError: if more images are bad than --max_bad.
    """
    model.eval()
    distributed.share_buffers(model)
    confusion, count = torch.zeros(len(classes), len(classes), dtype=torch.int64), 0
    for imgs, targets in loader:
        with autocast():
            predicted = segment(model, imgs, window, targets.shape[-2:])
        confusion += confusion_matrix(predicted, targets, len(classes)).cpu()
        count += len(imgs)
    counts, confusions = zip(*distributed.gather((count, confusion)))
    bad_images = loader.bad.num_images - sum(counts)
    loader.bad.check(bad_images)
    result = scores(sum(confusions))
    metrics = {f'val_{name}': result[name] for name in ('miou', 'macc', 'pixel_acc')}
    metrics |= {f'val_iou/{name}': iou for name, iou in zip(classes, result['iou'].tolist())}
    return metrics | ({'val_bad_images': bad_images} if bad_images else {})


@torch.no_grad()
def segment_image(model, image, settings, window, device, autocast):
    """The class of every pixel of image (C, h, w), at its own size: (h, w) uint8 array."""
    model.eval()
    imgs = transforms.normalise(image[None].to(device), settings.mean, settings.std)
    with autocast():
        predicted = segment(model, imgs, window, image.shape[-2:])
    return predicted[0].to(torch.uint8).cpu().numpy()
