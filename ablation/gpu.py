"""What to measure on a GPU: is it right, is it fast, and does the claim hold?

    python -m ablation.gpu OUT --images IMAGES --cifar10 CIFAR10     # three stages of nine minutes
    python -m ablation.gpu OUT --stages right                       # two minutes
    python -m ablation.gpu OUT --rehearse                           # all at toy size, on a CPU
    python -m ablation.gpu OUT --write docs/results.md              # its section "On one GPU"

right: the reference tensors, resuming, changing devices. fast: steps of all sizes, the loader
beside them, the most expensive kernels, waits for the device. true: MAE against MFF on CIFAR-10.

Each measurement writes OUT/NAME.json and a line to OUT/lines.txt as soon as it is done. The same
command repeats what failed, and continues with what a stage had no time for.
"""

import collections
import itertools
import json
import os
import re
import signal
import tarfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import resize, to_pil_image

import bench
import engine
import main_pretrain
from ablation import report, run
from models_mff import MaskedAutoencoderMFF
from util import distributed, weights
from util.args import ArgumentParser, number, run_job
from util.errors import InputError, RunError
from util.files import image_paths
from util.shapes import Shapes

ROOT = Path(__file__).parent.parent
HEADING = '## On one GPU'


def get_parser():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add('out', type=Path, metavar='OUT', help='a folder')
    add('--stages', nargs='+', choices=STAGES, default=list(STAGES), help='(default: all)')
    add('--minutes', type=number(float, 0), default=7.5, help='of a stage, about')
    add('--images', type=Path, help='a folder of folders, or a .tar (default: drawn pictures)')
    add('--cifar10', type=Path, help='a folder with train/ and test/, or its .tar.gz')
    add('--rehearse', action='store_true', help='toy sizes on a CPU, nothing is compiled')
    add('--write', type=Path, metavar='PAGE', help='only write the section of a page')
    return parser


def main(args):
    if args.write:
        return write_section(args.out, args.write)
    args.device = distributed.start('cpu' if args.rehearse else 'cuda')
    args.pictures = draw_pictures(args.out / 'pictures')
    if args.rehearse:
        torch.compiler.set_stance('force_eager')
    failed = []
    for stage in args.stages:
        args.end = time.monotonic() + 60 * args.minutes
        for name, measure in STAGES[stage](args).items():
            if time.monotonic() < args.end and not record(args, f'{stage}-{name}', measure):
                failed.append(f'{stage}-{name}')
    if failed:
        raise RunError(f'{", ".join(failed)}: see {args.out}/lines.txt')


def record(args, name, measure):
    """Write OUT/NAME.json, with the rows of a table that measure returns; whether it succeeded."""
    path, began, rows, error = args.out / f'{name}.json', time.time(), [], ''
    if path.exists() and not json.loads(path.read_text())['error']:
        return True
    torch.compiler.reset()
    try:
        rows = measure()
        error = 'WRONG' if any(row.get('result') == 'WRONG' for row in rows) else ''
    except Exception as failure:
        error = f'{type(failure).__name__}: {failure}'.splitlines()[0]
    facts = bench.environment(args.device) | {'began': began, 'seconds': time.time() - began}
    path.write_text(json.dumps({'error': error, 'rows': rows, **facts}, indent=1) + '\n')
    with open(args.out / 'lines.txt', 'a') as file:
        for output in (file, None):
            print(f'{name}, {facts["seconds"]:.1f} s: {error}', *rows, file=output, flush=True)
    return not error


# --- Right ----------------------------------------------------------------------------------------


