"""Features of a frozen encoder: how well they tell classes apart, without training; or as a file.

    python -m tools.features --knn 20 --logistic --data_path IMAGES --init_from CHECKPOINT
    python -m tools.features --out FEATURES.npz --data_path IMAGES --init_from CHECKPOINT

The features are those of the final LayerNorm, which MFF trained on the fused levels: the cls token,
and the mean of the patch tokens. Several processes share the work of --knn.
"""

import numpy as np
import torch
import torch.nn.functional as F

import engine
from models_mff import MODELS, create_encoder
from util import args as flags
from util import data, distributed, sources, transforms, weights
from util.errors import InputError, as_input_error

HELD_OUT = 0.2  # share of the training images by which the penalty of logistic regression is chosen
PENALTIES = [10.0 ** (-power / 2) for power in range(13)]  # 1 to 1e-6


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_input_arguments(parser)
    flags.add_model_arguments(parser, MODELS)
    add = parser.add_argument_group('features').add_argument
    add('--knn', type=flags.number(int, 1), metavar='K', help='classify by the K nearest images')
    add('--logistic', action='store_true', help='fit a logistic regression')
    add('--out', metavar='OUT.npz', help='write features, names, labels and splits')
    add('--seed', type=flags.number(int, 0), default=0, help='of random weights')
    add('--crop_pct', type=flags.number(float, 0.01, 1), help='of an image (default: 0.875)')
    return parser


def main(args):
    if not (args.knn or args.logistic or args.out):
        raise InputError('nothing to do: give --knn K, --logistic or --out OUT.npz')
    if distributed.world()[1] > 1 and (args.logistic or args.out):
        raise InputError('--logistic and --out run in one process')
    device = distributed.start(args.device)
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings = weights.settings_of(args, file)
    with as_input_error():
        encoder = create_encoder(settings.sizes, 'token')
        encoder = encoder if file else weights.random_encoder(settings.sizes)
    lines = [weights.load(encoder, file) if file else 'random weights', *settings.notes]
    labelled = bool(args.knn or args.logistic)
    train, val = sources.open_sources(args, settings.sizes, labelled)
    if args.out:
        with as_input_error():
            open(args.out, 'ab').close()  # before the work, as it may not be writable

    autocast, _ = engine.mixed_precision(args.amp, device)
    encoder.to(device)
    found = {}  # split: features, numbers of the images
    for split, source in (('train', train), ('val', val)):
        if source is not None:
            crop_pct = args.crop_pct or settings.crop_pct
            size, bicubic = settings.sizes['img_size'], transforms.BICUBIC
            transform = transforms.centre_transform(size, crop_pct, bicubic)
            samples = data.Samples(source, transform, numbered=True)
            loader = engine.evaluation_loader(args, device, samples, settings)
            batches = engine.evaluation_batches(loader)
            found[split] = source, *engine.extract(encoder, batches, autocast)
    if labelled:
        pairs = [
            (features, torch.from_numpy(source.labels)[numbers])
            for source, features, numbers in found.values()
        ]
        results = {}
        if args.knn:
            results[f'{args.knn}-NN'] = engine.neighbour_accuracy(*pairs, args.knn, device)
        if args.logistic:
            results['logistic regression'] = logistic_accuracy(*pairs, device)
        count = sum(distributed.gather(len(pairs[1][1])))
        lines += [
            f'{method} top-1 {top1:.2f} %  by the {feature}, on {count} images'
            for method, accuracy in results.items()
            for feature, top1 in accuracy.items()
        ]
    if args.out:
        write(args.out, found)
        lines.append(f'Wrote the features of {sum(len(part[2]) for part in found.values())} images')
    if distributed.is_first():
        print('\n'.join(lines))
    distributed.stop()


def write(path, found):
    """An .npz of 'names', 'labels' (-1: none), 'classes', 'split', 'cls_token', 'mean_of_patches'.

    found: {split: (source, {feature: (M, D)}, numbers of the images (M,))}.
    """
    arrays = {'names': [], 'labels': [], 'split': [], 'cls_token': [], 'mean_of_patches': []}
    for split, (source, features, numbers) in found.items():
        labels = np.full(len(source), -1) if source.labels is None else source.labels
        arrays['names'].append([source.path(number) for number in numbers.tolist()])
        arrays['labels'].append(labels[numbers.numpy()])
        arrays['split'].append([split] * len(numbers))
        for name, values in features.items():
            arrays[name.replace(' ', '_')].append(values.numpy())
    classes = next((part[0].classes for part in found.values() if part[0].classes), [])
    with as_input_error(path), open(path, 'wb') as file:
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        np.savez(file, classes=np.array(classes), **joined)


# --- Logistic regression --------------------------------------------------------------------------


def logistic_accuracy(train, val, device='cpu'):
    """{feature: top-1 in percent} of val by logistic regression on train, both from extract.

    The penalty is chosen on a fixed held-out part of the training images: from the largest of
    PENALTIES down, until the loss rises. The model is then fitted to all training images.
    """
    (train, labels), (val, val_labels) = train, val
    labels, val_labels = labels.to(device), val_labels.to(device)
    held_out = torch.from_numpy(np.random.default_rng(0).random(len(labels)) < HELD_OUT).to(device)
    accuracy = {}
    for name in train:
        x, val_x = train[name].to(device), val[name].to(device)
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        x, val_x = (x - mean) / std, (val_x - mean) / std
        model = torch.nn.Linear(x.shape[1], 1 + int(labels.max()), device=device)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        lowest = float('inf')
        for penalty in PENALTIES:
            fit_logistic(model, x, labels, penalty, ~held_out)
            with torch.no_grad():
                loss = F.cross_entropy(model(x[held_out]), labels[held_out]).item()
            if loss > lowest:
                break
            lowest, chosen = loss, penalty
        fit_logistic(model, x, labels, chosen)
        with torch.no_grad():
            right = model(val_x).argmax(1) == val_labels
        accuracy[name] = 100 * right.double().mean().item()
    return accuracy


def fit_logistic(model, x, labels, penalty, used=None, max_iter=500):
    """Fit a Linear to x (M, D) and labels (M,) by L-BFGS, starting from what it is.

    Minimises the mean cross entropy over the images that are used + penalty / 2 * |weight|^2.
    """
    used = torch.ones_like(labels, dtype=torch.bool) if used is None else used
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=max_iter, tolerance_grad=1e-5, line_search_fn='strong_wolfe'
    )

    def closure():
        optimizer.zero_grad()
        total = penalty / 2 * model.weight.square().sum()
        total.backward()
        for rows, classes, chosen in zip(x.split(2**16), labels.split(2**16), used.split(2**16)):
            losses = F.cross_entropy(model(rows), classes, reduction='none')
            loss = (losses * chosen).sum() / used.sum()
            loss.backward()
            total = total + loss
        return total.detach()

    optimizer.step(closure)


if __name__ == '__main__':
    flags.run_job(main, get_parser())
