"""Train a pre-trained encoder for semantic segmentation, evaluate a segmenter, or segment images.

    python main_segment.py @recipes/vit_base_segment.txt --data_path ADEChallengeData2016 --init_from CHECKPOINT
    python main_segment.py --eval --data_path ADEChallengeData2016 --init_from CHECKPOINT
    python main_segment.py --predict IMAGE ... --init_from CHECKPOINT

The model is UperNet (models_upernet.py); --data_path holds images/ and masks/ (docs/segmentation.md). Resuming,
processes and recipes are as in main_pretrain.py.
"""

import argparse
import dataclasses
import os
import shlex

import torch
from PIL import Image

import engine
from models_mff import MODELS
from models_upernet import UperNet, default_levels
from util import checkpoint, distributed, folders, masks, mix, optim, segmentation, transforms, visualize, weights
from util.args import ArgumentParser, ImageSize, add_common_arguments, add_model_arguments, number, run_job
from util.errors import InputError, as_input_error


def get_parser():
    parser = ArgumentParser(__doc__, usage='%(prog)s [@RECIPE] [--FLAG VALUE ...]')
    add_common_arguments(parser, betas=[0.9, 0.999])
    add_model_arguments(parser, MODELS)
    parser.set_defaults(blr=1.6e-3, epochs=100)  # 1e-4 at a total batch of 16
    count = number(int, 1)
    add = parser.add_argument_group('segmentation').add_argument
    add('--levels', type=number(int, 0), nargs=4, help='blocks whose outputs are used (default: 3 5 7 11 of 12)')
    add('--channels', type=count, help='width of the head (default: that of the encoder)')
    add('--aux_channels', type=count, help='width of the auxiliary head (default: 256, at most --channels)')
    add('--scale', type=count, nargs=2, metavar=('LONG', 'SHORT'), help='of images (default: 4 and 1 times the crop)')
    add('--scale_range', type=number(float, 0.1, 10), nargs=2, default=[0.5, 2.0], help='random factors of --scale')
    add('--num_classes', type=number(int, 2, 255), help='where no classes.txt names the classes')
    zero = 'ignore 0 in masks; 1 is the first class (default: for ADE20K)'
    add('--reduce_zero_label', action=argparse.BooleanOptionalAction, help=zero)
    add('--ignore_label', type=number(int, 0, 255), help='number in masks to ignore (default: 255)')
    add('--total_steps', type=count, help='length of the training, instead of --epochs')
    add('--warmup_steps', type=number(int, 0), help='instead of --warmup_epochs')
    add('--layer_decay', type=number(float, 0, 1), default=0.65, help='rate of a block divided by that of the next')
    add('--drop_path', type=number(float, 0, 0.99), default=0.1, help='stochastic depth: rate of the last block')
    add('--classifier_std', type=number(float, 0), default=0.01, help="of the classifiers' first weights")
    add('--grad_checkpointing', action='store_true', help='less memory: activations are computed twice')
    add = parser.add_argument_group('evaluation and prediction').add_argument
    add('--eval', action='store_true', help='only evaluate the segmenter of --init_from')
    add('--predict', nargs='+', metavar='PATH', help='only segment images and folders with --init_from')
    add('--stride', action=ImageSize, type=count, nargs='+', help='of the sliding window (default: 2/3 of the crop)')
    add('--scales', type=number(float, 0.1), nargs='+', default=[1.0], help='average over these multiples of --scale')
    add('--flip', action='store_true', help='average with the mirrored image')
    return parser


