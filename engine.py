"""The training loop, and evaluation.

Every job prepares the same five things (a run, a model, an optimiser, a loss, a loader) and calls train. Training is
counted in optimiser steps; the end of an epoch is an event in the loop.
"""

import collections
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.utils import accuracy
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from util import checkpoint, data, distributed, optim, sources, transforms, weights
from util.errors import INTERRUPTED, InputError, as_input_error
from util.log import Log, Meter
from util.optim import Schedule


@dataclass
class Run:
    """One training run: where it happens and how far it is."""

    args: object
    schedule: Schedule
    device: torch.device
    rank: int
    world_size: int
    autocast: Callable  # () -> context
    scaler: torch.amp.GradScaler
    start: int  # optimiser steps already done
    state: dict | None  # the checkpoint to resume, until train has restored it
    lock: object  # holds --output_dir
    record: dict  # numbers and strings that every checkpoint holds beside the states


@dataclass(frozen=True)
class Events:
    """What a job does beside its steps. Each may be None."""

    evaluate: Callable | None = None  # () -> {name: number}, on all processes, every --eval_every epochs
    best: str | None = None  # of these numbers the one whose largest value makes checkpoint-best.pth
    draw: Callable | None = None  # () -> {name: figure}, on rank 0, every --picture_every epochs
    numbers: Callable | None = None  # () -> {name: number}, at every log line
    neighbours: Callable | None = None  # as evaluate, before the first step and every --knn_every epochs


# --- Before training ----------------------------------------------------------------------------------------------


def initial_weights(args, model, settings, complete=False):
    """Load --init_from into model, if it is given, and return a line on what it was, and which flags differ from it.

    complete: require --init_from, and a file with every part of the model, such as its head.

    Raises:
        InputError: as weights.load_weights does.
    """
    if args.init_from:
        return '; '.join([weights.load_weights(model, args.init_from, complete), *settings.notes])
    if complete:
        raise InputError('--eval needs the weights to evaluate: --init_from CHECKPOINT')
    return 'random weights'


def start_run(args, schedule, model, settings, classes=None):
    """Claim --output_dir, find the checkpoint to resume, and join the other processes.

    Args:
        settings: as weights.settle gives them; every checkpoint holds its sizes, mean and std.
        classes: names of the classes, of a classifier or segmenter; also in every checkpoint.

    Raises:
        InputError: if --output_dir cannot be used, or its checkpoint is of another run.
    """
    device_name, (rank, world_size) = distributed.choose_device(args.device), distributed.world()
    record = {
        'sizes': {name: checkpoint.plain(value) for name, value in settings.sizes.items()},
        'mean': list(settings.mean),
        'std': list(settings.std),
        'num_images': schedule.num_images,
        'batch_size': schedule.batch_size,
    }
    if classes:
        record['classes'] = classes
    checkpoint.make_output_dir(args.output_dir)
    lock = checkpoint.lock(args.output_dir) if rank == 0 else None
    state, start = checkpoint.find(args.resume, args.output_dir), 0
    if state is not None:
        checkpoint.check_same_run(state, args, model, record)
        start = state['step']
        home = args.output_dir if args.resume == 'auto' else os.path.dirname(os.path.abspath(args.resume))
        if os.path.samefile(home, args.output_dir) and os.path.exists(os.path.join(home, checkpoint.BEST)):
            record |= {name: value for name, value in state.items() if name.startswith('best_')}
        if start > schedule.total_steps:
            raise InputError(f'the checkpoint is at step {start}, but this run ends at step {schedule.total_steps}')
    device = distributed.start(device_name)
    distributed.check_equal(start, 'the step of the checkpoint to resume (is --output_dir shared?)')
    distributed.check_equal(schedule.num_images, 'the number of images')
    autocast, scaler = distributed.mixed_precision(args.amp, device)
    return Run(
        args=args,
        schedule=schedule,
        device=device,
        rank=rank,
        world_size=world_size,
        autocast=autocast,
        scaler=scaler,
        start=start,
        state=state,
        lock=lock,
        record=record,
    )


