"""Strong scaling: the same total batch on more and more processes, and what synchronising the gradients costs.

    python -m benchmarks.scaling --processes 1 2 4 8                                  # GPUs
    python -m benchmarks.scaling --processes 1 2 --model tiny --device cpu --threads 1

Each number of processes is started by torchrun as main_pretrain.py is. A step is one optimiser step on the total
batch, in micro-steps of --batch_size images per process, of which the last synchronises; in every other timing none
does, and the difference is the share lost. The numbers of processes take turns.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import report
from benchmarks.step import SIZES, model_of_size, our_step, synchronise
from util import distributed
from util.args import ArgumentParser, number, run_job
from util.errors import RunError
from util.optim import split_batch


def get_parser():
    parser = ArgumentParser(__doc__.splitlines()[0])
    add, count = parser.add_argument, number(int, 1)
    add('--processes', type=count, nargs='+', default=[1, 2], help='(default: 1 2)')
    add('--model', choices=SIZES, default='base', help='size of the ViT')
    add('--total_batch_size', type=count, help='(default: 256 for each of the most on GPUs, else 32)')
    add('--batch_size', type=count, help='images on one device at a time (default: what each of the most gets)')
    add('--steps', type=count, help='timed optimiser steps of a round, after two that are not (default: 20 or 2)')
    add('--rounds', type=count, default=5, help='turns of each count')
    add('--device', default='auto', help='cuda or cpu (default: the first of them that is there)')
    add('--amp', choices=['auto', 'bf16', 'fp16', 'none'], default='auto', help='as in main_pretrain.py')
    add('--compile', action='store_true', help='torch.compile the model')
    add('--threads', type=count, default=1, help='CPU threads of a process')
    add('--out', help='write OUT.md and OUT.json')
    return parser


def main(args):
    args.device = distributed.choose_device(args.device)
    on_gpu = args.device.startswith('cuda')
    args.total_batch_size = args.total_batch_size or (256 * max(args.processes) if on_gpu else 32)
    args.steps = args.steps or (20 if on_gpu else 2)
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        return work(args)
    rounds = {processes: [] for processes in args.processes}
    for processes in args.processes:
        split_batch(args.total_batch_size, batch_size(args), processes)  # a mistake shows before anything starts
    for _ in range(args.rounds):
        for processes, results in rounds.items():
            results.append(launch(processes, args))
            print(f'{processes} processes: {json.dumps(results[-1])}', flush=True)
    report.publish(args.out, args.device, summarise(rounds, args.total_batch_size * args.steps), rounds)


def batch_size(args):
    return args.batch_size or args.total_batch_size // max(args.processes)


def launch(processes, args):
    """Seconds of a round on so many processes: {'synchronised', 'not'}."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    done = subprocess.run(
        [sys.executable, *launcher, '-m', 'benchmarks.scaling', *sys.argv[1:]],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, 'OMP_NUM_THREADS': str(args.threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RunError(f'{processes} processes failed; the reason is above')
    return json.loads(done.stdout.splitlines()[-1])


def work(args):
    """One of the processes: the first prints what launch returns."""
    rank, world_size = distributed.world()
    device = distributed.start(args.device)
    batch = split_batch(args.total_batch_size, batch_size(args), world_size)
    accumulation = args.total_batch_size // (batch * world_size)
    step = our_step(args.model, device, args.amp, args.compile)
    imgs = torch.randn(batch, 3, *model_of_size(args.model).patch_embed.img_size, device=device)
    seconds = {}
    for name, together in (('synchronised', True), ('not', False)):
        for _ in range(2):  # warm-up; DistributedDataParallel orders its buckets anew in the second
            step(imgs, accumulation, together)
        distributed.barrier()
        synchronise(device)
        began = time.perf_counter()
        for _ in range(args.steps):
            step(imgs, accumulation, together)
        synchronise(device)
        distributed.barrier()
        seconds[name] = time.perf_counter() - began
    if rank == 0:
        print(json.dumps(seconds))
    distributed.stop()


def summarise(rounds, images):
    """Rows of the table, from the seconds of each round by number of processes."""
    fewest = min(rounds)
    rows = []
    for processes, results in rounds.items():
        seconds = [result['synchronised'] for result in results]
        speed_up = [first['synchronised'] / second for first, second in zip(rounds[fewest], seconds)]
        rows.append(
            {
                'processes': processes,
                f'speed : {fewest}': report.spread(speed_up),
                'efficiency': f'{median(speed_up) * fewest / processes:.0%}',
                'lost to synchronising': report.spread([100 * (1 - r['not'] / r['synchronised']) for r in results], 2)
                + ' %',
                'images/s': report.spread([images / s for s in seconds]),
            }
        )
    return rows


if __name__ == '__main__':
    run_job(main, get_parser())
