"""Train a pre-trained encoder for semantic segmentation, evaluate a segmenter, or segment images.

    python main_segment.py @recipes/vit_base_segment.txt --data_path ADEChallengeData2016 \\
        --init_from CHECKPOINT
    python main_segment.py --eval --data_path ADEChallengeData2016 --init_from CHECKPOINT
    python main_segment.py --predict IMAGE ... --init_from CHECKPOINT

The model is UperNet (models_upernet.py); --data_path holds images/ and masks/
(docs/segmentation.md). Resuming, processes and recipes are as in main_pretrain.py.
"""

import argparse
import dataclasses
import os
import sys
from functools import partial
from itertools import zip_longest

import torch

import engine
from models_mff import ENCODER, MODELS
from models_upernet import UperNet, default_levels
from util import args as flags
from util import data, distributed, optim, segmentation, sources, transforms, weights
from util.errors import InputError, as_input_error
from util.images import read_image


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_common_arguments(parser, betas=[0.9, 0.999])
    flags.add_model_arguments(parser, MODELS)
    parser.set_defaults(blr=1.6e-3, epochs=100)  # 1e-4 at a total batch of 16
    number, boolean = flags.number, argparse.BooleanOptionalAction
    count, real = number(int, 1), number(float, 0)
    add = parser.add_argument_group('segmentation').add_argument
    add('--levels', type=number(int, 0), nargs=4, help='blocks that are used (3 5 7 11 of 12)')
    add('--channels', type=count, help='width of the head (default: that of the encoder)')
    add('--aux_channels', type=count, help='of the auxiliary head (256, at most --channels)')
    add('--scale', type=count, nargs=2, help='LONG SHORT, of images (4 and 1 times the crop)')
    add('--scale_range', type=real, nargs=2, default=[0.5, 2.0], help='random factors of --scale')
    add('--num_classes', type=number(int, 2, 255), help='where no classes.txt names the classes')
    add('--reduce_zero_label', action=boolean, help='ignore 0 in masks; classes count from 1')
    add('--ignore_label', type=number(int, 0, 255), help='in masks, to ignore (default: 255)')
    add('--total_steps', type=count, help='length of the training, instead of --epochs')
    add('--warmup_steps', type=number(int, 0), help='instead of --warmup_epochs')
    decay = 'rate of a block over that of the next'
    add('--layer_decay', type=number(float, 0, 1), default=0.65, help=decay)
    add('--drop_path', type=number(float, 0, 0.99), default=0.1, help='rate at the last block')
    add('--classifier_std', type=real, default=0.01, help="of the classifiers' first weights")
    add('--grad_checkpointing', action=boolean, default=False, help='less memory, more time')
    add = parser.add_argument_group('evaluation and prediction').add_argument
    add('--eval', action='store_true', help='only evaluate the segmenter of --init_from')
    add('--predict', nargs='+', metavar='PATH', help='only segment images, by --init_from')
    add('--stride', action=flags.ImageSize, type=count, nargs='+', help='of windows (2/3 crop)')
    add('--scales', type=number(float, 0.1), nargs='+', default=[1.0], help='to average over')
    add('--flip', action='store_true', help='average with the mirrored image')
    return parser


def main(args):
    # --- Data, model ------------------------------------------------------------------------------
    device = distributed.start(args.device)
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings, options, segment = settle(args, file)
    sizes = settings.sizes
    if args.predict:
        return predict(args, device, file, settings, segment)
    pairs = partial(segmentation.open_pairs, args=options, sizes=sizes, classes=settings.classes)
    train_source, val_source = sources.open_sources(
        options, sizes, only_val=args.eval, opener=pairs
    )
    if val_source is None:
        raise InputError(f'{args.data_path}: no images/val; give --val_path, or --val_share 0.1')
    classes = val_source.classes
    val_set = segmentation.PairSamples(val_source, transform=None)
    val_loader = engine.evaluation_loader(args, device, val_set, settings, 1)  # any size
    if args.eval:
        return report(args, device, file, settings, segment, val_loader)
    check_classes(train_source.classes, 'the training images', classes)
    model, origin = build(args, device, file, settings, classes)
    crop = {'size': sizes['img_size'], 'scale': options.scale, 'ratios': args.scale_range}
    augment = partial(segmentation.transform_pair, **crop)
    train_set = segmentation.PairSamples(train_source, augment, seed=args.seed)

    # --- Optimiser, and the checkpoint to resume --------------------------------------------------
    schedule = make_schedule(args, len(train_source), device)
    groups = optim.param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = optim.create_adamw(args, groups, schedule.lr, device)
    run = engine.Run(args, schedule, settings, model, optimizer, device, classes, True)
    run.log.say(
        f'{len(classes)} classes: {sources.shorten(classes)}; {len(train_source)} training and '
        f'{len(val_source)} validation images\nblocks {sizes["levels"]}; {origin}'
    )
    keys = data.BatchStream(schedule, args.seed, run.step)
    loader = data.Loader(train_set, keys, device, settings, args.num_workers)

    # --- Train ------------------------------------------------------------------------------------
    def loss_fn(network, imgs, masks):
        imgs, masks = segmentation.fill_padding(imgs, masks)
        with run.autocast():
            logits, aux_logits = network(imgs, resize=False)
        return segmentation.segmentation_loss(logits.float(), aux_logits.float(), masks)

    for epoch in run.epochs():
        engine.train_epoch(run, loss_fn, loader, epoch)
        best = None
        if run.is_due(epoch, args.eval_every):
            values = evaluate(model, val_loader, segment, run.autocast, run)
            run.log.entry(run.step, values)
            best = {'best_miou': values['val_miou']}
        run.saver.end_epoch(epoch, run.step, best)
    run.log.say(summary(values, classes))
    distributed.stop()


