"""Seconds from the command to the first optimiser step, and how much of that are imports.

python -m benchmarks.startup                                                       # the demo
python -m benchmarks.startup @recipes/one_gpu_pretrain.txt --data_path IMAGES      # any flags of main_pretrain.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from util import distributed

ROUNDS = 5


def main(flags):
    stages = {'import torch': ['-c', 'import torch'], 'import main_pretrain': ['-c', 'import main_pretrain']}
    rounds = {}
    for _ in range(ROUNDS):
        for stage, arguments in stages.items():
            rounds.setdefault(stage, []).append(seconds(arguments))
        with tempfile.TemporaryDirectory() as folder:
            training = ['main_pretrain.py', *flags, '--log_every', '1', '--output_dir', folder]
            rounds.setdefault('first step', []).append(seconds(training, until='step 1/'))
    rows = [{'until': stage, 'seconds': report.spread(values)} for stage, values in rounds.items()]
    report.publish(None, distributed.choose_device('auto'), rows, rounds)


def seconds(arguments, until=None):
    """From starting Python with arguments to the first line with `until`, where it is stopped, or to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    )
    with process:
        found = any(until and until in line for line in process.stdout)  # to its end without `until`
        elapsed = time.perf_counter() - began
        if found:
            process.terminate()
        process.communicate()  # to the end: what it still has to say needs a reader
    if until and not found or not until and process.returncode:
        raise SystemExit(f'{arguments} failed')
    return elapsed


if __name__ == '__main__':
    main(sys.argv[1:] or ['@recipes/demo_pretrain.txt'])
