"""Speed of a training step and of the loader, side by side with other implementations.

    python bench.py step                                   # ViT-B, beside its peers if installed
    python bench.py step --task finetune --variants ours ours+compile
    python bench.py step --variants ours ours+data --data_path IMAGES    # does the loader keep up?
    python bench.py loader --data_path IMAGES              # beside torchvision's ImageFolder

A step is forward, backward and optimiser on images that lie on the device; +data takes them from
the loader. Peers of pre-training are mmpretrain's MFF, ViT-B, and transformers' ViTMAE, which is
plain MAE, as `mae` is. They run in our loop with our optimiser: what differs is the model.

The variants take turns. Ratios are to the first variant in the same round. Figures are the median
of the rounds, with the lowest and the highest in brackets.
"""

import argparse
import datetime
import importlib.util
import itertools
import os
import platform
import re
import shlex
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torchvision
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as v1

import engine
from models_mff import ENCODER, MODELS, MaskedAutoencoderMFF, create_encoder, model_sizes
from models_upernet import UperNet, default_levels
from util import args as flags
from util import data, distributed, optim, segmentation, sources, transforms

PEERS = {'mmpretrain': 'ours', 'transformers': 'mae'}  # and which of ours is the same model
STATISTICS = {'mean': [0.5] * 3, 'std': [0.5] * 3}
VARIANTS = (
    'ours or mae, with +compile, +checkpointing or +data; mmpretrain; transformers '
    '(default: ours, ours+compile, and the peers that are installed)'
)


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_input_arguments(parser)
    add, count = parser.add_argument_group('benchmark').add_argument, flags.number(int, 1)
    add('what', choices=['step', 'loader'])
    add('--model', choices=MODELS, default='vit_base_patch16', help='its size')
    add('--input_size', type=count, help="side of the images (default: the model's)")
    add('--task', choices=['pretrain', 'finetune', 'segment'], default='pretrain', help='of a step')
    add('--variants', nargs='+', metavar='NAME', help=VARIANTS)
    add('--steps', type=count, help='of a turn (default: 10 on a GPU and of the loader, else 1)')
    add('--rounds', type=count, default=5, help='turns of each variant')
    add('--resized', metavar='PATH', help='a smaller copy of --data_path, for the loader')
    return parser


def main(args):
    """Print a table, and return its rows, [{column: text}]."""
    device = distributed.start(args.device)
    on_gpu = device.type == 'cuda'
    args.batch_size = args.batch_size or (256 if on_gpu else 16)
    args.steps = args.steps or (10 if on_gpu or args.what == 'loader' else 1)
    if args.num_workers is None:
        args.num_workers = data.default_workers()
    rows = {'step': bench_step, 'loader': bench_loader}[args.what](args, device)
    print('\n'.join([*environment(device).values(), '', markdown(rows)]), flush=True)
    return rows