def right(args):
    device, reference = args.device, torch.load(ROOT / 'tests/data/mff_tiny.pt', weights_only=True)
    c, state = reference['config'], weights.convert_state_dict(reference['state'])
    theirs = weights.convert_state_dict(reference['grads'])
    torch.set_float32_matmul_precision('highest')  # no TF32
    torch.backends.cudnn.allow_tf32 = False

    def step(amp='none', wrap=lambda model: model, checkpointing=False, bound=1e-4):
        model = MaskedAutoencoderMFF(
            c['img'], c['patch'], 3, c['dim'], c['depth'], c['heads'],
            decoder_embed_dim=c['ddim'], decoder_depth=c['ddepth'], decoder_num_heads=c['dheads'],
            fuse_layers=c['out'], norm_pix_loss=c['norm_pix'],
        )  # fmt: skip
        model.load_state_dict(state)
        model.to(device).grad_checkpointing = checkpointing
        network, scale = wrap(model), 2**10  # as fp16 needs
        imgs, noise = reference['imgs'].to(device), reference['noise'].to(device)
        with engine.mixed_precision(amp, device)[0]():
            loss, pred, _ = network(imgs, c['mask'], noise)
        (loss * scale).backward()
        ours = {name: p.grad / scale for name, p in model.named_parameters()}
        return [
            judge('loss', {'': loss}, {'': reference['loss']}, bound),
            judge('prediction', {'': pred}, {'': reference['pred']}, bound),
            judge('all gradients', ours, theirs, bound),
        ]

    def step_of_process_group():
        os.environ |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0'}
        distributed.join_group(device.type)
        try:
            return step(wrap=partial(distributed.wrap, device=device))
        finally:
            distributed.stop()

    def resume():
        straight, first = pretrain(args, 'straight')
        resumed, _ = pretrain(args, 'resumed', '--resume', first / 'checkpoint-0001.pth')
        cpu = ['--device', 'cpu', '--resume', first / 'checkpoint-0001.pth']
        _, second = pretrain(args, 'on_cpu', *cpu)
        back, _ = pretrain(args, 'back', '--resume', second / 'checkpoint-0002.pth')
        bound = 1e-3 if device.type == 'cuda' else 0.0  # atomic additions come in any order
        return [
            judge('weights of a resumed run', resumed, straight, bound),
            judge('weights, after an epoch on a CPU', back, straight, 2e-2),  # TF32 on the GPU
        ]

    return {
        'fp32': step,
        'bf16': partial(step, 'bf16', bound=5e-2),
        'fp16': partial(step, 'fp16', bound=1e-2),
        'checkpointing': partial(step, checkpointing=True),
        'process-group': step_of_process_group,
        'resume': resume,
        'compiled': partial(step, wrap=partial(distributed.wrap, device=device, compiled=True)),
    }


def judge(what, ours, theirs, bound):
    """A row: |ours - theirs| / |theirs| of two {name: tensor}, as one vector, and its bound."""
    ours, theirs = (
        torch.cat([tensors[name].detach().cpu().double().flatten() for name in theirs])
        for tensors in (ours, theirs)
    )
    value = ((ours - theirs).norm() / theirs.norm()).item()
    result = 'right' if value <= bound else 'WRONG'
    return {'difference of': what, 'relative': f'{value:.1e}', 'bound': bound, 'result': result}


def pretrain(args, name, *flags):
    """(weights, folder) of a small model after three epochs of six steps."""
    folder = args.out / 'runs' / name
    words = '--model vit_nano_patch4 --total_batch_size 16 --epochs 3 --lr 1e-3 --amp none '
    words += f'--num_workers 1 --keep_every 1 --resume none --device {args.device.type}'
    words = [*words.split(), '--data_path', args.pictures, '--output_dir', folder, *flags]
    main_pretrain.main(main_pretrain.get_parser().parse_args(list(map(str, words))))
    return weights.read_file(str(folder / 'checkpoint-last.pth'))['model'], folder


def draw_pictures(folder):
    """train/CLASS/*.jpg and val/CLASS/*.jpg, for runs of seconds."""
    for split, count in (('train', 96), ('val', 40)):
        shapes = Shapes(split, (36, 32))
        for index in range(count):
            image, label = shapes[index]
            path = folder / split / shapes.classes[label] / f'{index}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    return folder


# --- Fast -----------------------------------------------------------------------------------------


def fast(args):
    def parse(what, *flags, size='vit_base_patch16', batch=256):
        """The arguments of bench.py."""
        images = unpacked(args.images, args.out / 'images') or args.pictures / 'train'
        words = [what, *flags, '--device', args.device.type, '--data_path', images]
        words += ['--model', size, '--batch_size', batch, '--rounds', 3]
        if args.rehearse:
            words += ['--model', 'vit_nano_patch4', '--batch_size', 2, '--rounds', 1]
        return bench.get_parser().parse_args(list(map(str, words)))

    def step(*variants, task='pretrain', side=None, size='vit_base_patch16', batch=256):
        flags = ['--variants', *variants, '--task', task]
        flags += ['--input_size', 32 if args.rehearse else side] if side else []
        job = parse('step', *flags, size=size, batch=batch)
        named = {'step': task, 'model': job.model, 'batch': job.batch_size}
        return [named | row for row in bench.main(job)]

    def loader():
        resized = resized_copy(parse('loader').data_path, args.out / 'resized')
        return bench.main(parse('loader', '--resized', resized, batch=64))

    both = partial(step, 'ours', 'ours+compile')
    sizes = ('vit_small_patch16', 'vit_large_patch16', 'vit_huge_patch14')
    return {
        'base': both,
        'data': partial(step, 'ours+compile', 'ours+compile+data'),
        'waits': partial(waits, args),
        'profile': lambda: profile(parse('step'), args.device),
        'loader': loader,
        'peers': partial(step, 'ours', 'mae', *bench.installed_peers()),
        'finetune': partial(both, task='finetune', batch=128),
        'segment': partial(both, task='segment', side=512, batch=16),
        **{f'batch-{batch}': partial(step, 'ours', batch=batch) for batch in (64, 512, 1024)},
        **{size: partial(both, size=size) for size in sizes},
    }


