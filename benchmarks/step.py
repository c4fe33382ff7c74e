"""Speed and memory of a pre-training step, side by side with mmpretrain's MFF.

    python -m benchmarks.step                                     # ViT-B on this machine's GPU (bf16) or CPU (fp32)
    python -m benchmarks.step --models small base large --out output/step    # on a GPU with mmpretrain's fp16, too
    python -m benchmarks.step --profile                           # what takes the time

A step is forward, backward and optimiser on a batch that lies on the device, normalised; both sides draw the mask
and make the targets within it. Ours is what main_pretrain.py runs: its precision, parameter groups and fused AdamW.
mmpretrain's is its model and its optimiser wrapper, built as its recipe does (pip install -r
benchmarks/requirements.txt); before anything is timed, it must have as many parameters and, from the same weights
and mask, the same loss.

Each variant has a process of its own, so that one's memory does not hide the other's. The processes take turns, in
alternating order, and one of them times a large matrix product in the same precision: the ceiling.
"""

import importlib.util
import itertools
import multiprocessing
import resource
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
from benchmarks import report
from models_mff import MODELS, MaskedAutoencoderMFF, model_sizes
from util import distributed, optim
from util.args import ArgumentParser, number, run_job
from util.errors import RunError
from util.weights import convert_state_dict

SIZES = {name.split('_')[1]: name for name in MODELS}  # 'base': 'vit_base_patch16'
LR, WEIGHT_DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)
PRODUCTS = 10


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add('--models', nargs='+', choices=SIZES, default=['base'], help='(default: base)')
    add('--variants', nargs='+', choices=VARIANTS, help='(default: mff mff+compile mmpretrain, on a GPU all)')
    add('--batch_size', type=count, help='(default: 256 on a GPU, 16 elsewhere)')
    add('--steps', type=count, help='timed steps of a round, after one that is not (default: 20 on a GPU, else 2)')
    add('--rounds', type=count, default=5, help='turns of each variant')
    add('--device', default='auto', help='cuda or cpu (default: the first of them that is there)')
    add('--amp', choices=['auto', 'bf16', 'fp16', 'none'], default='auto', help='as in main_pretrain.py')
    add('--profile', action='store_true', help='only list the operators of a step of the first variant')
    add('--out', help='write OUT.md and OUT.json')
    return parser


def main(args):
    device = distributed.choose_device(args.device)
    on_gpu = device.startswith('cuda')
    args.batch_size = args.batch_size or (256 if on_gpu else 16)
    args.steps = args.steps or (20 if on_gpu else 2)
    variants = args.variants or [name for name in VARIANTS if on_gpu or name in ('mff', 'mff+compile', 'mmpretrain')]
    if args.profile:
        return profile(variants[0], args.models[0], device, args)
    if importlib.util.find_spec('mmpretrain') is None:
        print('mmpretrain is not installed: measured without it; pip install -r benchmarks/requirements.txt')
        variants = [variant for variant in variants if not variant.startswith('mmpretrain')]
    rows, rounds = [], {}
    for size in args.models:
        if any(variant.startswith('mmpretrain') for variant in variants):
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                print(pool.submit(check_peer, size).result(), flush=True)
        rates, memory = measure(variants, size, device, args)
        if not memory.keys() - {CEILING}:
            raise RunError(f'{size}: every variant failed; the reasons are above')
        rows += summarise(size, rates, memory)
        rounds[size] = {'rates': rates, 'memory': memory}
    report.publish(args.out, device, rows, rounds)


# --- What is measured -----------------------------------------------------------------------------------------


def our_step(size, device, amp, compiled=False, grad_checkpointing=False):
    """A function (images, micro-steps, whether to synchronise) that does one optimiser step, that of engine.py."""
    model = model_of_size(size).to(device).train()
    model.grad_checkpointing = grad_checkpointing
    groups = optim.param_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, LR, BETAS, fused=device.type in ('cuda', 'cpu'))
    autocast, scaler = distributed.mixed_precision(amp, device)
    network = distributed.wrap(model, device, compiled)

    def loss_fn(network, imgs, place):
        with autocast():
            return network(imgs)[0]

    def step(imgs, accumulation=1, synchronise=True):
        schedule = SimpleNamespace(accumulation=accumulation, batch_size=len(imgs))
        args = SimpleNamespace(seed=0, clip_grad=None)
        run = SimpleNamespace(args=args, schedule=schedule, scaler=scaler, device=device, rank=0, world_size=1)
        with distributed.no_sync(network, skip=not synchronise):
            engine.optimizer_step(run, 0, network, optimizer, loss_fn, itertools.repeat(imgs))

    return step


