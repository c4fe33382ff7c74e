"""MAE against MFF, or the paper's design choices, at equal crop and equal budget, over several seeds.

    python -m benchmarks.ablation @recipes/ablation_demo.txt                              # ten minutes on two cores
    python -m benchmarks.ablation @recipes/ablation_cifar10_cpu.txt --data_path CIFAR10   # hours on two cores
    python -m benchmarks.ablation @recipes/ablation_gpu.txt --data_path CIFAR10           # one GPU
    python -m benchmarks.ablation_report results/demo                                     # the report alone

A run is a variant with a seed. main_pretrain.py trains it and logs its curves, main_linprobe.py classifies all
validation images by its features, with --measure_every also at checkpoints on the way, main_finetune.py fine-tunes it
where --finetune_flags are given. 'random' is not trained: the zero line. A finished run is a small file in --results,
VARIANT-seedN.json, and not repeated; an unfinished one resumes from --output_dir. So the same command, given again,
continues, and the results of several days or machines add up.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import main_pretrain
from benchmarks import report
from benchmarks.ablation_report import read_results, write_report
from util import checkpoint, distributed, log, sources, weights
from util.args import ArgumentParser, number, run_job
from util.errors import InputError, RunError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAST = ['--fuse_layers', '{last}']  # the last block alone: plain MAE
VARIANTS = {  # flags of main_pretrain.py; {last}: index of the last block
    'random': [],
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
METHODS = {'20-nearest-neighbour': 'knn', 'logistic-regression': 'logistic'}  # as main_linprobe.py prints them
FEATURES = {'cls token': 'cls', 'mean of patches': 'patches'}


def get_parser():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add('--data_path', required=True, help='labelled images, as for main_finetune.py')
    add('--results', required=True, metavar='DIR', help='small files, a table and figures: what is worth keeping')
    add('--output_dir', default='output/ablation', help='checkpoints and logs')
    add('--variants', nargs='+', choices=VARIANTS, default=['random', 'MAE', 'MFF'], help='(default: random MAE MFF)')
    add('--seeds', type=number(int, 0), nargs='+', default=[0, 1, 2], help='(default: 0 1 2)')
    add('--measure_every', type=number(int, 1), metavar='EPOCHS', help='measure on the way, too (default: at the end)')
    add('--model_flags', type=shlex.split, default=[], metavar="'FLAGS'", help='size of the encoder')
    add('--pretrain_flags', type=shlex.split, default=[], metavar="'FLAGS'", help='of main_pretrain.py')
    add('--measure_flags', type=shlex.split, default=[], metavar="'FLAGS'", help='of main_linprobe.py')
    add('--finetune_flags', type=shlex.split, metavar="'FLAGS'", help='of main_finetune.py (default: no fine-tuning)')
    add('--num_workers', type=number(int, 0), default=1, help='loader processes of a run')
    add('--jobs', type=number(int, 1), default=1, help='runs at a time')
    return parser


def main(args):
    check(args)
    signal.signal(signal.SIGTERM, stop)
    names = [(variant, seed) for seed in args.seeds for variant in args.variants]  # comparable early on
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(train_and_measure, args, *name) for name in names]
        try:
            for future in as_completed(futures):
                try:
                    print(future.result(), flush=True)
                    write_report(args.results)
                except InputError as error:
                    print(error, flush=True)
                    failed.append(error)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise RunError(f'{len(failed)} of {len(names)} runs failed; the same command repeats them')
    print(write_report(args.results))


def settings_of(args):
    """What all results in a folder must have in common."""
    names = ('measure_every', 'model_flags', 'pretrain_flags', 'measure_flags', 'finetune_flags')
    return {name: getattr(args, name) for name in names}


def check(args):
    """Raise InputError if --results holds another experiment, or flags are wrong."""
    for result in (result for runs in read_results(args.results).values() for result in runs.values()):
        changed = [name for name, value in settings_of(args).items() if result['settings'].get(name) != value]
        if changed:
            raise InputError(f'{args.results} holds results of other --{", --".join(changed)}; name another --results')
    for variant in args.variants:
        flags = ['--data_path', args.data_path, *pretrain_flags(args, variant)]
        parsed = main_pretrain.get_parser().parse_args(flags)
    sources.open_labelled_sources(parsed, weights.settle(parsed).sizes)  # a run needs validation images and classes
    os.makedirs(args.results, exist_ok=True)


def pretrain_flags(args, variant):
    flags = [*args.model_flags, *args.pretrain_flags]
    depth = weights.settle(main_pretrain.get_parser().parse_args(flags)).sizes['depth']
    return [*flags, *(flag.format(last=depth - 1, late=2 * depth // 3) for flag in VARIANTS[variant])]


def train_and_measure(args, variant, seed):
    """One run: train, measure, fine-tune, write its file. Returns a line about it. Raises InputError if a job fails."""
    path = os.path.join(args.results, f'{variant}-seed{seed}.json')
    if os.path.exists(path):
        return f'{path}: done before'
    folder = os.path.join(args.output_dir, f'{variant}-seed{seed}')
    os.makedirs(folder, exist_ok=True)

    def start(job, *flags):
        common = ['--data_path', args.data_path, '--seed', str(seed), '--num_workers', str(args.num_workers)]
        return run_script(job, os.path.join(folder, f'{job}.out'), [*common, *map(str, flags)])

    curves, checkpoints = {}, {0: None}  # {name: [(epoch, value)]}, {epoch: file}
    if variant != 'random':
        pretrain = os.path.join(folder, 'pretrain')
        keep = ['--keep_every', args.measure_every] if args.measure_every else []
        start('pretrain', '--output_dir', pretrain, *pretrain_flags(args, variant), *keep)
        for entry in log.read(os.path.join(pretrain, 'log.jsonl')):
            for name, value in entry.items():
                if name.startswith(('val_', 'fusion/')) and entry['epoch'] % 1 == 0 and value is not None:
                    curves.setdefault(name, []).append((entry['epoch'], round(value, 4)))
        last = round(curves['val_loss'][-1][0])
        kept = range(args.measure_every, last, args.measure_every) if args.measure_every else ()
        checkpoints = {epoch: os.path.join(pretrain, f'checkpoint-{epoch:04d}.pth') for epoch in kept}
        checkpoints[last] = os.path.join(pretrain, checkpoint.LAST)
    for epoch, weights_file in checkpoints.items():
        origin = ['--init_from', weights_file] if weights_file else args.model_flags
        printed = start('linprobe', '--knn', 20, '--logistic', *origin, *args.measure_flags)
        for method, top1, feature in re.findall(r'^(\S+) top-1 ([\d.]+) %  by the (.+?),', printed, re.MULTILINE):
            name = f'{METHODS[method]}_{FEATURES[feature]}'
            curves.setdefault(name, []).append((epoch, float(top1)))
    if args.finetune_flags is not None:
        finetune = os.path.join(folder, 'finetune')
        start('finetune', '--output_dir', finetune, *origin, *args.finetune_flags)
        top1 = [entry['val_top1'] for entry in log.read(os.path.join(finetune, 'log.jsonl')) if 'val_top1' in entry]
        curves['finetune'] = [(epoch, round(top1[-1], 4))]

    facts = {'variant': variant, 'seed': seed, **report.environment(distributed.choose_device('auto'))}
    with open(path + '.tmp', 'w') as file:
        json.dump(facts | {'settings': settings_of(args), 'curves': curves}, file)
        file.write('\n')
    os.replace(path + '.tmp', path)
    return f'{path}: written'


# --- Jobs ---------------------------------------------------------------------------------------------------------

children = []  # processes that were started


def run_script(job, output, flags):
    """Standard output of main_JOB.py, which also goes to the file `output`. InputError if it fails."""
    command = [sys.executable, os.path.join(ROOT, f'main_{job}.py'), *flags]
    with open(output, 'w') as file:
        children.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    code = children[-1].wait()
    with open(output) as file:
        text = file.read()
    if code:
        raise InputError(f'main_{job}.py failed with code {code}; {output} ends with: {text[-300:].strip()}')
    return text


def stop(*_):
    for child in children:
        child.terminate()
    raise KeyboardInterrupt


if __name__ == '__main__':
    run_job(main, get_parser())
