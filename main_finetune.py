"""Fine-tune a pre-trained encoder as a classifier, evaluate one, or predict the classes of images.

    python main_finetune.py @recipes/small_finetune.txt --data_path IMAGES        # after small_pretrain.txt
    python main_finetune.py --predict IMAGES --init_from output/small_finetune/checkpoint-best.pth
    python main_finetune.py @recipes/vit_base_finetune.txt --data_path IMAGENET --init_from CHECKPOINT
    python main_finetune.py --eval --data_path IMAGENET --init_from mae_finetuned_vit_base.pth

The classifier is timm's VisionTransformer; --init_from reads every known checkpoint (util/weights.py). Resuming,
processes and recipes are as in main_pretrain.py.
"""

import argparse
import json

import torch
from timm.data.auto_augment import rand_augment_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import engine
from models_mff import MODELS, create_encoder
from util import data, distributed, folders, mix, optim, sources, transforms, weights
from util.args import ArgumentParser, add_common_arguments, add_model_arguments, number, run_job
from util.errors import InputError, as_input_error


def get_parser():
    parser = ArgumentParser(__doc__, usage='%(prog)s [@RECIPE] [--FLAG VALUE ...]')
    add_common_arguments(parser, betas=[0.9, 0.999])
    add_model_arguments(parser, MODELS)
    parser.set_defaults(blr=5e-4, min_lr=1e-6, epochs=100)
    add = parser.add_argument_group('fine-tuning').add_argument
    ratio, rate = number(float, 0, 1), number(float, 0)
    add('--layer_decay', type=ratio, default=0.65, help='learning rate of a block divided by that of the next')
    add('--drop_path', type=number(float, 0, 0.99), default=0.1, help='stochastic depth: rate of the last block')
    add('--aa', type=augmentation, default='rand-m9-mstd0.5-inc1', help="timm's RandAugment, or none")
    add('--reprob', type=ratio, default=0.25, help='probability of random erasing')
    add('--mixup', type=rate, default=0.8, help='alpha of Mixup, 0: off')
    add('--cutmix', type=rate, default=1.0, help='alpha of CutMix, 0: off')
    add('--smoothing', type=number(float, 0, 0.99), default=0.1, help='label smoothing')
    add('--crop_pct', type=number(float, 0.01, 1), help='crop of a test image over its resized side (default: 0.875)')
    add('--grad_checkpointing', action='store_true', help='less memory: activations are computed twice')
    add('--eval', action='store_true', help='only evaluate the weights of --init_from')
    add('--predict', nargs='+', metavar='PATH', help='only predict the classes of images and folders with --init_from')
    add('--json', action='store_true', help='predictions as JSON lines')
    return parser


def augmentation(text):
    """An argparse type: a RandAugment that timm can read, or 'none'."""
    try:
        if text != 'none':
            rand_augment_transform(text, {})
        return text
    except (AssertionError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither none nor a RandAugment policy such as rand-m9-mstd0.5-inc1"
        ) from None


def main(args):
    if args.predict:
        return predict(args)

    # --- Model and data -------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    settings = weights.settle(args)  # sizes, mean, std: from flags, --init_from or --model
    with as_input_error():
        model = create_encoder(settings.sizes, 'avg', args.drop_path)
    train_source, val_source = sources.open_labelled_sources(args, settings.sizes, only_val=args.eval)
    give_head(model, len(val_source.classes))
    model.set_grad_checkpointing(args.grad_checkpointing)
    origin = engine.initial_weights(args, model, settings, complete=args.eval)
    if args.eval:
        return engine.report_classifier(args, model, val_source, settings, origin)
    if args.mixup > 0 or args.cutmix > 0:  # one of them on every pair of images
        mixing = mix.Mix(args.mixup, args.cutmix, args.smoothing, len(val_source.classes), args.seed)
        criterion = SoftTargetCrossEntropy()
    else:
        mixing, criterion = None, LabelSmoothingCrossEntropy(args.smoothing)
    drop_path = mix.PlacedDropPath(model, args.seed)
    statistics = settings.mean, settings.std
    augment = transforms.finetune_transform(settings.sizes['img_size'], statistics, args.aa, args.reprob)
    samples = data.Samples(train_source, augment, seed=args.seed)
    if args.aa != 'none':
        image = samples.read(0, 0)[0]
        if image.dtype != torch.uint8 or len(image) not in (1, 3):
            raise InputError('RandAugment needs 8-bit images of 1 or 3 channels; for others give --aa none')

    # --- Run: output folder, checkpoint to resume, processes, device ----------------------------------------------
    schedule = optim.make_schedule(args, len(train_source), usual_batch=1024)
    if mixing and schedule.batch_size % 2:
        raise InputError(
            f'Mixup and CutMix mix pairs, but a device has {schedule.batch_size} of --total_batch_size '
            f'{schedule.total_batch_size} at a time; give even numbers, as --batch_size too, or --mixup 0 --cutmix 0'
        )
    run = engine.start_run(args, schedule, model, settings, val_source.classes)
    model.to(run.device)
    loader = engine.training_loader(run, samples, settings)
    val_loader = engine.classes_loader(args, val_source, settings, run.device)
    optimizer = optim.create_adamw(args, optim.param_groups(model, args.weight_decay, args.layer_decay), run)

    # --- Train ----------------------------------------------------------------------------------------------------
    def loss_fn(network, batch, place):
        imgs, labels = batch
        if mixing:
            imgs, labels = mixing(imgs, labels, place)
        drop_path.draw(len(imgs), place, run.device)
        with run.autocast():
            logits = network(imgs)
        return criterion(logits.float(), labels)

    title = f'Fine-tuning on {len(val_source.classes)} classes; {origin}'
    engine.train_classifier(run, model, optimizer, loss_fn, loader, val_loader, title)


def give_head(model, num_classes):
    """A fresh Linear on the pooled features, weights N(0, 2e-5) truncated, bias 0."""
    model.reset_classifier(num_classes)
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    torch.nn.init.zeros_(model.head.bias)


@torch.no_grad()
def predict(args):
    """Print the most probable classes of images, by a fine-tuned checkpoint of this project, which knows its flags.

    An image that cannot be read is reported, and the exit code is 1 at the end.
    """
    if not args.init_from:
        raise InputError('--predict needs a fine-tuned checkpoint: --init_from CHECKPOINT')
    settings = weights.settle(args)
    if not settings.classes:
        raise InputError(f'{args.init_from}: not a fine-tuned checkpoint of this project; it names no classes')
    with as_input_error():
        model = create_encoder(settings.sizes, 'avg')
    give_head(model, len(settings.classes))
    weights.load_weights(model, args.init_from, complete=True)
    device = distributed.start(distributed.choose_device(args.device), join=False)
    model.to(device).eval()
    crop_pct = args.crop_pct or settings.crop_pct
    transform = transforms.centre_transform(model.patch_embed.img_size, crop_pct, transforms.BICUBIC)
    for path, image in folders.given_images(args.predict, settings.sizes['in_chans'], args.background):
        imgs = transforms.normalise(transform(image)[None].to(device), settings.mean, settings.std)
        probabilities, indices = model(imgs)[0].softmax(0).topk(min(5, len(settings.classes)))
        top = {settings.classes[index]: round(p, 4) for p, index in zip(probabilities.tolist(), indices.tolist())}
        if args.json:
            print(json.dumps({'image': path, 'classes': top}))
        else:
            print(f'{path}  ' + '  '.join(f'{name} {p:.1%}' for name, p in top.items()))


if __name__ == '__main__':
    run_job(main, get_parser())
