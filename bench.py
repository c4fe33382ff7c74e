"""Speed of a training step and of the loader, side by side with other implementations.

    python bench.py step                                   # ViT-B, beside its peers if installed
    python bench.py step --task finetune --variants ours ours+compile
    python bench.py step --variants ours ours+data --data_path IMAGES    # does the loader keep up?
    python bench.py loader --data_path IMAGES              # beside torchvision's ImageFolder

A step is that of engine.py on images that lie on the device; +data takes them from the loader. The
peers, of ViT-B's pre-training, are mmpretrain's MFF and transformers' ViTMAE, which is plain MAE,
as `mae` is. They run in our loop with our optimiser: what differs is the model.

The variants take turns. Ratios are to the first variant in the same round. Figures are the median
of the rounds, with the lowest and the highest in brackets.
"""

import datetime
import importlib.util
import itertools
import os
import platform
import re
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.data import Mixup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as v1

import engine
from models_mff import ENCODER, MODELS, MaskedAutoencoderMFF, create_encoder, model_sizes
from models_upernet import UperNet, default_levels
from util import args as flags
from util import data, distributed, segmentation, sources, transforms
from util.errors import InputError

PEERS = {'mmpretrain': 'ours', 'transformers': 'mae'}  # and which of ours is the same model
OPTIONS = {'compile', 'checkpointing', 'data'}
STATISTICS = {'mean': [0.5] * 3, 'std': [0.5] * 3}


def get_parser():
    parser = flags.ArgumentParser(__doc__)
    flags.add_input_arguments(parser)
    add, count = parser.add_argument_group('benchmark').add_argument, flags.number(int, 1)
    add('what', choices=['step', 'loader'])
    add('--model', choices=MODELS, default='vit_base_patch16', help='its size')
    add('--input_size', type=count, help="side of the images (default: the model's)")
    add('--task', choices=['pretrain', 'finetune', 'segment'], default='pretrain', help='of a step')
    names = f'ours, mae, {", ".join(PEERS)}, each with +compile, +checkpointing, +data'
    add('--variants', nargs='+', metavar='NAME', help=f'{names} (default: all that are installed)')
    add('--rounds', type=count, default=5, help='turns of each variant')
    return parser


def main(args):
    """Print a table, and return its rows, [{column: text}]."""
    device = distributed.start(args.device)
    args.batch_size = args.batch_size or (256 if device.type == 'cuda' else 16)
    if args.num_workers is None:
        args.num_workers = data.default_workers()
    rows = (bench_step if args.what == 'step' else bench_loader)(args, device)
    print('\n'.join([*environment(device).values(), '', markdown(rows)]), flush=True)
    return rows


def take_turns(calls, rounds, steps, warm_up=0):
    """{name: [work per second in each round]} of {name: (a function to call, its work)}."""
    rates = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            call, work = calls[name]
            for _ in range(warm_up):
                call()
            timer = Timer('call()', globals={'call': call}, num_threads=torch.get_num_threads())
            rates[name].append(work / timer.timeit(steps).mean)
    return rates


# --- The step -------------------------------------------------------------------------------------


def bench_step(args, device):
    on_gpu = device.type == 'cuda'
    calls, memory = {'product': product(args, device)}, {}
    for name in args.variants or ['ours', 'ours+compile', *models(args)[1:]]:
        before = torch.cuda.memory_allocated()  # 0 on a CPU
        step = create_step(name, args, device)
        for _ in range(3):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            step()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        calls[name] = step, args.batch_size
    rates = take_turns(calls, args.rounds, steps=10 if on_gpu else 1)
    products = rates.pop('product')
    rows = compare(rates)
    for row, name in zip(rows, rates):
        flops = 3 * forward_flops(name, args)  # the backward pass is twice the forward pass
        shares = [flops * rate / most for rate, most in zip(rates[name], products)]
        row['of the matrix product'] = f'{statistics.median(shares):.1%}'
        row['product, TFLOP/s'] = spread([rate / 1e12 for rate in products])
        row['memory, GiB'] = f'{memory[name]:.3g}' if on_gpu else ''
    return rows