def take_turns(calls, args, device, warm_up=1):
    """{name: [work per second in each turn]} of {name: (a function to call, its work)}."""
    rates = {name: [] for name in calls}
    for number in range(args.rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            call, work = calls[name]
            for _ in range(warm_up):
                call()
            synchronise(device)
            began = time.perf_counter()
            for _ in range(args.steps):
                call()
            synchronise(device)
            rates[name].append(args.steps * work / (time.perf_counter() - began))
    return rates


# --- The step -------------------------------------------------------------------------------------


def bench_step(args, device):
    on_gpu = device.type == 'cuda'
    names = args.variants or ['ours', 'ours+compile']
    if not args.variants and args.task == 'pretrain':
        names += installed_peers()
    calls, memory = {'product': product(args, device)}, {}
    for name in names:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        step = create_step(name, args, device)
        for _ in range(3):
            step()
            if on_gpu:
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
                torch.cuda.reset_peak_memory_stats()
        calls[name] = step, args.batch_size
    rates = take_turns(calls, args, device)
    products = rates.pop('product')
    rows = compare(rates)
    for row, name in zip(rows, rates):
        flops = 3 * forward_flops(name, args)  # the backward pass is twice the forward pass
        shares = [flops * rate / most for rate, most in zip(rates[name], products)]
        row['of the matrix product'] = f'{statistics.median(shares):.1%}'
        row['product, TFLOP/s'] = spread([rate / 1e12 for rate in products])
        row['memory, GiB'] = f'{memory[name]:.3g}' if on_gpu else ''
    return rows


def installed_peers():
    return [peer for peer in PEERS if importlib.util.find_spec(peer)]


def product(args, device):
    """(a large matrix product in the precision of the step, its operations); on a CPU in fp32."""
    on_gpu = device.type == 'cuda'
    dtype = engine.mixed_precision(args.amp, device)[0].keywords['dtype'] if on_gpu else None
    side = 8192 if on_gpu else 1024  # bf16 without instructions for it is 60 times slower
    a, b, c = torch.randn(3, side, side, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=c), 2 * side**3


def create_step(variant, args, device):
    """() -> one step, which is that of engine.py."""
    name, *options = variant.split('+')
    torch.manual_seed(0)
    with device:
        model, images, targets, loss_fn = create(name, args)
    model.train()
    model.grad_checkpointing = 'checkpointing' in options
    batches = itertools.repeat((images, targets))
    if 'data' in options:
        batches = open_loader(args.data_path, args, device)
    autocast, scaler = engine.mixed_precision(args.amp, device)
    job = SimpleNamespace(seed=0, clip_grad=None, betas=(0.9, 0.95))
    if name in PEERS:
        groups = [{'params': [p for p in model.parameters() if p.requires_grad]}]
    else:
        groups = optim.param_groups(model, 0.05)
    run = SimpleNamespace(
        args=job,
        schedule=SimpleNamespace(accumulation=1, batch_size=args.batch_size),
        step=0,
        device=device,
        network=distributed.wrap(model, device, 'compile' in options),
        optimizer=optim.create_adamw(job, groups, 1e-4, device),
        scaler=scaler,
        fp16_scaler=scaler if args.amp == 'fp16' else None,
    )

    def loss_in_precision(network, images, targets):
        with autocast():
            return loss_fn(network, images, targets)

    return lambda: engine.optimizer_step(run, loss_in_precision, batches)


def create(name, args):
    """(model, random images (N, 3, H, W) and targets, loss_fn(model, images, targets))."""
    sizes, N = model_sizes(args.model, img_size=args.input_size), args.batch_size
    H, W = sizes['img_size']
    images = torch.randn(N, 3, H, W)
    if args.task == 'segment':
        heads = {'levels': default_levels(sizes['depth']), 'channels': sizes['embed_dim']}
        encoder = {key: sizes[key] for key in ENCODER}
        model = UperNet(**encoder, **heads, num_classes=150, drop_path=0.1)
        masks, loss = torch.randint(150, (N, H, W)), segmentation.segmentation_loss
        return model, images, masks, lambda m, x, masks: loss(*m(x, resize=False), masks)
    if args.task == 'finetune':
        model = create_encoder(sizes, 'avg', drop_path=0.1)
        model.reset_classifier(1000)
        mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=1000)
        criterion = SoftTargetCrossEntropy()

        def loss_fn(model, images, labels):
            images, targets = mixup(images.clone(), labels)
            return criterion(model(images), targets)

        return model, images, torch.randint(1000, (N,)), loss_fn
    noise = torch.rand(N, H * W // sizes['patch_size'] ** 2)
    if name == 'mmpretrain':  # pip install mmpretrain==1.2.0 mmengine==0.10.7 mmcv-lite==2.2.0
        import mmpretrain

        model = mmpretrain.get_model('mff_vit-base-p16_8xb512-amp-coslr-300e_in1k')
        return model, images, noise, lambda m, x, _: m.loss(x, None)['loss']
    if name == 'transformers':
        return create_transformers(sizes), images, noise, lambda m, x, noise: m(x, noise=noise).loss
    if name == 'mae':
        sizes['fuse_layers'] = sizes['fuse_layers'][-1:]
    return MaskedAutoencoderMFF(**sizes), images, noise, lambda m, x, noise: m(x, 0.75, noise)[0]


def create_transformers(sizes):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=sizes['img_size'][0],
        patch_size=sizes['patch_size'],
        hidden_size=sizes['embed_dim'],
        num_hidden_layers=sizes['depth'],
        num_attention_heads=sizes['num_heads'],
        intermediate_size=int(sizes['mlp_ratio'] * sizes['embed_dim']),
        decoder_hidden_size=sizes['decoder_embed_dim'],
        decoder_num_hidden_layers=sizes['decoder_depth'],
        decoder_num_attention_heads=sizes['decoder_num_heads'],
        decoder_intermediate_size=int(sizes['mlp_ratio'] * sizes['decoder_embed_dim']),
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config)


