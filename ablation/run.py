"""MAE against MFF, or the paper's design choices, at equal crop and budget, over several seeds.

    python -m ablation.run @recipes/ablation_demo.txt                              # on two cores
    python -m ablation.run @recipes/ablation_cifar10_cpu.txt --data_path CIFAR10   # for hours
    python -m ablation.run @recipes/ablation_gpu.txt --data_path CIFAR10           # on a GPU

A run is a variant with a seed. ablation.pretrain trains it and logs its curves; tools.features
classifies all validation images by its features, with --measure_every also on the way; with
--finetune_flags main_finetune fine-tunes it. 'random' is not trained: the zero line. A finished run
is a small file in --results, and not repeated; an unfinished one resumes from --output_dir. So the
same command continues, and the results of several days or machines add up.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from ablation import pretrain
from ablation.report import RANDOM, read_results, write_report
from bench import environment
from util import weights
from util.args import ArgumentParser, number, run_job
from util.errors import InputError, RunError

LAST = ['--fuse_layers', '{last}']  # the last block alone: plain MAE
VARIANTS = {  # flags of ablation.pretrain; {last}: index of the last block
    RANDOM: [],
    'MAE': LAST,
    'MFF': [],
    'MAE-rrc': [*LAST, '--crop', 'rrc'],
    'MFF-rrc': ['--crop', 'rrc'],
    'first+last': ['--fuse_layers', '0', '{last}'],
    'late+last': ['--fuse_layers', '{late}', '{last}'],
    'no-projection': ['--fuse_proj', 'none'],
    'mlp-projection': ['--fuse_proj', 'mlp'],
    'uniform': ['--fusion', 'uniform'],
    'attention': ['--fusion', 'attention'],
    'PixMIM': [*LAST, '--target', 'lowpass'],
    'PixMIM+MFF': ['--target', 'lowpass'],
}
SETTINGS = ('measure_every', 'model_flags', 'pretrain_flags', 'measure_flags', 'finetune_flags')
children = []  # the commands that were started


def get_parser():
    parser = ArgumentParser(__doc__)
    add, flags = parser.add_argument, {'type': shlex.split, 'default': [], 'metavar': "'FLAGS'"}
    add('--data_path', required=True, help='labelled images, as for main_finetune.py')
    add('--results', required=True, metavar='DIR', help='for what is worth keeping')
    add('--output_dir', default='output/ablation', help='for checkpoints and logs')
    add('--variants', nargs='+', choices=VARIANTS, default=[RANDOM, 'MAE', 'MFF'])
    add('--seeds', type=number(int, 0), nargs='+', default=[0, 1, 2], help='of each')
    add('--measure_every', type=number(int, 1), metavar='EPOCHS', help='(default: at the end)')
    add('--model_flags', **flags, help='size of the encoder')
    add('--pretrain_flags', **flags, help='of main_pretrain.py')
    add('--measure_flags', **flags, help='of tools.features')
    add('--finetune_flags', **flags | {'default': None}, help='(default: no fine-tuning)')
    add('--num_workers', type=number(int, 0), default=1, help='loader processes of a run')
    add('--jobs', type=number(int, 1), default=1, help='runs at a time')
    return parser


def main(args):
    flags = {variant: pretrain_flags(args, variant) for variant in args.variants}
    check_results(args)
    os.makedirs(args.results, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    runs = [(variant, seed, flags[variant]) for seed in args.seeds for variant in args.variants]
    with ThreadPoolExecutor(args.jobs) as pool:
        failures = list(filter(None, pool.map(lambda run: failure_of(args, *run), runs)))
    if failures:
        raise RunError(f'{len(failures)} of {len(runs)} runs failed; the same command repeats them')
    print(write_report(args.results))


def pretrain_flags(args, variant):
    flags = [*args.model_flags, *args.pretrain_flags]
    depth = weights.settings_of(pretrain.get_parser().parse_args(flags), None).sizes['depth']
    return flags + [flag.format(last=depth - 1, late=2 * depth // 3) for flag in VARIANTS[variant]]


def check_results(args):
    """Raise InputError if --results holds another experiment."""
    for group in read_results(args.results).values():
        for result in group.values():
            then = result['settings']
            changed = [name for name in SETTINGS if getattr(args, name) != then.get(name)]
            if changed:
                raise InputError(f'{args.results} holds results of other --{", --".join(changed)}')


def failure_of(args, variant, seed, flags):
    """The RunError that ended a run, which is printed, or None."""
    try:
        train_and_measure(args, variant, seed, flags)
    except RunError as error:
        print(error, flush=True)
        return error


def train_and_measure(args, variant, seed, flags):
    """One run: train, measure, fine-tune, write its file. Raises RunError if a command fails."""
    path = os.path.join(args.results, f'{variant}-seed{seed}.json')
    if os.path.exists(path):
        return print(f'{path}: done before', flush=True)
    folder = os.path.join(args.output_dir, f'{variant}-seed{seed}')
    os.makedirs(folder, exist_ok=True)
    common = ['--data_path', args.data_path, '--num_workers', args.num_workers, '--seed', seed]
    pretrained, finetuned = (os.path.join(folder, name) for name in ('pretrain', 'finetune'))

    def start(module, *flags):
        output = os.path.join(folder, f'{module.split(".")[-1]}.out')
        return run_module(module, output, [*common, *flags])

    curves = {}  # {name: [(epoch, value)]}
    origins = {0: args.model_flags}  # {epoch: flags that name its weights}
    if variant != RANDOM:
        keep = ['--keep_every', args.measure_every] if args.measure_every else []
        start('ablation.pretrain', '--output_dir', pretrained, *flags, *keep)
        curves = read_log(pretrained)
        last = round(curves['val_loss'][-1][0])
        every = args.measure_every or last
        files = {epoch: f'checkpoint-{epoch:04d}.pth' for epoch in range(every, last, every)}
        files[last] = 'checkpoint-last.pth'
        origins = {e: ['--init_from', os.path.join(pretrained, f)] for e, f in files.items()}
    for epoch, origin in origins.items():
        printed = start('tools.features', '--knn', 20, '--logistic', *origin, *args.measure_flags)
        for name, top1 in read_accuracies(printed).items():
            curves.setdefault(name, []).append((epoch, top1))
    if args.finetune_flags is not None:
        start('main_finetune', '--output_dir', finetuned, *origin, *args.finetune_flags)
        curves['finetune'] = [(epoch, read_log(finetuned)['val_top1'][-1][1])]

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    result = {'variant': variant, 'seed': seed, **environment(device)}
    result |= {'settings': {name: getattr(args, name) for name in SETTINGS}, 'curves': curves}
    with open(f'{path}.tmp', 'w') as file:
        file.write(json.dumps(result) + '\n')
    os.replace(f'{path}.tmp', path)
    print(f'{path}: written', flush=True)


def read_log(output_dir):
    """{name: [(epoch, value)]} of what a run logged after its epochs."""
    curves = {}
    with open(os.path.join(output_dir, 'log.jsonl')) as file:
        _, *entries = map(json.loads, file)
    for entry in entries:
        for name, value in entry.items():
            if name.startswith(('val_', 'fusion/')) and value is not None:
                curves.setdefault(name, []).append((entry['epoch'], round(value, 4)))
    return curves


def read_accuracies(printed):
    """{'knn_cls', 'knn_patches', 'logistic_cls', 'logistic_patches'} of tools.features."""
    methods = {'20-NN': 'knn', 'logistic regression': 'logistic'}
    features = {'cls token': 'cls', 'mean of patches': 'patches'}
    found = re.findall(r'^(.+) top-1 ([\d.]+) %  by the (.+), on', printed, re.MULTILINE)
    return {f'{methods[m]}_{features[f]}': float(top1) for m, top1, f in found}


def run_module(module, output, flags):
    """What python -m MODULE FLAGS prints, which also goes to the file `output`.

    Raises:
        RunError: if it fails.
    """
    with open(output, 'w+') as file:
        command = [sys.executable, '-m', module, *map(str, flags)]
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        children.append(child)
        code = child.wait()
        file.seek(0)
        printed = file.read()
    if code:
        last = (printed.splitlines() or [''])[-1]
        raise RunError(f'{module} ended with code {code}; {output} ends with: {last}')
    return printed


def stop(*_):
    """End all commands: those that train save first."""
    for child in children:
        child.terminate()
    raise KeyboardInterrupt


if __name__ == '__main__':
    run_job(main, get_parser())
