"""Pre-train a masked autoencoder with multi-level feature fusion.

    python main_pretrain.py @recipes/demo_pretrain.txt                             # no data, no GPU, two minutes
    python main_pretrain.py @recipes/small_pretrain.txt --data_path IMAGES         # a few hundred images or more
    torchrun --nproc_per_node=8 main_pretrain.py @recipes/vit_base_300e_pretrain.txt --data_path IMAGENET

The same command resumes an interrupted run from its last checkpoint. Later flags win over earlier ones and over the
recipe's. A recipe's total batch is the same on any number of GPUs.
"""

import argparse
import shlex

import torch

import engine
from models_mff import MODELS, MaskedAutoencoderMFF
from util import checkpoint, data, features, optim, sources, transforms, variants, visualize, weights
from util.args import ArgumentParser, add_common_arguments, add_model_arguments, number, run_job
from util.errors import InputError, as_input_error


def get_parser():
    parser = ArgumentParser(__doc__, usage='%(prog)s [@RECIPE] [--FLAG VALUE ...]')
    add_common_arguments(parser, betas=[0.9, 0.95])
    add_model_arguments(parser, MODELS, decoder=True)
    add, boolean = parser.add_argument_group('pre-training').add_argument, argparse.BooleanOptionalAction
    add('--mask_ratio', type=number(float, 0, 1), default=0.75, help='share of patches hidden from the encoder')
    add('--norm_pix_loss', action=boolean, default=True, help='standardise each target patch (default: yes)')
    add('--crop', choices=['simple', 'rrc', 'none'], default='simple', help="MFF's, MAE's or none")
    add('--grad_checkpointing', action=boolean, default=False, help='less memory: activations are computed twice')
    add('--knn_every', type=number(int, 1), metavar='EPOCHS', help='epochs between 20-NN accuracies; needs labels')
    variants.add_arguments(parser)
    return parser


def main(args):
    # --- Model ----------------------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    settings = weights.settle(args)  # sizes, mean, std: from flags, --init_from or --model
    with as_input_error():
        if variants.is_default(args):
            model = MaskedAutoencoderMFF(**settings.sizes, norm_pix_loss=args.norm_pix_loss)
        else:
            model = variants.create_model(args, settings)
    model.grad_checkpointing = args.grad_checkpointing
    size, num_patches = model.patch_embed.img_size, model.patch_embed.num_patches
    if not 0 < int(num_patches * (1 - args.mask_ratio)) < num_patches:
        raise InputError(f'--mask_ratio {args.mask_ratio} of {num_patches} patches leaves none visible or none hidden')
    origin = engine.initial_weights(args, model, settings)

    # --- Data -----------------------------------------------------------------------------------------------------
    train_source, val_source = sources.open_sources(args, settings.sizes)
    samples = data.Samples(train_source, transforms.pretrain_transform(size, args.crop), num_patches, args.seed)
    centre = transforms.centre_transform(size)
    val_samples = data.Samples(val_source or train_source, centre, num_patches)
    knn_parts = features.small_parts(train_source, val_source) if args.knn_every else ()

    # --- Run: output folder, checkpoint to resume, processes, device ----------------------------------------------
    schedule = optim.make_schedule(args, len(train_source), usual_batch=4096)
    run = engine.start_run(args, schedule, model, settings)
    model.to(run.device)
    statistics = settings.mean, settings.std
    loader = engine.training_loader(run, samples, settings)
    if val_source:  # always with the same masks
        val_loader = engine.evaluation_loader(args, run.device, val_samples, settings)
    knn_loaders = [
        engine.evaluation_loader(args, run.device, data.Samples(part, centre), settings) for part in knn_parts
    ]
    optimizer = optim.create_adamw(args, optim.param_groups(model, args.weight_decay), run)

    # --- Train ----------------------------------------------------------------------------------------------------
    def loss_fn(network, batch, place=None):
        imgs, noise = batch
        with run.autocast():
            return network(imgs, args.mask_ratio, noise)[0]

    def evaluate():
        return engine.evaluate(model, val_loader, lambda model, batch: {'val_loss': loss_fn(model, batch)})

    def draw():
        imgs, noise = examples(val_samples, statistics, run.device)
        return {'reconstruction': visualize.reconstruction_figure(model, imgs, statistics, args.mask_ratio, noise)}

    def fusion_weights():
        values = model.fusion_weights.tolist()
        return {f'fusion/layer_{layer:02d}': value for layer, value in zip(model.fuse_layers, values)}

    def neighbours():
        train, val = (features.extract(model, part_loader, run.autocast) for part_loader in knn_loaders)
        accuracy = features.neighbour_accuracy(train, val, 20, run.device)
        return {'val_knn_cls': accuracy['cls token'], 'val_knn_patches': accuracy['mean of patches']}

    events = engine.Events(
        evaluate=evaluate if val_source else None,
        draw=draw,
        numbers=fusion_weights,
        neighbours=neighbours if knn_loaders else None,
    )
    title = f'Pre-training, fusing blocks {list(model.fuse_layers)}; {origin}'
    engine.train(run, model, optimizer, loss_fn, loader, events, title)
    if run.rank == 0:
        done = 'Training was already complete' if run.start == schedule.total_steps else 'Done'
        output_dir, last = shlex.quote(args.output_dir), shlex.quote(f'{args.output_dir}/{checkpoint.LAST}')
        labelled = val_source is not None and train_source.labels is not None
        probe = '--knn 20' if labelled else '--features FEATURES.npz'
        print(
            f'{done}. In {args.output_dir}: {checkpoint.LAST}, reconstruction.png, log.jsonl, TensorBoard events\n'
            f'  curves:          tensorboard --logdir {output_dir}\n'
            f'  as a picture:    python -m util.visualize curves {output_dir}\n'
            f'  reconstruction:  python -m util.visualize reconstruct {last} --images IMAGE ...\n'
            f'  features:        python main_linprobe.py {probe} {engine.data_flags(args)} --init_from {last}'
        )


def examples(samples, statistics, device, count=8):
    """(imgs (N, C, H, W) normalised, noise (N, L)) of images spread over a data set, always the same."""
    count = min(count, len(samples))
    keys = [(0, i * (len(samples) - 1) // max(1, count - 1)) for i in range(count)]
    images, noise, _ = torch.utils.data.default_collate([samples[key] for key in keys])
    return transforms.normalise(images, *statistics).to(device), noise.to(device)


if __name__ == '__main__':
    run_job(main, get_parser())
