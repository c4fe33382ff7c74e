"""Every flag of every job: it reaches what it is for, it changes nothing else, and resuming refuses it or accepts it.

CASES has an entry for each flag, or several, FLAG/WHAT; a flag without one is a failure. The flag is tried in a whole
run of four steps, whose facts (what was built, what the network saw, what the optimiser did, what was logged and
written) are compared with those of the same run without it.
"""

import functools
import hashlib
import itertools
import math
import re
import shutil
import tarfile
from dataclasses import dataclass, field, replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import engine
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from util import checkpoint, distributed, log, mix, transforms, visualize
from util.args import run_job
from util.shapes import Shapes

JOBS = {'pretrain': main_pretrain, 'finetune': main_finetune, 'linprobe': main_linprobe, 'segment': main_segment}

# Two epochs of two steps, the first of them warm-up.
FLAGS = (
    '--model vit_nano_patch4 --input_size 16 --epochs 2 --warmup_epochs 1 --num_workers 0 --log_every 1 --device cpu '
)
JOB_FLAGS = {
    'pretrain': '--data_path {images} --total_batch_size 16 --blr 0.16 ',
    'finetune': '--data_path {images} --total_batch_size 16 --blr 0.16 --min_lr 0 ',
    'linprobe': '--data_path {images} --total_batch_size 16 --blr 0.16 ',
    'segment': '--data_path {pairs} --total_batch_size 8 --blr 0.32 --channels 8 --aux_channels 8 ',
}


@dataclass(frozen=True)
class Case:
    """What a flag does.

    Args:
        flags: the flag and its value; {NAME} is a place.
        changes: every fact that differs, and its value, a check of it, or ... for any.
        given: flags of both runs.
        resume: 'refused', 'free', or a message other than the usual one, or None for what trains nothing.
        fails, prints: the run ends with this message, or prints this pattern; no facts are compared.
        exact: whether all other facts stay.
    """

    flags: str
    changes: dict = field(default_factory=dict)
    given: str = ''
    resume: str | None = 'refused'
    fails: str | None = None
    prints: str | None = None
    exact: bool = True


def norm_is(expected):
    """A check of the norms of all parameters' gradients."""
    return lambda norms: math.hypot(*norms) == pytest.approx(expected, rel=1e-3)


# --- The table ----------------------------------------------------------------------------------------------------

DRAWS = {'torch_draws': ..., 'numpy_draws': ...}  # of a step
SEEN = {'inputs': ..., 'gradient': ...}  # other pixels
BUILT = {'parameters': ..., 'initial': ..., 'gradient': ...}  # another architecture
DATA = {'sample': ..., 'val_inputs': ..., **SEEN}  # other images
OTHER = [0.1, 0.2, 0.3]  # a mean or deviation
KEPT = ['run/checkpoint-0001.pth', 'run/checkpoint-0002.pth']
BEST = 'run/checkpoint-best.pth'
LAST = ['run/checkpoint-last.pth', 'run/checkpoint-previous.pth', 'run/log.jsonl']

