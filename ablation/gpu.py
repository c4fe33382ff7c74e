"""What to measure on a GPU: is it right, is it fast, and does the claim hold?

    timeout 540 python -m ablation.gpu OUT --images IMAGES --cifar10 CIFAR10   # again to continue
    python -m ablation.gpu OUT --stages right                 # two minutes
    python -m ablation.gpu OUT --rehearse                     # all at toy size, on a CPU
    python -m ablation.gpu OUT --write docs/results.md        # its section "On one GPU"

right: the reference tensors, resuming, changing devices. fast: steps of all sizes, the loader
beside them, the most expensive kernels, waits for the device. true: MAE against MFF on CIFAR-10.

Each measurement writes OUT/NAME.json and a line to OUT/lines.txt as soon as it is done. The same
command repeats what failed, and continues where it was cut off.
"""

import collections
import itertools
import json
import os
import re
import subprocess
import sys
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
from ablation import report
from models_mff import MaskedAutoencoderMFF
from util import distributed, weights
from util.args import ArgumentParser, run_job
from util.errors import RunError
from util.files import image_paths
from util.shapes import Shapes

ROOT = Path(__file__).parent.parent
HEADING = '## On one GPU'


def get_parser():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add('out', type=Path, metavar='OUT', help='a folder')
    add('--stages', nargs='+', choices=STAGES, default=list(STAGES), help='(default: all)')
    add('--images', type=Path, help='a folder of folders (default: drawn pictures)')
    add('--cifar10', help='a folder with train/ and test/')
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
    measures = {
        f'{stage}-{name}': measure
        for stage in args.stages
        for name, measure in STAGES[stage](args).items()
    }
    failed = [name for name, measure in measures.items() if not record(args, name, measure)]
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


# --- Right ----------------------------------------------------------------------------------------


def right(args):
    device, reference = args.device, torch.load(ROOT / 'tests/data/mff_tiny.pt', weights_only=True)
    c, grads = reference['config'], weights.convert_state_dict(reference['grads'])

    def step(amp='none', bound=1e-4, checkpointing=False, compiled=False):
        torch.set_float32_matmul_precision('highest')  # no TF32
        torch.backends.cudnn.allow_tf32 = False
        model = MaskedAutoencoderMFF(
            c['img'], c['patch'], 3, c['dim'], c['depth'], c['heads'],
            decoder_embed_dim=c['ddim'], decoder_depth=c['ddepth'], decoder_num_heads=c['dheads'],
            fuse_layers=c['out'], norm_pix_loss=c['norm_pix'],
        )  # fmt: skip
        model.load_state_dict(weights.convert_state_dict(reference['state']))
        model.to(device).grad_checkpointing = checkpointing
        network, scale = distributed.wrap(model, device, compiled), 2**10  # as fp16 needs
        imgs, noise = reference['imgs'].to(device), reference['noise'].to(device)
        with engine.mixed_precision(amp, device)[0]():
            loss, pred, _ = network(imgs, c['mask'], noise)
        (loss * scale).backward()
        ours = dict(model.named_parameters())
        ours = [ours[name].grad / scale for name in grads]
        return [
            judge('loss', [loss], [reference['loss']], bound),
            judge('prediction', [pred], [reference['pred']], bound),
            judge('all gradients', ours, grads.values(), bound),
        ]

    def step_of_process_group():
        os.environ |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0'}
        distributed.join_group(device.type)
        try:
            return step()
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
        'bf16': partial(step, 'bf16', 5e-2),
        'fp16': partial(step, 'fp16', 1e-2),
        'checkpointing': partial(step, checkpointing=True),
        'process-group': step_of_process_group,
        'resume': resume,
        'compiled': partial(step, compiled=True),
    }


def pretrain(args, name, *flags):
    """(weights, folder) of a small model after three epochs of six steps."""
    folder = args.out / 'runs' / name
    words = '--model vit_nano_patch4 --total_batch_size 16 --epochs 3 --lr 1e-3 --amp none '
    words += f'--num_workers 1 --keep_every 1 --resume none --device {args.device.type}'
    words = [*words.split(), '--data_path', args.pictures, '--output_dir', folder, *flags]
    main_pretrain.main(main_pretrain.get_parser().parse_args(list(map(str, words))))
    return weights.read_file(str(folder / 'checkpoint-last.pth'))['model'].values(), folder