def models(args):
    """Names of the models that can do the task; PEERS pre-train ViT-B."""
    peers = [peer for peer in PEERS if importlib.util.find_spec(peer)]
    is_base = args.model == 'vit_base_patch16' and not args.input_size
    return ['ours', 'mae', *(peers if is_base else [])] if args.task == 'pretrain' else ['ours']


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
    if name not in models(args) or not OPTIONS.issuperset(options):
        raise InputError(f'--variants {variant}: here there are {", ".join(models(args))}')
    torch.manual_seed(0)
    with device:
        model, *batch, loss_fn = create(name, args, args.batch_size)
    model.train()
    model.grad_checkpointing = 'checkpointing' in options
    autocast, scaler = engine.mixed_precision(args.amp, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run = SimpleNamespace(
        args=SimpleNamespace(seed=0, clip_grad=None),
        schedule=SimpleNamespace(accumulation=1, batch_size=args.batch_size),
        step=0,
        device=device,
        network=distributed.wrap(model, device, 'compile' in options),
        optimizer=torch.optim.AdamW(trained, 1e-4, (0.9, 0.95), fused=True),
        scaler=scaler,
        fp16_scaler=scaler if scaler.get_scale() != 1.0 else None,  # as engine.Run
    )
    batches = open_loader(args, device) if 'data' in options else itertools.repeat(batch)

    def loss_in_precision(network, images, targets):
        with autocast():
            return loss_fn(network, images, targets)

    return lambda: engine.optimizer_step(run, loss_in_precision, batches)


def create(name, args, N):
    """(model, random images (N, 3, H, W), targets, loss_fn(model, images, targets))."""
    sizes = model_sizes(args.model, img_size=args.input_size)
    H, W = sizes['img_size']
    images = torch.randn(N, 3, H, W)
    noise = torch.rand(N, H * W // sizes['patch_size'] ** 2)
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

        def mixed_loss(model, images, labels):
            images, targets = mixup(images.clone(), labels)
            return F.cross_entropy(model(images), targets)

        return model, images, torch.randint(1000, (N,)), mixed_loss
    if name == 'mmpretrain':  # pip install mmpretrain==1.2.0 mmengine==0.10.7 mmcv-lite==2.2.0
        import mmpretrain

        model = mmpretrain.get_model('mff_vit-base-p16_8xb512-amp-coslr-300e_in1k')
        return model, images, noise, lambda m, x, _: m.loss(x, None)['loss']
    if name == 'transformers':  # whose defaults are ViT-B
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        model = ViTMAEForPreTraining(ViTMAEConfig(layer_norm_eps=1e-6, norm_pix_loss=True))
        return model, images, noise, lambda m, x, noise: m(x, noise=noise).loss
    if name == 'mae':
        sizes['fuse_layers'] = sizes['fuse_layers'][-1:]
    return MaskedAutoencoderMFF(**sizes), images, noise, lambda m, x, noise: m(x, 0.75, noise)[0]


def forward_flops(variant, args):
    """Floating-point operations of one image's forward pass, two per multiply-add, in products."""
    name = variant.partition('+')[0]
    with torch.device('meta'):
        model, *batch, loss_fn = create(PEERS.get(name, name), args, 2)  # BatchNorm refuses one
        # Attention in products that torch counts: not those of the CPU's fused one
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss_fn(model.train(), *batch)
    return counter.get_total_flops() / 2


# --- The loader -----------------------------------------------------------------------------------


def bench_loader(args, device):
    loaders = {'ImageFolder': open_image_folder(args, device), 'ours': open_loader(args, device)}
    calls = {name: (loader.__next__, args.batch_size) for name, loader in loaders.items()}
    queue = 2 * args.num_workers  # was filled in the other's turn
    return compare(take_turns(calls, args.rounds, steps=10, warm_up=queue))


def open_loader(args, device):
    """The loader of main_pretrain.py, without end."""
    sizes, N = model_sizes(args.model, img_size=args.input_size), args.batch_size
    source, _ = sources.open_sources(args, sizes)
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
    base, *_ = rates
    ratios = {name: [a / b for a, b in zip(rates[name], rates[base])] for name in rates}
    return [
        {'variant': name, f'speed : {base}': spread(ratios[name]), 'images/s': spread(rates[name])}
        for name in rates
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
    name, cpuinfo = platform.machine(), Path('/proc/cpuinfo')
    if cpuinfo.exists():
        name = (re.findall(r'^model name\s*: (.+)', cpuinfo.read_text(), re.M) or [name])[0]
    cpu = f'{name}, {torch.get_num_threads()} of {os.cpu_count()} cores'
    modules = ', '.join(f'{m.__name__} {m.__version__}' for m in (torch, torchvision, timm))
    return {
        'command': shlex.join(['python', *sys.orig_argv[1:]]),
        'device': f'{torch.cuda.get_device_name(device)}; {cpu}' if device.type == 'cuda' else cpu,
        'versions': f'Python {platform.python_version()}, {modules}',
        'date': str(datetime.date.today()),
    }


if __name__ == '__main__':
    flags.run_job(main, get_parser())
