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
    add = parser.add_argument_group("the paper's alternatives").add_argument
    texts = {
        'fuse_proj': 'projection of the levels below the last; mlp: two layers',
        'fusion': 'weights that are trained, or 1/K each, or self-attention over the levels',
        'target': "lowpass: PixMIM's, without high frequencies",
    }
    for name, options in CHOICES.items():
        add(f'--{name}', choices=options, default=options[0], help=texts[name])
    return parser


def main(args):
    file = weights.read(args.init_from) if args.init_from else None
    settings = weights.settings_of(args, file)
    choices = {name: getattr(args, name) for name in CHOICES}
    build = partial(VariantMFF, mean=settings.mean, std=settings.std, **choices)
    main_pretrain.main(args, build)


if __name__ == '__main__':
    flags.run_job(main, get_parser())
