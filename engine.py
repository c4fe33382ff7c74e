"""A run, its epochs and its steps: batches, accumulation, mixed precision, what is logged and saved."""

import collections
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.utils import accuracy
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from util import checkpoint, data, distributed, optim, transforms
from util.args import INTERRUPTED, InputError
from util.log import Log


@dataclass
class Plan:
    """What flags, data and processes come to."""

    args: object
    source: object  # the training images
    rank: int
    world_size: int
    batch_size: int  # images on a device at a time
    accumulation: int  # micro-steps of an optimiser step
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    lr: float  # at its peak
    bad: data.BadImages  # those of the current epoch, in this process
    start: int = 0  # optimiser steps already done
    lock: object = None  # holds --output_dir
    state: dict | None = None  # the checkpoint to go on from
    skipped: list = field(default_factory=list)  # the latest steps in a row whose loss or gradient was not finite
    record: dict = field(default_factory=dict)  # numbers and strings that every checkpoint holds beside the states
    advised: bool = False  # whether it has been said that data is too slow

    def lr_at(self, step, lr_scale=1.0):
        return optim.learning_rate(step, self.total_steps, self.warmup_steps, self.lr * lr_scale, self.args.min_lr)

    def batch_keys(self):
        """The samples that this process sees, from the first step of this run to the last."""
        return data.BatchStream(
            len(self.source),
            self.args.total_batch_size,
            self.batch_size,
            self.args.seed,
            self.start,
            self.total_steps,
            self.rank,
            self.world_size,
        )

    def images_of(self, step):
        """Names of the images of one step, on all processes."""
        total, seed = self.args.total_batch_size, self.args.seed
        (keys,) = data.BatchStream(len(self.source), total, total, seed, step, step + 1)
        return [data.name_of(self.source, index) for _, index in keys]

    def __str__(self):
        return (
            f'{len(self.source)} images; total batch {self.args.total_batch_size} = {self.batch_size} x '
            f'{self.world_size} processes x {self.accumulation} accumulated; peak learning rate {self.lr:.3g}; '
            f'steps {self.start} to {self.total_steps}'
        )


def make_plan(args, source, model):
    """Derive the plan, create --output_dir, and find the checkpoint to go on from. Raises InputError."""
    rank, world_size = distributed.world()
    num_images = len(source)
    steps_per_epoch = num_images // args.total_batch_size
    if not steps_per_epoch:
        raise InputError(
            f'{args.data_path} has {num_images} images, too few for one step of --total_batch_size '
            f'{args.total_batch_size}; choose one of at most {num_images}'
        )
    batch_size, accumulation = data.split_batch(args.total_batch_size, args.batch_size, world_size)
    if args.warmup_epochs > args.epochs:
        raise InputError(f'--warmup_epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}')
    lr = args.blr * args.total_batch_size / 256 if args.lr is None else args.lr
    if args.min_lr > lr:
        raise InputError(f'--min_lr {args.min_lr:g} is more than the learning rate, {lr:g}')
    total_steps, warmup_steps = args.epochs * steps_per_epoch, int(args.warmup_epochs * steps_per_epoch)
    bad = data.BadImages(num_images, args.max_bad, args.output_dir)
    sizes = (batch_size, accumulation, steps_per_epoch, total_steps, warmup_steps)
    plan = Plan(args, source, rank, world_size, *sizes, lr, bad)
    plan.record['num_images'] = num_images
    checkpoint.make_output_dir(args.output_dir)
    if rank == 0:
        plan.lock = checkpoint.lock(args.output_dir)
    plan.state = checkpoint.find(args.resume, args.output_dir)
    if plan.state is not None:
        checkpoint.check_same_run(plan.state, args, model, num_images)
        plan.start = plan.state['step']
    if plan.start > plan.total_steps:
        raise InputError(f'the checkpoint is of step {plan.start}, after the last of this run, {plan.total_steps}')
    return plan


