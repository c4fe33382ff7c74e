"""A run, one epoch of training, and evaluation."""

import collections
import contextlib
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from util import checkpoint, data, distributed, optim, sources, transforms
from util.errors import InputError, Interrupted
from util.log import Log

MOST_COSINES = 2**25  # at a time: 128 MB


class Run:
    """A training run: model and optimiser with their checkpoint restored, its log, and its step.

    Args:
        settings: weights.Settings; every checkpoint records them.
        classes: their names, of a classifier or segmenter.
        compare_batch: refuse to resume with another number of images on a device at a time, for
            BatchNorm, Mixup and drop path, which depend on it.

    Raises:
        InputError: if --output_dir cannot be used or holds another run, or if the processes differ
            in flags, precision, devices or data.
    """

    def __init__(
        self, args, schedule, settings, model, optimizer, device, classes=None, compare_batch=False
    ):
        self.args, self.schedule, self.settings, self.device = args, schedule, settings, device
        self.model, self.optimizer = model, optimizer
        self.autocast, self.scaler = mixed_precision(args.amp, device)
        self.fp16_scaler = self.scaler if self.scaler.get_scale() != 1.0 else None
        record = {
            'sizes': {name: checkpoint.plain(value) for name, value in settings.sizes.items()},
            'mean': list(settings.mean),
            'std': list(settings.std),
            'classes': classes,
            'num_images': schedule.num_images,
            'total_batch_size': schedule.total_batch_size,
            'batch_size': schedule.batch_size if compare_batch else None,
        }
        same = {'precision': str(self.autocast.keywords), 'device': device.type, **vars(args)}
        distributed.check_equal(same | {'data': record})
        self.saver = checkpoint.Saver(
            args, model, optimizer, self.fp16_scaler, record, schedule.total_steps
        )
        self.step = self.saver.resume()
        distributed.check_equal({'the step to resume (is --output_dir shared?)': self.step})
        self.network = distributed.wrap(model, device, args.compile)
        self.log = Log(self)

    def loader(self, samples):
        """The batches that are left, of this process."""
        keys = data.BatchStream(self.schedule, self.args.seed, self.step)
        return data.Loader(samples, keys, self.device, self.settings, self.args.num_workers)

    def epochs(self):
        """The epochs that are left, from 1.

        One that ended just before the run was stopped, or the last, is evaluated again.
        """
        schedule = self.schedule
        first = max(0, self.step - 1) // schedule.steps_per_epoch
        last = -(-schedule.total_steps // schedule.steps_per_epoch)
        self.describe()
        with distributed.StopRequest() as self.stop, contextlib.closing(self.log):
            yield from range(first + 1, last + 1)

    def is_due(self, epoch, every):
        """Whether something is due after this epoch that happens every so many, and at the end."""
        return bool(every) and (epoch % every == 0 or self.step == self.schedule.total_steps)

    def describe(self):
        """Print what is trained, on what, for how long."""
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        schedule, (_, world_size) = self.schedule, distributed.world()
        self.log.say(
            f'{parameters:.2f} M parameters on {self.device.type}, {schedule.num_images} images\n'
            f'total batch {schedule.total_batch_size} = {schedule.batch_size} x {world_size} '
            f'processes x {schedule.accumulation} accumulated, {schedule.steps_per_epoch} steps '
            f'per epoch, learning rate {schedule.lr:.3g}, steps {self.step} to '
            f'{schedule.total_steps}; logs and checkpoints in {self.args.output_dir}'
        )

    def save_and_exit(self):
        """What was asked to stop ends here: it raises Interrupted once the file is there."""
        self.saver.save(self.step, checkpoint.LAST, required=True)
        distributed.barrier()  # the launcher would end all with the first that exits
        how = '' if self.args.resume == 'auto' else ' with --resume auto'
        self.log.say(f'Stopped after step {self.step}, and saved; the same command{how} resumes it')
        raise Interrupted(f'at step {self.step}')


def mixed_precision(amp, device):
    """(() -> autocast context, GradScaler) of --amp. Without fp16 the scale is 1."""
    if amp == 'auto':
        amp = 'none'
        if device.type == 'cuda':
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            amp = 'bf16' if bf16 else 'fp16'
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(amp)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, init_scale=2**16 if amp == 'fp16' else 1.0)


# --- Training -------------------------------------------------------------------------------------


def train_epoch(run, loss_fn, loader, epoch):
    """The steps of an epoch (from 1) that are left, saving and logging on the way.

    Args:
        loss_fn: (network, images, targets) -> scalar, the mean over the batch.

    Raises:
        FloatingPointError, RunError: as Log.step and checkpoint.Saver.save do.
        Interrupted: when asked to stop; it has saved.
    """
    schedule = run.schedule
    run.model.train()
    run.log.begin()
    loader.num_bad = 0
    for step in range(run.step, min(epoch * schedule.steps_per_epoch, schedule.total_steps)):
        optim.set_learning_rate(run.optimizer, schedule, step)
        loss, norm = optimizer_step(run, loss_fn, loader)
        run.step = step + 1
        run.log.step(loss, norm, loader)
        if run.stop():
            run.save_and_exit()
        run.saver.save_if_due(run.step)


