"""What the benchmarks share: where a figure comes from, median and spread, tables."""

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from pathlib import Path

import PIL
import timm
import torch
import torchvision


def environment(device):
    """What a figure cannot be read without."""
    model = {'machine': platform.processor() or platform.machine()}
    if os.path.exists('/proc/cpuinfo'):
        model = dict(line.split(':', 1) for line in open('/proc/cpuinfo') if line.startswith('model name'))
    cpu = f'{next(iter(model.values())).strip()}, {torch.get_num_threads()} of {os.cpu_count()} cores'
    return {
        'command': shlex.join(['python', '-m', f'benchmarks.{Path(sys.argv[0]).stem}', *sys.argv[1:]]),
        'device': f'{torch.cuda.get_device_name(device)}; {cpu}' if device.startswith('cuda') else cpu,
        'versions': f'Python {platform.python_version()}, torch {torch.__version__}, torchvision '
        f'{torchvision.__version__}, timm {timm.__version__}, Pillow {PIL.__version__}',
        'date': f'{datetime.date.today()}',
    }


def heading(facts):
    """Markdown of environment's dict, a line each."""
    return '\n'.join(f'{name}: {value}  ' for name, value in facts.items())


def spread(values, digits=3):
    """'median (lowest to highest)' of the rounds."""
    low, middle, high = (f'{x:.{digits}g}' for x in (min(values), statistics.median(values), max(values)))
    return f'{middle} ({low} to {high})'


def table(rows):
    """Markdown of a list of dicts, whose keys, all the same, are the header."""
    lines = [list(rows[0]), ['---'] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def publish(out, device, rows, rounds):
    """Print the table last; write it as out.md, and with every round as out.json."""
    facts = environment(device)
    text = f'{heading(facts)}\n\n{table(rows)}\n'
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(f'{out}.md').write_text(text)
        Path(f'{out}.json').write_text(json.dumps({**facts, 'table': rows, 'rounds': rounds}, indent=1) + '\n')
    print(f'\n{text}', end='')