def train(plan, model, optimizer, scaler, loss_fn, loader, title, end_of_epoch, extra=None):
    """Train from plan.start to the end, saving and logging on the way.

    Args:
        model, optimizer, scaler: on the device; their states are restored from plan.state. The scaler is that of
            distributed.mixed_precision.
        loss_fn: (model, batch of loader) -> scalar, the mean over the batch.
        loader: data.Loader over plan.batch_keys().
        title: first line of the log.
        end_of_epoch: called with (epochs done, steps done, log) after each epoch, and once more where a run goes on
            from there; if it returns True, the checkpoint is the best so far and also kept as that.
        extra: () -> {name: number}, logged with the rest.
    """
    args = plan.args
    distributed.check_equal(plan.start, 'the step of the checkpoint to go on from; is --output_dir shared?')
    distributed.check_equal(len(plan.source), 'the number of images')
    if plan.state is not None:
        checkpoint.restore(plan.state, model, optimizer, scaler)
        plan.state = None
    network = distributed.wrap(model, loader.device, args.compile)
    log = Log(args.output_dir, plan.total_steps, plan.start, args, enabled=plan.rank == 0)
    log.say(f'{title}; {plan} on {loader.device.type}')
    saver = checkpoint.Saver(args, plan.steps_per_epoch, model, optimizer, scaler, plan.record, log.say, plan.rank == 0)

    def close_epoch(step):
        if end_of_epoch(step // plan.steps_per_epoch, step, log):
            saver.save(step, best=True)

    with distributed.StopRequest() as stop_request:

        def after_step(step):
            if stop_request.agreed():
                saver.save_now(step)
                log.say(
                    f'Stopped after step {step} of {plan.total_steps}, and saved; the same command goes on from there'
                )
                log.close()
                raise SystemExit(INTERRUPTED)
            saver(step)

        if plan.start and plan.start % plan.steps_per_epoch == 0:  # it may have been cut off in there
            close_epoch(plan.start)
        batches = iter(loader)
        for epoch in range(plan.start // plan.steps_per_epoch, args.epochs):
            steps = range(max(plan.start, epoch * plan.steps_per_epoch), (epoch + 1) * plan.steps_per_epoch)
            train_one_epoch(plan, network, batches, loss_fn, optimizer, scaler, steps, log, extra, after_step)
            if epoch + 1 < args.epochs:
                saver.end_of_epoch(steps.stop)
            else:
                saver.save_now(steps.stop)
            close_epoch(steps.stop)
    saver.wait()
    log.close()
    distributed.stop()


def train_one_epoch(plan, model, batches, loss_fn, optimizer, scaler, steps, log, extra=None, after_step=None):
    """Run the optimiser steps `steps`, a range counted from the start of training. Arguments as for train.

    A step whose loss or gradient is not finite leaves the weights as they are, on all processes, and is counted.

    Raises:
        FloatingPointError: if that happens MAX_SKIPPED times in a row.
        RunError: on rank 0, if more of this epoch's images are bad than --max_bad; other processes exit.
    """
    args = plan.args
    plan.bad.count = 0
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    waiting = data.Waiting(parameters[0].device)
    losses, norms, began = [], [], time.perf_counter()
    for step in steps:
        optim.set_learning_rate(optimizer, plan.lr_at, step)
        losses.append(0.0)
        for micro_step in range(plan.accumulation):
            with waiting:
                batch = next(batches)
            # Whatever the step draws (mixing, drop path) follows from its place in the total batch, not the process.
            chunk = micro_step * plan.world_size + plan.rank
            data.seed_generators(args.seed, step, chunk, device=batch[0].device)
            with distributed.no_sync(model, skip=micro_step < plan.accumulation - 1):
                loss = loss_fn(model, batch) / plan.accumulation
                finite = loss.detach() * 0 + 1  # 1, or nan: with it a gradient is not finite where the loss is not
                scaler.scale(loss * finite).backward()
            losses[-1] = losses[-1] + loss.detach()
        scaler.unscale_(optimizer)
        norms.append(get_total_norm([p.grad for p in parameters]))  # after summing: the same on all processes
        if args.clip_grad:
            clip_grads_with_norm_(parameters, args.clip_grad, norms[-1])
        scaler.step(optimizer)  # unless a gradient is not finite; LARS, unlike AdamW, waits for the device to know
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        log.advance()

        if (step + 1) % args.log_every == 0 or step + 1 == steps.stop:  # the only place that waits for the device
            num_steps = len(losses)
            sums = torch.stack([*losses, torch.full_like(losses[0], plan.bad.count)]).float()
            *losses, bad_images = distributed.sum_over_processes(sums).tolist()
            losses = [loss / plan.world_size for loss in losses]
            plan.bad.check(int(bad_images))
            norms = torch.stack(norms).tolist()
            seconds = time.perf_counter() - began
            good = [index for index, norm in enumerate(norms) if math.isfinite(norm)]
            values = {
                'loss': sum(losses[index] for index in good) / len(good) if good else math.nan,
                'lr': max(group['lr'] for group in optimizer.param_groups),
                'grad_norm': norms[-1],
                'images_per_s': num_steps * args.total_batch_size / seconds,
                'data_wait': waiting.seconds() / seconds,
            }
            if scaler.state_dict():
                values['loss_scale'] = scaler.get_scale()
            if len(good) < num_steps:
                values['skipped'] = num_steps - len(good)
            if bad_images:
                values['bad_images'] = int(bad_images)
            log.entry(step + 1, (step + 1) / plan.steps_per_epoch, values | (extra() if extra else {}))
            first = step + 1 - num_steps == plan.start  # includes the start of the workers
            if values['data_wait'] > 0.2 and not first and not plan.advised:
                log.say(data.advice(values['data_wait'], plan.source, args, batch[0].shape[-2:]))
                plan.advised = True
            note_skipped(
                plan, [step + 1 - num_steps + index for index in range(num_steps) if index not in good], scaler
            )
            losses, norms, began = [], [], time.perf_counter()
        if after_step:
            after_step(step + 1)


MAX_SKIPPED = 20  # updates in a row; fp16 may need 16 to bring its loss scale down from 65536 to 1


def note_skipped(plan, steps, scaler):
    """Keep plan.skipped, the latest steps in a row without an update; FloatingPointError if they are MAX_SKIPPED."""
    for step in steps:
        plan.skipped = plan.skipped + [step] if plan.skipped[-1:] == [step - 1] else [step]
    if len(plan.skipped) >= MAX_SKIPPED:
        first = plan.skipped[0]
        raise FloatingPointError(
            f'{len(plan.skipped)} updates in a row, steps {first + 1} to {plan.skipped[-1] + 1}, were skipped because '
            f'the loss or its gradient was not finite (loss scale {scaler.get_scale():g}); the weights are still those '
            f'of step {first}. Step {first + 1} began with {", ".join(plan.images_of(first)[:4])}. Try --force_resume '
            'with --amp bf16 or none, a lower --blr, or --clip_grad 1'
        )


@torch.no_grad()
def evaluate(model, loader, measure):
    """{name: mean over all images of all processes} of what measure(model, batch) gives as means over a batch.

    Each process has its own share of the images in loader, each image once, but for those that cannot be read: they
    are left out, and their number is 'val_bad_images' if there are any. Above --max_bad it is a RunError.
    """
    model.eval()
    distributed.share_buffers(model)
    totals, count = {}, 0
    for batch in loader:
        for name, value in measure(model, batch).items():
            totals[name] = totals.get(name, 0.0) + value.float() * len(batch[0])
        count += len(batch[0])
    sums = collections.Counter()
    for share in distributed.gather({'images': count} | {name: float(total) for name, total in totals.items()}):
        sums.update(share)  # a process that can read none of its images only counts 0
    num_images = sums.pop('images')
    bad_images = len(loader.batches.dataset) - num_images
    loader.bad.check(bad_images)
    means = {name: total / num_images for name, total in sums.items()}
    return means | ({'val_bad_images': bad_images} if bad_images else {})


# --- Classification: what fine-tuning and probing share -------------------------------------------------------


@dataclass
class Task:
    """A classifier, its data and its device, as prepare_classification leaves them."""

    args: object
    model: torch.nn.Module
    plan: Plan | None  # None where nothing is trained
    device: torch.device
    autocast: Callable
    scaler: torch.amp.GradScaler
    train_source: object
    val_loader: data.Loader
    classes: list
    origin: str  # what the weights were, in a line


def initial_weights(args, model, needed=False, whole=False):
    """Load --init_from, if given, into model, and return a line on what it was.

    needed: refuse to go without. whole: refuse a file that lacks any of the model, such as its head.

    Raises:
        InputError: as checkpoint.load_weights does, or if there is no --init_from where it is needed.
    """
    if args.init_from:
        return checkpoint.load_weights(model, args.init_from, whole)
    if needed:
        raise InputError('--eval needs the weights to evaluate: --init_from CHECKPOINT')
    return 'random weights'


def prepare_classification(args, model, origin, size, train_source, val_source, only_measure):
    """The plan, unless weights are only measured, the device, and the validation loader. Raises InputError."""
    device_name, statistics = distributed.choose_device(args.device), transforms.pixel_statistics(args)
    plan = None if only_measure else make_plan(args, train_source, model)
    device = distributed.start(device_name)
    model.to(device)
    samples = data.Samples(val_source, transforms.centre_transform(size, args.crop_pct, transforms.BICUBIC))
    keys = data.fixed_batches(len(samples), args.batch_size or 128, *distributed.world())
    bad = data.BadImages(len(samples), args.max_bad, None if only_measure else args.output_dir)
    val_loader = data.Loader(samples, keys, device, statistics, args.num_workers, bad, leave_out=True)
    autocast, scaler = distributed.mixed_precision(args.amp, device)
    return Task(args, model, plan, device, autocast, scaler, train_source, val_loader, val_source.classes, origin)


def train_classifier(task, optimizer, loss_fn, transform):
    """Train, evaluate after each epoch, keep the best checkpoint; the classes' names go into every checkpoint."""
    args, plan = task.args, task.plan
    samples = data.Samples(task.train_source, transform, seed=args.seed)
    statistics = transforms.pixel_statistics(args)
    loader = data.Loader(samples, plan.batch_keys(), task.device, statistics, args.num_workers, plan.bad)
    plan.record['classes'] = list(map(str, task.classes))
    plan.record['best_top1'] = plan.state['best_top1'] if plan.state else -1.0

    def end_of_epoch(epoch, step, log):
        metrics = evaluate_classifier(task)
        log.entry(step, epoch, metrics)
        best = metrics['val_top1'] > plan.record['best_top1']
        plan.record['best_top1'] = max(plan.record['best_top1'], metrics['val_top1'])
        return best

    train(plan, task.model, optimizer, task.scaler, loss_fn, loader, task.origin, end_of_epoch)
    if plan.rank == 0:
        print(
            f'Best top-1 {plan.record["best_top1"]:.2f} %. In {args.output_dir}: {checkpoint.LAST}, {checkpoint.BEST}, '
            f'log.jsonl, TensorBoard events'
        )


def evaluate_classifier(task):
    """{'val_loss', 'val_top1', 'val_top5'} over the validation images, the accuracies in percent."""

    def measure(model, batch):
        imgs, labels = batch
        with task.autocast():
            logits = model(imgs).float()
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        return {'val_loss': cross_entropy(logits, labels), 'val_top1': top1, 'val_top5': top5}

    return evaluate(task.model, task.val_loader, measure)


def report(task):
    """Evaluate and print one line."""
    metrics = evaluate_classifier(task)
    bad = metrics.get('val_bad_images', 0)
    if distributed.world()[0] == 0:
        print(
            f'{task.origin}\ntop-1 {metrics["val_top1"]:.2f} %  top-5 {metrics["val_top5"]:.2f} %  '
            f'loss {metrics["val_loss"]:.4f}  on {task.val_loader.bad.num_images - bad} images'
            + f' ({bad} cannot be read)'
            * (bad > 0)
        )
    distributed.stop()
