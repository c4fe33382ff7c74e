"""Weights in: what a job builds by its flags and a file, and the file into the model.

util/formats.py reads files of any known origin.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, resample_abs_pos_embed

from models_mff import DECODER, ENCODER, MODELS, MaskedAutoencoderMFF, create_encoder, model_sizes
from util.errors import InputError, as_input_error
from util.formats import convert_state_dict, read, read_file, split_bias  # noqa: F401

# --- What a job builds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a model is built with: by flags, then a file, then --model or what is usual."""

    sizes: dict  # as model_sizes gives them
    mean: tuple = IMAGENET_DEFAULT_MEAN  # of the pixels, in 0..1, per channel
    std: tuple = IMAGENET_DEFAULT_STD
    classes: list | None = None  # names, of the file
    crop_pct: float = 0.875  # share of a test image that is seen
    args: dict = field(default_factory=dict)  # flags of the run that made the file
    notes: tuple = ()  # lines to print: what differs from the file, and what was assumed
    global_pool: str | None = None  # what the file's head sees: 'avg' or 'token'


def settings_of(args, file):
    """The Settings of a job by its flags (None: not given), and read(args.init_from) or None.

    Raises InputError where nothing tells the image size, or where mean and std do not fit.
    """
    flags = {name: name if name != 'img_size' else 'input_size' for name in ENCODER + DECODER}
    given = {name: getattr(args, flag, None) for name, flag in flags.items()}
    model = getattr(args, 'model', None)
    with as_input_error():
        named = model_sizes(model or 'vit_base_patch16', **given)
    file = file or {}
    told, state, notes = file.get('sizes', {}), file.get('model', {}), [*file.get('notes', ())]
    sizes = sizes_of(file, **given) if file else named
    if model and any(named[name] != sizes[name] for name in ('embed_dim', 'depth')):
        notes.append(f'the sizes are those of the file, not of {model}')
    for name in told:
        if sizes[name] != told[name]:
            notes.append(f'{flags[name]} {sizes[name]}, where the file has {told[name]}')
    if file and 'num_heads' not in told and not given['num_heads']:
        notes.append(f'num_heads {sizes["num_heads"]} assumed')

    in_chans = sizes['in_chans']
    usual = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    if in_chans != 3:
        usual = dict.fromkeys(usual, (0.5,) * in_chans)
    theirs = file if told.get('in_chans') == in_chans else {}
    statistics = {
        key: tuple(getattr(args, key, None) or theirs.get(key) or usual[key]) for key in usual
    }
    if any(len(values) != in_chans for values in statistics.values()):
        raise InputError(f'{statistics} is not of {in_chans} channels')
    if file and statistics == usual and 'mean' not in theirs:
        whose = "ImageNet's mean and std" if in_chans == 3 else 'mean and std 0.5'
        notes.append(f'{whose} assumed')

    head = state.get('head.weight', state.get('classifier.1.weight', ()))
    classes = list(file.get('classes', ()))
    pool = 'avg' if 'fc_norm.weight' in state else None
    return Settings(
        sizes,
        **statistics,
        classes=classes if classes and len(classes) == len(head) else None,
        crop_pct=getattr(args, 'crop_pct', None) or file.get('crop_pct') or 0.875,
        args=file.get('args', {}),
        notes=tuple(notes),
        global_pool=(file.get('global_pool') or pool or 'token') if len(head) else pool,
    )