COMMON = {
    # --- Data
    'data_path': Case('--data_path {other_images}', DATA, resume='free'),
    'val_path': Case('--val_path {other_images}/val', {'val_inputs': ...}, resume='free'),
    'val_share': Case('--data_path {unsplit_images} --val_share 0.25', {'num_images': 22}, exact=False),
    'download_dir': Case(
        '--download_dir {root}/new',
        {'files': ...},
        given='--data_path {images_tar} --download_dir {root}',
        resume='free',
    ),
    'background': Case('--background 0 99 200', DATA, given='--data_path {clear_images}'),
    'max_bad': Case(
        '--max_bad 0', given='--data_path {broken_images}', fails='more than --max_bad 0 allows', resume='free'
    ),
    'num_workers': Case('--num_workers 1', {'workers': 1}, resume='free'),
    # --- Weights
    'init_from': Case('--init_from {pretrain_checkpoint}', {'initial': ..., 'gradient': ...}),
    # --- Optimisation
    'total_batch_size': Case(
        '--total_batch_size 8', {'batches': [8] * 8, 'log_steps': [1, 2, 3, 4, 5, 6, 7, 8]}, exact=False
    ),
    'batch_size': Case('--batch_size 8', {'batches': [8] * 8, 'val_inputs': ...}, exact=False, resume='free'),
    'epochs': Case('--epochs 3', {'rates': [1e-6, 0.01, 0.01, 0.00853553, 0.005, 0.00146447]}, exact=False),
    'warmup_epochs': Case('--warmup_epochs 0', {'rates': [0.01, 0.00853553, 0.005, 0.00146447]}),
    'blr': Case('--blr 0.08', {'rates': [5e-7, 0.005, 0.005, 0.0025]}),
    'lr': Case('--lr 5e-3', {'rates': [5e-7, 0.005, 0.005, 0.0025]}),
    'min_lr': Case('--min_lr 1e-3', {'rates': [1e-6, 0.01, 0.01, 0.0055]}),
    'weight_decay': Case('--weight_decay 0.3', {'decays': [0, 0.3]}),
    'betas': Case('--betas 0.5 0.6', {'momentum': (0.5, 0.6)}),
    'clip_grad': Case('--clip_grad 0.01', {'gradient': norm_is(0.01)}, given='--batch_size 8'),
    # --- Run
    'output_dir': Case('--output_dir {root}/elsewhere', {'files': ..., 'log_steps': []}, exact=False, resume=None),
    'resume': Case('--resume {checkpoint}', {'start': 4, 'rates': []}, exact=False, resume=None),
    'force_resume': Case(
        '--force_resume --weight_decay 0.3 --epochs 3 --resume {checkpoint}',
        {'start': 4, 'rates': [0.005, 0.00146447], 'decays': [0, 0.3]},
        exact=False,
        resume='free',
    ),
    'seed': Case('--seed 1', {'initial': ..., 'sample': ..., 'order': ..., **DRAWS, **SEEN}),
    'device': Case('--device cpu:0', {'device': 'cpu:0'}, resume='free'),
    'amp': Case('--amp bf16', {'dtype': 'torch.bfloat16', 'gradient': ...}),
    'compile': Case('--compile', {'compiled': True}, resume='free'),
    'save_every': Case('--save_every 1', {'saved': [1, 2, 3, 4], 'files': LAST}, resume='free'),
    'keep_every': Case('--keep_every 1', {'saved': [2, 4], 'files': [*KEPT, *LAST]}, resume='free'),
    'log_every': Case('--log_every 3', {'log_steps': [2, 3, 4]}, resume='free'),
    'eval_every': Case('--eval_every 2', {'eval_steps': [4]}, resume='free'),
    'picture_every': Case('--picture_every 1', {'figures': [2, 4]}, resume='free'),
    # --- Model
    'model': Case('--model vit_tiny_patch4', BUILT, exact=False),
    'input_size': Case('--input_size 12', {'parameters': ..., 'tokens': 10}, exact=False),
    'in_chans': Case('--in_chans 1', BUILT | DATA | {'mean': [0.5], 'std': [0.5]}),
    'mean': Case('--mean 0.1 0.2 0.3', {'mean': OTHER, 'val_inputs': ..., **SEEN}),
    'std': Case('--std 0.1 0.2 0.3', {'std': OTHER, 'val_inputs': ..., **SEEN}),
    'patch_size': Case('--patch_size 8', BUILT | {'tokens': 5}),
    'embed_dim': Case('--embed_dim 32', BUILT),
    'depth': Case('--depth 3', BUILT, exact=False),
    'num_heads': Case('--num_heads 2', {'heads': {2}, 'gradient': ...}),
    'mlp_ratio': Case('--mlp_ratio 2', BUILT),
}