def training_loader(run, samples, settings):
    """The batches of this process, from the first step of this run to the last."""
    args, schedule = run.args, run.schedule
    keys = data.BatchStream(
        num_samples=schedule.num_images,
        total_batch=schedule.total_batch_size,
        batch_size=schedule.batch_size,
        seed=args.seed,
        start=run.start,
        stop=schedule.total_steps,
        rank=run.rank,
        world_size=run.world_size,
    )
    bad = data.BadImages(schedule.num_images, args.max_bad, args.output_dir)
    return data.Loader(samples, keys, run.device, (settings.mean, settings.std), args.num_workers, bad)


def describe(run, model, job):
    """The first lines of a run: what is trained, on what, for how long, and what it needs on disk."""
    schedule, sizes, output_dir = run.schedule, run.record['sizes'], run.args.output_dir
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = sizes['img_size']
    files = 3 if 'classes' in run.record else 2  # the last, the one before, the best
    if run.args.keep_every:
        files += schedule.total_steps // schedule.steps_per_epoch // run.args.keep_every
    lines = [
        job,
        f'model: ViT, {sizes["depth"]} blocks x {sizes["embed_dim"]}, patch {sizes["patch_size"]}, images '
        f'{height} x {width}, {parameters / 1e6:.2f} M parameters, on {run.device.type}',
        f'data: {schedule.num_images} images, {schedule.steps_per_epoch} steps per epoch; total batch '
        f'{schedule.total_batch_size} = {schedule.batch_size} x {run.world_size} processes x {schedule.accumulation} '
        'accumulated',
        f'training: steps {run.start} to {schedule.total_steps}, peak learning rate {schedule.lr:.3g}',
        f'disk: {files} checkpoints of {4e-6 * (parameters + 2 * trained):.0f} MB in '
        f'{output_dir}, and one more while it saves',  # AdamW keeps two numbers for each one that is trained
    ]
    if schedule.lr < 1e-4 * math.sqrt(schedule.total_batch_size / 256):
        lines.append(
            f'The learning rate {schedule.lr:.2g} is very low for a batch of {schedule.total_batch_size}: the model '
            'will learn little. Small batches need about --lr 1e-3 (docs/own_images.md)'
        )
    return '\n'.join(lines)


def data_flags(args):
    """The flags of the data of a run, for a command that uses the same."""
    flags = f'--data_path {shlex.quote(args.data_path)}'
    if args.val_path:
        return f'{flags} --val_path {shlex.quote(args.val_path)}'
    return f'{flags} --val_share {args.val_share:g}' if args.val_share else flags


# --- Training -----------------------------------------------------------------------------------------------------


