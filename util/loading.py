"""Fit the tensors of a file to a model and load them, saying what is left out and what is freshly initialised."""

import math
import re

from timm.layers import PatchEmbed, resample_abs_pos_embed

from util.errors import InputError
from util.formats import beit_names
from util.recognise import find_dims, find_grid

# Parts that a file or a model may lack, in the order of the network; all other names are the encoder's, which must be
# there as a whole.
PARTS = {
    'relative positions and layer scales': r'encoder\..*(relative_position_bias_table|gamma_[12])$',
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


def load(model, weights, complete):
    """Load Weights into a model, as util.weights.load_weights says. Returns its note; raises InputError."""
    ours = {name.removeprefix('backbone.'): tensor for name, tensor in model.state_dict().items()}  # of LinearProbe
    actual = dict(zip(ours, model.state_dict()))
    our_dims = find_dims(ours)
    check_size(weights, our_dims)
    if weights.is_segmenter and 'encoder.cls_token' not in ours:
        raise InputError(f'{weights.path}: {weights.origin}, which only main_segment.py takes')
    state, notes = weights.state, []
    if not weights.is_segmenter:
        state, notes = fit(weights, next(part for part in model.modules() if isinstance(part, PatchEmbed)))
        if 'encoder.cls_token' in ours:
            state = into_beit(state)

    theirs_has, ours_has = ({part_of(name) for name in names} for names in (state, ours))
    left_out, fresh = theirs_has - ours_has, ours_has - theirs_has
    # A head fits only the end that it was trained on: norm (token), fc_norm (mean), or norm and bn (probe).
    same_norm = all((part in theirs_has) == (part in ours_has) for part in ('fc_norm', 'bn'))
    for part in HEADS:
        if part in theirs_has & ours_has and not (same_norm and weights.dims.get('classes') == our_dims['classes']):
            left_out, fresh = left_out | {part}, fresh | {part}
    if 'norm' in fresh and not ('decoder' in ours_has and 'fc_norm' in theirs_has):
        hint = ' (fine-tuned on the mean of the patches, it has fc_norm instead)' if 'fc_norm' in theirs_has else ''
        raise InputError(f'{weights.path}: {weights.origin}; it lacks norm.weight and norm.bias{hint}')
    taken = {name: tensor for name, tensor in state.items() if part_of(name) not in left_out}
    wanted = {name: tensor for name, tensor in ours.items() if part_of(name) not in fresh}
    # The last layer of a decoder predicts pixels of the file's channels.
    if 'decoder' in theirs_has & ours_has and weights.dims['in_chans'] != our_dims['in_chans']:
        left_out, fresh = left_out | {'decoder_pred'}, fresh | {'decoder_pred'}
        for tensors in (taken, wanted):
            for name in [name for name in tensors if name.startswith('decoder_pred.')]:
                del tensors[name]
    check_names(weights, taken, wanted)
    if complete and fresh:
        instead = f'; it has {list_parts(left_out, state)} instead' if left_out else ''
        lacks = f'it lacks {list_parts(fresh, ours)}, needed here'
        raise InputError(f'{weights.path}: {weights.origin}; {lacks}{instead}')

    model.load_state_dict(model.state_dict() | {actual[name]: tensor for name, tensor in taken.items()})
    summary = [f'{weights.path}: {weights.origin}']
    if left_out:
        summary.append(f'left out: {list_parts(left_out, state)}')
    if fresh:
        summary.append(f'freshly initialised: {list_parts(fresh, ours)}')
    return '; '.join(summary + notes)


def check_size(weights, ours):
    """Raise InputError if width, depth or patch size differ. ours: the dimensions of the model."""
    theirs, ours = (
        f'width {dims["embed_dim"]}, depth {dims["depth"]} and patch size {dims["patch_size"]}'
        for dims in (weights.dims, ours)
    )
    if theirs != ours:
        hint = 'without --model and flags of sizes, the model follows the file'
        raise InputError(f'{weights.path}: a ViT of {theirs}, but the model has {ours}; {hint}')


def fit(weights, patch_embed):
    """(state, notes): a file's state resampled and adapted to the grid and channels of a model's patch embedding."""
    state, notes = dict(weights.state), []
    grid, new_grid = find_grid(weights), tuple(patch_embed.grid_size)
    if grid != new_grid:
        for name in {'pos_embed', 'decoder_pos_embed'} & state.keys():
            state[name] = resample_abs_pos_embed(state[name], new_grid, grid, antialias=False)  # as MAE does
        notes.append(f'position embedding resampled from {grid[0]} x {grid[1]} to {new_grid[0]} x {new_grid[1]}')
    channels, in_chans = weights.dims['in_chans'], patch_embed.proj.in_channels
    if channels != in_chans:
        state['patch_embed.proj.weight'] = adapt_channels(state['patch_embed.proj.weight'], in_chans)
        notes.append(f'patch embedding adapted from {channels} to {in_chans} channels')
    return state, notes


def adapt_channels(weight, in_chans):
    """(D, c, p, p) -> (D, in_chans, p, p): summed to one channel, else repeated and scaled, as timm does."""
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans] * (channels / in_chans)


def into_beit(state):
    """A plain ViT's state with the names of UperNet's encoder; other parts keep theirs."""
    converted = {}
    for name, tensor in state.items():
        converted.update(beit_names(name, tensor) if part_of(name) == 'encoder' else {name: tensor})
    return converted


def check_names(weights, taken, wanted):
    """Raise InputError, naming the parameters, unless both have the same names and shapes."""
    reshaped = [name for name in wanted if name in taken and taken[name].shape != wanted[name].shape]
    for problem, names in (
        ('lacks', [name for name in wanted if name not in taken]),
        ('has what this model lacks:', [name for name in taken if name not in wanted]),
        ('differs in shape:', reshaped),
    ):
        if not names:
            continue
        text = f'{weights.path}: {weights.origin}; it {problem} {names[0]}'
        if names is reshaped:
            text += f' ({tuple(taken[names[0]].shape)} there, {tuple(wanted[names[0]].shape)} here)'
        if len(names) > 1:
            text += f' and {len(names) - 1} more'
        if part_of(names[0]) == 'fusion':
            text += '; --fuse_layers, --fuse_proj and --fusion must be those of the file'
        raise InputError(text)


def list_parts(parts, state):
    """'decoder, fusion, head of 10 classes', in the order of the network."""
    order = [*PARTS, 'decoder_pred']
    words = {part: f'{part} of {len(state[name])} classes' for part, name in HEADS.items() if name in state}
    return ', '.join(words.get(part, part) for part in sorted(parts, key=order.index))
