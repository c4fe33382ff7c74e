"""Table and figure of an ablation, from the files of its finished runs (ablation/run.py).

python -m ablation.report results/demo
"""

import json
import statistics
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure

from util.args import ArgumentParser, run_job
from util.errors import InputError

MEASURES = {  # name of a curve in a result: its title
    'val_loss': 'validation loss',
    'val_knn_cls': '20-NN, cls token, subset',
    'val_knn_patches': '20-NN, mean of patches, subset',
    'knn_cls': '20-NN, cls token',
    'knn_patches': '20-NN, mean of patches',
    'logistic_cls': 'logistic, cls token',
    'logistic_patches': 'logistic, mean of patches',
    'finetune': 'fine-tuning',
}
SUMMARY = ['val_knn_patches', 'val_loss']  # the panels of the figure
RANDOM, BASE = 'random', 'MAE'  # the zero line, and what the others are compared with


def get_parser():
    parser = ArgumentParser(__doc__)
    parser.add_argument('folder', help='--results of ablation.run')
    return parser


def main(args):
    print(write_report(args.folder))


def write_report(folder):
    """Write table.md and summary.png into a folder. Returns the table.

    Raises:
        InputError: if there are no results.
    """
    groups = read_results(folder)
    if not groups:
        raise InputError(f'{folder}: no results of finished runs')
    table = make_table(groups)
    Path(folder, 'table.md').write_text(table + '\n')
    make_figure(groups).savefig(Path(folder, 'summary.png'))
    return table


def read_results(folder):
    """The results in a folder, {variant: {seed: result}}; MAE first."""
    groups = {BASE: {}}
    for path in sorted(Path(folder).glob('*-seed*.json')):
        result = json.loads(path.read_text())
        groups.setdefault(result['variant'], {})[result['seed']] = result
    return {variant: group for variant, group in groups.items() if group}


def curves_of(groups, name):
    """({variant: {seed: [(epoch, value)]}} of one measure, [value of random weights])."""
    curves = {
        variant: {seed: run['curves'][name] for seed, run in group.items() if name in run['curves']}
        for variant, group in groups.items()
    }
    firsts = [points[0] for group in curves.values() for points in group.values()]
    trained = {name: group for name, group in curves.items() if group and name != RANDOM}
    return trained, [value for epoch, value in firsts if epoch == 0]


def make_table(groups):
    """Markdown: each measure at the end, differences to MAE, epochs to its final accuracy."""
    trained = [variant for variant in groups if variant != RANDOM]
    rows = ['random weights', *trained, *(f'{v} - {BASE}' for v in trained if v != BASE)]
    columns, notes = {}, []  # {title: {row: text}}
    for name, title in MEASURES.items():
        curves, starts = curves_of(groups, name)
        digits = 3 if name == 'val_loss' else 1
        column = columns[title] = {'random weights': in_words(starts, digits)}
        final = {v: {s: points[-1][1] for s, points in curves[v].items()} for v in curves}
        base = final.get(BASE, {})
        for variant, values in final.items():
            column[variant] = in_words(values.values(), digits)
            both = sorted(values.keys() & base.keys()) if variant != BASE else []
            differences = [values[seed] - base[seed] for seed in both]
            column[f'{variant} - {BASE}'] = in_words(differences, digits, '+')
            if both and name in ('val_knn_cls', 'val_knn_patches'):
                epochs = [epochs_to_reach(curves[variant][seed], base[seed]) for seed in both]
                notes.append(
                    f'- Epochs until {variant} reaches the final accuracy of {BASE}, {title}, seed '
                    f'by seed: {", ".join(epochs)}, of {curves[BASE][both[0]][-1][0]:g}'
                )
    columns = {title: column for title, column in columns.items() if any(column.values())}
    lines = [['', *columns], ['---'] * (1 + len(columns))]
    lines += [[row, *(column.get(row, '') for column in columns.values())] for row in rows]
    counts = ', '.join(f'{len(group)} of {variant}' for variant, group in groups.items())
    runs = [run for group in groups.values() for run in group.values()]
    origins = {f'\n{run["command"]}  \n{run["device"]}; {run["versions"]}' for run in runs}
    return '\n'.join([
        *(f'| {" | ".join(line)} |' for line in lines if any(line[1:])),
        f'\nMean ± standard deviation over runs ({counts}); accuracies in %; differences seed '
        'by seed.\n',
        *notes,
        *sorted(origins),
    ])  # fmt: skip


def in_words(values, digits, sign=''):
    """'mean ± sample standard deviation'; of one value, the value; of none, nothing."""
    if not values:
        return ''
    mean = f'{statistics.fmean(values):{sign}.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def epochs_to_reach(points, value):
    """Where the broken line through points [(epoch, value)] first has this value, or 'never'."""
    for (epoch, before), (after, now) in pairwise([(points[0][0], value), *points]):
        if now >= value:
            share = (value - before) / (now - before) if now > before else 1.0
            return f'{epoch + share * (after - epoch):.1f}'
    return 'never'


def make_figure(groups):
    """Values by epoch: a colour per variant, a thin line per seed, a thick one for their mean.

    The grey line is what random weights give. The other curves are in TensorBoard.
    """
    figure = Figure(figsize=(8, 3.8), layout='constrained', dpi=100)
    for axes, name in zip(figure.subplots(1, len(SUMMARY)), SUMMARY):
        curves, starts = curves_of(groups, name)
        if starts:
            axes.axhline(statistics.fmean(starts), color='grey', ls='--', label='random weights')
        for number, (variant, group) in enumerate(curves.items()):
            for points in group.values():
                axes.plot(*zip(*points), color=f'C{number}', linewidth=0.7, alpha=0.7)
            epochs = [points[0][0] for points in zip(*group.values())]
            means = [statistics.fmean(v for _, v in points) for points in zip(*group.values())]
            axes.plot(epochs, means, color=f'C{number}', linewidth=2, label=variant)
        axes.set(title=MEASURES[name] + (', %' if name != 'val_loss' else ''), xlabel='epoch')
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return figure


if __name__ == '__main__':
    run_job(main, get_parser())
