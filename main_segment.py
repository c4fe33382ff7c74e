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
from functools import partial
from itertools import zip_longest

import torch

import engine
from models_mff import ENCODER, MODELS
from models_upernet import UperNet, default_levels
from util import args as flags
from util import distributed, optim, segmentation, sources, weights
from util.errors import InputError, as_input_error


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
    add('--layer_decay', type=number(float, 0, 1), default=0.65, help='rate over the next block')
    add('--drop_path', type=number(float, 0, 0.99), default=0.1, help='rate at the last block')
    add('--classifier_std', type=real, default=0.01, help="of the classifiers' first weights")
    add('--grad_checkpointing', action=boolean, default=False, help='less memory, more time')
    add = parser.add_argument_group('evaluation and prediction').add_argument
    add('--eval', action='store_true', help='only evaluate the segmenter of --init_from')
    add('--predict', nargs='+', metavar='PATH', help='only segment images, by --init_from')
    add('--scales', type=number(float, 0.1), nargs='+', default=[1.0], help='to average over')
    add('--flip', action='store_true', help='average with the mirrored image')
    return parser


def main(args):
    # --- Data -------------------------------------------------------------------------------------
    device = distributed.start(args.device)
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings = follow(args, file)
    sizes, classes, only_use = settings.sizes, settings.classes, bool(args.eval or args.predict)
    if only_use and classes is None:
        raise InputError('--eval and --predict need a segmenter: --init_from CHECKPOINT')
    if not args.predict:
        pairs = partial(segmentation.open_pairs, args=args, sizes=sizes, classes=classes)
        train_source, val_source = sources.open_sources(
            args, sizes, only_val=args.eval, opener=pairs
        )
        if val_source is None:
            raise InputError(f'{args.data_path}: no images/val; --val_path, or --val_share 0.1')
        classes = val_source.classes
        expected = file.get('classes', classes) if args.eval else train_source.classes
        different = [pair for pair in zip_longest(classes, expected) if pair[0] != pair[1]]
        if different:
            raise InputError('the class {} to evaluate is {} in training'.format(*different[0]))

    # --- Model ------------------------------------------------------------------------------------
    heads = {'num_classes': len(classes), 'classifier_std': args.classifier_std}
    with as_input_error():
        model = UperNet(**sizes, **heads, drop_path=args.drop_path)
    model.encoder.set_grad_checkpointing(args.grad_checkpointing)
    origin = weights.load(model, file, only_use, classes) if file else 'random weights'
    origin = '\n'.join([origin, *settings.notes])
    at_least = 2  # images on a device, for BatchNorm
    if device.type == 'cuda' and distributed.world()[1] > 1:
        model, at_least = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), 1
    model.to(device)
    autocast, _ = engine.mixed_precision(args.amp, device)
    short = min(sizes['img_size'])
    scale = args.scale or (4 * short, short)

    @torch.no_grad()
    def segment(imgs, size):
        with autocast():
            return segmentation.segment(model.eval(), imgs, size, scale, args.scales, args.flip)

    if args.predict:
        print(origin)
        return segmentation.predict(args, device, settings, segment)
    val_set = segmentation.PairSamples(val_source, transform=None)
    val_loader = engine.evaluation_loader(args, device, val_set, settings, 1)  # any size
    if args.eval:
        values = evaluate(val_loader, segment)
        statistics = f'on {len(val_set)} images, mean {settings.mean}, std {settings.std}'
        sources.say(f'{origin}\n{table(values)}\n{statistics}')
        return distributed.stop()

    # --- Optimiser, and the checkpoint to resume --------------------------------------------------
    schedule = make_schedule(args, len(train_source), at_least)
    groups = optim.param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = optim.create_adamw(args, groups, schedule.lr, device)
    run = engine.Run(args, schedule, settings, model, optimizer, device, classes, True)
    run.log.say(
        f'{len(classes)} classes: {sources.shorten(classes)}; {len(train_source)} training and '
        f'{len(val_source)} validation images\nblocks {sizes["levels"]}; {origin}'
    )
    crop = {'size': sizes['img_size'], 'scale': scale, 'ratios': args.scale_range}
    augment = partial(segmentation.transform_pair, **crop)
    train_set = segmentation.PairSamples(train_source, augment, seed=args.seed)
    loader = run.loader(train_set)

    # --- Train ------------------------------------------------------------------------------------
    def loss_fn(network, imgs, masks):
        imgs, masks = segmentation.fill_padding(imgs, masks)
        with autocast():
            logits, aux_logits = network(imgs, resize=False)
        return segmentation.segmentation_loss(logits.float(), aux_logits.float(), masks)

    for epoch in run.epochs():
        engine.train_epoch(run, loss_fn, loader, epoch)
        best = None
        if run.is_due(epoch, args.eval_every):
            distributed.share_buffers(model)
            values = evaluate(val_loader, segment, run)
            run.log.entry(run.step, values)
            best = {'best_miou': values['val_miou']}
        run.saver.end_epoch(epoch, run.step, best)
    run.log.say(table(values))
    distributed.stop()