def unpacked(path, folder):
    """path, if it is a folder or None; a tar file is unpacked into folder/all."""
    if path is None or path.is_dir():
        return path
    if not folder.exists():
        with tarfile.open(path) as archive:
            archive.extractall(folder / 'all', filter='data')
    return folder


def resized_copy(images, folder):
    """A folder with the first 2,000 images, their shorter side resized to 224 pixels."""
    (folder / 'all').mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(image_paths([images])[:2000]):
        image = resize(Image.open(path).convert('RGB'), 224)
        image.save(folder / f'all/{index}.jpg', quality=95)
    return folder


def waits(args):
    """Rows: the lines at which a small pre-training waits for the device, and how often."""
    on_gpu = args.device.type == 'cuda'
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        if on_gpu:
            torch.cuda.set_sync_debug_mode('warn')
        pretrain(args, 'waits')
        if on_gpu:
            torch.cuda.set_sync_debug_mode('default')
    places = collections.Counter(
        f'{os.path.relpath(warning.filename)}:{warning.lineno}'
        for warning in caught
        if 'synchronizing' in str(warning.message)
    )
    column = 'waits in 3 epochs of 6 steps'
    return [{column: place, 'times': times} for place, times in places.most_common()]


def profile(args, device):
    """Rows: the five most expensive kernels of a step, and the calls that wait for the device."""
    args.batch_size = args.batch_size or 256
    step = bench.create_step('ours', args, device)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        step()
        bench.synchronise(device)
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type.name.lower() == device.type]
    time_of = {
        'cuda': lambda event: event.self_device_time_total,
        'cpu': lambda event: event.self_cpu_time_total,
    }[device.type]
    total = sum(map(time_of, kernels))
    rows = [
        {'kernel': event.key[:90], 'calls': event.count, 'share': f'{time_of(event) / total:.1%}'}
        for event in sorted(kernels, key=time_of, reverse=True)[:5]
    ]
    return rows + [
        {'kernel': event.key, 'calls': event.count, 'share': 'a wait'}
        for event in events
        if re.search('Synchronize|_local_scalar_dense', event.key)
    ]


# --- True -----------------------------------------------------------------------------------------


def ablate(args):
    """Run recipes/ablation_gpu.txt until the time is over. RunError if there are runs left."""
    words = [f'@{ROOT}/recipes/ablation_gpu.txt', '--results', args.out / 'true']
    words += ['--output_dir', args.out / 'runs']
    if args.rehearse:
        toy = '--total_batch_size 16 --epochs 1'
        words += ['--data_path', args.pictures, '--seeds', 0, '--num_workers', 0]
        words += ['--model_flags', '--model vit_nano_patch4', '--pretrain_flags', toy]
        words += ['--finetune_flags', toy]
    elif args.cifar10:
        folder = unpacked(args.cifar10, args.out / 'cifar10')
        words += ['--data_path', next(folder.glob('**/train')).parent]
    else:
        raise InputError('the stage true needs --cifar10')
    signal.signal(signal.SIGALRM, run.stop)
    signal.alarm(max(1, int(args.end - time.monotonic())))
    try:
        run.main(run.get_parser().parse_args(list(map(str, words))))
    except KeyboardInterrupt:
        raise RunError('not all runs are finished; the same command continues') from None
    finally:
        signal.alarm(0)
    return []


STAGES = {'right': right, 'fast': fast, 'true': lambda args: {'runs': partial(ablate, args)}}

# --- The page -------------------------------------------------------------------------------------


def write_section(out, page):
    """Replace what stands under HEADING by what was measured."""
    results = {path.stem: json.loads(path.read_text()) for path in out.glob('*-*.json')}
    results = dict(sorted(results.items(), key=lambda item: item[1]['began']))
    facts = {f'{r["device"]}; {r["versions"]}; {r["date"]}' for r in results.values()}
    parts = [HEADING, f'`python -m ablation.gpu`; {"; ".join(sorted(facts))}']
    rows = [row for result in results.values() for row in result['rows']]
    parts += [bench.markdown(list(group)) for _, group in itertools.groupby(rows, key=list)]
    parts += [f'{name}: {result["error"]}' for name, result in results.items() if result['error']]
    runs = report.read_results(out / 'true')
    parts += [report.make_table(runs)] if runs else []
    before, after = page.read_text().split(HEADING)
    _, *others = re.split(r'^(?=## )', after, maxsplit=1, flags=re.M)
    page.write_text(before + '\n\n'.join([*parts, ''.join(others)]))


if __name__ == '__main__':
    run_job(main, get_parser())
