"""What fusion alone is worth: MAE and MFF at equal crop and equal budget, over several seeds, in one command.

    python -m benchmarks.ablation @recipes/ablation_quick.txt --data_path shapes       # minutes on a CPU, a toy
    python -m benchmarks.ablation @recipes/ablation_cpu.txt --data_path CIFAR10        # 3 hours on two cores
    python -m benchmarks.ablation @recipes/ablation_gpu.txt --data_path CIFAR10        # one GPU; half an hour, a guess

The released recipe changes MAE's crop together with the fusion. Here each is changed alone: {MAE, MFF} x {simple
crop, random resized crop} x seeds, pre-trained by main_pretrain.py, then probed, fine-tuned, and classified by
nearest neighbours at checkpoints on the way, by the recipes cifar10_*.txt. --grid choices compares the paper's
design choices instead. Whatever was done is not repeated: the same line goes on. In --output_dir a folder a run, of
about 0.7 GB each (the tiny model), and in report_GRID, of the runs that are complete so far, table.md, results.json,
curves.png, convergence.png, fusion.png.
"""

import glob
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from benchmarks import report
from benchmarks.ablation_report import write_report
from util import checkpoint, data, distributed, log
from util.args import ArgumentParser, InputError, number, run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAST_BLOCK = ['--fuse_layers', '11']  # of the tiny model: plain MAE
GRIDS = {
    'fusion': {
        f'{name}, {crop}': [*flags, '--crop', crop]
        for crop in ('simple', 'rrc')
        for name, flags in (('MAE', LAST_BLOCK), ('MFF', []))
    },
    'choices': {
        name: [*flags, '--crop', 'simple']
        for name, flags in {
            'MAE, simple': LAST_BLOCK,
            'MFF, simple': [],
            'layers 0 11': ['--fuse_layers', '0', '11'],
            'layers 8 11': ['--fuse_layers', '8', '11'],
            'all layers': ['--fuse_layers', *map(str, range(12))],
            'no projection': ['--fuse_proj', 'none'],
            'two-layer projection': ['--fuse_proj', 'mlp'],
            'uniform average': ['--fusion', 'uniform'],
            'self-attention': ['--fusion', 'attention'],
            'PixMIM': [*LAST_BLOCK, '--target', 'lowpass'],
            'PixMIM + MFF': ['--target', 'lowpass'],
        }.items()
    },
}
PAIRS = {
    'fusion': [('MFF, simple', 'MAE, simple'), ('MFF, rrc', 'MAE, rrc')],
    'choices': [(name, 'MFF, simple') for name in GRIDS['choices'] if name != 'MFF, simple' and 'PixMIM' not in name]
    + [('PixMIM + MFF', 'PixMIM')],
}


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add, count, default = parser.add_argument, number(int, 1), '(default: %(default)s)'
    add('--data_path', required=True, help='as for main_finetune.py: labelled images, of 32 pixels')
    add('--grid', choices=GRIDS, default='fusion', help=default)
    add('--output_dir', default='output/ablation', help=default)
    add('--seeds', type=count, default=3, help=f'runs of each, with seeds 0, 1, ... {default}')
    add('--epochs', type=count, default=200, help=f'of pre-training {default}')
    add('--points', type=count, default=5, help=f'checkpoints at which neighbours are measured {default}')
    add('--probe_epochs', type=count, default=30, help=default)
    add('--finetune_epochs', type=count, default=20, help=default)
    add('--images', type=count, help='training images of pre-training, spread over the set (default: all)')
    add('--labelled', type=count, help='training images of probe, fine-tuning and neighbours (default: all)')
    add('--val_images', type=count, help='validation images (default: all)')
    for name in ('all', 'pretrain', 'linprobe', 'finetune'):
        text = 'further flags of every main' if name == 'all' else f'of main_{name}.py'
        add(f'--{name}_flags', type=shlex.split, default=[], metavar="'FLAGS'", help=text)
    add('--jobs', type=count, default=1, help=f'runs at a time {default}')
    return parser


def main(args):
    prepare(args)
    names = [(variant, seed) for seed in range(args.seeds) for variant in GRIDS[args.grid]]  # comparable early on
    processes, results = Processes(args), {}
    folder = os.path.join(args.output_dir, f'report_{args.grid}')
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the mains end with this process
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(train_and_measure, args, *name, processes): name for name in names}
        try:
            for done in as_completed(futures):
                results[futures[done]] = done.result()
                complete = [results[name] for name in names if name in results]
                head = describe(args, f'{len(complete)} of {len(names)}')
                table = write_report(folder, head, complete, PAIRS[args.grid])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    print(table)


def describe(args, runs):
    """How it was made, and how small the experiment is, for the head of the table."""
    images, labelled, val = (len(glob.glob(os.path.join(folder, '*', '*.npy'))) for folder in data_folders(args))
    return (
        f'{report.heading(report.environment(distributed.choose_device("auto")))}\n\n'
        f'Tiny model. Pre-training: {images} images, {args.epochs} epochs. Labelled: {labelled} images; probe '
        f'{args.probe_epochs} epochs, fine-tuning {args.finetune_epochs}. Measured on {val} validation images. '
        f'Complete runs: {runs}.'
        + ' The validation loss of PixMIM is that of another target.'
        * (args.grid == 'choices')
    )


def data_folders(args):
    """Of the images of pre-training, of all with labels, and of validation."""
    return [os.path.join(args.output_dir, 'data', name) for name in ('images', 'labelled', 'val')]


# --- Runs ---------------------------------------------------------------------------------------------------------


