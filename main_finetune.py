"""Fine-tune a pre-trained encoder as a classifier, evaluate one, or predict the classes of images.

    python main_finetune.py @recipes/small_finetune.txt --data_path IMAGES
    python main_finetune.py --predict IMAGES --init_from output/small_finetune/checkpoint-best.pth
    python main_finetune.py @recipes/vit_base_finetune.txt --data_path IMAGENET \\
        --init_from CHECKPOINT
    python main_finetune.py --eval --data_path IMAGENET --init_from mae_finetuned_vit_base.pth

The classifier is timm's VisionTransformer; --init_from reads every known checkpoint. Resuming,
processes and recipes are as in main_pretrain.py, but Mixup and drop path are drawn once for the
images on a device, as in the reference: a run resumes with the same number of them.
"""

import argparse

import torch
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform

import engine
import engine_classify
from models_mff import MODELS, create_encoder
from util import args as flags
from util import data, distributed, optim, sources, transforms, weights
from util.errors import InputError, as_input_error


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_common_arguments(parser, betas=[0.9, 0.999])
    flags.add_model_arguments(parser, MODELS)
    flags.add_classifier_arguments(parser)
    parser.set_defaults(blr=5e-4, min_lr=1e-6, epochs=100)
    add = parser.add_argument_group('fine-tuning').add_argument
    ratio, rate = flags.number(float, 0, 1), flags.number(float, 0)
    add('--global_pool', choices=['avg', 'token'], help='what the head sees (default: avg)')
    add('--layer_decay', type=ratio, default=0.65, help='rate of a block over the next; 0: freeze')
    add('--drop_path', type=flags.number(float, 0, 0.99), default=0.1, help='of the last block')
    aa = 'rand-m9-mstd0.5-inc1'
    add('--aa', type=augmentation, default=aa, help="timm's RandAugment, or none")
    add('--reprob', type=ratio, default=0.25, help='probability of random erasing')
    add('--mixup', type=rate, default=0.8, help='alpha of Mixup, 0: off')
    add('--cutmix', type=rate, default=1.0, help='alpha of CutMix, 0: off')
    add('--smoothing', type=flags.number(float, 0, 0.99), default=0.1, help='label smoothing')
    add('--grad_checkpointing', action='store_true', help='less memory, more time')
    add = parser.add_argument_group('prediction').add_argument
    add('--predict', nargs='+', metavar='PATH', help='only predict the classes of these images')
    add('--split', choices=['train', 'val'], help='of the one folder to predict, as in training')
    add('--topk', type=flags.number(int, 1), default=5, help='classes to print')
    add('--json', action='store_true', help='JSON lines, with all classes')
    return parser


def augmentation(text):
    """An argparse type: a RandAugment that timm can read, or 'none'."""
    try:
        if text != 'none':
            rand_augment_transform(text, {})
    except (AssertionError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f'{text} is no RandAugment of timm') from None
    return text


def main(args):
    # --- Data, model ------------------------------------------------------------------------------
    device = distributed.start(args.device)
    if args.eval or args.report:
        return engine_classify.report(args, device)
    if args.predict:
        return engine_classify.predict(args, device)
    if args.split or args.json:
        raise InputError('--split and --json belong to --predict')
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings = weights.settings_of(args, file)  # sizes, mean, std: flags, --init_from or --model
    pool = args.global_pool or settings.global_pool or 'avg'
    with as_input_error():
        model = create_encoder(settings.sizes, pool, args.drop_path)
    train_source, val_source = sources.open_sources(args, settings.sizes, labelled=True)
    classes = val_source.classes
    give_head(model, len(classes))
    model.set_grad_checkpointing(args.grad_checkpointing)
    origin = weights.load(model, file, classes=classes) if file else 'random weights'
    model.to(device)
    augment = transforms.finetune_transform(args, settings)
    train_set = data.Samples(train_source, augment, seed=args.seed)
    first = train_set.read(0, 0)[0]
    if args.aa != 'none' and (first.dtype != torch.uint8 or len(first) not in (1, 3)):
        raise InputError('RandAugment needs 8-bit images of 1 or 3 channels; others: --aa none')

    # --- Optimiser, and the checkpoint to resume --------------------------------------------------
    mixing = args.mixup > 0 or args.cutmix > 0  # one of them on every batch
    schedule = optim.make_schedule(args, len(train_source), usual_batch=1024, at_least=2)
    if mixing and schedule.batch_size % 2:
        raise InputError(
            f'Mixup and CutMix mix pairs, but a device has {schedule.batch_size} images at a time; '
            'give an even --batch_size, or --mixup 0 --cutmix 0'
        )
    groups = optim.param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = optim.create_adamw(args, groups, schedule.lr, device)
    by_batch = mixing or args.drop_path > 0
    run = engine.Run(args, schedule, settings, model, optimizer, device, classes, by_batch)
    run.log.say('\n'.join([f'Fine-tuning; {origin}', *settings.notes]))
    loader = run.loader(train_set)
    val_loader = engine_classify.classes_loader(args, device, val_source, settings)
    if mixing:
        mixup = Mixup(
            args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=len(classes)
        )
    criterion = engine_classify.create_criterion(
        args, train_source, device, args.smoothing, soft=mixing
    )

    # --- Train ------------------------------------------------------------------------------------
    def loss_fn(network, imgs, labels):
        if mixing:
            imgs, labels = mixup(imgs, labels)
        with run.autocast():
            logits = network(imgs)
        return criterion(logits.float(), labels)

    for epoch in run.epochs():
        engine.train_epoch(run, loss_fn, loader, epoch)
        best = None
        if run.is_due(epoch, args.eval_every):
            values, recalls = engine_classify.evaluate(
                model, val_loader, run.autocast, classes, run
            )
            run.log.entry(run.step, values)
            best = {'best_top1': values['val_top1']}
        run.saver.end_epoch(epoch, run.step, best)
    run.log.say(engine_classify.summary(values, recalls, len(val_source)))
    distributed.stop()


def give_head(model, num_classes):
    """A fresh Linear on the pooled features, weights N(0, 2e-5) truncated, bias 0."""
    model.reset_classifier(num_classes)
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    torch.nn.init.zeros_(model.head.bias)


if __name__ == '__main__':
    flags.run_job(main, get_parser())