def peer_step(size, device, amp, compiled=False):
    """The same of mmpretrain: MFF.train_step with the wrapper and groups of its configs/mae, which MFF inherits."""
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper

    MMLogger.get_current_instance().setLevel('ERROR')  # it names every parameter
    model = peer_model(model_of_size(size)).to(device).train()
    if compiled:
        model.compile()
    dtype = distributed.mixed_precision(amp, device)[0].keywords['dtype']
    precision = {'type': 'AmpOptimWrapper', 'dtype': dtype, 'loss_scale': 'dynamic'} if dtype else {}
    no_decay = dict.fromkeys(['ln', 'bias', 'pos_embed', 'mask_token', 'cls_token'], {'decay_mult': 0.0})
    adamw = {'type': 'AdamW', 'lr': LR, 'betas': BETAS, 'weight_decay': WEIGHT_DECAY}
    wrapper = build_optim_wrapper(
        model, {'type': 'OptimWrapper', 'optimizer': adamw, 'paramwise_cfg': {'custom_keys': no_decay}, **precision}
    )
    return lambda imgs: model.train_step({'inputs': imgs, 'data_samples': None}, wrapper)


def product_step(size, device, amp):
    """PRODUCTS matrix products in the precision of the step: as many as keep the device as warm as a step does."""
    dtype = distributed.mixed_precision(amp, device)[0].keywords['dtype'] or torch.float32
    a, b, c = torch.randn(3, product_side(device), product_side(device), device=device, dtype=dtype)

    def step(imgs):
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=c)

    return step


def product_side(device):
    return 8192 if torch.device(device).type == 'cuda' else 2048


VARIANTS = {
    'mff': (our_step, {}),
    'mff+compile': (our_step, {'compiled': True}),
    'mff+checkpointing': (our_step, {'grad_checkpointing': True}),
    'mmpretrain': (peer_step, {}),
    'mmpretrain+compile': (peer_step, {'compiled': True}),
    'mmpretrain+fp16': (peer_step, {'amp': 'fp16'}),  # its recipe's
}
CEILING = 'product'  # a variant that is always measured


def model_of_size(size):
    torch.manual_seed(0)
    return MaskedAutoencoderMFF(**model_sizes(SIZES[size]))


def import_peer():
    """mmpretrain's class."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about parts of mmcv that MFF does not use
        from mmpretrain.models.selfsup.mff import MFF
    return MFF


def peer_model(model):
    """mmpretrain's MFF of the sizes and with the weights of model."""
    patch_size, width = model.patch_embed.patch_size[0], model.pos_embed.shape[-1]
    encoder, decoder = model.blocks[0], model.decoder_blocks[0]
    peer = import_peer()(
        backbone={
            'type': 'MFFViT',
            'arch': {
                'embed_dims': width,
                'num_layers': len(model.blocks),
                'num_heads': encoder.attn.num_heads,
                'feedforward_channels': encoder.mlp.fc1.out_features,
            },
            'img_size': model.patch_embed.img_size[0],
            'patch_size': patch_size,
            'out_indices': list(model.fuse_layers),
        },
        neck={
            'type': 'MAEPretrainDecoder',
            'num_patches': model.patch_embed.num_patches,
            'patch_size': patch_size,
            'embed_dim': width,
            'decoder_embed_dim': model.decoder_embed.out_features,
            'decoder_depth': len(model.decoder_blocks),
            'decoder_num_heads': decoder.attn.num_heads,
        },
        head={
            'type': 'MAEPretrainHead',
            'norm_pix': model.norm_pix_loss,
            'patch_size': patch_size,
            'loss': {'type': 'PixelReconstructionLoss', 'criterion': 'L2'},
        },
    )
    ours, theirs = model.state_dict(), peer.state_dict()
    names = zip(theirs, convert_state_dict(theirs), strict=True)
    peer.load_state_dict({their_name: ours[our_name] for their_name, our_name in names})
    return peer


@torch.no_grad()
def check_peer(size):
    """A line that says that mmpretrain runs the same model; AssertionError if it does not."""
    model = model_of_size(size)
    peer = peer_model(model)
    counts = [sum(p.numel() for p in network.parameters() if p.requires_grad) for network in (model, peer)]
    imgs = torch.randn(2, 3, *model.patch_embed.img_size)
    noise = torch.rand(2, model.patch_embed.num_patches)
    with mock.patch('torch.rand', lambda *shape, device: noise):
        losses = [model(imgs)[0].item(), peer.loss(imgs, None)['loss'].item()]
    line = f'{size}: parameters {counts[0]} and mmpretrain {counts[1]}, loss {losses[0]:.7f} and {losses[1]:.7f}'
    assert counts[0] == counts[1] and abs(losses[0] - losses[1]) <= 1e-5 * losses[1], line
    return line


