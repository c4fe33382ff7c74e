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
import engine_classify
from models_mff import MODELS, create_encoder, random_encoder
from util import args as flags
from util import distributed, sources, weights
from util.errors import InputError, as_input_error
from util.files import say


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
    parser.set_defaults(resize_mode=None)  # that of the checkpoint
    return parser


def main(args):
    if not (args.knn or args.logistic or args.out):
        raise InputError('nothing to do: give --knn K, --logistic or --out OUT.npz')
    if distributed.world()[1] > 1 and (args.logistic or args.out):
        raise InputError('--logistic and --out run in one process')

    # --- Encoder, images --------------------------------------------------------------------------
    device = distributed.start(args.device)
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings = weights.settings_of(args, file)
    with as_input_error():
        sizes = settings.sizes
        encoder = create_encoder(sizes, 'token') if file else random_encoder(sizes)
    say('\n'.join([weights.load(encoder, file) if file else 'random weights', *settings.notes]))
    encoder.to(device)
    train, val = sources.open_sources(args, sizes, labelled=bool(args.knn or args.logistic))
    if val and train.classes and val.classes:
        sources.use_classes(val, train.classes)
    if args.out:
        with as_input_error():
            open(args.out, 'ab').close()  # before the work, as it may not be writable

    # --- Features ---------------------------------------------------------------------------------
    autocast, _ = engine.mixed_precision(args.amp, device)
    parts, columns = [], {'names': [], 'split': [], 'labels': []}  # parts: (features, labels)
    for split, source in (('train', train), ('val', val)):
        if source:
            loader = engine_classify.classes_loader(args, device, source, settings, numbered=True)
            batches = engine.evaluation_batches(loader)
            features, numbers = engine.extract(encoder, batches, autocast)
            labels = torch.full((len(source),), -1) if source.labels is None else source.labels
            parts.append((features, torch.as_tensor(labels)[numbers]))
            columns['names'] += [source.path(number) for number in numbers.tolist()]
            columns['split'] += [split] * len(numbers)
            columns['labels'] += parts[-1][1].tolist()

    # --- What they are good for -------------------------------------------------------------------
    accuracies, count = {}, sum(distributed.gather(len(numbers)))
    if args.knn:
        accuracies[f'{args.knn}-NN'] = engine.neighbour_accuracy(*parts, args.knn, device)
    if args.logistic:
        accuracies['logistic regression'] = logistic_accuracy(*parts, device)
    for method, accuracy in accuracies.items():
        for feature, top1 in accuracy.items():
            say(f'{method} top-1 {top1:.2f} %  by the {feature}, on {count} images')
    if args.out:
        for name in features:
            columns[name.replace(' ', '_')] = torch.cat([part[name] for part, _ in parts])
        with as_input_error(), open(args.out, 'wb') as file:
            np.savez(file, classes=train.classes or [], **columns)
        say(f'{args.out}: features of {len(columns["names"])} images')
    distributed.stop()


# --- Logistic regression --------------------------------------------------------------------------

PENALTIES = [10.0 ** (-power / 2) for power in range(13)]  # 1 to 1e-6


def logistic_accuracy(train, val, device='cpu'):
    """{feature: top-1 in percent} of val by logistic regression on train, both from extract.

    The penalty is chosen on a fixed fifth of the training images: from the largest of PENALTIES
    down, until the loss rises. The model is then fitted to all training images.
    """
    (train, labels), (val, val_labels) = train, val
    held_out = np.random.default_rng(0).random(len(labels)) < 0.2
    order, used = np.argsort(held_out, kind='stable'), (~held_out).sum()
    labels = labels[order].to(device)
    accuracy = {}
    for name in train:
        x = train[name][order].to(device)
        std, mean = torch.std_mean(x, 0)
        std.clamp_(min=1e-6)
        x.sub_(mean).div_(std)
        model = torch.nn.Linear(x.shape[1], 1 + int(labels.max()), device=device)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        lowest = float('inf')
        for penalty in PENALTIES:
            fit_logistic(model, x[:used], labels[:used], penalty)
            loss = F.cross_entropy(model(x[used:]), labels[used:]).item()
            if loss > lowest:
                break
            lowest, chosen = loss, penalty
        fit_logistic(model, x, labels, chosen)
        predicted = model((val[name].to(device) - mean) / std).argmax(1).cpu()
        accuracy[name] = 100 * (predicted == val_labels).double().mean().item()
    return accuracy


def fit_logistic(model, x, labels, penalty):
    """Fit a Linear to x (M, D) and labels (M,) by L-BFGS, starting from what it is.

    Minimises the mean cross entropy + penalty / 2 * |weight|^2.
    """
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-5, line_search_fn='strong_wolfe'
    )

    def closure():
        optimizer.zero_grad()
        loss = penalty / 2 * model.weight.square().sum()
        loss.backward()
        for rows, classes in zip(x.split(2**16), labels.split(2**16)):
            part = F.cross_entropy(model(rows), classes, reduction='sum') / len(x)
            part.backward()
            loss = loss + part
        return loss.detach()

    optimizer.step(closure)


if __name__ == '__main__':
    flags.run_job(main, get_parser())
