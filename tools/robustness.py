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
    'gaussian_noise': 88.6, 'shot_noise': 89.4, 'impulse_noise': 92.3, 'defocus_blur': 82.0,
    'glass_blur': 82.6, 'motion_blur': 78.6, 'zoom_blur': 79.8, 'snow': 86.7, 'frost': 82.7,
    'fog': 81.9, 'brightness': 56.5, 'contrast': 85.3, 'elastic_transform': 64.6, 'pixelate': 71.8,
    'jpeg_compression': 60.7,
}  # fmt: skip
SETS = {'imagenet_a': 'ImageNet-A', 'imagenet_r': 'ImageNet-R', 'imagenet_sketch': 'Sketch'}


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
    folders = {SETS[name]: [getattr(args, name)] for name in SETS if getattr(args, name)}
    corruptions = []
    if args.imagenet_c:
        with as_input_error():
            names = sorted(entry.name for entry in os.scandir(args.imagenet_c) if entry.is_dir())
        corruptions = names or ['CORRUPTION']  # which will be missing
    for name in corruptions:
        folders[name] = [os.path.join(args.imagenet_c, name, str(number)) for number in range(1, 6)]
    missing = [path for name in corruptions for path in folders[name] if not os.path.isdir(path)]
    if missing or not folders:
        raise InputError(f'nothing to measure: no {(missing or ["--imagenet_c, --imagenet_a"])[0]}')
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

    found = {name: [top1(path) for path in paths] for name, paths in folders.items()}
    results = {title: {'top1': found[title][0]} for title in SETS.values() if title in found}
    if corruptions:
        errors = {name: [100 - value for value in found[name]] for name in corruptions}
        results['ImageNet-C'] = corruption_errors(errors)
    if distributed.is_first():
        table = format_table(results)
        print(table)
        with as_input_error():
            with open(f'{args.out}.json', 'w') as file:
                json.dump({'checkpoint': args.init_from} | results, file, indent=2)
            with open(f'{args.out}.md', 'w') as file:
                file.write(table + '\n')
    distributed.stop()


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
    rows = {f'{name}, top-1': part['top1'] for name, part in results.items() if 'top1' in part}
    if 'ImageNet-C' in results:
        corrupted = results['ImageNet-C']
        if 'mce' in corrupted:
            rows[f'mean corruption error, {len(corrupted["counted"])} of 15'] = corrupted['mce']
        rows['mean error, not normalised'] = corrupted['mean_error']
        for name, error in corrupted['errors'].items():
            rows[f'{name}{"" if name in corrupted["counted"] else " (extra)"}, error'] = error
    return '\n'.join(['| | |', '|---|---|', *(f'| {k} | {v:.2f} % |' for k, v in rows.items())])


if __name__ == '__main__':
    flags.run_job(main, get_parser())