def sizes_of(file, **changes):
    """The arguments of MaskedAutoencoderMFF: changes (None: none), what a file tells, the usual.

    fuse_layers is () where it is not known which are fused. Raises InputError where the image size
    is not known.
    """
    told, state = dict(file['sizes']), file['model']
    if changes.get('depth') not in (None, told['depth']):
        told.pop('fuse_layers', None)
    changes = told | {name: value for name, value in changes.items() if value is not None}
    usual = {sizes['embed_dim']: name for name, sizes in MODELS.items()}
    usual = usual.get(told['embed_dim'], 'vit_base_patch16')
    if told['embed_dim'] != MODELS[usual]['embed_dim']:
        changes.setdefault('num_heads', max(1, told['embed_dim'] // 64))
    if told.get('decoder_embed_dim') not in (None, MODELS[usual]['decoder_embed_dim']):
        changes.setdefault('decoder_num_heads', max(1, told['decoder_embed_dim'] // 32))
    side = math.isqrt(state['pos_embed'].shape[1] - 1)
    if 'img_size' not in changes:
        if side**2 != state['pos_embed'].shape[1] - 1:
            raise InputError(f'{file["path"]}: its patches make no square; give --input_size H W')
        changes['img_size'] = side * told['patch_size']
    sizes = model_sizes(usual, **changes)
    fused = len(state.get('fuse_logits', sizes['fuse_layers']))
    if fused != len(sizes['fuse_layers']) and sizes['depth'] == told['depth']:
        sizes['fuse_layers'] = changes.get('fuse_layers', ())
    return sizes


# --- Into a model ---------------------------------------------------------------------------------

PARTS = {  # which a file or a model may lack as a whole; all other names are the encoder's
    'relative positions, layer scales': r'blocks.*(relative_position_bias_table|gamma_[12])$',
    'decoder_pred': r'decoder_pred\.',
    'decoder': r'decoder_|mask_token$',
    'fusion': r'fuse_',
    'norm': r'norm\.',
    'fc_norm': r'fc_norm\.',
    'bn': r'bn\.',
    'head': r'head\.',
    'pyramid': r'(neck|pools|pool_conv|laterals|smooth|fuse|aux_head\.0)\.',
    'classifier': r'(classifier|aux_head)\.',
}
HEADS = {'head': 'head.weight', 'classifier': 'classifier.1.weight'}


def part_of(name):
    return next((part for part, pattern in PARTS.items() if re.match(pattern, name)), 'encoder')


def load(model, file, complete=False, classes=None):
    """Load read(path) into a MaskedAutoencoderMFF, timm VisionTransformer, LinearProbe or UperNet.

    Position embeddings are resampled to the model's grid, the patch embedding is adapted to its
    channels. A part that only one of both has is left out, or stays as the model was initialised; a
    head is taken for the same classes, behind the norm that it was trained on.

    Args:
        complete: refuse a file without some part of the model, and take its eps of LayerNorm.
        classes: names of the model's classes.

    Returns:
        One line to print: what is left out, fresh, resampled or adapted.

    Raises:
        InputError: naming a parameter that is missing, too much or of another shape.
    """
    actual = {re.sub(r'^(backbone|encoder)\.', '', name): name for name in model.state_dict()}
    wanted = {name: model.state_dict()[actual[name]] for name in actual}
    path, (taken, notes) = file['path'], fit(model, file)
    if 'blocks.0.attn.q_bias' in wanted:
        taken = split_bias(taken)
    elif 'blocks.0.attn.q_bias' in taken:
        raise InputError(f'{path}: a segmenter, which only main_segment.py takes')

    ours, theirs = ({part_of(name) for name in state} for state in (wanted, taken))
    shared = ours & theirs
    same_head = all((norm in ours) == (norm in theirs) for norm in ('fc_norm', 'bn'))
    if classes and file.get('classes') and list(classes) != list(file['classes']):
        same_head = notes.append('its classes have other names')
    for part in shared & HEADS.keys():
        if not same_head or len(wanted[HEADS[part]]) != len(taken.get(HEADS[part], ())):
            shared.remove(part)
    if wanted['patch_embed.proj.weight'].shape[1] != file['sizes']['in_chans']:
        shared.discard('decoder_pred')  # of other pixels
    if 'norm' in ours - shared and not ('fc_norm' in theirs and 'decoder' in ours):
        raise InputError(f'{path}: lacks norm.weight, as if trained on the mean of the patches')
    left_out, fresh = ([p for p in PARTS if p in parts - shared] for parts in (theirs, ours))
    if complete and fresh:
        raise InputError(f'{path}: lacks {", ".join(fresh)} of this model')

    taken, wanted = (
        {name: state[name] for name in state if part_of(name) in shared}
        for state in (taken, wanted)
    )
    shapes = [{name: tuple(state[name].shape) for name in state} for state in (taken, wanted)]
    odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    if odd:
        there, here = (shape.get(odd[0], 'missing') for shape in shapes)
        raise InputError(f'{path}: {odd[0]} is {there} there, {here} here; {len(odd)} differ')
    model.load_state_dict({actual[name]: taken[name] for name in taken}, strict=False)

    eps = file.get('layer_norm_eps', 1e-6)
    if eps != 1e-6:
        notes.append(f'eps of LayerNorm {eps if complete else f"1e-06, not {eps}"}')
    for module in model.modules() if complete else ():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    parts = {'left out': left_out, 'fresh': fresh}
    lines = [f'{text}: {", ".join(parts[text])}' for text in parts if parts[text]]
    return '; '.join([path, *lines, *notes])


def fit(model, file):
    """(state, notes): a file's parameters at the grid and channels of a model."""
    state, notes, sizes = dict(file['model']), [], file['sizes']
    if 'blocks.0.attn.q_bias' in state:  # a segmenter, whose relative positions fix its grid
        return state, notes
    patch_embed = next(module for module in model.modules() if isinstance(module, PatchEmbed))
    count, new = state['pos_embed'].shape[1] - 1, tuple(patch_embed.grid_size)
    square = (math.isqrt(count),) * 2
    old = new if math.prod(new) == count else square
    if 'img_size' in sizes:
        old = tuple(side // sizes['patch_size'] for side in sizes['img_size'])
    elif old != square:
        notes.append(f'its {count} positions taken as {old[0]} x {old[1]}')
    if math.prod(old) != count:
        raise InputError(f'{file["path"]}: its {count} positions are of an unknown rectangle')
    if old != new:
        for name in {'pos_embed', 'decoder_pos_embed'} & state.keys():
            state[name] = resample_abs_pos_embed(state[name], new, old, antialias=False)  # as MAE
        notes.append(f'positions resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]}')
    theirs, ours = sizes['in_chans'], patch_embed.proj.in_channels
    if theirs != ours:  # as timm does: the sum for one channel, else repeated and scaled
        weight = state['patch_embed.proj.weight']
        repeated = weight.repeat(1, math.ceil(ours / theirs), 1, 1)[:, :ours] * (theirs / ours)
        adapted = weight.sum(1, keepdim=True) if ours == 1 else repeated
        state['patch_embed.proj.weight'] = adapted
        notes.append(f'patch embedding adapted from {theirs} to {ours} channels')
    return state, notes


def load_model(path):
    """(MaskedAutoencoderMFF in eval mode, its Settings) of pre-trained weights with a decoder.

    Without a record, pixels count as standardised in each patch, and a file without fusion as MAE.
    """
    file = read(path)
    if not any(name.startswith('fuse_') for name in file['model']):
        file['sizes'].setdefault('fuse_layers', (file['sizes']['depth'] - 1,))
    settings = settings_of(None, file)
    with as_input_error(path):
        norm_pix_loss = settings.args.get('norm_pix_loss') is not False
        model = MaskedAutoencoderMFF(**settings.sizes, norm_pix_loss=norm_pix_loss)
    load(model, file, complete=True)
    return model.eval(), settings


def load_encoder(path):
    """(timm's VisionTransformer without a head in eval mode, its Settings) of any weights."""
    file = read(path)
    settings = settings_of(None, file)
    with as_input_error(path):
        pool = 'avg' if 'fc_norm.weight' in file['model'] else 'token'
        model = create_encoder(settings.sizes, pool)
    load(model, file, complete=True)
    return model.eval(), settings


def random_encoder(sizes):
    """create_encoder(sizes, 'token') with weights as pre-training starts from, not timm's."""
    start = MaskedAutoencoderMFF(**sizes | {'fuse_layers': [sizes['depth'] - 1]}).state_dict()
    encoder = create_encoder(sizes, 'token')
    encoder.load_state_dict({name: start[name] for name in encoder.state_dict()})
    return encoder.eval()