def judge(what, ours, theirs, bound):
    """A row: |ours - theirs| / |theirs| of tensors, as one vector, and its bound."""
    ours, theirs = (
        torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])
        for tensors in (ours, theirs)
    )
    value = ((ours - theirs).norm() / theirs.norm()).item()
    result = 'right' if value <= bound else 'WRONG'
    return {'difference of': what, 'relative': f'{value:.1e}', 'bound': bound, 'result': result}


# --- Fast -----------------------------------------------------------------------------------------


def fast(args):
    images = args.images or args.pictures / 'train'

    def parse(words, path=images):
        """The arguments of a command of bench.py; without others, of ViT-B and 256 images."""
        words = [*words.split(), '--data_path', path, '--device', args.device.type]
        if args.rehearse:
            words += '--model vit_nano_patch4 --input_size 32 --batch_size 2 --rounds 1'.split()
        return bench.get_parser().parse_args(list(map(str, words)))

    def rows(words, path=images):
        return [{'bench.py': words} | row for row in bench.main(parse(words, path))]

    both = '--variants ours ours+compile'
    commands = {
        'base': f'step {both}',
        'data': 'step --variants ours+compile ours+compile+data',
        'loader': 'loader --batch_size 64',
        'peers': 'step',
        'finetune': f'step {both} --task finetune --batch_size 128',
        'segment': f'step {both} --task segment --input_size 512 --batch_size 16',
        **{f'batch-{n}': f'step --variants ours --batch_size {n}' for n in (64, 512, 1024)},
        'small': f'step {both} --model vit_small_patch16',
        'large': f'step {both} --model vit_large_patch16',
        'huge': f'step {both} --model vit_huge_patch14',
    }
    return {name: partial(rows, words) for name, words in commands.items()} | {
        'resized': lambda: rows('loader --batch_size 64', resized_copy(images, args.out)),
        'waits': partial(waits, args),
        'profile': lambda: profile(parse('step --batch_size 256'), args.device),
    }


def resized_copy(images, out):
    """A folder with the first 2,000 images, their shorter side resized to 224 pixels."""
    folder = out / 'resized/all'
    folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(image_paths([images])[:2000]):
        resize(Image.open(path).convert('RGB'), 224).save(folder / f'{index}.jpg', quality=95)
    return folder.parent


def waits(args):
    """Rows: the lines at which a small pre-training waits for the device, and how often."""
    mode = torch.cuda.set_sync_debug_mode if args.device.type == 'cuda' else lambda _: None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        mode('warn')
        pretrain(args, 'waits')
        mode('default')
    places = collections.Counter(
        f'{os.path.relpath(warning.filename)}:{warning.lineno}'
        for warning in caught
        if 'synchronizing' in str(warning.message)
    )
    column = 'waits in 3 epochs of 6 steps'
    return [{column: place, 'times': times} for place, times in places.most_common()]


def profile(args, device):
    """Rows: the five most expensive kernels of a step."""
    step = bench.create_step('ours', args, device)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        step()
    events = [e for e in profiler.key_averages() if e.device_type.name.lower() == device.type]
    costs = {e.key: e.self_device_time_total + e.self_cpu_time_total for e in events}  # one is 0
    largest = sorted(costs, key=costs.get, reverse=True)[:5]
    total = sum(costs.values())
    return [{'kernel': key[:90], 'of a step': f'{costs[key] / total:.1%}'} for key in largest]


# --- True -----------------------------------------------------------------------------------------


def ablate(args):
    """Run recipes/ablation_gpu.txt, MAE against MFF. RunError if there are runs left."""
    words = f'-m ablation.run @{ROOT}/recipes/ablation_gpu.txt'.split()
    words += ['--results', args.out / 'true', '--output_dir', args.out / 'runs', '--data_path']
    if args.rehearse:
        toy = '--total_batch_size 16 --epochs 1'
        words += [args.pictures, '--seeds', 0, '--variants', 'MAE', 'MFF', '--num_workers', 0]
        words += ['--pretrain_flags', toy, '--finetune_flags', toy]
        words += ['--model_flags', '--model vit_nano_patch4']
    elif args.cifar10:
        words.append(args.cifar10)
    if subprocess.run([sys.executable, *map(str, words)]).returncode:
        raise RunError('not all runs are finished')
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