CLASSIFIER = {
    'save_every': Case('--save_every 1', {'saved': [1, 2, 3, 4]}, resume='free'),
    'keep_every': Case('--keep_every 1', {'files': [*KEPT, BEST, *LAST]}, resume='free'),
    'eval_every': Case('--eval_every 2', {'eval_steps': [4], 'saved': [4]}, exact=False, resume='free'),
    'picture_every': Case('--picture_every 1', resume='free'),
    'crop_pct': Case('--crop_pct 0.5', {'val_inputs': ...}),
    'eval': Case('--eval --init_from {checkpoint}', prints='top-1 .* on 10 images', resume=None),
}
TRANSFORMER = {
    'layer_decay': Case('--layer_decay 0.5', {'layers': [0.03125, 0.0625, 0.125, 0.25, 0.5, 1]}),
    'drop_path': Case(
        '--drop_path 0.3', {'drop_path': [0.1, 0.1, 0.2, 0.2, 0.3, 0.3], 'dropped': ..., 'gradient': ...}
    ),
    'grad_checkpointing': Case('--grad_checkpointing', {'passes': 2}, resume='free'),
}

CASES = {
    'pretrain': COMMON
    | {
        'seed': Case('--seed 1', {'target': ..., 'initial': ..., 'sample': ..., 'order': ..., **DRAWS, **SEEN}),
        'input_size': Case('--input_size 12', {'parameters': ..., 'tokens': 3}, exact=False),
        'patch_size': Case('--patch_size 8', BUILT | {'tokens': 2}, exact=False),
        'num_heads': Case('--num_heads 2', {'heads': {2, 4}, 'gradient': ...}),
        'decoder_embed_dim': Case('--decoder_embed_dim 32', BUILT),
        'decoder_depth': Case('--decoder_depth 2', BUILT),
        'decoder_num_heads': Case('--decoder_num_heads 2', {'heads': {2, 4}, 'gradient': ...}),
        'fuse_layers': Case('--fuse_layers 1 3', BUILT | {'logged': ...}),
        'mask_ratio': Case('--mask_ratio 0.5', {'tokens': 9, 'gradient': ...}),
        'norm_pix_loss': Case('--no-norm_pix_loss', {'gradient': ...}),
        'crop': Case('--crop rrc', {'sample': ..., **SEEN}),
        'grad_checkpointing': Case('--grad_checkpointing', {'passes': 2}, resume='free'),
        'knn_every': Case('--knn_every 1', {'knn_steps': [0, 2, 4]}, resume='free'),
        'fuse_proj': Case('--fuse_proj none', BUILT),
        'fusion': Case('--fusion uniform', {'initial': ...}, exact=False),
        'target': Case('--target lowpass', {'gradient': ...}),
    },
    'finetune': COMMON
    | CLASSIFIER
    | TRANSFORMER
    | {
        'seed': Case('--seed 1', {'initial': ..., 'sample': ..., 'order': ..., **DRAWS, 'dropped': ..., **SEEN}),
        'mean': Case('--mean 0.1 0.2 0.3', {'mean': OTHER, 'sample': ..., 'val_inputs': ..., **SEEN}),
        'aa': Case('--aa rand-m3-n1', {'augment': 'rand-m3-n1', 'sample': ..., **SEEN}),
        'reprob': Case('--reprob 0.9', {'erase': 0.9, 'sample': ..., **SEEN}),
        'mixup': Case('--mixup 0.3', {'mixup': (0.3, 1.0, 0.1), **SEEN}),
        'cutmix': Case('--cutmix 0.3', {'mixup': (0.8, 0.3, 0.1), 'numpy_draws': ..., **SEEN}),
        'smoothing/unmixed': Case('--smoothing 0.3', {'smoothing': 0.3, 'gradient': ...}, given='--mixup 0 --cutmix 0'),
        'smoothing': Case('--smoothing 0.3', {'mixup': (0.8, 1.0, 0.3), 'gradient': ...}),
        'predict': Case('--predict {image} --init_from {checkpoint}', prints=r'\.png  \w+ [\d.]+%  \w+', resume=None),
        'json': Case(
            '--json --predict {image} --init_from {checkpoint}', prints=r'{"image": .*, "classes": {"', resume=None
        ),
    },
    'linprobe': {name: case for name, case in COMMON.items() if name != 'betas'}  # LARS has none
    | CLASSIFIER
    | {
        'batch_size': replace(COMMON['batch_size'], resume='images on a device at a time'),
        'force_resume': replace(COMMON['force_resume'], changes={'start': 4, 'decays': [0, 0.3]}),
        'momentum': Case('--momentum 0.5', {'momentum': 0.5}),
        'knn': Case('--knn 3', prints='3-nearest-neighbour top-1', resume=None),
        'logistic': Case('--logistic', prints='logistic-regression top-1', resume=None),
        'features': Case('--features {root}/out.npz', prints='Wrote the features of 42 images', resume=None),
    },
    'segment': COMMON
    | CLASSIFIER
    | TRANSFORMER
    | {
        'data_path': Case('--data_path {other_pairs}', DATA | {'target': ...}, resume='free'),
        'val_path': Case('--val_path {other_pairs}', {'val_inputs': ...}, resume='free'),
        'val_share': Case('--data_path {unsplit_pairs} --val_share 0.25', {'num_images': 12}, exact=False),
        'download_dir': replace(COMMON['download_dir'], given='--data_path {pairs_tar} --download_dir {root}'),
        'background': replace(COMMON['background'], given='--data_path {clear_pairs}'),
        'max_bad': replace(COMMON['max_bad'], given='--data_path {broken_pairs}'),
        'total_batch_size': Case('--total_batch_size 4', {'batches': [4] * 8}, exact=False),
        'clip_grad': Case('--clip_grad 0.01', {'gradient': norm_is(0.01)}),
        'batch_size': Case('--batch_size 4', fails='BatchNorm would average over 4 images only', resume=None),
        'epochs': Case('--epochs 3', {'rates': [1e-8, 0.01, 0.01, 2 / 300, 1 / 300, 0]}, exact=False),
        'warmup_epochs': Case('--warmup_epochs 0', {'rates': [0.01, 2 / 300, 1 / 300, 0]}),
        'blr': Case('--blr 0.16', {'rates': [5e-9, 0.005, 0.005, 0]}),
        'lr': Case('--lr 5e-3', {'rates': [5e-9, 0.005, 0.005, 0]}),
        'min_lr': Case('--min_lr 1e-3', {'rates': [1e-8, 0.01, 0.01, 0.001]}),
        'seed': Case(
            '--seed 1',
            {'initial': ..., 'sample': ..., 'target': ..., 'order': ..., **DRAWS, 'dropped': ..., **SEEN},
        ),
        'force_resume': replace(
            COMMON['force_resume'], changes={'start': 4, 'rates': [1 / 300, 0], 'decays': [0, 0.3]}
        ),
        'picture_every': COMMON['picture_every'],
        'num_heads': Case('--num_heads 2', BUILT | {'heads': {2}}),
        'depth': Case('--depth 6', BUILT, exact=False),
        'levels': Case('--levels 0 2 3 5', {'levels': (0, 2, 3, 5)}, given='--depth 6', exact=False),
        'channels': Case('--channels 16', BUILT),
        'aux_channels': Case('--aux_channels 16', BUILT),
        'classifier_std': Case('--classifier_std 0.1', {'initial': ..., 'gradient': ...}),
        'scale': Case('--scale 40 20', DATA | {'target': ...}),
        'scale_range': Case('--scale_range 1.1 1.5', {'sample': ..., 'target': ..., **SEEN}),
        'num_classes': Case('--num_classes 11', {'logged': ...}),
        'reduce_zero_label': Case('--reduce_zero_label', {'target': ...}, exact=False),
        'ignore_label': Case('--ignore_label 0', {'target': ...}, exact=False),
        'total_steps': Case('--total_steps 3', {'rates': [1e-8, 0.01, 0.01]}, exact=False),
        'warmup_steps': Case('--warmup_steps 1', {'rates': [1e-8, 0.01, 0.005, 0]}),
        'eval': Case('--eval --init_from {checkpoint}', prints='mIoU .* on 5 images', resume=None),
        'predict': Case('--predict {image} --init_from {checkpoint}', prints=r'_overlay\.png', resume=None),
        'stride': Case('--stride 4', {'val_inputs': ...}, given='--scale 64 32'),
        'scales': Case('--scales 1.5', {'val_inputs': ...}),
        'flip': Case('--flip', {'val_inputs': ...}),
    },
}
del CASES['segment']['crop_pct']


