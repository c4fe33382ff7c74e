"""Probe a frozen encoder: train a linear classifier on its features, or classify by nearest neighbours (--knn).

    python main_linprobe.py --knn 20 --data_path IMAGES --init_from CHECKPOINT           # no training
    python main_linprobe.py --logistic --data_path IMAGES --init_from CHECKPOINT         # fitted to convergence
    python main_linprobe.py --features OUT.npz --data_path IMAGES --init_from CHECKPOINT
    python main_linprobe.py @recipes/vit_base_linprobe.txt --data_path IMAGENET --init_from CHECKPOINT

The features are those of the final LayerNorm, which MFF trained on the fused levels: the cls token for the probe, and
also the mean of the patch tokens for the others. Resuming, processes and recipes are as in main_pretrain.py.
"""

import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars

import engine
from models_mff import MODELS, create_encoder
from util import data, distributed, features, optim, sources, transforms, weights
from util.args import ArgumentParser, add_common_arguments, add_model_arguments, number, run_job
from util.errors import InputError, as_input_error


def get_parser():
    parser = ArgumentParser(__doc__, usage='%(prog)s [@RECIPE] [--FLAG VALUE ...]')
    add_common_arguments(parser)
    add_model_arguments(parser, MODELS)
    parser.set_defaults(blr=0.1, weight_decay=0.0, epochs=90)
    add = parser.add_argument_group('probing').add_argument
    add('--momentum', type=number(float, 0, 1), default=0.9, help='of LARS')
    add('--crop_pct', type=number(float, 0.01, 1), help='crop of a test image over its resized side (default: 0.875)')
    add('--eval', action='store_true', help='only evaluate the probe of --init_from')
    add('--knn', type=number(int, 1), metavar='K', help='only classify by the K nearest training images')
    add('--logistic', action='store_true', help='only fit a logistic regression on the features of the training images')
    add('--features', metavar='OUT.npz', help='only write the features of all images, with their names and labels')
    return parser


class LinearProbe(nn.Module):
    """A frozen encoder in eval mode; BatchNorm without parameters on its cls token; a Linear (MAE, appendix A.1)."""

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
        """imgs (N, C, H, W) -> logits (N, classes)."""
        with torch.no_grad():
            tokens = self.backbone(imgs)  # (N, D)
        return self.head(self.bn(tokens))


def main(args):
    # --- Model and data -------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    settings = weights.settle(args)  # sizes, mean, std: from flags, --init_from or --model
    with as_input_error():
        encoder = create_encoder(settings.sizes, 'token') if args.init_from else weights.random_encoder(settings.sizes)
    if args.features:
        return write_features(args, encoder, settings)
    train_source, val_source = sources.open_labelled_sources(args, settings.sizes, only_val=args.eval)
    model = LinearProbe(encoder, len(val_source.classes))
    if args.eval:
        origin = engine.initial_weights(args, model, settings, complete=True)
        return engine.report_classifier(args, model, val_source, settings, origin)
    origin = engine.initial_weights(args, encoder, settings)
    if args.knn or args.logistic:
        return report_features(args, encoder, settings, train_source, val_source, origin)
    samples = data.Samples(train_source, transforms.linprobe_transform(settings.sizes['img_size']), seed=args.seed)

    # --- Run: output folder, checkpoint to resume, processes, device ----------------------------------------------
    schedule = optim.make_schedule(args, len(train_source), usual_batch=16384)
    if schedule.batch_size < 2:
        raise InputError('BatchNorm needs at least two images on a device: a larger --total_batch_size or --batch_size')
    run = engine.start_run(args, schedule, model, settings, val_source.classes)
    model.to(run.device)
    loader = engine.training_loader(run, samples, settings)
    val_loader = engine.classes_loader(args, val_source, settings, run.device)
    optimizer = create_lars(model.head, schedule.lr, args.momentum, args.weight_decay)

    # --- Train ----------------------------------------------------------------------------------------------------
    def loss_fn(network, batch, place):
        imgs, labels = batch
        with run.autocast():
            logits = network(imgs)
        return F.cross_entropy(logits.float(), labels)

    engine.train_classifier(run, model, optimizer, loss_fn, loader, val_loader, f'Linear probe; {origin}')


