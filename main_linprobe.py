"""Probe a frozen encoder: train a linear classifier on its features, or classify by nearest neighbours (--knn).

    python main_linprobe.py @recipes/vit_base_linprobe.txt --data_path IMAGENET --init_from CHECKPOINT
    python main_linprobe.py --knn 20 --data_path IMAGENET --init_from CHECKPOINT

The features are those of the final LayerNorm, which MFF trained on the fused levels: the cls token for the probe, and
also the mean of the patch tokens for the neighbours. Resuming, processes and recipes are as in main_pretrain.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import Lars
from tqdm import tqdm

import engine
from models_mff import MODELS, create_encoder, create_untrained_encoder
from util import checkpoint, data, distributed, transforms
from util.args import ArgumentParser, InputError, add_common_arguments, as_input_error, number, run


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.set_defaults(blr=0.1, weight_decay=0.0, warmup_epochs=10, epochs=90, total_batch_size=16384)
    add = parser.add_argument_group('probing').add_argument
    names = ', '.join(name.removeprefix('mff_') for name in MODELS)
    add('--model', default='vit_base_patch16', help=f'{names} (default: %(default)s)')
    add('--momentum', type=number(float, 0, 1), default=0.9, help='of LARS (default: %(default)s)')
    share = number(float, 0.01, 1)
    add(
        '--crop_pct', type=share, default=0.875, help="share of a test image's side that is seen (default: %(default)s)"
    )
    add('--eval', action='store_true', help='only evaluate the probe of --init_from')
    add('--knn', type=number(int, 1), metavar='K', help='only classify by the K nearest training images')
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
            features = self.backbone(imgs)  # (N, D)
        return self.head(self.bn(features))


def main(args):
    torch.manual_seed(args.seed)
    with as_input_error():
        if args.init_from:
            encoder = create_encoder(args.model, args.input_size, args.in_chans, 'token')
        else:
            encoder = create_untrained_encoder(args.model, args.input_size, args.in_chans)
    size = encoder.patch_embed.img_size
    train_source, val_source = data.open_labelled_sources(args, size)
    model = LinearProbe(encoder, len(val_source.classes))
    origin = engine.initial_weights(args, encoder, needed=args.eval)
    if args.eval:
        load_head(model, args.init_from)
        origin = '; '.join(note for note in origin.split('; ') if not note.startswith('left out: '))
    only_measure = args.eval or args.knn is not None
    task = engine.prepare_classification(args, model, origin, size, train_source, val_source, only_measure)
    if args.eval:
        return engine.report(task)
    if args.knn:
        return report_neighbours(task, size)

    optimizer = create_lars(model.head, task.plan.lr, args.momentum, args.weight_decay)

    def loss_fn(model, batch):
        imgs, labels = batch
        with task.autocast():
            logits = model(imgs)
        return F.cross_entropy(logits.float(), labels)

    engine.train_classifier(task, optimizer, loss_fn, transforms.linprobe_transform(size))


def create_lars(head, lr, momentum, weight_decay=0.0):
    """LARS that adapts the rate of the weight, though it does not decay, but not that of the bias, as MAE's does."""
    groups = [{'params': [head.weight], 'always_adapt': True}, {'params': [head.bias]}]
    return Lars(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)


def load_head(model, path):
    """BatchNorm statistics and Linear of a probe's checkpoint, this project's or mmpretrain's. Raises InputError."""
    state, origin = checkpoint.read_weights(path)
    state = {name: tensor for name, tensor in state.items() if name.startswith(('bn.', 'head.'))}
    problem = [
        name
        for name, tensor in model.state_dict().items()
        if not name.startswith('backbone.') and (name not in state or state[name].shape != tensor.shape)
    ]
    if problem:
        raise InputError(f'{path}: {origin}, without a probe of {model.head.out_features} classes ({problem[0]})')
    model.load_state_dict(state, strict=False)


def report_neighbours(task, size):
    """Print the accuracy of --knn, by the cls token and by the mean of the patch tokens; the images are read once."""
    if distributed.world()[1] > 1:
        raise InputError('--knn runs in one process; start it without torchrun')
    args, device = task.args, task.device
    samples = data.Samples(task.train_source, transforms.centre_transform(size, args.crop_pct, transforms.BICUBIC))
    keys = data.fixed_batches(len(samples), args.batch_size or 128)
    statistics, bad = transforms.pixel_statistics(args), data.BadImages(len(samples), args.max_bad)
    bank_loader = data.Loader(samples, keys, device, statistics, args.num_workers, bad, leave_out=True)
    bank, bank_labels = extract_features(task, bank_loader, 'training images')
    queries, labels = extract_features(task, task.val_loader, 'validation images')
    for name in bank:
        predicted = nearest_neighbours(bank[name], bank_labels, queries[name], args.knn, len(task.classes))
        top1 = 100 * (predicted == labels).float().mean().item()
        print(f'{args.knn}-nearest-neighbour top-1 {top1:.2f} %  by the {name}, on {len(labels)} images; {task.origin}')


@torch.no_grad()
def extract_features(task, loader, title):
    """({'cls token': (M, D), 'mean of patches': (M, D)}, labels (M,)) of all images of loader, after the final norm."""
    encoder = task.model.backbone.eval()
    features, labels = {'cls token': [], 'mean of patches': []}, []
    for imgs, target in tqdm(loader, title, len(loader.batches), disable=None):
        with task.autocast():
            tokens = encoder.forward_features(imgs).float()  # (N, 1+L, D)
        features['cls token'].append(tokens[:, 0])
        features['mean of patches'].append(tokens[:, 1:].mean(1))
        labels.append(target)
    loader.bad.check(loader.bad.count)
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels)


def nearest_neighbours(bank, bank_labels, queries, k, num_classes, temperature=0.07):
    """Classes (Q,) of queries (Q, D) by the k of bank (M, D) with the largest cosine.

    Each votes exp(cosine / temperature) for its label: Wu et al. (2018), arXiv 1805.01978.
    """
    bank, predicted = F.normalize(bank, dim=1), []
    for chunk in F.normalize(queries, dim=1).split(512):
        cosine, index = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # (q, k)
        votes = cosine.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[index], (cosine / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


if __name__ == '__main__':
    run(main, get_parser())
