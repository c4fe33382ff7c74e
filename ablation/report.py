"""Table and figures of an ablation, from the files of its finished runs (ablation/run.py).

python -m ablation.report results/demo
"""

import json
import statistics
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
SUMMARY = ['val_knn_patches', 'val_loss']  # of these, a figure of their own
RANDOM, BASE = 'random', 'MAE'  # the zero line, and what the others are compared with


def get_parser():
    parser = ArgumentParser(__doc__)
    parser.add_argument('folder', help='--results of ablation.run')
    return parser


def main(args):
    print(write_report(args.folder))


def write_report(folder):
    """Write table.md, summary.png, curves.png and fusion.png into a folder. Returns the table.

    Raises:
        InputError: if there are no results.
    """
    groups = read_results(folder)
    if not groups:
        raise InputError(f'{folder}: no results of finished runs')
    table = make_table(groups)
    Path(folder, 'table.md').write_text(table + '\n')
    others = [name for name in MEASURES if name not in SUMMARY]
    figures = {
        'summary': curve_panels(groups, SUMMARY),
        'curves': curve_panels(groups, others),
        'fusion': fusion_panels(groups),
    }
    for name, panels in figures.items():
        if panels:
            make_figure(panels).savefig(Path(folder, f'{name}.png'))
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
    runs = [points for group in curves.values() for points in group.values()]
    starts = [points[0][1] for points in runs if points[0][0] == 0]
    trained = {name: group for name, group in curves.items() if group and name != RANDOM}
    return trained, starts


# --- Table ----------------------------------------------------------------------------------------


def make_table(groups):
    """Markdown: each measure at the end, differences to MAE, epochs to its final accuracy."""
    cells = {'random weights': {}} | {name: {} for name in groups if name != RANDOM}
    notes = []
    for name, title in MEASURES.items():
        digits = 3 if name == 'val_loss' else 1
        curves, starts = curves_of(groups, name)
        cells['random weights'][name] = in_words(starts, digits)
        final = {
            variant: {seed: points[-1][1] for seed, points in group.items()}
            for variant, group in curves.items()
        }
        for variant, values in final.items():
            cells[variant][name] = in_words(list(values.values()), digits)
            both = sorted(values.keys() & final.get(BASE, {}).keys())
            if variant == BASE:
                continue
            differences = [values[seed] - final[BASE][seed] for seed in both]
            row = cells.setdefault(f'{variant} - {BASE}', {})
            row[name] = in_words(differences, digits, '+')
            if both and name in ('val_knn_cls', 'val_knn_patches'):
                epochs = [epochs_to_reach(curves[variant][s], final[BASE][s]) for s in both]
                notes.append(
                    f'- Epochs until {variant} reaches the final accuracy of {BASE}, {title}, seed '
                    f'by seed: {", ".join(epochs)}, of {curves[BASE][both[0]][-1][0]:g}'
                )
    measures = [name for name in MEASURES if any(row.get(name) for row in cells.values())]
    lines = [['', *(MEASURES[name] for name in measures)], ['---'] * (1 + len(measures))]
    for title, row in cells.items():
        if any(row.values()):
            lines.append([title, *(row.get(name, '') for name in measures)])
    counts = ', '.join(f'{len(group)} of {variant}' for variant, group in groups.items())
    results = [result for group in groups.values() for result in group.values()]
    origins = {f'{run["command"]}  \n{run["device"]}; {run["versions"]}' for run in results}
    return '\n'.join(
        [
            *(f'| {" | ".join(line)} |' for line in lines),
            f'\nMean ± standard deviation over runs ({counts}); accuracies in %; differences seed '
            'by seed.\n',
            *notes,
            *(f'\n{origin}' for origin in sorted(origins)),
        ]
    )


def in_words(values, digits, sign=''):
    """'mean ± sample standard deviation'; of one value, the value; of none, nothing."""
    if not values:
        return ''
    mean = f'{statistics.fmean(values):{sign}.{digits}f}'
    return f'{mean} ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def epochs_to_reach(points, value):
    """Where the broken line through points [(epoch, value)] first has this value, or 'never'."""
    before = None
    for epoch, now in points:
        if now >= value and before is None:
            return f'{epoch:.1f}'
        if now >= value:
            share = (value - before[1]) / (now - before[1])
            return f'{before[0] + share * (epoch - before[0]):.1f}'
        before = epoch, now
    return 'never'


# --- Figures: {title of a panel: ({label: [points of a seed]}, values of random weights)} ---------


def curve_panels(groups, measures):
    """A panel for each measure that was taken more than once in a run, a line per variant."""
    panels = {}
    for name in measures:
        title = MEASURES[name]
        curves, starts = curves_of(groups, name)
        lines = {variant: list(group.values()) for variant, group in curves.items()}
        if any(len(points) > 1 for runs in lines.values() for points in runs):
            panels[title if name == 'val_loss' else f'{title}, %'] = lines, starts
    return panels


def fusion_panels(groups):
    """A panel for each variant that learns fusion weights, a line per block."""
    panels = {}
    for variant, group in groups.items():
        lines = {}
        for result in group.values():
            for name, points in result['curves'].items():
                if name.startswith('fusion/'):
                    lines.setdefault(name.removeprefix('fusion/'), []).append(points)
        if len(lines) > 1:
            panels[f'fusion weights of {variant}'] = lines, []
    return panels


def make_figure(panels):
    """Values against epochs: a colour per label, a thin line per seed, a thick one for their mean.

    The grey line is what random weights give.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout='constrained', dpi=100)
    labels = list(dict.fromkeys(label for lines, _ in panels.values() for label in lines))
    for place, (title, (lines, starts)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        if starts:
            axes.axhline(statistics.fmean(starts), color='grey', ls='--', label='random weights')
        for label, runs in lines.items():
            colour = f'C{labels.index(label)}'
            for points in runs:
                axes.plot(*zip(*points), color=colour, linewidth=0.7, alpha=0.7)
            epochs = [epoch for epoch, _ in runs[0]]
            means = [statistics.fmean(value for _, value in points) for points in zip(*runs)]
            axes.plot(epochs, means, color=colour, linewidth=2, label=label)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
    handles = {}
    for axes in figure.axes:
        handles |= {line.get_label(): line for line in axes.lines if line.get_label()[0] != '_'}
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=min(5, len(handles)))
    return figure


if __name__ == '__main__':
    run_job(main, get_parser())