def forward_flops(model, mask_ratio=0.75):
    """Floating-point operations of one image's forward pass, two per multiply-add, in matrix products only.

    A training step does three times as much: backward multiplies by the weights and by the activations.
    """
    device = model.cls_token.device
    # In products that torch counts on every device: not those of the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, model.in_chans, *model.patch_embed.img_size, device=device), mask_ratio)
    return counter.get_total_flops()


# --- Rounds ---------------------------------------------------------------------------------------------------


def measure(variants, size, device, args):
    """({variant: images/s of each round}, {variant: peak memory in GiB}); of CEILING, FLOP/s. Failed ones are not in.

    Memory is what PyTorch allocated on a GPU; on a CPU the peak of the process less its peak before the model was
    built.
    """
    context = multiprocessing.get_context('spawn')
    pipes, rates, memory = {}, {}, {}
    for variant in [*variants, CEILING]:
        pipe, other = context.Pipe()
        process = context.Process(target=serve, args=(other, variant, size, device, args.amp, args.batch_size))
        process.start()
        other.close()
        pipes[variant] = pipe
        print(f'{size}, {variant}: building', flush=True)
        ask(pipes, variant, 2)  # warm-up, and compilation
    for number_of_round in range(args.rounds):
        for variant in list(pipes)[:: -1 if number_of_round % 2 else 1]:
            seconds = ask(pipes, variant, args.steps)
            if seconds:
                work = PRODUCTS * 2 * product_side(device) ** 3 if variant == CEILING else args.batch_size
                rates.setdefault(variant, []).append(work * args.steps / seconds)
                print(f'{size}, {variant}: {rates[variant][-1]:.4g} /s', flush=True)
    for variant in list(pipes):
        memory[variant] = ask(pipes, variant, None)
    return {variant: rates[variant] for variant in memory}, memory


def ask(pipes, variant, question):
    """A process's answer; one that died (its traceback is printed) is taken out of pipes."""
    try:
        pipes[variant].send(question)
        return pipes[variant].recv()
    except (EOFError, OSError):
        print(f'{variant} failed and is left out', flush=True)
        del pipes[variant]


def serve(pipe, variant, size, device, amp, batch_size):
    """A process of measure: answers each number of steps with their seconds, None with its peak memory, and ends."""
    device = distributed.start(device)
    build, options = (product_step, {}) if variant == CEILING else VARIANTS[variant]
    if variant.startswith('mmpretrain'):
        import_peer()  # not part of the memory of a step
    before = peak_memory(device)
    step = build(size, device, **{'amp': amp, **options})
    imgs = torch.randn(batch_size, 3, *model_of_size(size).patch_embed.img_size, device=device)
    for num_steps in iter(pipe.recv, None):
        step(imgs)
        synchronise(device)
        began = time.perf_counter()
        for _ in range(num_steps):
            step(imgs)
        synchronise(device)
        pipe.send(time.perf_counter() - began)
        if device.type == 'cuda':
            torch.cuda.empty_cache()  # room for the others
    pipe.send((peak_memory(device) - before) / 2**30)


def synchronise(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Bytes: allocated by PyTorch on a GPU, else of the process (Linux)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarise(size, rates, memory):
    """Rows of the table: first the ratios to mmpretrain, in each of its precisions, or to the first variant."""
    with torch.device('meta'):
        flops = 3 * forward_flops(model_of_size(size))
    variants = [variant for variant in rates if variant != CEILING]
    bases = [variant for variant in ('mmpretrain', 'mmpretrain+fp16') if variant in rates] or variants[:1]
    rows = []
    for variant in variants:
        row = {'model': size, 'variant': variant}
        for base in bases:
            row[f'speed : {base}'] = report.spread([a / b for a, b in zip(rates[variant], rates[base])])
            row[f'memory : {base}'] = f'{memory[variant] / memory[base]:.3g}' if memory[base] else '-'
        row |= {'images/s': report.spread(rates[variant]), 'peak memory, GiB': f'{memory[variant]:.3g}'}
        if CEILING in rates:
            shares = [flops * rate / most for rate, most in zip(rates[variant], rates[CEILING])]
            row['of the matrix product'] = f'{median(shares):.1%}'
            row['matrix product, TFLOP/s'] = report.spread([rate / 1e12 for rate in rates[CEILING]])
        rows.append(row)
    return rows


def profile(variant, size, device, args):
    """Print the operators that take most of one step, after three others."""
    device = distributed.start(device)
    build, options = VARIANTS[variant]
    step = build(size, device, **{'amp': args.amp, **options})
    imgs = torch.randn(args.batch_size, 3, *model_of_size(size).patch_embed.img_size, device=device)
    for _ in range(3):
        step(imgs)
    with torch.profiler.profile() as profiler:
        step(imgs)
        synchronise(device)
    kind = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=kind, row_limit=20))


if __name__ == '__main__':
    run_job(main, get_parser())