def optimizer_step(run, loss_fn, loader):
    """One step over the total batch, from accumulation micro-batches.

    A step whose loss or gradient is not finite leaves the weights as they are, on all processes.

    Returns:
        Loss and norm of the gradient, on the device: nothing here waits for it.
    """
    args, schedule, scaler, optimizer = run.args, run.schedule, run.scaler, run.optimizer
    rank, world_size = distributed.world()
    total = 0.0
    for micro_step in range(schedule.accumulation):
        images, targets = next(loader)
        first = (micro_step * world_size + rank) * schedule.batch_size  # place in the total batch
        data.seed_generators(args.seed, run.step, first, device=run.device)
        with distributed.no_sync(run.network, skip=micro_step < schedule.accumulation - 1):
            loss = loss_fn(run.network, images, targets) / schedule.accumulation
            finite = loss.detach() * 0 + 1  # 1 or nan: no gradient is finite where the loss is not
            scaler.scale(loss * finite).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    norm = get_total_norm([p.grad for p in parameters])  # the same on all processes
    if args.clip_grad:
        clip_grads_with_norm_(parameters, args.clip_grad, norm)
    scaler.step(optimizer)  # skips what is not finite; only LARS waits for the device to know
    scaler.update(None if run.fp16_scaler else 1.0)
    optimizer.zero_grad(set_to_none=True)
    return total, norm


# --- Evaluation -----------------------------------------------------------------------------------


def evaluation_loader(args, device, samples, settings, batch_size=None):
    """This process's share of samples, each once, drawn as in epoch 0; no unreadable images."""
    keys = data.fixed_batches(len(samples), batch_size or args.batch_size or 128)
    return data.Loader(samples, keys, device, settings, args.num_workers, leave_out=True)


def evaluation_batches(loader, run=None):
    """Yield (images, targets) of an evaluation. If the run is asked to stop, it ends at once.

    Raises:
        RunError: at the end, if too many images could not be read.
        Interrupted: as train_epoch does; the same command does this evaluation again.
    """
    loader.num_bad = 0
    hidden = None if distributed.is_first() else True  # None: where there is no terminal
    for images, targets in tqdm(loader, 'evaluation', leave=False, disable=hidden):
        if len(images):
            yield images, targets
        if run and run.stop():
            run.save_and_exit()
    bad = sum(distributed.gather(loader.num_bad))
    loader.check_bad(bad)
    if bad and distributed.is_first():
        left_out = f'{bad} of {len(loader.samples)} images cannot be read, and are left out'
        print(left_out, file=sys.stderr, flush=True)


@torch.no_grad()
def evaluate(model, loader, measure, run=None):
    """Means over all images of all processes: {name: float, or list of them}.

    Args:
        loader: from evaluation_loader.
        measure: (model, images, targets) -> {name: mean over the batch, on the device}.
    """
    model.eval()
    distributed.share_buffers(model)
    sums = collections.Counter()
    for images, targets in evaluation_batches(loader, run):
        for name, value in measure(model, images, targets).items():
            sums[name] += value.float() * len(images)
        sums['images'] += torch.tensor(float(len(images)))
    total = collections.Counter()
    for share in distributed.gather({name: value.cpu().double() for name, value in sums.items()}):
        total.update(share)
    num_images = total.pop('images')
    return {name: (value / num_images).tolist() for name, value in total.items()}


def examples(samples, settings, device, count=8):
    """(images (N, C, H, W) normalised, targets) spread over a data set, always the same."""
    count = min(count, len(samples))
    keys = [(0, i * (len(samples) - 1) // max(1, count - 1)) for i in range(count)]
    images, targets, _ = data.collate([samples[key] for key in keys])
    return transforms.normalise(images.to(device), settings.mean, settings.std), targets.to(device)


# --- Features, and their nearest neighbours -------------------------------------------------------


class Neighbours:
    """20-NN accuracy while training, on parts of the images that are always the same.

    Raises:
        InputError: if training or validation images have no labels, or others.
    """

    def __init__(self, args, device, train, val, transform, settings):
        if val is None or train.labels is None or train.classes != val.classes:
            raise InputError('--knn_every needs training and validation images of the same classes')
        self.loaders = []
        for source, count in ((train, 2000), (val, 1000)):
            part = sources.Part(source, spread(source.labels, count))
            samples = data.Samples(part, transform)
            self.loaders.append(evaluation_loader(args, device, samples, settings))

    def accuracy(self, run):
        """{'val_knn_cls', 'val_knn_patches'}, in percent."""
        train, val = (
            extract(run.model, evaluation_batches(loader, run), run.autocast)
            for loader in self.loaders
        )
        accuracy = neighbour_accuracy(train, val, 20, run.device)
        return {
            'val_knn_cls': accuracy['cls token'],
            'val_knn_patches': accuracy['mean of patches'],
        }


@torch.no_grad()
def extract(model, batches, autocast):
    """Features of this process's share of the images: nothing masked, after the final norm.

    Args:
        model: with forward_features, (N, C, H, W) -> (N, 1+L, D).
        batches: (images, labels), as evaluation_batches gives them.

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
    size = 1 + MOST_COSINES // (1 + len(queries))  # of a chunk
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
