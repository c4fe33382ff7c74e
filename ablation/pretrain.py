"""Pre-train one of the paper's alternatives: main_pretrain.py with three more flags.

    python -m ablation.pretrain --fusion uniform @recipes/demo_pretrain.txt

Its runs resume by the same command. The encoder of a checkpoint is read by all jobs and tools.
"""

from functools import partial

import main_pretrain
from ablation.variants import CHOICES, VariantMFF
from util import args as flags
from util import weights


def get_parser():
    parser = main_pretrain.get_parser()
    parser.description = __doc__
    add = parser.add_argument_group("the paper's alternatives; the first is its own").add_argument
    for name, options in CHOICES.items():
        add(f'--{name}', choices=options, default=options[0], help='see ablation/variants.py')
    return parser


def main(args):
    choices = {name: getattr(args, name) for name in CHOICES}
    if args.target == 'lowpass':  # of pixels that are not normalised
        settings = weights.settings_of(
            args, weights.read(args.init_from) if args.init_from else None
        )
        choices |= {'mean': settings.mean, 'std': settings.std}
    main_pretrain.main(args, partial(VariantMFF, **choices))


if __name__ == '__main__':
    flags.run_job(main, get_parser())