def train(run, model, optimizer, loss_fn, loader, events, title=''):
    """Train from run.start to the end, saving and logging on the way.

    Args:
        model, optimizer: on the device; their states are restored from run.state.
        loss_fn: (network, batch of loader, place) -> scalar, the mean over the batch. place: (step, index in the total
            batch of the first image): whatever a step draws follows from it, not from the process.
        loader: as training_loader gives it.
        title: first line of the log.

    Raises:
        FloatingPointError: after MAX_SKIPPED steps in a row whose loss or gradient was not finite.
        RunError: if more images are bad than --max_bad, or the end cannot be saved.
        SystemExit: with code INTERRUPTED, when asked to stop.
    """
    args, schedule = run.args, run.schedule
    if run.state is not None:
        checkpoint.restore(run.state, model, optimizer, run.scaler)
        run.state = None
    network = distributed.wrap(model, run.device, args.compile)
    with as_input_error(args.output_dir):
        log = Log(run)
    log.say(describe(run, model, title))
    saver = checkpoint.Saver(run, model, optimizer, log.say)
    meter = Meter(run, loader, log.say)
    batches = meter.timed(loader)
    best_name = f'best_{events.best.removeprefix("val_")}' if events.best else None

    with distributed.StopRequest() as stop:
        for step in range(run.start, schedule.total_steps + 1):
            # --- `step` steps are done. If they complete an epoch: evaluate, keep the best, draw. It comes first, with
            # one turn more at the end, so that a run that was killed in here does it again when it resumes.
            epoch, step_in_epoch = divmod(step, schedule.steps_per_epoch)
            is_end = step == schedule.total_steps
            if events.neighbours and (is_end or step_in_epoch == 0 and epoch % args.knn_every == 0):
                log.entry(step, step / schedule.steps_per_epoch, events.neighbours())
            if step > 0 and (step_in_epoch == 0 or is_end):
                loader.bad.count = 0
                if epoch == 1 and (note := loader.bad.flat_note()):
                    log.say(note)
                if events.evaluate and (epoch % args.eval_every == 0 or is_end):
                    metrics = events.evaluate()
                    log.entry(step, step / schedule.steps_per_epoch, metrics)
                    if events.best and metrics[events.best] > run.record.get(best_name, -1.0):
                        saver.save(step, best={best_name: metrics[events.best]}, required=is_end)
                if events.draw and run.rank == 0 and (epoch % args.picture_every == 0 or is_end):
                    for name, figure in events.draw().items():
                        log.figure(name, figure, step)
            if is_end:
                break

            # --- One optimiser step
            optim.set_learning_rate(optimizer, schedule, step)
            loss, norm = optimizer_step(run, step, network, optimizer, loss_fn, batches)
            meter.update(loss, norm)
            log.advance()

            # --- Log, save, stop
            done = step + 1
            if done % args.log_every == 0 or done % schedule.steps_per_epoch == 0 or done == schedule.total_steps:
                values = meter.flush(done, max(group['lr'] for group in optimizer.param_groups))
                if events.numbers:
                    values |= events.numbers()
                log.entry(done, done / schedule.steps_per_epoch, values)
            if saver.due(done):
                saver.save(done, required=done == schedule.total_steps)
            if stop.agreed():
                saver.save(done, required=True)
                distributed.barrier()  # an early exit of one process would kill the one that saves
                how = 'the same command' if args.resume == 'auto' else 'the same command with --resume auto'
                log.say(f'Stopped after step {done} of {schedule.total_steps}, and saved; {how} resumes it')
                log.close()
                raise SystemExit(INTERRUPTED)
    log.close()
    distributed.stop()


def optimizer_step(run, step, network, optimizer, loss_fn, batches):
    """One step over the total batch, from accumulation micro-batches. Returns loss and gradient norm, on the device.

    A step whose loss or gradient is not finite leaves the weights as they are, on all processes.
    """
    schedule, scaler = run.schedule, run.scaler
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    network.train()
    mean_loss = 0.0
    for micro_step in range(schedule.accumulation):
        batch = next(batches)
        first = (micro_step * run.world_size + run.rank) * schedule.batch_size  # its place in the total batch
        data.seed_generators(run.args.seed, step, first, device=run.device)
        with distributed.no_sync(network, skip=micro_step < schedule.accumulation - 1):
            loss = loss_fn(network, batch, (step, first)) / schedule.accumulation
            finite = loss.detach() * 0 + 1  # 1, or nan: with it a gradient is not finite where the loss is not
            scaler.scale(loss * finite).backward()
        mean_loss = mean_loss + loss.detach()
    scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in parameters])  # of the sum over processes: the same on all of them
    if run.args.clip_grad:
        clip_grads_with_norm_(parameters, run.args.clip_grad, norm)
    # The scaler skips a step whose gradient is not finite; without fp16, its scale is 1 (distributed.UnitScaler).
    scaler.step(optimizer)  # LARS, unlike AdamW, waits for the device to know
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


# --- Evaluation ---------------------------------------------------------------------------------------------------


def evaluation_loader(args, device, samples, settings, batch_size=None, output_dir=None):
    """This process's share of samples, each once, always drawn as in epoch 0; unreadable images are left out.

    output_dir: where these are listed, if anywhere.
    """
    keys = data.fixed_batches(len(samples), batch_size or args.batch_size or 128, *distributed.world())
    bad = data.BadImages(len(samples), args.max_bad, output_dir)
    return data.Loader(samples, keys, device, (settings.mean, settings.std), args.num_workers, bad, leave_out=True)


