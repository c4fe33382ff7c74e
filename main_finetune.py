"""Fine-tune a pre-trained encoder as a classifier, evaluate one, or predict the classes of images.

    python main_finetune.py @recipes/vit_base_finetune.txt --data_path IMAGENET --init_from CHECKPOINT
    python main_finetune.py --eval --init_from mae_finetuned_vit_base.pth --data_path IMAGENET
    python main_finetune.py --predict IMAGE ... --init_from output/vit_base_finetune/checkpoint-best.pth

The classifier is timm's VisionTransformer; --init_from reads every known checkpoint (util/weights.py). Resuming,
processes and recipes are as in main_pretrain.py.
"""

import argparse
import json

import torch
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

import engine
from models_mff import MODELS, create_encoder
from util import checkpoint, data, distributed, optim, transforms
from util.args import ArgumentParser, InputError, add_common_arguments, as_input_error, number, run


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.set_defaults(blr=5e-4, betas=[0.9, 0.999], min_lr=1e-6, warmup_epochs=5, epochs=100, total_batch_size=1024)
    add = parser.add_argument_group('fine-tuning').add_argument
    names = ', '.join(name.removeprefix('mff_') for name in MODELS)
    ratio, rate = number(float, 0, 1), number(float, 0)
    add('--model', default='vit_base_patch16', help=f'{names} (default: %(default)s)')
    add('--layer_decay', type=ratio, default=0.65, help='learning rate of a block over the next (default: %(default)s)')
    add('--drop_path', type=ratio, default=0.1, help='at the last block (default: %(default)s)')
    add(
        '--aa',
        type=augmentation,
        default='rand-m9-mstd0.5-inc1',
        help='RandAugment of timm, or none (default: %(default)s)',
    )
    add('--reprob', type=ratio, default=0.25, help='probability of random erasing (default: %(default)s)')
    add('--mixup', type=rate, default=0.8, help='alpha of Mixup, 0: off (default: %(default)s)')
    add('--cutmix', type=rate, default=1.0, help='alpha of CutMix, 0: off (default: %(default)s)')
    add('--smoothing', type=ratio, default=0.1, help='label smoothing (default: %(default)s)')
    add(
        '--crop_pct', type=ratio, default=0.875, help="share of a test image's side that is seen (default: %(default)s)"
    )
    add('--grad_checkpointing', action='store_true', help='less memory: activations are computed twice')
    add('--eval', action='store_true', help='only evaluate the weights of --init_from')
    add('--predict', nargs='+', metavar='IMAGE', help='only predict the classes of images with --init_from')
    add('--json', action='store_true', help='predictions as JSON lines')
    return parser


def augmentation(text):
    """An argparse type: a RandAugment that timm can read, or 'none'."""
    try:
        if text != 'none':
            rand_augment_transform(text, {})
        return text
    except (AssertionError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is neither none nor such as rand-m9-mstd0.5-inc1") from None


def main(args):
    if args.predict:
        return predict(args)
    torch.manual_seed(args.seed)
    with as_input_error():
        model = create_encoder(args.model, args.input_size, args.in_chans, 'avg', args.drop_path)
    size = model.patch_embed.img_size
    train_source, val_source = data.open_labelled_sources(args, size)
    give_head(model, len(val_source.classes))
    model.set_grad_checkpointing(args.grad_checkpointing)
    origin = engine.initial_weights(args, model, needed=args.eval, whole=args.eval)
    task = engine.prepare_classification(args, model, origin, size, train_source, val_source, args.eval)
    if args.eval:
        return engine.report(task)

    groups = optim.param_groups(model, args.weight_decay, args.layer_decay)
    fused = task.device.type in ('cuda', 'cpu')
    optimizer = torch.optim.AdamW(groups, lr=task.plan.lr, betas=args.betas, fused=fused)
    mix, criterion = None, LabelSmoothingCrossEntropy(args.smoothing)
    if args.mixup > 0 or args.cutmix > 0:  # one of them on every batch
        if task.plan.batch_size % 2:
            raise InputError(f'Mixup and CutMix mix pairs of images: --batch_size {task.plan.batch_size} must be even')
        mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=len(task.classes))
        criterion = SoftTargetCrossEntropy()

    def loss_fn(model, batch):
        imgs, labels = mix(*batch) if mix else batch
        with task.autocast():
            logits = model(imgs)
        return criterion(logits.float(), labels)

    transform = transforms.finetune_transform(size, transforms.pixel_statistics(args), args.aa, args.reprob)
    engine.train_classifier(task, optimizer, loss_fn, transform)


def give_head(model, num_classes):
    """A fresh Linear on the pooled features, weights N(0, 2e-5) truncated, bias 0."""
    model.reset_classifier(num_classes)
    torch.nn.init.trunc_normal_(model.head.weight, std=2e-5)
    torch.nn.init.zeros_(model.head.bias)


@torch.no_grad()
def predict(args):
    """Print the most probable classes of images, by a fine-tuned checkpoint of this project, which knows its flags."""
    if not args.init_from:
        raise InputError('--predict needs a fine-tuned checkpoint: --init_from CHECKPOINT')
    state = checkpoint.read_file(args.init_from)
    if not {'classes', 'args', 'model'} <= state.keys():
        raise InputError(f'{args.init_from}: not a fine-tuned checkpoint of this project, which would name the classes')
    flags, classes = argparse.Namespace(**state['args']), state['classes']
    model = create_encoder(flags.model, flags.input_size, flags.in_chans, 'avg')
    give_head(model, len(classes))
    checkpoint.load_weights(model, args.init_from, whole=True)
    device = distributed.start(distributed.choose_device(args.device))
    model.to(device).eval()
    transform = transforms.centre_transform(model.patch_embed.img_size, flags.crop_pct, transforms.BICUBIC)
    statistics = transforms.pixel_statistics(flags)
    for path in args.predict:
        image = transform(transforms.read_given_image(path, flags.in_chans))
        imgs = transforms.normalise(image[None].to(device), *statistics)
        probabilities, indices = model(imgs)[0].softmax(0).topk(min(5, len(classes)))
        top = {classes[index]: round(p, 4) for p, index in zip(probabilities.tolist(), indices.tolist())}
        print(json.dumps({'image': path, 'classes': top}) if args.json else
              f'{path}  ' + '  '.join(f'{name} {p:.1%}' for name, p in top.items()))  # fmt: skip


if __name__ == '__main__':
    run(main, get_parser())
