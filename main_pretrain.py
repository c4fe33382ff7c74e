"""Pre-train a masked autoencoder with multi-level feature fusion.

    python main_pretrain.py @recipes/demo_pretrain.txt               # no data, no GPU, two minutes
    python main_pretrain.py @recipes/small_pretrain.txt --data_path IMAGES    # hundreds of images
    torchrun --nproc_per_node=8 main_pretrain.py @recipes/vit_base_300e_pretrain.txt \\
        --data_path IMAGENET

The same command resumes an interrupted run from its last checkpoint. Later flags win over earlier
ones and over the recipe's. A recipe's total batch is the same on any number of GPUs.
"""

import argparse

import torch

import engine
from models_mff import MODELS, MaskedAutoencoderMFF
from util import args as flags
from util import data, distributed, optim, sources, transforms, visualize, weights
from util.errors import InputError, as_input_error


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_common_arguments(parser, betas=[0.9, 0.95])
    flags.add_model_arguments(parser, MODELS, decoder=True)
    boolean = argparse.BooleanOptionalAction
    add = parser.add_argument_group('pre-training').add_argument
    add('--mask_ratio', type=flags.number(float, 0, 1), default=0.75, help='share to hide')
    add('--norm_pix_loss', action=boolean, default=True, help='standardise each target patch')
    crops = ['simple', 'rrc', 'none']
    add('--crop', choices=crops, default='simple', help="MFF's, MAE's or none")
    add('--grad_checkpointing', action=boolean, default=False, help='less memory, more time')
    epochs = {'type': flags.number(int, 1), 'metavar': 'EPOCHS'}
    add('--knn_every', **epochs, help='between 20-NN accuracies')
    add('--picture_every', **epochs, default=20, help='between reconstructions')
    return parser


def main(args, build=MaskedAutoencoderMFF):
    # --- Model ------------------------------------------------------------------------------------
    device = distributed.start(args.device)
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings = weights.settings_of(args, file)  # sizes, mean, std: flags, --init_from or --model
    with as_input_error():
        model = build(**settings.sizes, norm_pix_loss=args.norm_pix_loss)
    model.grad_checkpointing = args.grad_checkpointing
    size, num_patches = model.patch_embed.img_size, model.patch_embed.num_patches
    if not 0 < int(num_patches * (1 - args.mask_ratio)) < num_patches:
        raise InputError(f'--mask_ratio {args.mask_ratio} hides none or all of the patches')
    origin = weights.load(model, file) if file else 'random weights'
    model.to(device)

    # --- Data -------------------------------------------------------------------------------------
    train_source, val_source = sources.open_sources(args, settings.sizes)
    augment = transforms.pretrain_transform(size, args.crop)
    centre = transforms.centre_transform(size)
    train_set = data.Samples(train_source, augment, num_patches, args.seed)
    val_set = data.Samples(val_source or train_source, centre, num_patches)  # always the same masks
    schedule = optim.make_schedule(args, len(train_source), usual_batch=4096)

    # --- Optimiser, and the checkpoint to resume --------------------------------------------------
    groups = optim.param_groups(model, args.weight_decay)
    optimizer = optim.create_adamw(args, groups, schedule.lr, device)
    run = engine.Run(args, schedule, settings, model, optimizer, device)
    run.log.say('\n'.join([f'Fusing blocks {list(model.fuse_layers)}; {origin}', *settings.notes]))
    loader = run.loader(train_set)
    if val_source:
        val_loader = engine.evaluation_loader(args, device, val_set, settings)
    if args.knn_every:
        neighbours = engine.Neighbours(args, device, train_source, val_source, centre, settings)

    # --- Train ------------------------------------------------------------------------------------
    def loss_fn(network, images, noise):
        with run.autocast():
            return network(images, args.mask_ratio, noise)[0]

    def measure(model, images, noise):
        return {'val_loss': loss_fn(model, images, noise)}

    for epoch in run.epochs():
        if args.knn_every and run.step == 0:
            run.log.entry(0, neighbours.accuracy(run))
        engine.train_epoch(run, loss_fn, loader, epoch)
        levels = zip(model.fuse_layers, model.fusion_weights.tolist())
        values = {f'fusion/layer_{layer:02d}': weight for layer, weight in levels}
        if args.knn_every and run.is_due(epoch, args.knn_every):
            values |= neighbours.accuracy(run)
        if val_source and run.is_due(epoch, args.eval_every):
            values |= engine.evaluate(model, val_loader, measure, run)
        run.log.entry(run.step, values)
        if run.is_due(epoch, args.picture_every) and distributed.is_first():
            images, noise = engine.examples(val_set, settings, device)
            picture = visualize.reconstruction_figure(
                model, images, (settings.mean, settings.std), args.mask_ratio, noise
            )
            run.log.figure('reconstruction', picture, run.step)
        run.saver.end_epoch(epoch, run.step)
    distributed.stop()


if __name__ == '__main__':
    flags.run_job(main, get_parser())
