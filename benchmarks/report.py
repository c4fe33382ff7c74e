"""What the benchmarks share: where a figure comes from, median and spread, tables."""

import datetime
import json
import os
import platform
import re
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
    models = []  # ARM's /proc/cpuinfo names none
    if os.path.exists('/proc/cpuinfo'):
        models = re.findall(r'^model name\s*: (.+)', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    model = models[0] if models else platform.processor() or platform.machine()
    cpu = f'{model}, {torch.get_num_threads()} of {os.cpu_count()} cores'
    return {
        'command': shlex.join(['python', '-m', f'benchmarks.{Path(sys.argv[0]).stem}', *sys.argv[1:]]),
        'device': f'{torch.cuda.get_device_name(device)}; {cpu}' if device.startswith('cuda') else cpu,
        'versions': f'Python {platform.python_version()}, torch {torch.__version__}, torchvision '
        f'{torchvision.__version__}, timm {timm.__version__}, Pillow {PIL.__version__}',
        'date': f'{datetime.date.today()}',
    }


def spread(values, digits=3):
    """'median (lowest to highest)' of the rounds."""
    low, middle, high = (f'{x:.{digits}g}' for x in (min(values), statistics.median(values), max(values)))
    return f'{middle} ({low} to {high})'


def table(rows):
    """Markdown of a list of dicts, whose keys are the header; a cell that a row lacks stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ['---'] * len(columns), *([str(row.get(name, '')) for name in columns] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def publish(out, device, rows, rounds):
    """Print the table last; write it as out.md, and with every round as out.json."""
    facts = environment(device)
    heading = '\n'.join(f'{name}: {value}  ' for name, value in facts.items())
    text = f'{heading}\n\n{table(rows)}\n'
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(f'{out}.md').write_text(text)
        Path(f'{out}.json').write_text(json.dumps({**facts, 'table': rows, 'rounds': rounds}, indent=1) + '\n')
    print(f'\n{text}', end='')
