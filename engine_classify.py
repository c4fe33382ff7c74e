"""Classifiers: what fine-tuning and probing share beside engine.py."""

import csv
import json
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import accuracy

import engine
from models_mff import create_encoder
from util import data, distributed, files, sources, transforms, weights
from util.errors import InputError, as_input_error


class LinearProbe(nn.Module):
    """A frozen encoder; BatchNorm without parameters on its cls token; a Linear (MAE, A.1)."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.backbone = encoder.requires_grad_(False)
        self.bn = nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, imgs):
        """imgs (N, C, H, W) -> logits (N, K)."""
        with torch.no_grad():
            tokens = self.backbone(imgs)  # (N, D)
        return self.head(self.bn(tokens))


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


def classes_loader(args, device, source, settings, numbered=False):
    """evaluation_loader of a classifier's images: resized, and cropped at the centre or padded."""
    samples = data.Samples(source, transforms.test_transform(args, settings), numbered=numbered)
    return engine.evaluation_loader(args, device, samples, settings)


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


def find_logits(model, settings, source):
    """(K,) which of a classifier's logits are of the source's classes. Prints what is assumed.

    Raises:
        InputError: if it does not know some of them, or has others without names.
    """
    count, known = len(model.head.weight), settings.classes or source.classes
    if len(known) != count:
        raise InputError(f'the classifier has {count} classes, without names, not {len(known)}')
    unknown = sorted(set(source.classes) - set(known))
    if unknown:
        raise InputError(f'the classifier does not know the classes {files.shorten(unknown)}')
    if not settings.classes:
        files.say(f'it names no classes; their order is assumed: {files.shorten(known)}')
    if len(source.classes) < count:
        files.say(f'over the logits of {len(source.classes)} of its {count} classes')
    return torch.tensor([known.index(name) for name in source.classes])


def load_classifier(args, device):
    """(classifier of --init_from, on the device, settings). Raises InputError if it is none."""
    if not args.init_from:
        raise InputError('no classifier: --init_from CHECKPOINT')
    file = weights.read(args.init_from)
    settings = weights.settings_of(args, file)
    head = file['model'].get('head.weight')
    if head is None:
        raise InputError(f'{args.init_from}: not a classifier, it has no head')
    if 'bn.running_mean' in file['model']:
        model = LinearProbe(create_encoder(settings.sizes, 'token'), len(head))
    else:
        pool = getattr(args, 'global_pool', None) or settings.global_pool or 'avg'
        model = create_encoder(settings.sizes, pool)
        model.reset_classifier(len(head))
    lines = [weights.load(model, file, complete=True), *settings.notes]
    if distributed.is_first():
        print('\n'.join(lines), file=sys.stderr)  # predictions go to stdout
    return model.to(device).eval(), settings


def report(args, device):
    """--eval: evaluate the classifier of --init_from, print the result, and write --report.

    Where the images are of only some of its classes, only their logits count. Of the data that it
    was trained on, the images that --val_share held out are evaluated.
    """
    model, settings = load_classifier(args, device)
    if args.data_path == settings.args.get('data_path') and not args.val_share:
        args.val_share = settings.args.get('val_share', 0.0)  # what was held out, not all
    _, source = sources.open_sources(args, settings.sizes, labelled=True, only_val=True)
    index = find_logits(model, settings, source)
    autocast, _ = engine.mixed_precision(args.amp, device)
    loader = classes_loader(args, device, source, settings)
    values, recalls = evaluate(model, loader, autocast, source.classes, index=index)
    files.say(summary(values, recalls, len(source)))
    if args.report:
        shares = distributed.gather(list(predictions(args, device, model, settings, source)))
        numbers, probabilities = (np.array(part) for part in zip(*sum(shares, [])))
        if distributed.is_first():
            write_report(args.report, source, numbers, probabilities[:, index])
    distributed.stop()