def create_lars(head, lr, momentum, weight_decay=0.0):
    """LARS as in MAE: it adapts the learning rate of the weight, also without decay, but not that of the bias."""
    groups = [{'params': [head.weight], 'always_adapt': True}, {'params': [head.bias], 'weight_decay': 0.0}]
    return Lars(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)


# --- Without training ---------------------------------------------------------------------------------------------


def extract(args, encoder, settings, source, device):
    """features.extract of this process's share of a source."""
    autocast, _ = distributed.mixed_precision(args.amp, device)
    return features.extract(encoder, engine.classes_loader(args, source, settings, device), autocast)


def report_features(args, encoder, settings, train_source, val_source, origin):
    """--knn and --logistic: print the accuracy, by the cls token and by the mean of the patch tokens."""
    device = distributed.start(distributed.choose_device(args.device))
    encoder.to(device)
    train, val = (extract(args, encoder, settings, source, device) for source in (train_source, val_source))
    num_images = sum(distributed.gather(len(val[1])))  # without those that cannot be read
    results = {}
    if args.knn:
        results[f'{args.knn}-nearest-neighbour'] = features.neighbour_accuracy(train, val, args.knn, device)
    if args.logistic:
        results['logistic-regression'] = features.logistic_accuracy(train, val, device)
    if distributed.world()[0] == 0:
        for method, accuracy in results.items():
            for name, top1 in accuracy.items():
                print(f'{method} top-1 {top1:.2f} %  by the {name}, on {num_images} images; {origin}')
    distributed.stop()


class Numbered(sources.Part):
    """Images of a source, whose labels are their numbers in it."""

    def __getitem__(self, index):
        return self.source[index][0], index


def write_features(args, encoder, settings):
    """--features: an .npz of 'names', 'labels' (-1: none), 'classes', 'cls_token' and 'mean_of_patches' (images, D).

    Images that cannot be read are left out.
    """
    if distributed.world()[1] > 1:
        raise InputError(
            f'--features runs in one process, and the launcher says {distributed.world()[1]}; start it without'
        )
    if not args.features.endswith('.npz') or not os.path.isdir(os.path.dirname(args.features) or '.'):
        raise InputError(f'--features {args.features}: must end in .npz and lie in an existing folder')
    parts = [source for source in sources.open_sources(args, settings.sizes) if source is not None]
    if len(parts) == 2 and None not in (parts[0].classes, parts[1].classes):
        sources.check_same_classes(parts[0].classes, parts[1].classes, 'the training images', 'the validation images')
    origin = engine.initial_weights(args, encoder, settings)
    with as_input_error():
        open(args.features, 'ab').close()  # before the work, as it may not be writable
    device = distributed.start(distributed.choose_device(args.device))
    encoder.to(device)
    names, labels, arrays = [], [], []
    for source in parts:
        found, numbers = extract(args, encoder, settings, Numbered(source, np.arange(len(source))), device)
        names += [source.path(number) for number in numbers.tolist()]
        labels.append(np.full(len(numbers), -1) if source.labels is None else source.labels[numbers.numpy()])
        arrays.append(found)
    with as_input_error(args.features):
        np.savez(
            args.features,
            names=np.array(names),
            labels=np.concatenate(labels),
            classes=np.array(next((part.classes for part in parts if part.classes), [])),
            **{name.replace(' ', '_'): torch.cat([part[name] for part in arrays]).numpy() for name in arrays[0]},
        )
    bad = sum(map(len, parts)) - len(names)
    unreadable = f' ({bad} cannot be read)' if bad else ''
    print(f'Wrote the features of {len(names)} images{unreadable} to {args.features}; {origin}')


if __name__ == '__main__':
    run_job(main, get_parser())
