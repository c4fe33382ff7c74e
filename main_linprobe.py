"""Probe a frozen encoder: train a linear classifier on its features.

    python main_linprobe.py @recipes/vit_base_linprobe.txt --data_path IMAGENET \\
        --init_from CHECKPOINT

The feature is the cls token after the final LayerNorm, which MFF trained on the fused levels.
Resuming, processes and recipes are as in main_pretrain.py. Without training: tools/features.py.
"""

import torch
from timm.optim import Lars

import engine
import engine_classify
from models_mff import MODELS, create_encoder, random_encoder
from util import args as flags
from util import data, distributed, optim, sources, transforms, weights
from util.errors import InputError, as_input_error


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_common_arguments(parser)
    flags.add_model_arguments(parser, MODELS)
    flags.add_classifier_arguments(parser)
    parser.set_defaults(blr=0.1, weight_decay=0.0, epochs=90)
    add = parser.add_argument_group('probing').add_argument
    add('--momentum', type=flags.number(float, 0, 1), default=0.9, help='of LARS')
    return parser


def create_lars(head, lr, momentum, weight_decay):
    """LARS as in MAE: it adapts the rate of the weight, also without decay, not of the bias."""
    weight = {'params': [head.weight], 'always_adapt': True}
    bias = {'params': [head.bias], 'weight_decay': 0.0}
    return Lars([weight, bias], lr=lr, momentum=momentum, weight_decay=weight_decay)


def main(args):
    # --- Data, model ------------------------------------------------------------------------------
    device = distributed.start(args.device)
    if args.eval or args.report:
        return engine_classify.report(args, device)
    torch.manual_seed(args.seed)
    file = weights.read(args.init_from) if args.init_from else None
    settings = weights.settings_of(args, file)
    with as_input_error():
        if file:
            encoder = create_encoder(settings.sizes, 'token')
        else:
            encoder = random_encoder(settings.sizes)
    train_source, val_source = sources.open_sources(args, settings.sizes, labelled=True)
    classes = val_source.classes
    origin = weights.load(encoder, file) if file else 'random weights'
    model = engine_classify.LinearProbe(encoder, len(classes)).to(device)
    train_set = data.Samples(
        train_source, transforms.linprobe_transform(args, settings), seed=args.seed
    )

    # --- Optimiser, and the checkpoint to resume --------------------------------------------------
    schedule = optim.make_schedule(args, len(train_source), usual_batch=16384, at_least=2)
    if schedule.batch_size == 1:
        raise InputError('BatchNorm needs two images on a device at a time: --batch_size 2')
    optimizer = create_lars(model.head, schedule.lr, args.momentum, args.weight_decay)
    run = engine.Run(args, schedule, settings, model, optimizer, device, classes, True)
    run.log.say('\n'.join([f'Linear probe; {origin}', *settings.notes]))
    loader = run.loader(train_set)
    val_loader = engine_classify.classes_loader(args, device, val_source, settings)
    criterion = engine_classify.create_criterion(args, train_source, device)

    # --- Train ------------------------------------------------------------------------------------
    def loss_fn(network, imgs, labels):
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


if __name__ == '__main__':
    flags.run_job(main, get_parser())