def settle(args, file):
    """What follows from flags, else from a segmenter of --init_from, else is usual.

    Returns:
        settings: with the sizes of UperNet, and the classes of the segmenter, or None.
        options: args, with these: levels, scale, what numbers in masks mean, what is held out.
        segment: (model, imgs, size) -> classes of the pixels, as segmentation.segment.
    """
    settings, classes, then = weights.settings_of(args, file), None, {}
    head = file and file['model'].get('classifier.1.weight')
    if head is not None:
        usual = segmentation.ADE20K if len(head) == 150 else list(map(str, range(len(head))))
        classes = settings.classes or usual  # mmsegmentation records none
        aux_channels = file['model']['aux_head.2.weight'].shape[1]
        then = settings.args | {'channels': head.shape[1], 'aux_channels': aux_channels}
    names = 'levels', 'channels', 'aux_channels', 'scale', 'ignore_label', 'reduce_zero_label'
    unset = {name: then.get(name) for name in names if getattr(args, name) is None}
    if args.eval and not args.val_share and args.data_path == then.get('data_path'):
        unset['val_share'] = then.get('val_share', 0.0)  # what was held out, not all
    options = argparse.Namespace(**vars(args) | unset)
    sizes = {name: settings.sizes[name] for name in ENCODER}
    sizes['levels'] = tuple(options.levels or default_levels(sizes['depth']))
    sizes['channels'] = options.channels or sizes['embed_dim']
    sizes['aux_channels'] = options.aux_channels or min(256, sizes['channels'])
    size = sizes['img_size']
    options.scale = sorted(options.scale or (4 * min(size), min(size)), reverse=True)
    stride = args.stride or [max(1, side * 2 // 3) for side in size]
    if any(step > side for step, side in zip(stride, size)):
        raise InputError(f'--stride {stride} leaves gaps between windows of {size}')
    how = {'stride': stride, 'scale': options.scale, 'ratios': args.scales, 'flip': args.flip}
    segment = partial(segmentation.segment, window=size, **how)
    return dataclasses.replace(settings, sizes=sizes, classes=classes), options, segment


def build(args, device, file, settings, classes, complete=False):
    """(UperNet, lines on its weights); complete: all of them are the file's. Raises InputError."""
    heads = {'num_classes': len(classes), 'classifier_std': args.classifier_std}
    with as_input_error():
        model = UperNet(**settings.sizes, **heads, drop_path=args.drop_path)
    model.encoder.set_grad_checkpointing(args.grad_checkpointing)
    origin = weights.load(model, file, complete, classes) if file else 'random weights'
    if shares_batch(device):
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device), '\n'.join([origin, *settings.notes])


def shares_batch(device):
    """Whether BatchNorm averages over the images of all devices."""
    return device.type == 'cuda' and distributed.world()[1] > 1


def make_schedule(args, num_images, device):
    """By --total_steps and --warmup_steps; the rate falls linearly. Raises InputError."""
    at_least = 1 if shares_batch(device) else 2
    schedule = optim.make_schedule(args, num_images, usual_batch=16, at_least=at_least)
    total, warmup = args.total_steps or schedule.total_steps, args.warmup_steps
    if warmup is None:
        warmup = total // 10 if args.warmup_epochs is None else schedule.warmup_steps
    if warmup > total:
        raise InputError(f'{warmup} steps of warm-up are more than {total} in all')
    if schedule.accumulation > 1 or schedule.batch_size < at_least:
        raise InputError(
            f'BatchNorm needs the images of a step at once, {at_least} or more on a device, not '
            f'{schedule.batch_size}; change --total_batch_size, or use --grad_checkpointing'
        )
    changes = {'total_steps': total, 'warmup_steps': warmup, 'decay': 'linear'}
    return dataclasses.replace(schedule, **changes, warmup_from=1e-6)


# --- Evaluation and prediction --------------------------------------------------------------------


def check_classes(ours, whose, classes):
    """Raise InputError unless these are the classes, in the same order."""
    pairs = enumerate(zip_longest(ours, classes))
    different = [f'number {i} is {a} there, and {b} here' for i, (a, b) in pairs if a != b]
    if different:
        raise InputError(f'the classes are not those of {whose}: {different[0]}')


@torch.no_grad()
def evaluate(model, loader, segment, autocast, run=None):
    """{'val_miou', 'val_macc', 'val_pixel_acc', 'val_iou/CLASS', ...} in percent."""
    model.eval()
    distributed.share_buffers(model)
    classes = loader.samples.source.classes
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for imgs, masks in engine.evaluation_batches(loader, run):
        with autocast():
            predicted = segment(model, imgs, size=masks.shape[-2:])
        confusion += segmentation.confusion_matrix(predicted, masks, len(classes)).cpu()
    result = segmentation.scores(sum(distributed.gather(confusion)))
    values = {f'val_{name}': result[name] for name in ('miou', 'macc', 'pixel_acc')}
    return values | {f'val_iou/{name}': iou for name, iou in zip(classes, result['iou'].tolist())}


def summary(values, classes):
    """The lines to print of an evaluation."""
    ious = [values[f'val_iou/{name}'] for name in classes]
    lines = [f'{name:>24} {iou:6.2f}' for name, iou in zip(classes, ious)]
    names = {'val_miou': 'mIoU', 'val_macc': 'mean accuracy', 'val_pixel_acc': 'pixel accuracy'}
    lines.append('  '.join(f'{names[key]} {values[key]:.2f} %' for key in names))
    seen = sum(iou == iou for iou in ious)
    if seen < len(ious):
        lines.append(f'over {seen} of {len(ious)} classes: nan is neither there nor predicted')
    return '\n'.join(lines)


def report(args, device, file, settings, segment, loader):
    """--eval: evaluate the segmenter of --init_from, and print a table."""
    if settings.classes is None:
        raise InputError('--eval needs a segmenter: --init_from CHECKPOINT')
    classes = loader.samples.source.classes
    known = settings.classes if 'classes' in file else classes[: len(settings.classes)]
    check_classes(known, 'the segmenter', classes)
    model, origin = build(args, device, file, settings, classes, complete=True)
    autocast, _ = engine.mixed_precision(args.amp, device)
    values = evaluate(model, loader, segment, autocast)
    if distributed.is_first():
        print(f'{origin}\nmean {settings.mean}, std {settings.std}\n{summary(values, classes)}')
        print(f'on {len(loader.samples)} images')
    distributed.stop()


@torch.no_grad()
def predict(args, device, file, settings, segment):
    """Write NAME.png, the class of every pixel, and NAME_overlay.png; print shares of classes.

    Raises SystemExit(1) at the end if an image cannot be read.
    """
    classes, folder = settings.classes, os.path.join(args.output_dir, 'predictions')
    if classes is None:
        raise InputError('--predict needs a segmenter: --init_from CHECKPOINT')
    model, origin = build(args, device, file, settings, classes, complete=True)
    print(origin)
    autocast, _ = engine.mixed_precision(args.amp, device)
    with as_input_error(folder):
        os.makedirs(folder, exist_ok=True)
    written, code = set(), 0
    for path in sources.image_paths(args.predict):
        try:
            image = read_image(path, settings.sizes['in_chans'], args.background, args.max_value)
        except InputError as error:
            print(error, file=sys.stderr)
            code = 1
            continue
        imgs = transforms.normalise(image[None].to(device), settings.mean, settings.std)
        with autocast():
            mask = segment(model.eval(), imgs, size=image.shape[-2:])[0].cpu()
        name = os.path.splitext(os.path.basename(path))[0]
        while {name, f'{name}_overlay'} & written:  # of the same name in another folder
            name += '_'
        written |= {name, f'{name}_overlay'}
        segmentation.indexed(mask).save(os.path.join(folder, f'{name}.png'))
        segmentation.overlay(image, mask).save(os.path.join(folder, f'{name}_overlay.png'))
        print(f'{path}: {folder}/{name}.png')
        shares = mask.flatten().bincount() / mask.numel()
        for number in shares.argsort(descending=True)[: (shares > 0).sum()].tolist():
            print(f'{classes[number]:>24} {shares[number]:7.2%}')
    raise SystemExit(code)


if __name__ == '__main__':
    flags.run_job(main, get_parser())