def forward_flops(variant, args):
    """Floating-point operations of one image's forward pass, two per multiply-add, in products."""
    name = variant.partition('+')[0]
    two = argparse.Namespace(**vars(args) | {'batch_size': 2})  # BatchNorm refuses one
    with torch.device('meta'):
        model, images, targets, loss_fn = create(PEERS.get(name, name), two)
        # Attention in products that torch counts: not those of the CPU's fused one
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss_fn(model.train(), images, targets)
    return counter.get_total_flops() / 2


# --- The loader -----------------------------------------------------------------------------------


def bench_loader(args, device):
    loaders = {'ImageFolder': open_image_folder(args, device)}
    loaders['ours'] = open_loader(args.data_path, args, device)
    if args.resized:
        loaders['resized'] = open_loader(args.resized, args, device)
    calls = {name: (loader.__next__, args.batch_size) for name, loader in loaders.items()}
    queue = 2 * args.num_workers  # was filled in the others' turns
    return compare(take_turns(calls, args, device, warm_up=1 + queue))


def open_loader(path, args, device):
    """The loader of main_pretrain.py, for the images of a path, without end."""
    sizes, N = model_sizes(args.model, img_size=args.input_size), args.batch_size
    source, _ = sources.open_sources(argparse.Namespace(**vars(args) | {'data_path': path}), sizes)
    num_patches = sizes['img_size'][0] * sizes['img_size'][1] // sizes['patch_size'] ** 2
    samples = data.Samples(source, transforms.pretrain_transform(sizes['img_size']), num_patches)
    keys = ([divmod(N * i + k, len(source)) for k in range(N)] for i in itertools.count())
    return data.Loader(samples, keys, device, SimpleNamespace(**STATISTICS), args.num_workers)


def open_image_folder(args, device):
    """The same as most projects have it: PIL, v1 transforms to float, torch's DataLoader."""
    side = model_sizes(args.model, img_size=args.input_size)['img_size'][0]
    crop = [v1.Resize(side), v1.RandomCrop(side, padding=4, padding_mode='reflect')]
    to_float = [v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(**STATISTICS)]
    images = torchvision.datasets.ImageFolder(args.data_path, v1.Compose([*crop, *to_float]))
    endless = RandomSampler(images, replacement=True, num_samples=10**9)
    options = {'num_workers': args.num_workers, 'pin_memory': device.type == 'cuda'}
    loader = DataLoader(images, args.batch_size, sampler=endless, **options)
    return ([part.to(device, non_blocking=True) for part in batch] for batch in loader)


# --- Tables ---------------------------------------------------------------------------------------


def compare(rates):
    """Rows of {name: [rate of each round]}: speeds, and ratios to the first."""
    first, *_ = rates.values()
    base = next(iter(rates))
    return [
        {
            'variant': name,
            f'speed : {base}': spread([a / b for a, b in zip(values, first)]),
            'images/s': spread(values),
        }
        for name, values in rates.items()
    ]


def spread(values):
    """'median (lowest to highest)'."""
    middle, low, high = (f'{f(values):.3g}' for f in (statistics.median, min, max))
    return f'{middle} ({low} to {high})'


def markdown(rows):
    """A table of rows {column: text}."""
    lines = [list(rows[0]), ['---'] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def environment(device):
    """What a figure cannot be read without: {'command', 'device', 'versions', 'date'}."""
    models = []
    if os.path.exists('/proc/cpuinfo'):
        models = re.findall(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.M)
    name = models[0] if models else platform.machine()
    cpu = f'{name}, {torch.get_num_threads()} of {os.cpu_count()} cores'
    on_gpu = device.type == 'cuda'
    script = os.path.relpath(sys.argv[0]).removesuffix('.py').replace(os.sep, '.')
    return {
        'command': shlex.join(['python', '-m', script, *sys.argv[1:]]),
        'device': f'{torch.cuda.get_device_name(device)}; {cpu}' if on_gpu else cpu,
        'versions': f'Python {platform.python_version()}, torch {torch.__version__}, torchvision '
        f'{torchvision.__version__}, timm {timm.__version__}',
        'date': str(datetime.date.today()),
    }


def synchronise(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


if __name__ == '__main__':
    flags.run_job(main, get_parser())