@torch.no_grad()
def evaluate(model, loader, measure):
    """The means, over all images of all processes, of the numbers {name: mean over a batch} of measure(model, batch).

    Each process has its own share of the images in loader, each image once, but for those that cannot be read: they
    are left out, and their number is 'val_bad_images' if there are any. Above --max_bad it is a RunError.
    """
    model.eval()
    distributed.share_buffers(model)
    totals, count = collections.Counter(), 0
    for batch in loader:
        for name, value in measure(model, batch).items():
            totals[name] += value.float() * len(batch[0])
        count += len(batch[0])
    sums = collections.Counter()
    for share in distributed.gather({'images': count} | {name: float(total) for name, total in totals.items()}):
        sums.update(share)  # a process that can read none of its images only counts 0
    num_images = sums.pop('images')
    bad_images = loader.bad.num_images - num_images
    loader.bad.check(bad_images)
    means = {name: total / num_images for name, total in sums.items()}
    return means | ({'val_bad_images': bad_images} if bad_images else {})


# --- Classification: what fine-tuning and probing share -----------------------------------------------------------


def classes_loader(args, source, settings, device):
    """The validation images of a classifier: resized and cropped at the centre."""
    crop_pct = args.crop_pct or settings.crop_pct
    transform = transforms.centre_transform(settings.sizes['img_size'], crop_pct, transforms.BICUBIC)
    return evaluation_loader(args, device, data.Samples(source, transform), settings)


def evaluate_classifier(model, loader, autocast):
    """{'val_loss', 'val_top1', 'val_top5'} over the validation images, the accuracies in percent."""

    def measure(model, batch):
        imgs, labels = batch
        with autocast():
            logits = model(imgs).float()
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        return {'val_loss': cross_entropy(logits, labels), 'val_top1': top1, 'val_top5': top5}

    return evaluate(model, loader, measure)


def report_classifier(args, model, source, settings, origin):
    """--eval: evaluate and print one line.

    origin: what the weights are.

    Raises:
        InputError: if the checkpoint names other classes than the source.
    """
    check_evaluated(args, source, settings)
    device = distributed.start(distributed.choose_device(args.device))
    autocast, _ = distributed.mixed_precision(args.amp, device)
    loader = classes_loader(args, source, settings, device)
    metrics = evaluate_classifier(model.to(device), loader, autocast)
    bad = metrics.get('val_bad_images', 0)
    if distributed.world()[0] == 0:
        unreadable = f' ({bad} cannot be read)' if bad else ''
        print(
            f'{origin}\ntop-1 {metrics["val_top1"]:.2f} %  top-5 {metrics["val_top5"]:.2f} %  '
            f'loss {metrics["val_loss"]:.4f}  on {len(source) - bad} images{unreadable}'
        )
    distributed.stop()


def check_evaluated(args, source, settings):
    """Before --eval: compare the classes with the checkpoint's, and say so if it was trained on most of the images.

    Raises:
        InputError: if the classes differ.
    """
    if settings.classes:
        sources.check_same_classes(settings.classes, source.classes, 'the checkpoint', args.data_path)
    then = vars(settings.flags)
    if then.get('val_share') and getattr(source, 'is_everything', False) and distributed.world()[0] == 0:
        if os.path.abspath(str(then.get('data_path'))) == os.path.abspath(args.data_path):
            print(f'Most of these images were trained on; --val_share {then["val_share"]:g} evaluates the others')


def train_classifier(run, model, optimizer, loss_fn, loader, val_loader, title):
    """Train, evaluate each epoch, keep the best checkpoint."""
    events = Events(evaluate=lambda: evaluate_classifier(model, val_loader, run.autocast), best='val_top1')
    train(run, model, optimizer, loss_fn, loader, events, title)
    if run.rank == 0:
        print(
            f'Best top-1 {run.record["best_top1"]:.2f} %. In {run.args.output_dir}: {checkpoint.LAST}, '
            f'{checkpoint.BEST}, log.jsonl, TensorBoard events'
        )