def prepare(args):
    """Check that --output_dir is of the same experiment, and decode the images of all runs once, as arrays.

    Raises:
        InputError: if --output_dir holds runs of other flags or cannot be written, or there are no labelled images.
    """
    checkpoint.make_output_dir(args.output_dir)
    free = {'grid', 'seeds', 'jobs', 'output_dir'}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    path = os.path.join(args.output_dir, 'settings.json')
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        trained = glob.glob(os.path.join(args.output_dir, '*', 'pretrain'))
        fixed = settings if trained else ['data_path', 'images', 'labelled', 'val_images']
        changed = [
            f'--{name} {before.get(name)} -> {settings[name]}' for name in fixed if before.get(name) != settings[name]
        ]
        if changed:
            raise InputError(
                f'{args.output_dir} holds another experiment: {", ".join(changed)}; name another --output_dir'
            )
    wanted = zip(data_folders(args), ['train', 'train', 'val'], [args.images, args.labelled, args.val_images])
    missing = [(folder, split, count) for folder, split, count in wanted if not os.path.exists(folder)]
    sources = [data.open_source(args.data_path, split, size=(32, 32), labelled=True) for _, split, _ in missing]
    if any(source is None or source.classes is None for source in sources):
        raise InputError(f'{args.data_path}: labelled training and validation images are needed')
    write_json(path, settings)
    for (folder, _, count), source in zip(missing, sources):
        write_arrays(source, count or len(source), folder)


def write_json(path, content):
    with open(path + '.tmp', 'w') as file:
        json.dump(content, file, indent=2)
    os.replace(path + '.tmp', path)


def write_arrays(source, count, folder):
    """folder/CLASS/INDEX.npy (H, W, C) of `count` images at equal distances, which keeps the shares of sorted classes.

    All or nothing: a kill leaves no folder of that name.
    """
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist():
        image, label = source[index]
        path = os.path.join(folder + '.tmp', f'{label:04d}', f'{index}.npy')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        np.save(path, image.permute(1, 2, 0).numpy())
    os.replace(folder + '.tmp', folder)


class Processes:
    """The mains that run now: run starts one and waits for it, stop ends them all."""

    def __init__(self, args):
        cores = data.default_workers()
        self.workers = str(max(1, cores // args.jobs))
        self.environment = {'OMP_NUM_THREADS': '1' if args.jobs > 1 else str(cores), **os.environ}
        self.running, self.stopped = set(), False

    def run(self, job, output, *flags):
        """Standard output of main_JOB.py with these flags, also in the file `output`. InputError if it fails."""
        command = [sys.executable, os.path.join(ROOT, f'main_{job}.py'), '--num_workers', self.workers, *flags]
        with open(output, 'w') as file:
            if self.stopped:
                raise InputError('stopped')
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment)
            self.running.add(process)
            if self.stopped:  # meanwhile
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        with open(output) as file:
            text = file.read()
        if code:
            raise InputError(f'main_{job}.py failed with code {code}; {output} ends with: {text[-300:].strip()}')
        return text

    def stop(self):
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def train_and_measure(args, variant, seed, processes):
    """One run of the grid, or what is left of it: {'variant', 'seed', 'folder', 'epochs', and a number a measure}."""
    folder = os.path.join(args.output_dir, re.sub(r'\W+', '-', f'{variant}-seed{seed}'))
    os.makedirs(folder, exist_ok=True)
    images, labelled, val = data_folders(args)
    flags = ['--val_path', val, '--seed', str(seed)]
    result_path = os.path.join(folder, 'result.json')
    result = {'variant': variant, 'seed': seed, 'folder': folder, 'epochs': args.epochs}
    if os.path.exists(result_path):
        with open(result_path) as file:
            result = json.load(file) | {'folder': folder}

    def measured(name, value):
        result[name] = value
        write_json(result_path, result)
        print(f'{variant}, seed {seed}: {name} {value}', flush=True)

    def start(job, name, *more):
        recipe = f'@{os.path.join(ROOT, "recipes", f"cifar10_{job}.txt")}'
        chosen = [*args.all_flags, *getattr(args, f'{job}_flags')]
        return processes.run(job, os.path.join(folder, f'{name}.out'), recipe, *chosen, *flags, *more)

    def last_entry(job, name):
        return [entry[name] for entry in log.read(os.path.join(folder, job, 'log.jsonl')) if name in entry][-1]

    def kept(epoch):
        return os.path.join(folder, 'pretrain', f'checkpoint-{epoch:04d}.pth')

    every = max(1, args.epochs // args.points)
    last = os.path.join(folder, 'pretrain', 'checkpoint-last.pth')
    if 'loss' not in result:
        where = ['--data_path', images, '--output_dir', os.path.join(folder, 'pretrain')]
        length = ['--epochs', str(args.epochs), '--warmup_epochs', str(args.epochs / 20), '--keep_every', str(every)]
        start('pretrain', 'pretrain', *where, *length, *GRIDS[args.grid][variant])
        measured('loss', last_entry('pretrain', 'val_loss'))
    for epoch in dict.fromkeys([*range(every, args.epochs, every), args.epochs]):
        name = 'knn' if epoch == args.epochs else f'knn_{epoch}'
        if name not in result:
            weights = ['--init_from', last if epoch == args.epochs else kept(epoch)]
            printed = start('linprobe', name, '--data_path', labelled, *weights, '--knn', '20')
            measured(name, float(re.search(r'top-1 ([\d.]+) %  by the mean of patches', printed)[1]))
    for job, epochs in (('linprobe', args.probe_epochs), ('finetune', args.finetune_epochs)):
        if job not in result:
            where = ['--data_path', labelled, '--output_dir', os.path.join(folder, job), '--init_from', last]
            start(job, job, *where, '--epochs', str(epochs), '--warmup_epochs', str(epochs / 10))
            measured(job, last_entry(job, 'val_top1'))
    return result


if __name__ == '__main__':
    run(main, get_parser())