@torch.no_grad()
def predictions(args, device, model, settings, source):
    """Yield (number in source, [probability of each class]) of the images that can be read."""
    autocast, _ = engine.mixed_precision(args.amp, device)
    loader = classes_loader(args, device, source, settings, numbered=True)
    for images, numbers in engine.evaluation_batches(loader):
        with autocast():
            probabilities = model(images).float().softmax(1)
        yield from zip(numbers.tolist(), probabilities.tolist())


def predict(args, device):
    """--predict: print the most probable classes of images; SystemExit(1) if one is unreadable.

    Where the images lie in folders of known classes, also the true class.
    """
    model, settings = load_classifier(args, device)
    if not settings.classes:
        raise InputError(f'{args.init_from}: it names no classes, so there is nothing to print')
    source, count = open_given(args, settings), 0
    for number, probabilities in predictions(args, device, model, settings, source):
        count += 1
        path, label = source.path(number), -1 if source.labels is None else source.labels[number]
        true = source.classes[label] if label >= 0 else None
        order = np.argsort(probabilities)[::-1]
        top = {settings.classes[index]: round(probabilities[index], 4) for index in order}
        if args.json:
            print(json.dumps({'image': path, 'classes': top, 'class': true}))
        else:
            names = [f'{name} {p:.1%}' for name, p in list(top.items())[: args.topk]]
            print('  '.join([path, *names, *([f'(is {true})'] if true else [])]))
    if sum(distributed.gather(count)) < len(source):
        raise SystemExit(1)


def open_given(args, settings):
    """The images of --predict: files and folders, or --split of the one folder."""
    if args.split:
        args.data_path, args.val_share = args.predict[0], settings.args.get('val_share', 0.0)
        return sources.open_sources(args, settings.sizes)[args.split == 'val']
    paths = files.image_paths(args.predict)
    options = sources.decode_options(args, settings.sizes)
    numbers = {name: number for number, name in enumerate(settings.classes)}
    labels = [numbers.get(os.path.basename(os.path.dirname(path)), -1) for path in paths]
    return sources.Images(
        options,
        '',
        [os.fsencode(path) for path in paths],
        files.read_file,
        classes=settings.classes,
        labels=np.array(labels),
    )


# --- Files of an evaluation -----------------------------------------------------------------------


def write_report(folder, source, numbers, probabilities):
    """Write classes.csv, confusion.csv, confusion.png and mistakes.csv into folder.

    numbers: (M,) of the images in source; probabilities: (M, K) of its classes. Raises InputError
    if nothing can be written there.
    """
    classes, labels, predicted = source.classes, source.labels[numbers], probabilities.argmax(1)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)  # true class, predicted class
    np.add.at(confusion, (labels, predicted), 1)
    right, seen, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    confidence, mistakes = probabilities.max(1), []
    for i in np.argsort(-confidence):
        if predicted[i] != labels[i]:
            names = source.path(numbers[i]), classes[labels[i]], classes[predicted[i]]
            mistakes.append((*names, f'{confidence[i]:.4f}'))
    tables = {
        'classes': [('class', 'images', 'recall', 'precision')],
        'confusion': [('true \\ predicted', *classes)],
        'mistakes': [('image', 'class', 'predicted', 'probability'), *mistakes],
    }
    recall, precision = right / np.maximum(seen, 1), right / np.maximum(found, 1)
    tables['classes'] += zip(classes, seen, recall, precision)
    tables['confusion'] += [(name, *row) for name, row in zip(classes, confusion)]
    with as_input_error(folder):
        os.makedirs(folder, exist_ok=True)
        for name, rows in tables.items():
            path = os.path.join(folder, f'{name}.csv')
            with open(path, 'w', newline='', errors='surrogateescape') as file:
                csv.writer(file).writerows(rows)
        confusion_figure(confusion, classes).savefig(os.path.join(folder, 'confusion.png'))
    files.say(f'Wrote {", ".join(tables)}.csv and confusion.png in {folder}')


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
