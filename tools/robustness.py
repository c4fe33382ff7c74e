"""The robustness of a classifier: ImageNet-C, -A, -R and -Sketch, as their authors measure it.

    python -m tools.robustness --init_from CHECKPOINT --imagenet_c DIR --imagenet_a DIR \
        --imagenet_r DIR --imagenet_sketch DIR --out robustness

A, R and Sketch: folders of classes, named by wnid, which may be some of the checkpoint's; only
their logits count. C: CORRUPTION/SEVERITY/CLASS, for severities 1 to 5 (Hendrycks and Dietterich,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019).
"""

import json
import os

import engine
import engine_classify
from models_mff import MODELS
from util import args as flags
from util import distributed, sources
from util.errors import InputError, as_input_error

# Top-1 errors of AlexNet by corruption, in percent (Hendrycks and Dietterich 2019), by which the
# mean corruption error is normalised.
ALEXNET = {
    'gaussian_noise': 88.6,
    'shot_noise': 89.4,
    'impulse_noise': 92.3,
    'defocus_blur': 82.0,
    'glass_blur': 82.6,
    'motion_blur': 78.6,
    'zoom_blur': 79.8,
    'snow': 86.7,
    'frost': 82.7,
    'fog': 81.9,
    'brightness': 56.5,
    'contrast': 85.3,
    'elastic_transform': 64.6,
    'pixelate': 71.8,
    'jpeg_compression': 60.7,
}
SETS = {'imagenet_a': 'ImageNet-A', 'imagenet_r': 'ImageNet-R', 'imagenet_sketch': 'Sketch'}
SEVERITIES = [1, 2, 3, 4, 5]


def get_parser():
    parser = flags.ArgumentParser(__doc__, usage='%(prog)s --init_from CHECKPOINT [--FLAG VALUE]')
    flags.add_input_arguments(parser)
    flags.add_model_arguments(parser, MODELS)
    flags.add_classifier_arguments(parser)
    add = parser.add_argument_group('robustness').add_argument
    add('--global_pool', choices=['avg', 'token'], help='what the head sees')
    add('--imagenet_c', metavar='DIR', help='corruptions; sets of the same form also do')
    for name, title in SETS.items():
        add(f'--{name}', metavar='DIR', help=title)
    add('--out', default='robustness', help='for OUT.json and OUT.md (default: robustness)')
    return parser


def main(args):
    if not args.imagenet_c and not any(getattr(args, name) for name in SETS):
        raise InputError('nothing to measure: --imagenet_c, --imagenet_a, --imagenet_r, ...')
    severities = find_severities(args.imagenet_c) if args.imagenet_c else {}
    device = distributed.start(args.device)
    model, settings = engine_classify.load_classifier(args, device)
    autocast, _ = engine.mixed_precision(args.amp, device)

    def top1(path):
        args.data_path = path
        _, source = sources.open_sources(args, settings.sizes, labelled=True, only_val=True)
        index = engine_classify.find_logits(model, settings, source)
        loader = engine_classify.classes_loader(args, device, source, settings)
        values, _ = engine_classify.evaluate(model, loader, autocast, source.classes, index=index)
        return values['val_top1']

    results = {'checkpoint': args.init_from}
    for name, title in SETS.items():
        if getattr(args, name):
            results[title] = {'top1': top1(getattr(args, name))}
    if severities:
        errors = {
            name: [100 - top1(folder) for folder in folders] for name, folders in severities.items()
        }
        results['ImageNet-C'] = corruption_errors(errors)
    if distributed.is_first():
        table = format_table(results)
        print(table)
        with as_input_error():
            with open(f'{args.out}.json', 'w') as file:
                json.dump(results, file, indent=2)
            with open(f'{args.out}.md', 'w') as file:
                file.write(table + '\n')
    distributed.stop()


def find_severities(root):
    """{corruption: folders of its five severities}. Raises InputError if one is missing."""
    with as_input_error():
        corruptions = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    folders = {
        name: [os.path.join(root, name, str(severity)) for severity in SEVERITIES]
        for name in corruptions
    }
    missing = [path for paths in folders.values() for path in paths if not os.path.isdir(path)]
    if missing or not folders:
        raise InputError(f'{root}: no {missing[0] if missing else "folder of a corruption"}')
    return folders


def corruption_errors(errors):
    """Means over severities, and over corruptions.

    Args:
        errors: {corruption: top-1 errors in percent, one per severity}.

    Returns:
        'errors': {corruption: mean}; 'mean_error' over the 15 corruptions that count, or those of
        them that are there; 'mce': their mean, each over AlexNet's, in percent. Other corruptions,
        the "extra" ones, are in 'errors' only. Where none of the 15 is there, all count, and
        there is no 'mce'.
    """
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    counted = [name for name in means if name in ALEXNET] or list(means)
    result = {'errors': means, 'by_severity': errors, 'counted': counted}
    result['mean_error'] = sum(means[name] for name in counted) / len(counted)
    if counted[0] in ALEXNET:
        ratios = [100 * means[name] / ALEXNET[name] for name in counted]
        result['mce'] = sum(ratios) / len(ratios)
    return result


def format_table(results):
    """A Markdown table of what main measured."""
    rows = ['| | |', '|---|---|']
    for title in SETS.values():
        if title in results:
            rows.append(f'| {title}, top-1 | {results[title]["top1"]:.2f} % |')
    corrupted = results.get('ImageNet-C')
    if corrupted:
        count = len(corrupted['counted'])
        if 'mce' in corrupted:
            rows.append(f'| mean corruption error, {count} of 15 | {corrupted["mce"]:.2f} % |')
        rows.append(f'| mean error, not normalised | {corrupted["mean_error"]:.2f} % |')
        for name, error in corrupted['errors'].items():
            extra = '' if name in corrupted['counted'] else ' (extra)'
            rows.append(f'| {name}{extra}, error | {error:.2f} % |')
    return '\n'.join(rows)


if __name__ == '__main__':
    flags.run_job(main, get_parser())
