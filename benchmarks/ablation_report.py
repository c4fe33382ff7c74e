"""What the ablation found: table, convergence, figures, from the results of its runs (benchmarks/ablation.py)."""

import json
import os
import statistics

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from util.features import depth_colour
from util.visualize import fusion_curves, read_curves

COLOURS = [*colormaps['tab20'].colors[::2], *colormaps['tab20'].colors[1::2]]  # the usual ten, and ten light ones
MEASURES = {'loss': 'validation loss', 'knn': '20-NN', 'linprobe': 'linear probe', 'finetune': 'fine-tuning'}


def write_report(output_dir, head, results, pairs):
    """Write table.md, results.json, curves.png, convergence.png and fusion.png into a folder; returns the table.

    head: its first lines. results: dicts of a run each, as ablation.train_and_measure returns. pairs: variants to
    compare seed by seed.
    """
    os.makedirs(output_dir, exist_ok=True)
    table = f'{head}\n\n{make_table(results, pairs)}'
    for name, text in (('table.md', table), ('results.json', json.dumps(results, indent=2))):
        with open(os.path.join(output_dir, name), 'w') as file:
            file.write(text + '\n')
    for name, draw in (('curves', loss_figure), ('convergence', convergence_figure), ('fusion', fusion_figure)):
        draw(results).savefig(os.path.join(output_dir, f'{name}.png'))
    return table


def by_variant(results):
    """{variant: its results}, in the order of the grid."""
    return {name: [r for r in results if r['variant'] == name] for name in dict.fromkeys(r['variant'] for r in results)}


def make_table(results, pairs):
    """Markdown: mean and deviation of each measure, paired differences by seed, and epochs to the same accuracy."""
    groups = by_variant(results)
    counts = sorted({len(group) for group in groups.values()})
    seeds = {name: {r['seed']: r for r in group} for name, group in groups.items()}
    lines = [f'| | {" | ".join(MEASURES.values())} |', '|---|' + '---|' * len(MEASURES)]
    for name, group in groups.items():
        lines.append(row(name, [[r[measure] for r in group] for measure in MEASURES]))
    pairs = [(ours, theirs) for ours, theirs in pairs if seeds.get(ours, {}).keys() & seeds.get(theirs, {}).keys()]
    for ours, theirs in pairs:
        both = seeds[ours].keys() & seeds[theirs].keys()
        differences = [[seeds[ours][s][m] - seeds[theirs][s][m] for s in both] for m in MEASURES]
        lines.append(row(f'{ours} less {theirs}', differences, sign='+'))
    lines += [
        '',
        f'Mean and standard deviation over seeds ({" or ".join(map(str, counts))} each; accuracies in %, differences '
        'seed by seed). 20-NN: by the mean of the patch tokens.',
        '',
    ]
    for ours, theirs in pairs:
        both = sorted(seeds[ours].keys() & seeds[theirs].keys())
        needed = [epochs_to_reach(curve(seeds[ours][s]), seeds[theirs][s]['knn']) for s in both]
        in_order = ', '.join('never' if epochs is None else epochs for epochs in needed)
        lines.append(
            f'- Epochs until {ours} reaches the final 20-NN accuracy of {theirs}, seed by seed: {in_order}, '
            f'of {seeds[ours][both[0]]["epochs"]}'
        )
    if pairs:
        lines += ['', 'Between the points of convergence.png in straight lines; all but the last are in mid-schedule.']
    return '\n'.join(lines)


def row(title, columns, sign=''):
    digits = [3] + [1] * (len(columns) - 1)
    return f'| {title} | {" | ".join(in_words(values, sign, n) for values, n in zip(columns, digits))} |'


def in_words(values, sign='', digits=1):
    """'mean ± sample standard deviation'; of a single value, the value."""
    mean = f'{statistics.fmean(values):{sign}.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def curve(result):
    """[(epochs, 20-NN accuracy)] of one run, in order."""
    points = [(int(name[4:]), value) for name, value in result.items() if name.startswith('knn_')]
    return sorted(points) + [(result['epochs'], result['knn'])]


def epochs_to_reach(points, accuracy):
    """Epochs, in words, at which the broken line through points first has this accuracy; None if never.

    'at most' those of the first point, if it is already there.
    """
    before = None
    for epochs, value in points:
        if value >= accuracy:
            if before is None:
                return f'at most {epochs}'
            share = (accuracy - before[1]) / (value - before[1])
            return f'{before[0] + share * (epochs - before[0]):.1f}'
        before = epochs, value
    return None


def loss_figure(results):
    """Training loss against epochs: a colour a variant, a line a seed."""
    figure = Figure(figsize=(6, 4), layout='constrained', dpi=100)
    axes = figure.subplots()
    for index, (name, group) in enumerate(by_variant(results).items()):
        for number_, result in enumerate(group):
            points = read_curves(os.path.join(result['folder'], 'pretrain'))['loss']
            axes.plot(*zip(*points), color=COLOURS[index], linewidth=0.8, label=None if number_ else name)
    axes.set(xlabel='epoch', ylabel='pre-training loss')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def convergence_figure(results):
    """20-NN accuracy against epochs, mean and deviation over seeds: the paper's claim of faster convergence."""
    figure = Figure(figsize=(6, 4), layout='constrained', dpi=100)
    axes = figure.subplots()
    for index, (name, group) in enumerate(by_variant(results).items()):
        epochs, *_ = zip(*curve(group[0]))
        values = np.array([[value for _, value in curve(result)] for result in group])  # (seeds, points)
        deviation = values.std(0, ddof=1) if len(values) > 1 else None
        style = {'color': COLOURS[index], 'marker': 'o', 'markersize': 3, 'capsize': 3}
        axes.errorbar(epochs, values.mean(0), deviation, label=name, **style)
    axes.set(xlabel='epochs of pre-training', ylabel='20-nearest-neighbour accuracy, %')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def fusion_figure(results):
    """Fusion weights over training: a panel a variant that learns some, a colour a layer, a line a seed."""
    panels = {}
    for result in results:
        lines = fusion_curves(read_curves(os.path.join(result['folder'], 'pretrain')))
        if lines:
            panels.setdefault(result['variant'], []).append(lines)
    columns = max(1, min(len(panels), 3))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(max(6, 3.5 * columns), 3.5 * rows), layout='constrained', dpi=100)
    for axes, (name, runs) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        for index, lines in enumerate(runs):
            for layer, points in lines.items():
                label = None if index else f'layer {layer}'
                axes.plot(*zip(*points), color=depth_colour(layer, max(lines)), linewidth=0.8, label=label)
        axes.set(title=name, xlabel='epoch', ylabel='fusion weight')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in figure.axes[len(panels) :]:
        axes.axis('off')
    return figure
