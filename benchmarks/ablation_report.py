"""Table and figures of an ablation, from the files of its finished runs (benchmarks/ablation.py).

python -m benchmarks.ablation_report results/demo
"""

import itertools
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from util.args import ArgumentParser, run_job
from util.errors import InputError
from util.visualize import draw_fusion_curves, finish, fusion_curves

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
RANDOM, BASE = 'random', 'MAE'  # the zero line, and what the others are compared with


def get_parser():
    parser = ArgumentParser(__doc__)
    parser.add_argument('folder', help='--results of benchmarks.ablation')
    return parser


def main(args):
    print(write_report(args.folder))


def read_results(folder):
    """The results in a folder, {variant: {seed: result}}; MAE first."""
    groups = {BASE: {}}
    for path in sorted(Path(folder).glob('*-seed*.json')):
        result = json.loads(path.read_text())
        groups.setdefault(result['variant'], {})[result['seed']] = result
    return {variant: group for variant, group in groups.items() if group}


def write_report(folder):
    """Write table.md, curves.png and fusion.png into a folder of results. Returns the table. InputError without any."""
    groups = read_results(folder)
    if not groups:
        raise InputError(f'{folder}: no results of finished runs')
    table = make_table(groups)
    Path(folder, 'table.md').write_text(table + '\n')
    for name, figure in (('curves', curves_figure(groups)), ('fusion', fusion_figure(groups))):
        if figure is not None:
            figure.savefig(Path(folder, f'{name}.png'))
    return table


def curves_of(groups, name):
    """{variant: {seed: [(epoch, value)]}} of one measure, and what random weights give, [value], at epoch 0."""
    curves = {
        variant: {seed: result['curves'][name] for seed, result in group.items() if name in result['curves']}
        for variant, group in groups.items()
    }
    starts = [points[0][1] for group in curves.values() for points in group.values() if points[0][0] == 0]
    return {variant: group for variant, group in curves.items() if group and variant != RANDOM}, starts


# --- Table --------------------------------------------------------------------------------------------------------


def make_table(groups):
    """Markdown: mean and deviation of each measure at the end, differences to MAE, epochs to its final accuracy."""
    cells = {title: {} for title in ('random weights', *groups) if title != RANDOM}  # {row: {measure: text}}
    notes = []
    for name in MEASURES:
        digits = 3 if name == 'val_loss' else 1
        curves, starts = curves_of(groups, name)
        if starts:
            cells['random weights'][name] = in_words(starts, digits)
        final = {variant: {seed: points[-1][1] for seed, points in group.items()} for variant, group in curves.items()}
        for variant, values in final.items():
            cells[variant][name] = in_words(list(values.values()), digits)
        for variant in [variant for variant in final if variant != BASE]:
            both = sorted(final[variant].keys() & final.get(BASE, {}).keys())
            differences = [final[variant][seed] - final[BASE][seed] for seed in both]
            cells.setdefault(f'{variant} - {BASE}', {})[name] = in_words(differences, digits, '+')
            if both and name in ('val_knn_cls', 'val_knn_patches'):
                epochs = [epochs_to_reach(curves[variant][seed], final[BASE][seed]) for seed in both]
                notes.append(
                    f'- Epochs until {variant} reaches the final accuracy of {BASE}, {MEASURES[name]}, seed by seed: '
                    f'{", ".join(epochs)}, of {curves[BASE][both[0]][-1][0]:g}'
                )
    measures = [name for name in MEASURES if any(name in row for row in cells.values())]
    lines = [['', *(MEASURES[name] for name in measures)], ['---'] * (1 + len(measures))]
    lines += [[title, *(row.get(name, '') for name in measures)] for title, row in cells.items() if row]
    counts = ', '.join(f'{len(group)} of {variant}' for variant, group in groups.items())
    results = [result for group in groups.values() for result in group.values()]
    sources = {f'{result["command"]}  \n{result["device"]}; {result["versions"]}' for result in results}
    return '\n'.join(
        [
            *(f'| {" | ".join(cells)} |' for cells in lines),
            f'\nMean ± standard deviation over runs ({counts}); accuracies in %; differences seed by seed.\n',
            *notes,
            *(f'\n{source}' for source in sorted(sources)),
        ]
    )


def in_words(values, digits, sign=''):
    """'mean ± sample standard deviation'; of one value, the value; of none, nothing."""
    if not values:
        return ''
    mean = f'{statistics.fmean(values):{sign}.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def epochs_to_reach(points, value):
    """The epoch at which the broken line through points [(epoch, value)] first has this value, as text, or 'never'."""
    before = None
    for epoch, now in points:
        if now >= value:
            share = 1 if before is None else (value - before[1]) / (now - before[1])
            return f'{epoch if before is None else before[0] + share * (epoch - before[0]):.1f}'
        before = epoch, now
    return 'never'


# --- Figures ------------------------------------------------------------------------------------------------------


def curves_figure(groups):
    """Each measure against epochs: a colour per variant, a thin line per seed, a thick one for their mean.

    The grey line is what random weights give.
    """
    panels = {name: curves_of(groups, name) for name in MEASURES}
    panels = {
        name: (curves, starts)
        for name, (curves, starts) in panels.items()
        if any(len(points) > 1 for group in curves.values() for points in group.values())
    }
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout='constrained', dpi=100)
    colours = dict(zip((variant for variant in groups if variant != RANDOM), (f'C{i}' for i in itertools.count())))
    for place, (name, (curves, starts)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        if starts:
            axes.axhline(statistics.fmean(starts), color='grey', linestyle='--', label='random weights')
        for variant, group in curves.items():
            for points in group.values():
                axes.plot(*zip(*points), color=colours[variant], linewidth=0.7, alpha=0.7)
            values = zip(*([value for _, value in points] for points in group.values()))
            epochs = [epoch for epoch, _ in next(iter(group.values()))]
            mean = list(map(statistics.fmean, values))
            label = f'{variant}, {len(group)} seed{"s" if len(group) > 1 else ""}'
            axes.plot(epochs, mean, color=colours[variant], linewidth=2, label=label)
        axes.set_title(MEASURES[name])
        finish(axes, 'epoch', 'loss' if name == 'val_loss' else 'accuracy, %', ncols=0)
    labels = axes.get_legend_handles_labels()  # the same in all panels
    figure.legend(*labels, loc='outside lower center', ncols=min(5, len(labels[0])), frameon=False)
    return figure


def fusion_figure(groups):
    """Fusion weights over training: a panel per variant that learns some, a colour per block, a line style per seed."""
    panels = {}
    for variant, group in groups.items():
        lines = {f'seed {seed}': fusion_curves(result['curves']) for seed, result in group.items()}
        if any(lines.values()):
            panels[variant] = lines
    if not panels:
        return None
    figure = Figure(figsize=(4 * len(panels), 4), layout='constrained', dpi=100)
    for axes, (variant, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        draw_fusion_curves(axes, lines)
        axes.set_title(variant)
    return figure


if __name__ == '__main__':
    run_job(main, get_parser())
