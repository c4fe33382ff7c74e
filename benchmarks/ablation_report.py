"""Table and figures of an ablation, from the files of its finished runs (benchmarks/ablation.py).

python -m benchmarks.ablation_report results/ablation_demo
"""

import itertools
import json
import os
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from util.args import ArgumentParser, run
from util.errors import InputError
from util.visualize import draw_fusion_curves, finish, fusion_curves

MEASURES = {  # name of a curve: its name for people
    'val_loss': 'validation loss',
    'val_knn_cls': '20-NN, cls token, subset',
    'val_knn_patches': '20-NN, mean of patches, subset',
    'knn_cls': '20-NN, cls token',
    'knn_patches': '20-NN, mean of patches',
    'logistic_cls': 'logistic, cls token',
    'logistic_patches': 'logistic, mean of patches',
    'finetune': 'fine-tuning',
}
COLOURS = {'MAE': 'C0', 'MFF': 'C1'}  # in every figure; the others follow
BASE = 'MAE'  # what the others are compared with


def get_parser():
    parser = ArgumentParser(__doc__)
    parser.add_argument('folder', help='--results of benchmarks.ablation')
    return parser


def main(args):
    print(write_report(args.folder))


def read_results(folder):
    """The results in a folder, {variant: {seed: result}}."""
    results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob('*-seed*.json'))]
    order = {name: index for index, name in enumerate(('random', 'MAE', 'MFF'))}
    groups = {}
    for result in sorted(results, key=lambda result: order.get(result['variant'], 9)):
        groups.setdefault(result['variant'], {})[result['seed']] = result
    return groups


def write_report(folder):
    """Write table.md, curves.png and fusion.png into a folder of results. Returns the table. InputError without any."""
    groups = read_results(folder)
    if not groups:
        raise InputError(f'{folder}: no results of finished runs')
    table = make_table(groups)
    Path(folder, 'table.md').write_text(table + '\n')
    for name, figure in (('curves', curves_figure(groups)), ('fusion', fusion_figure(groups))):
        if figure is not None:
            figure.savefig(os.path.join(folder, f'{name}.png'))
    return table


# --- Table --------------------------------------------------------------------------------------------------------


def make_table(groups):
    """Markdown: mean and deviation of each measure at the end, differences to MAE seed by seed, epochs it takes."""
    measures = [
        name for name in MEASURES if any(name in r['curves'] for runs in groups.values() for r in runs.values())
    ]
    rows = [['', 'runs', *(MEASURES[name] for name in measures)], ['---'] * (len(measures) + 2)]
    for variant, runs in groups.items():
        columns = [[final(run, name) for run in runs.values() if name in run['curves']] for name in measures]
        rows.append([variant, len(runs), *(in_words(values) for values in columns)])
    for variant, runs in groups.items():
        both = sorted(runs.keys() & groups.get(BASE, {}).keys())
        if variant in (BASE, 'random') or not both:
            continue
        pairs = [(runs[seed], groups[BASE][seed]) for seed in both]
        columns = [
            [final(ours, name) - final(theirs, name) for ours, theirs in pairs if name in ours['curves']]
            for name in measures
        ]
        rows.append([f'{variant} - {BASE}', len(both), *(in_words(values, '+') for values in columns)])
    lines = [f'| {" | ".join(map(str, row))} |' for row in rows]
    lines += ['', 'Mean ± standard deviation over seeds; accuracies in %; differences seed by seed.', '']
    for name in ('val_knn_patches', 'val_knn_cls'):
        for variant, runs in groups.items():
            both = sorted(runs.keys() & groups.get(BASE, {}).keys())
            if variant not in (BASE, 'random') and both and all(name in runs[seed]['curves'] for seed in both):
                epochs = [epochs_to_reach(runs[s]['curves'][name], final(groups[BASE][s], name)) for s in both]
                needed = ', '.join('never' if epoch is None else f'{epoch:.1f}' for epoch in epochs)
                total = groups[BASE][both[0]]['curves'][name][-1][0]
                goal = f'the final {MEASURES[name]} of {BASE}'
                lines.append(f'- Epochs until {variant} reaches {goal}, seed by seed: {needed}, of {total:g}')
    lines += [
        '',
        *sorted({f'{r["command"]}  \n{r["device"]}; {r["versions"]}' for g in groups.values() for r in g.values()}),
    ]
    return '\n'.join(lines)


def final(run, name):
    return run['curves'][name][-1][1]


def in_words(values, sign=''):
    """'mean ± sample standard deviation'; of one value, the value; of none, nothing."""
    if not values:
        return ''
    digits = 3 if max(map(abs, values)) < 3 and sign == '' else 2
    mean = f'{statistics.fmean(values):{sign}.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def epochs_to_reach(points, value):
    """The epoch at which the broken line through points [(epoch, value)] first has this value; None if never."""
    before = None
    for epoch, now in points:
        if now >= value:
            return (
                epoch if before is None else before[0] + (epoch - before[0]) * (value - before[1]) / (now - before[1])
            )
        before = epoch, now
    return None


# --- Figures ------------------------------------------------------------------------------------------------------


def curves_figure(groups):
    """Each measure against epochs: a colour per variant, a thin line per seed, a thick one for their mean.

    The grey line is the mean of what random weights give, epoch 0.
    """
    all_runs = [run for runs in groups.values() for run in runs.values()]
    names = [name for name in MEASURES if any(len(run['curves'].get(name, ())) > 1 for run in all_runs)]
    if not names:
        return None
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout='constrained', dpi=100)
    spare = (f'C{index}' for index in itertools.count(2))
    colours = {variant: COLOURS.get(variant) or next(spare) for variant in groups if variant != 'random'}
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        start = [
            run['curves'][name][0][1] for run in all_runs if name in run['curves'] and run['curves'][name][0][0] == 0
        ]
        if start:
            axes.axhline(statistics.fmean(start), color='grey', linestyle='--', label='random weights')
        for variant, colour in colours.items():
            curves = [run['curves'][name] for run in groups[variant].values() if name in run['curves']]
            for points in curves:
                axes.plot(*zip(*points), color=colour, linewidth=0.7, alpha=0.7)
            if curves:
                epochs = [epoch for epoch, _ in curves[0]]
                means = [
                    statistics.fmean(values) for values in zip(*([value for _, value in points] for points in curves))
                ]
                axes.plot(epochs, means, color=colour, linewidth=2, label=f'{variant}, mean of {len(curves)}')
        axes.set_title(MEASURES[name])
        finish(axes, 'epoch', '' if 'loss' in name else 'accuracy, %')
    return figure


def fusion_figure(groups):
    """Fusion weights over training: a panel per variant that learns some, a colour per block, a line per seed."""
    panels = {}
    for variant, runs in groups.items():
        lines = {f'seed {seed}': fusion_curves(result['curves']) for seed, result in runs.items()}
        if any(lines.values()):
            panels[variant] = lines
    if not panels:
        return None
    figure = Figure(figsize=(4 * len(panels), 4.2), layout='constrained', dpi=100)
    for axes, (variant, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axes.set_title(variant)
        draw_fusion_curves(axes, lines)
    return figure


if __name__ == '__main__':
    run(main, get_parser())
