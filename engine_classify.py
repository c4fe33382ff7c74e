"""Classifiers: what fine-tuning and probing share beside engine.py."""

import csv
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import accuracy

import engine
from util import data, distributed, sources, transforms, weights
from util.errors import InputError, as_input_error

# --- Loss -----------------------------------------------------------------------------------------


def class_weights(source, most=10.0):
    """(K,) inverse frequencies of the classes, none more than `most` times the smallest.

    Their mean over the images of source is 1, so that the learning rate keeps its meaning.
    """
    counts = torch.bincount(torch.as_tensor(source.labels), minlength=len(source.classes)).float()
    inverse = (counts.max() / counts.clamp(min=1)).clamp(max=most)
    return inverse * counts.sum() / (counts * inverse).sum()


def create_criterion(args, source, device, smoothing=0.0, soft=False):
    """(logits (N, K), labels (N,), or (N, K) if soft) -> loss, by --class_weights if given."""
    if not args.class_weights:
        return SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(smoothing)
    weight, num_classes = class_weights(source).to(device), len(source.classes)

    def weighted(logits, labels):
        targets = labels if soft else F.one_hot(labels, num_classes).float()
        label_smoothing = 0.0 if soft else smoothing
        return F.cross_entropy(logits, targets, weight, label_smoothing=label_smoothing)

    return weighted


# --- Evaluation -----------------------------------------------------------------------------------


def classes_loader(args, device, source, settings):
    """evaluation_loader of a classifier's images: resized, and cropped at the centre or padded."""
    transform = transforms.test_transform(args, settings)
    return engine.evaluation_loader(args, device, data.Samples(source, transform), settings)


def evaluate(model, loader, autocast, classes, run=None, index=None):
    """Loss, top-1, top-5 and balanced accuracy (the mean over classes), in percent; and by class.

    index: (K,) the logits of these classes, where the model has others too.

    Returns:
        values: {'val_loss', 'val_top1', 'val_balanced'}, and 'val_top5' of more than five classes.
        recalls: {class: accuracy in percent}, of the classes that have images.
    """

    def measure(model, images, labels):
        with autocast():
            logits = model(images).float()
        if index is not None:
            logits = logits[:, index]
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        one_hot = F.one_hot(labels, len(classes)).float()
        right = (logits.argmax(1) == labels).float()
        return {
            'val_loss': F.cross_entropy(logits, labels),
            'val_top1': top1,
            'val_top5': top5,
            'seen': one_hot.mean(0),
            'right': (one_hot * right[:, None]).mean(0),
        }

    values = engine.evaluate(model, loader, measure, run)
    counts = zip(classes, values.pop('right'), values.pop('seen'))
    recalls = {name: 100 * right / seen for name, right, seen in counts if seen}
    if len(classes) <= 5:
        del values['val_top5']
    return values | {'val_balanced': sum(recalls.values()) / len(recalls)}, recalls


def summary(values, recalls, num_images):
    """The lines to print of an evaluation: all numbers, and the worst classes."""
    worst = sorted(recalls, key=recalls.get)[:5]
    names = {'val_top1': 'top-1', 'val_top5': 'top-5', 'val_balanced': 'balanced accuracy'}
    numbers = [f'{names[key]} {values[key]:.2f} %' for key in names if key in values]
    return (
        f'{"  ".join(numbers)}  loss {values["val_loss"]:.4f}  on {num_images} images\n'
        f'worst of {len(recalls)} classes: '
        + ', '.join(f'{name} {recalls[name]:.1f} %' for name in worst)
    )


def find_classes(known, classes):
    """(K,) where classes stand among those that a classifier knows. Raises InputError."""
    unknown = sorted(set(classes) - set(known))
    if unknown:
        raise InputError(f'the classifier does not know the classes {", ".join(unknown[:5])}')
    return torch.tensor([known.index(name) for name in classes])


def report(args, device, model, settings, file, source):
    """--eval: evaluate the classifier of --init_from, print the result, and write --report.

    model: with a head of settings.classes, where the file names them, or else of source.classes.
    Where the source has only some of the file's classes, only their logits count.
    """
    if file is None:
        raise InputError('--eval needs the weights to evaluate: --init_from CHECKPOINT')
    lines = [weights.load(model, file, complete=True), *settings.notes]
    known = settings.classes or source.classes
    if not settings.classes:
        order = ', '.join(known[:5])
        lines.append(f'the file names no classes; their order is assumed: {order} ...')
    index = find_classes(known, source.classes)
    if len(index) < len(known):
        lines.append(f'over the logits of {len(index)} of its {len(known)} classes')
    autocast, _ = engine.mixed_precision(args.amp, device)
    loader = classes_loader(args, device, source, settings)
    model.to(device)
    values, recalls = evaluate(model, loader, autocast, source.classes, index=index)
    if distributed.world()[0] == 0:
        print('\n'.join([*lines, summary(values, recalls, len(source))]))
    if args.report:
        rows = list(predictions(args, device, model, settings, source))
        numbers, probabilities = (np.array(part) for part in zip(*rows))
        paths = [source.path(number) for number in numbers]
        labels = source.labels[numbers]
        write_report(args.report, source.classes, paths, labels, probabilities[:, index])
        print(f'Wrote classes.csv, confusion.csv, confusion.png and mistakes.csv to {args.report}')
    distributed.stop()


