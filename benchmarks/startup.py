"""Seconds from the command to the first optimiser step, and how much of that are imports.

python -m benchmarks.startup                                                       # the demo
python -m benchmarks.startup @recipes/one_gpu_pretrain.txt --data_path IMAGES      # any flags of main_pretrain.py
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from util import distributed

ROUNDS = 5


def main(flags):
    rounds = {}
    for _ in range(ROUNDS):
        for module in ('torch', 'main_pretrain'):
            importing = ['-c', f'import {module}; print("imported", flush=True)']
            rounds.setdefault(f'import {module}', []).append(seconds(importing, until='imported'))
        with tempfile.TemporaryDirectory() as folder:
            training = ['main_pretrain.py', *flags, '--log_every', '1', '--output_dir', folder]
            rounds.setdefault('first step', []).append(seconds(training, until='step 1/'))
    rows = [{'until': stage, 'seconds': report.spread(values)} for stage, values in rounds.items()]
    report.publish(None, distributed.choose_device('auto'), rows, rounds)


def seconds(arguments, until):
    """From starting Python with arguments to the first line with `until`, where it is stopped."""
    began, lines = time.perf_counter(), []
    command = [sys.executable, *arguments]
    output = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}  # no terminal, so lines are printed
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, **output) as process:
        for line in process.stdout:
            lines.append(line)
            if until in line:
                elapsed = time.perf_counter() - began
                process.terminate()
                process.communicate()  # to the end: what it still has to say needs a reader
                return elapsed
    raise SystemExit(f'{shlex.join(command)} ended before "{until}": {"".join(lines[-3:]).strip()}')


if __name__ == '__main__':
    main(sys.argv[1:] or ['@recipes/demo_pretrain.txt'])