def main(args):
    if args.predict:
        return predict(args)

    # --- Model and data -------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    settings, labels, window = settle(args)
    train_source, val_source = masks.open_pairs(args, settings.sizes, labels, only_val=args.eval)
    classes = val_source.classes
    with as_input_error():
        heads = {'num_classes': len(classes), 'classifier_std': args.classifier_std}
        model = UperNet(**settings.sizes, **heads, drop_path=args.drop_path)
    model.encoder.set_grad_checkpointing(args.grad_checkpointing)
    origin = engine.initial_weights(args, model, settings, complete=args.eval)
    val_samples = segmentation.PairSamples(val_source, transform=None)
    if args.eval:
        return report(args, model, val_samples, settings, window, origin)
    augment = transforms.SegmentationTransform(window.size, window.scale, args.scale_range)
    samples = segmentation.PairSamples(train_source, augment, seed=args.seed)
    drop_path = mix.PlacedDropPath(model, args.seed)

    # --- Run: output folder, checkpoint to resume, processes, device ----------------------------------------------
    schedule = make_schedule(args, len(train_source))
    if distributed.choose_device(args.device).startswith('cuda'):
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # over the total batch, on any number of GPUs
    run = engine.start_run(args, schedule, model, settings, classes)
    model.to(run.device)
    loader = engine.training_loader(run, samples, settings)
    val_loader = engine.evaluation_loader(args, run.device, val_samples, settings, 1, args.output_dir)  # any size
    optimizer = optim.create_adamw(args, optim.param_groups(model, args.weight_decay, args.layer_decay), run)

    # --- Train ----------------------------------------------------------------------------------------------------
    def loss_fn(network, batch, place):
        imgs, targets = segmentation.fill_padding(*batch)
        drop_path.draw(len(imgs), place, run.device)
        with run.autocast():
            logits, aux_logits = network(imgs, resize=False)
        return segmentation.segmentation_loss(logits.float(), aux_logits.float(), targets)

    def draw():
        rows = []
        for index in range(0, len(val_source), -(-len(val_source) // 6)):
            image, mask, _ = val_samples[0, index]
            predicted = segmentation.segment_image(model, image, settings, window, run.device, run.autocast)
            rows.append((image, mask, predicted))
        return {'segmentation': visualize.segmentation_figure(rows, classes)}

    def evaluate():
        return segmentation.evaluate(model, val_loader, window, classes, run.autocast)

    events = engine.Events(evaluate=evaluate, best='val_miou', draw=draw)
    title = f'Segmentation into {len(classes)} classes, from blocks {list(settings.sizes["levels"])}; {origin}'
    if run.world_size > 1 and run.device.type != 'cuda':
        title += f'\nBatchNorm averages over the {schedule.batch_size} images of each process alone; only GPUs share it'
    engine.train(run, model, optimizer, loss_fn, loader, events, title)
    if run.rank == 0:
        best = shlex.quote(f'{args.output_dir}/{checkpoint.BEST}')
        print(
            f'Best mIoU {run.record["best_miou"]:.2f} %. In {args.output_dir}: {checkpoint.LAST}, {checkpoint.BEST}, '
            f'segmentation.png, log.jsonl, TensorBoard events\n'
            f'  each class:  python main_segment.py --eval {engine.data_flags(args)} --init_from {best}\n'
            f'  an image:    python main_segment.py --predict IMAGE --init_from {best}'
        )


def settle(args):
    """(Settings with the sizes of UperNet, Labels, Window): from flags, else the segmenter of --init_from, else usual.

    Raises:
        InputError: as weights.settle, or if --scale leaves images smaller than a crop.
    """
    settings = weights.settle(args)
    dims = settings.segmenter
    flags = settings.flags if dims else argparse.Namespace()

    def choose(name, usual):
        values = (getattr(args, name), getattr(flags, name, None), usual)
        return next((value for value in values if value is not None), None)

    sizes = {name: settings.sizes[name] for name in weights.ENCODER}
    sizes['channels'] = args.channels or dims.get('channels', sizes['embed_dim'])
    sizes['aux_channels'] = args.aux_channels or dims.get('aux_channels', min(256, sizes['channels']))
    sizes['levels'] = tuple(choose('levels', default_levels(sizes['depth'])))
    settings = dataclasses.replace(settings, sizes=sizes, classes=settings.classes if dims else None)
    classes = settings.classes
    if dims and not classes:  # of mmsegmentation, which does not name them
        classes = masks.ADE20K if dims['classes'] == len(masks.ADE20K) else list(map(str, range(dims['classes'])))
    labels = masks.Labels(
        classes=list(map(str, range(args.num_classes))) if args.num_classes else None,
        of_checkpoint=classes,
        ignore=choose('ignore_label', masks.IGNORE),
        reduce_zero=choose('reduce_zero_label', None),
    )
    size = sizes['img_size']
    window = segmentation.Window(
        size=size,
        stride=tuple(args.stride or (max(1, side * 2 // 3) for side in size)),
        scale=tuple(sorted(choose('scale', (4 * min(size), min(size))), reverse=True)),
        ratios=tuple(args.scales),
        flip=args.flip,
    )
    if any(max(args.scale_range) * side < crop for side, crop in zip(sorted(window.scale), sorted(size))):
        raise InputError(
            f'--scale {window.scale[0]} {window.scale[1]}: images are smaller than the crop, {size[0]} x {size[1]}, '
            f'at every --scale_range'
        )
    if any(step > side for step, side in zip(window.stride, size)):
        raise InputError(f'--stride {window.stride[0]} {window.stride[1]} leaves gaps between windows of {size}')
    return settings, labels, window


def make_schedule(args, num_images):
    """The schedule in steps, by --total_steps and --warmup_steps; the rate falls linearly. Raises InputError."""
    schedule = optim.make_schedule(args, num_images, usual_batch=16)
    total, warmup = args.total_steps or schedule.total_steps, args.warmup_steps
    if warmup is None:
        warmup = total // 10 if args.warmup_epochs is None else schedule.warmup_steps
    schedule = dataclasses.replace(schedule, total_steps=total, warmup_steps=warmup, decay='linear', warmup_from=1e-6)
    if schedule.warmup_steps > schedule.total_steps:
        raise InputError(f'{schedule.warmup_steps} steps of warm-up are more than {schedule.total_steps} in all')
    if schedule.accumulation > 1:
        raise InputError(
            f'--total_batch_size {schedule.total_batch_size} would be accumulated from {schedule.accumulation} parts, '
            f'and BatchNorm would average over {schedule.batch_size} images only; use more GPUs, --grad_checkpointing, '
            f'or --total_batch_size {schedule.batch_size * distributed.world()[1]}'
        )
    if schedule.batch_size < 2:
        raise InputError('BatchNorm needs at least two images on a device: a larger --total_batch_size')
    return schedule


def report(args, model, samples, settings, window, origin):
    """--eval: evaluate, and print a table."""
    device = distributed.start(distributed.choose_device(args.device))
    autocast, _ = distributed.mixed_precision(args.amp, device)
    classes = samples.source.classes
    engine.check_evaluated(args, samples.source, settings)
    loader = engine.evaluation_loader(args, device, samples, settings, 1)  # any size
    metrics = segmentation.evaluate(model.to(device), loader, window, classes, autocast)
    if distributed.world()[0] == 0:
        print(origin)
        for name in classes:
            print(f'{name:>24} {metrics[f"val_iou/{name}"]:6.2f}')
        bad = metrics.get('val_bad_images', 0)
        print(
            f'mIoU {metrics["val_miou"]:.2f} %  mean accuracy {metrics["val_macc"]:.2f} %  pixel accuracy '
            f'{metrics["val_pixel_acc"]:.2f} %  on {len(samples) - bad} images'
            + (f' ({bad} cannot be used)' if bad else '')
        )
    distributed.stop()


def predict(args):
    """Write for each image NAME.png, the class of every pixel, and NAME_overlay.png, its colours over the image.

    An image that cannot be read is reported, and the exit code is 1 at the end.
    """
    if not args.init_from:
        raise InputError('--predict needs a segmenter: --init_from CHECKPOINT')
    settings, labels, window = settle(args)
    classes = labels.of_checkpoint
    if not classes:
        raise InputError(
            f'{args.init_from}: not a segmenter; --predict needs one trained by main_segment.py or mmsegmentation'
        )
    with as_input_error():
        model = UperNet(**settings.sizes, num_classes=len(classes))
    print(weights.load_weights(model, args.init_from, complete=True))
    device = distributed.start(distributed.choose_device(args.device), join=False)
    autocast, _ = distributed.mixed_precision(args.amp, device)
    model.to(device)
    folder, written = os.path.join(args.output_dir, 'predictions'), set()
    checkpoint.make_output_dir(folder)
    for path, image in folders.given_images(args.predict, settings.sizes['in_chans'], args.background):
        predicted = segmentation.segment_image(model, image, settings, window, device, autocast)
        name = os.path.splitext(os.path.basename(path))[0]
        while {name, f'{name}_overlay'} & written:  # of the same name in another folder
            name += '_'
        written |= {name, f'{name}_overlay'}
        file = os.path.join(folder, name)
        indexed = Image.fromarray(predicted)
        indexed.putpalette(visualize.palette(len(classes)).tobytes())
        indexed.save(f'{file}.png')
        visualize.overlay(image, predicted, classes).save(f'{file}_overlay.png')
        print(f'{path}  {file}.png  {file}_overlay.png')


if __name__ == '__main__':
    run_job(main, get_parser())