@torch.no_grad()
def predictions(args, device, model, settings, source):
    """Yield (number in source, [probability of each class]) of the images that can be read."""
    autocast, _ = engine.mixed_precision(args.amp, device)
    transform = transforms.test_transform(args, settings)
    samples = data.Samples(source, transform, numbered=True)
    loader = engine.evaluation_loader(args, device, samples, settings)
    model.to(device).eval()
    for images, numbers in engine.evaluation_batches(loader):
        with autocast():
            probabilities = model(images).float().softmax(1)
        yield from zip(numbers.tolist(), probabilities.tolist())


def predict(args, device, model, settings):
    """--predict: print the most probable classes of images; SystemExit(1) if one is unreadable.

    Where the images lie in folders of known classes, also the true class.
    """
    source = sources.open_given(args, settings)
    count = 0
    for number, probabilities in predictions(args, device, model, settings, source):
        count += 1
        best = np.argsort(probabilities)[::-1]
        shown = best if args.json else best[: args.topk]
        top = {settings.classes[index]: round(probabilities[index], 4) for index in shown}
        label = -1 if source.labels is None else source.labels[number]
        true = source.classes[label] if label >= 0 else None
        if args.json:
            line = {'image': source.path(number), 'classes': top}
            print(json.dumps(line | ({'class': true} if true else {})))
        else:
            parts = [source.path(number), *(f'{name} {p:.1%}' for name, p in top.items())]
            print('  '.join([*parts, *([f'(is {true})'] if true else [])]))
    if count < len(source):
        raise SystemExit(1)


# --- Files of an evaluation -----------------------------------------------------------------------


def write_report(folder, classes, paths, labels, probabilities):
    """Write classes.csv, confusion.csv, confusion.png and mistakes.csv into folder.

    Args:
        paths: of the M images.
        labels: (M,) numbers of their classes.
        probabilities: (M, K) of the classes.

    Raises:
        InputError: if nothing can be written there.
    """
    predicted = probabilities.argmax(1)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)  # true class, predicted class
    np.add.at(confusion, (labels, predicted), 1)
    right, seen, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    rows = zip(classes, seen, right / np.maximum(seen, 1), right / np.maximum(found, 1))
    confidence = probabilities.max(1)
    wrong = [i for i in np.argsort(-confidence) if predicted[i] != labels[i]]
    mistakes = [
        (paths[i], classes[labels[i]], classes[predicted[i]], round(float(confidence[i]), 4))
        for i in wrong
    ]
    with as_input_error(folder):
        os.makedirs(folder, exist_ok=True)
        write_csv(folder, 'classes.csv', [('class', 'images', 'recall', 'precision'), *rows])
        named = [(name, *row) for name, row in zip(classes, confusion.tolist())]
        write_csv(folder, 'confusion.csv', [('true \\ predicted', *classes), *named])
        header = ('image', 'class', 'predicted', 'probability')
        write_csv(folder, 'mistakes.csv', [header, *mistakes])
        confusion_figure(confusion, classes).savefig(os.path.join(folder, 'confusion.png'))


def write_csv(folder, name, rows):
    with open(os.path.join(folder, name), 'w', newline='', errors='surrogateescape') as file:
        csv.writer(file).writerows(rows)


def confusion_figure(confusion, classes):
    """Figure of a confusion matrix (K, K), in shares of each row; with names up to 40 classes."""
    count = len(classes)
    side = min(12, max(4, 2.5 + 0.35 * count))
    figure = Figure(figsize=(side + 1, side), layout='constrained', dpi=100)
    axes = figure.subplots()
    shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=100, interpolation='nearest')
    figure.colorbar(image, label='% of the images of a class', shrink=0.7)
    axes.set(xlabel='predicted', ylabel='class')
    if count <= 40:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= 15:
        for row, column in np.ndindex(confusion.shape):
            colour = 'white' if shares[row, column] > 50 else 'black'
            text = f'{shares[row, column]:.0f}'
            axes.text(column, row, text, ha='center', va='center', color=colour)
    return figure
