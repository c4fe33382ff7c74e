"""Pre-train a masked autoencoder with multi-level feature fusion.

    python main_pretrain.py @recipes/demo_pretrain.txt                             # no data, no GPU, two minutes
    python main_pretrain.py @recipes/one_gpu_pretrain.txt --data_path IMAGES       # any folder of images
    torchrun --nproc_per_node=8 main_pretrain.py @recipes/vit_base_300e_pretrain.txt --data_path IMAGENET

The same line goes on from the last checkpoint if it was interrupted. Later flags win over earlier ones and over
the recipe's; a recipe's total batch is the same on any number of GPUs.
"""

import argparse
import os

import torch

import engine
from models_mff import MODELS
from util import checkpoint, data, design_choices, distributed, optim, transforms
from util.args import ArgumentParser, InputError, add_common_arguments, as_input_error, number, run


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_common_arguments(parser)
    group = parser.add_argument_group('pre-training')
    add = group.add_argument
    add('--model', default='mff_vit_base_patch16', help=f'{", ".join(MODELS)} (default: %(default)s)')
    layer = number(int, 0)
    add('--fuse_layers', type=layer, nargs='+', help='fused blocks; only the last: plain MAE (default: by model)')
    ratio = number(float, 0, 1)
    add(
        '--mask_ratio', type=ratio, default=0.75, help='share of patches hidden from the encoder (default: %(default)s)'
    )
    boolean = argparse.BooleanOptionalAction
    add('--norm_pix_loss', action=boolean, default=True, help='standardise each target patch (default: yes)')
    add('--crop', choices=['simple', 'rrc'], default='simple', help="MFF's crop or MAE's (default: %(default)s)")
    add('--grad_checkpointing', action=boolean, default=False, help='less memory: activations are computed twice')
    epochs = number(int, 1)
    add('--eval_every', type=epochs, default=1, help='epochs between validation losses (default: %(default)s)')
    add('--picture_every', type=epochs, default=20, help='epochs between reconstructions (default: %(default)s)')
    design_choices.add_arguments(parser)
    return parser


def main(args):
    # --- Everything that can be wrong, before devices and workers are started ---------------------------------
    device_name = distributed.choose_device(args.device)
    torch.manual_seed(args.seed)
    with as_input_error():
        model = design_choices.create_model(args)  # of models_mff, unless a flag asks for one of the alternatives
    model.grad_checkpointing = args.grad_checkpointing
    size, num_patches = model.patch_embed.img_size, model.patch_embed.num_patches
    if not 0 < int(num_patches * (1 - args.mask_ratio)) < num_patches:
        raise InputError(f'--mask_ratio {args.mask_ratio} of {num_patches} patches leaves none visible or none hidden')
    origin = engine.initial_weights(args, model)
    statistics = transforms.pixel_statistics(args)
    train_source, val_source = data.open_sources(args, size)
    plan = engine.make_plan(args, train_source, model)

    # --- Model and optimiser ----------------------------------------------------------------------------------
    device = distributed.start(device_name)
    model.to(device)
    groups = optim.param_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=args.betas, fused=device.type in ('cuda', 'cpu'))
    autocast, scaler = distributed.mixed_precision(args.amp, device)

    def loss_fn(model, batch):
        imgs, noise = batch
        with autocast():
            return model(imgs, args.mask_ratio, noise)[0]

    def fusion_weights():
        weights = model.fusion_weights.tolist()
        return {f'fusion/layer_{layer:02d}': weight for layer, weight in zip(model.fuse_layers, weights)}

    # --- Data -------------------------------------------------------------------------------------------------
    samples = data.Samples(train_source, transforms.pretrain_transform(size, args.crop), num_patches, args.seed)
    loader = data.Loader(samples, plan.batch_keys(), device, statistics, args.num_workers, plan.bad)
    val_samples = data.Samples(val_source or train_source, transforms.centre_transform(size), num_patches)
    if val_source:  # always with the same masks: fixed_batches are of epoch 0
        val_keys = data.fixed_batches(len(val_source), plan.batch_size, plan.rank, plan.world_size)
        val_bad = data.BadImages(len(val_source), args.max_bad, args.output_dir)
        val_loader = data.Loader(val_samples, val_keys, device, statistics, args.num_workers, val_bad, leave_out=True)

    # --- Train ------------------------------------------------------------------------------------------------
    def end_of_epoch(epoch, step, log):
        if val_source and (epoch % args.eval_every == 0 or epoch == args.epochs):
            log.entry(step, epoch, engine.evaluate(model, val_loader, lambda *batch: {'val_loss': loss_fn(*batch)}))
        if plan.rank == 0 and (epoch % args.picture_every == 0 or epoch == args.epochs):
            draw_reconstruction(model, val_samples, statistics, args, log, step)

    size_in_words = f'{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters'
    title = f'{size_in_words}, fusing {model.fuse_layers}; {origin}'
    engine.train(plan, model, optimizer, scaler, loss_fn, loader, title, end_of_epoch, fusion_weights)
    if plan.rank == 0:
        done = 'Training was complete before' if plan.start == plan.total_steps else 'Done'
        print(
            f'{done}. In {args.output_dir}: {checkpoint.LAST}, reconstruction.png, log.jsonl, TensorBoard events\n'
            f'  curves:          tensorboard --logdir {args.output_dir}\n'
            f'  as a picture:    python -m util.visualize curves {args.output_dir}\n'
            f'  reconstruction:  python -m util.visualize reconstruct {os.path.join(args.output_dir, checkpoint.LAST)} '
            'IMAGE ...'
        )


def draw_reconstruction(model, samples, statistics, args, log, step, count=8):
    """reconstruction.png and TensorBoard: images spread over a data set, always the same with the same masks."""
    from util.visualize import reconstruction_figure  # matplotlib is needed only here

    count = min(count, len(samples))
    keys = [(0, (i * len(samples) // count + i) % len(samples)) for i in range(count)]  # + i: of different classes
    images, noise, _ = torch.utils.data.default_collate([samples[key] for key in keys])
    imgs, noise = (x.to(model.pos_embed.device) for x in (transforms.normalise(images, *statistics), noise))
    figure = reconstruction_figure(model, imgs, statistics, args.mask_ratio, noise)
    with log.going_on():
        figure.savefig(os.path.join(args.output_dir, 'reconstruction.png'))
    log.figure('reconstruction', figure, step)


if __name__ == '__main__':
    run(main, get_parser())