# --- Facts --------------------------------------------------------------------------------------------------------


def digest(value):
    """A short text that tells values (tensors, or anything with a repr) apart."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().numpy().tobytes(), value.shape
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def observe(job, flags, root):
    """The facts of a run of a job, whose flags lead it to root / 'run'."""
    facts = {'rates': [], 'inputs': [], 'val_inputs': [], 'batches': [], 'saved': [], 'figures': [], 'compiled': False}
    with pytest.MonkeyPatch.context() as patch:
        watch_calls(patch, facts)
        patch.setattr(engine, 'train', functools.partial(watched_train, engine.train, facts))
        run_job(job.main, job.get_parser(), flags)
    facts['inputs'], facts['val_inputs'] = facts['inputs'][:1], sorted(set(facts['val_inputs']))
    facts['saved'] = sorted(set(facts['saved']))
    entries = [entry for entry in log.read(root / 'run/log.jsonl') if 'step' in entry]
    facts['log_steps'] = [entry['step'] for entry in entries if 'loss' in entry]
    facts['eval_steps'] = [entry['step'] for entry in entries if {'val_loss', 'val_miou'} & entry.keys()]
    facts['knn_steps'] = [entry['step'] for entry in entries if 'val_knn_cls' in entry]
    facts['logged'] = sorted(set(itertools.chain(*entries)) - {'data_wait', 'val_knn_cls', 'val_knn_patches'})
    names = [str(path.relative_to(root)) for path in root.rglob('*') if path.is_file()]
    facts['files'] = sorted(name for name in names if 'tfevents' not in name and not name.endswith('lock'))
    return facts


def watch_calls(patch, facts):
    """Record what reaches the parts that libraries make, and what is written."""

    def record(owner, name, note):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            note(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(owner, name, wrapper)

    record(
        mix, 'Mixup', lambda mixup, cutmix, label_smoothing, **_: facts.update(mixup=(mixup, cutmix, label_smoothing))
    )
    record(main_finetune, 'LabelSmoothingCrossEntropy', lambda smoothing: facts.update(smoothing=smoothing))
    record(transforms, 'rand_augment_transform', lambda name, _: facts.update(augment=name))
    record(transforms, 'RandomErasing', lambda probability, **_: facts.update(erase=probability))
    record(checkpoint, 'save', lambda state, *_: facts['saved'].append(state['step']))
    patch.setattr(log.Log, 'figure', lambda self, name, figure, step: facts['figures'].append(step))
    patch.setattr(visualize, 'reconstruction_figure', lambda *_: None)
    patch.setattr(visualize, 'segmentation_figure', lambda *_: None)
    patch.setattr(distributed, 'check_compiler', lambda device: None)
    patch.setattr('os.fsync', lambda file: None)
    patch.setattr('torch.utils.tensorboard.SummaryWriter', MagicMock())  # takes a fifth of a run
    patch.setattr(torch.nn.Module, 'compile', lambda self: facts.update(compiled=True))


def watched_train(train, facts, run, model, optimizer, loss_fn, loader, events, title=''):
    """engine.train, and the facts of its arguments and of what it does with them."""
    samples = loader.batches.dataset
    facts.update(
        parameters={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        initial=digest([digest(parameter) for parameter in model.parameters()]),
        levels=getattr(model, 'levels', None),
        heads={module.num_heads for module in model.modules() if hasattr(module, 'num_heads')},
        num_images=run.schedule.num_images,
        batch_size=run.schedule.batch_size,
        sample=digest(samples[0, 0][0]),
        target=digest(samples[0, 0][1]),
        order=digest(list(loader.batches.batch_sampler)[:1]),
        mean=loader.mean.tolist(),
        std=loader.std.tolist(),
        workers=loader.batches.num_workers,
        device=str(run.device),
        start=run.start,
    )
    block, forwards = next(module for name, module in model.named_modules() if name.endswith('blocks.0')), []
    paths = [module for module in model.modules() if isinstance(module, mix.GivenDropPath)]
    facts['drop_path'] = [path.drop_prob for path in paths]

    def before_forward(model, args):
        if not model.training:
            facts['val_inputs'].append(digest(args[0]))
            return
        facts['batches'].append(len(args[0]))
        facts['inputs'].append(digest(args[0]))
        facts.setdefault('torch_draws', torch.initial_seed())
        _, words, position, *_ = np.random.get_state()
        facts.setdefault('numpy_draws', (words.tobytes(), position))
        facts.setdefault('dropped', digest([digest(path.scale) for path in paths]))

    def after_linear(linear, args, output):
        if model.training:
            forwards.append(linear)
            facts.update(tokens=args[0].shape[1:-1].numel(), dtype=str(output.dtype))

    def before_step(optimizer, *_):
        groups = optimizer.param_groups
        rates = {group['lr'] for group in groups}
        facts['rates'].append(max(rates))
        if max(rates):
            facts.setdefault('layers', sorted({round(rate / max(rates), 6) for rate in rates}))
        facts['decays'] = sorted({group['weight_decay'] for group in groups})
        facts['momentum'] = groups[0].get('betas', groups[0].get('momentum'))
        gradients = [parameter.grad for group in groups for parameter in group['params']]
        facts.setdefault('gradient', [float(gradient.norm()) for gradient in gradients])

    model.register_forward_pre_hook(before_forward)
    block.mlp.fc1.register_forward_hook(after_linear)
    optimizer.register_step_pre_hook(before_step)
    train(run, model, optimizer, loss_fn, loader, events, title)
    facts['passes'] = len(forwards) / max(1, len(facts['batches']))


# --- Places that flags name ---------------------------------------------------------------------------------------


def draw(root, start=0, mode='RGB', broken=0, pairs=False):
    """Images of 20 x 18 pixels, the first `broken` empty files: 32 and 10 in class folders, or 16 and 5 with masks."""
    for split, count in (('train', 16), ('val', 5)) if pairs else (('train', 32), ('val', 10)):
        shapes = Shapes(split, (20, 18))
        for index in range(start, start + count):
            image, label = shapes[index]
            image = to_pil_image(image)
            if mode == 'RGBA':
                image.putalpha(100)
            path = (
                root / f'images/{split}/{index}.png' if pairs else root / split / shapes.classes[label] / f'{index}.png'
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            if split == 'train' and index < start + broken:
                path.write_bytes(b'')
            if pairs:
                path = root / f'masks/{split}/{index}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                to_pil_image(shapes.picture_and_mask(index)[1]).save(path)
    if pairs:
        (root / 'classes.txt').write_text('\n'.join(['background', *Shapes.classes]))
    return root


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """{name in CASES: path}, a folder of images and one of images with masks of each kind."""
    root, places = tmp_path_factory.mktemp('places'), {}
    kinds = {'': {}, 'other_': {'start': 100}, 'clear_': {'mode': 'RGBA'}, 'broken_': {'broken': 3}}
    for kind, options in kinds.items():
        for name, pairs in (('images', False), ('pairs', True)):
            places[kind + name] = draw(root / (kind + name), pairs=pairs, **options)
    for name in ('images', 'pairs'):
        places[f'{name}_tar'] = root / f'{name}.tar'
        with tarfile.open(places[f'{name}_tar'], 'w') as tar:
            tar.add(places[name], name)
    places['unsplit_images'] = places['images'] / 'train'
    places['unsplit_pairs'] = draw(root / 'unsplit_pairs', pairs=True)
    for folder in ('images', 'masks'):
        folder = root / 'unsplit_pairs' / folder
        shutil.rmtree(folder / 'val')
        (folder / 'train').rename(folder / 'all')
    places['image'] = next((places['images'] / 'val').rglob('*.png'))
    places['missing'] = root / 'missing'
    return places


class Runs:
    """Runs without the flags to be tried, each made once."""

    def __init__(self, places, make_folder):
        self.places, self.make_folder, self.made = places, make_folder, {}

    def arguments(self, job, flags, root, given=''):
        """The arguments of a run in root / 'run'; given and flags may name places, {root} and {checkpoint}."""
        text = FLAGS + JOB_FLAGS[job] + '--output_dir {root}/run ' + given + ' ' + flags
        names = self.places | {'root': root}
        if '{checkpoint}' in text:
            names['checkpoint'] = self.get(job)[1]
        if '{pretrain_checkpoint}' in text:
            names['pretrain_checkpoint'] = self.get('pretrain')[1]
        return text.format(**names).split()

    def get(self, job, given=''):
        """(facts, checkpoint) of a run."""
        if (job, given) not in self.made:
            root = self.make_folder('run')
            facts = observe(JOBS[job], self.arguments(job, given, root), root)
            self.made[job, given] = facts, root / 'run/checkpoint-last.pth'
        return self.made[job, given]


@pytest.fixture(scope='module')
def runs(places, tmp_path_factory):
    return Runs(places, tmp_path_factory.mktemp)


# --- The tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('job', JOBS)
def test_every_flag_has_an_entry(job):
    assert {name.split('/')[0] for name in CASES[job]} | {'help'} == {
        action.dest for action in JOBS[job].get_parser()._actions
    }


def parametrize_cases(wanted):
    return pytest.mark.parametrize(
        'job, name', [(job, name) for job in CASES for name in CASES[job] if wanted(CASES[job][name])]
    )


@parametrize_cases(lambda case: case.fails or case.prints)
def test_a_flag_ends_the_run_or_prints(job, name, runs, tmp_path, capsys):
    case = CASES[job][name]
    arguments = runs.arguments(job, case.flags, tmp_path, case.given)
    if case.prints:
        facts = observe(JOBS[job], arguments, tmp_path)
        assert 'start' not in facts and re.search(case.prints, capsys.readouterr().out)
    else:
        with pytest.raises(SystemExit):
            observe(JOBS[job], arguments, tmp_path)
        assert case.fails in capsys.readouterr().err


@parametrize_cases(lambda case: not (case.fails or case.prints))
def test_a_flag_changes_what_it_is_for_and_nothing_else(job, name, runs, tmp_path):
    case = CASES[job][name]
    before, _ = runs.get(job, case.given)
    after = observe(JOBS[job], runs.arguments(job, case.flags, tmp_path, case.given), tmp_path)
    changed = {fact for fact in after if after[fact] != before.get(fact)}
    if case.exact:
        assert changed == case.changes.keys()
    assert case.changes.keys() <= changed
    for fact, value in case.changes.items():
        if callable(value):
            assert value(after[fact]), (fact, after[fact])
        elif value is not ...:
            numbers = isinstance(value, list) and value and isinstance(value[0], float)
            assert after[fact] == (pytest.approx(value, rel=1e-5) if numbers else value), fact


@parametrize_cases(lambda case: case.resume)
def test_resuming_with_another_value(job, name, runs, tmp_path, capsys):
    """All that changes the training is refused, by the name of the flag and both values."""
    case = CASES[job][name]
    _, checkpoint = runs.get(job, '' if case.fails else case.given)
    resume = f'--resume {checkpoint} ' + ('' if case.fails else case.given)
    arguments = runs.arguments(job, case.flags, tmp_path, resume)
    if case.resume == 'free':
        assert observe(JOBS[job], arguments, tmp_path)['start'] == 4
        return
    with pytest.raises(SystemExit) as exit:
        observe(JOBS[job], arguments, tmp_path)
    message = case.resume if case.resume != 'refused' else rf'--{name.split("/")[0]} .+ -> |another architecture'
    assert exit.value.code == 2 and re.search(message, capsys.readouterr().err)