def follow(args, file):
    """Settings with UperNet's sizes, and the classes of the segmenter that file is, or None.

    Flags that are not given become what they were for the segmenter.
    """
    settings, state, classes = weights.settings_of(args, file), file['model'] if file else {}, None
    if 'classifier.1.weight' in state:
        num_classes, channels = state['classifier.1.weight'].shape[:2]
        usual = segmentation.ADE20K if num_classes == 150 else list(map(str, range(num_classes)))
        classes = settings.classes or usual  # mmsegmentation records none
        aux_channels = state['aux_head.2.weight'].shape[1]
        then = settings.args | {'channels': channels, 'aux_channels': aux_channels}
        names = 'levels channels aux_channels scale ignore_label reduce_zero_label max_value'
        for name in names.split():
            if getattr(args, name) is None:
                setattr(args, name, then.get(name))
        if args.eval and not args.val_share and args.data_path == then.get('data_path'):
            args.val_share = then.get('val_share', 0.0)  # what was held out, not all
    sizes = {name: settings.sizes[name] for name in ENCODER}
    sizes['levels'] = tuple(args.levels or default_levels(sizes['depth']))
    sizes['channels'] = args.channels or sizes['embed_dim']
    sizes['aux_channels'] = args.aux_channels or min(256, sizes['channels'])
    return dataclasses.replace(settings, sizes=sizes, classes=classes)


def make_schedule(args, num_images, at_least):
    """By --total_steps and --warmup_steps; the rate falls linearly. Raises InputError."""
    schedule = optim.make_schedule(args, num_images, usual_batch=16, at_least=at_least)
    total, warmup = args.total_steps or schedule.total_steps, args.warmup_steps
    if warmup is None:
        warmup = total // 10 if args.warmup_epochs is None else schedule.warmup_steps
    if warmup > total:
        raise InputError(f'{warmup} steps of warm-up are more than {total} in all')
    if schedule.accumulation > 1 or schedule.batch_size < at_least:
        raise InputError(
            f'BatchNorm needs all images of a step at once, {at_least} or more on a device, not '
            f'{schedule.batch_size}: see --total_batch_size, --batch_size, --grad_checkpointing'
        )
    changes = {'total_steps': total, 'warmup_steps': warmup, 'decay': 'linear'}
    return dataclasses.replace(schedule, **changes, warmup_from=1e-6)


def evaluate(loader, segment, run=None):
    """Scores over all images of all processes, as segmentation.scores."""
    classes, confusion = loader.samples.source.classes, 0
    for imgs, masks in engine.evaluation_batches(loader, run):
        predicted = segment(imgs, size=masks.shape[-2:])
        confusion = confusion + segmentation.confusion_matrix(predicted, masks, len(classes)).cpu()
    return segmentation.scores(sum(distributed.gather(confusion)), classes)


def table(values):
    return '\n'.join(f'{name:>28} {value:8.2f}' for name, value in values.items())


if __name__ == '__main__':
    flags.run_job(main, get_parser())
