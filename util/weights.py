"""Weights in: files of any known origin tell how to build a model, and are loaded into it.

Files are read and renamed in util/formats.py, checked and recognised in util/recognise.py. The flags of a job follow
what --init_from tells: settle.
"""

import argparse
import math
import re
from dataclasses import dataclass, field, replace

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, resample_abs_pos_embed

from models_mff import (
    MODELS,
    MaskedAutoencoderMFF,
    check_fuse_layers,
    check_image_size,
    check_width,
    create_encoder,
    default_fuse_layers,
    model_sizes,
)
from util import variants
from util.errors import InputError, as_input_error
from util.formats import beit_names, convert_state_dict, read_file
from util.recognise import DECODER, ENCODER, Weights, check_tensors, find_records, find_sides, recognise, without_none

# --- A file -------------------------------------------------------------------------------------------------------


def read_weights(path):
    """Read a weights file of any known origin.

    Returns:
        state: {name: tensor} with this project's names.
        origin: what it is, for people, such as 'mmpretrain MFF pre-training'.

    Raises:
        InputError: as read does.
    """
    weights = read(path)
    return weights.state, weights.origin


def read(path):
    """The Weights of a path.

    Raises:
        InputError: as read_file, and if it holds no ViT, a distilled DeiT, or tensors that are no weights (of integers,
            not finite, sparse, of another rank), or if what it records is not possible.
    """
    content = read_file(path)
    state = convert_state_dict(content)
    if 'dist_token' in state or 'head_dist.weight' in state:
        raise InputError(f'{path}: a distilled DeiT, which has a second class token; use the undistilled weights')
    names = {name.removeprefix('encoder.') for name in state}
    if not names.issuperset(['patch_embed.proj.weight', 'cls_token', 'pos_embed', 'blocks.0.attn.qkv.weight']):
        first = ', '.join(list(state)[:3]) or 'nothing'
        raise InputError(f'{path}: no weights of a ViT that is known here (it holds {first}, ...)')
    try:
        check_tensors(state)
        sides, records = find_sides(state), find_records(content)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    return Weights(path, content, state, recognise(content, state), sides, records)


# --- What a model is built with -----------------------------------------------------------------------------------

FLAGS = {'img_size': 'input_size'}  # the flag of a size, where it has another name


@dataclass(frozen=True)
class Settings:
    """What a model is built with, and what a file tells of the run that made it."""

    sizes: dict  # as model_sizes gives them
    mean: tuple  # of the pixels, in 0..1, per channel
    std: tuple
    notes: tuple = ()  # a line for each flag that differs from the checkpoint
    flags: argparse.Namespace = field(default_factory=argparse.Namespace)  # of that run, if it was one of this project
    classes: list | None = None  # their names
    known: frozenset = frozenset()  # the sizes, 'mean' and 'std' that the file records or shows; others are the usual


def file_settings(path):
    """The Settings of a checkpoint of any known origin.

    Widths, depths, patch size and channels are those of its tensors. The rest is what it records, or else the usual:
    a square image; the heads of the size in MODELS of that width, or one per 64 channels; ImageNet's mean and std for 3
    channels, 0.5 for others. fuse_layers is None where levels are fused, but it is not known which. In flags,
    norm_pix_loss is None and mask_ratio 0.75 where the file does not record them.

    Raises:
        InputError: as read_weights, and if what it records contradicts its tensors.
    """
    return settings_of(read(path))


def settings_of(weights):
    sides, records, content = weights.sides, weights.records, weights.content
    sizes = usual_sizes(weights) | {key: records[key] for key in ENCODER + DECODER if key in records}
    shown = shown_sizes(weights)
    mean, std = (records.get(key, default_statistics(sides['C'])[key]) for key in ('mean', 'std'))
    if not len(mean) == len(std) == sides['C']:
        raise InputError(f'{weights.path}: it records mean {mean} and std {std} for {sides["C"]} channels')
    flags, classes = argparse.Namespace(norm_pix_loss=None, mask_ratio=0.75), None
    if weights.is_ours:
        vars(flags).update({name: value for name, value in content['args'].items() if isinstance(name, str)})
        classes = content.get('classes')
    if classes is not None and (not isinstance(classes, list) or not all(isinstance(name, str) for name in classes)):
        raise InputError(f'{weights.path}: its classes are no list of names')
    if classes and len(classes) != sides.get('classes', len(classes)):
        raise InputError(f'{weights.path}: its head has {sides["classes"]} classes, but it names {len(classes)}')
    known = records.keys() | shown.keys()
    if fused(weights):
        known = known | {'fuse_layers'}
    return Settings(sizes | shown, mean, std, flags=flags, classes=classes, known=frozenset(known))


def fused(weights):
    return any(name.startswith('fuse_') for name in weights.state)


def shown_sizes(weights):
    """The sizes that the shapes of a file's tensors show."""
    sides = weights.sides
    sizes = {
        'img_size': tuple(side * sides['p'] for side in find_grid(weights)),
        'in_chans': sides['C'],
        'patch_size': sides['p'],
        'embed_dim': sides['D'],
        'depth': sides['depth'],
    }
    if 'heads' in sides:
        sizes['num_heads'] = sides['heads']
    if 'M' in sides:
        sizes['mlp_ratio'] = sides['M'] / sides['D']
    if 'E' in sides:
        sizes |= {'decoder_embed_dim': sides['E'], 'decoder_depth': sides['decoder_depth']}
    return sizes


def usual_sizes(weights):
    """Those of the size in MODELS that has the file's width, or else the base model's."""
    width, depth, decoder = (weights.sides.get(key) for key in ('D', 'depth', 'E'))
    sizes = MODELS['vit_base_patch16'] | {'num_heads': max(1, width // 64)}
    sizes = next((model for model in MODELS.values() if model['embed_dim'] == width), sizes)
    choices = fuse_layer_choices(width, depth)
    if fused(weights):
        choices = [layers for layers in choices if len(layers) == weights.sides.get('K')] or [None]
    elif decoder:
        choices = [(depth - 1,)]  # MAE
    sizes = sizes | {'fuse_layers': choices[0]}
    if decoder:
        heads = {model['decoder_embed_dim']: model['decoder_num_heads'] for model in MODELS.values()}
        sizes['decoder_num_heads'] = heads.get(decoder, max(1, decoder // 32))
    return sizes


def fuse_layer_choices(width, depth):
    """Usual choices of the fused blocks of a ViT, the best first."""
    same = [sizes['fuse_layers'] for sizes in MODELS.values() if (sizes['embed_dim'], sizes['depth']) == (width, depth)]
    return [*same, default_fuse_layers(depth)]


def default_statistics(in_chans):
    if in_chans == 3:
        return {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    return {'mean': (0.5,) * in_chans, 'std': (0.5,) * in_chans}


def find_grid(weights):
    """(rows, columns) of the patches: from the image size that this project records, or else a square."""
    num_patches, patch_size = weights.sides['1+L'] - 1, weights.sides['p']
    if 'img_size' in weights.records:
        rows, columns = (side // patch_size for side in weights.records['img_size'])
    else:
        rows, columns = [math.isqrt(num_patches)] * 2
    if not rows * columns == num_patches > 0:
        raise InputError(
            f'{weights.path}: its position embedding, of {num_patches} patches, is of an unknown rectangle'
        )
    return rows, columns


def settle(args):
    """What a job builds: its flags, else what --init_from tells, else the size of --model, by default vit_base_patch16.

    args: flags of a job (add_model_arguments and --init_from), None where not given; unchanged. --model sets all sizes
    but image size and channels, unless the file records a model of the same name.

    Returns:
        Settings, whose notes name each flag that differs from the checkpoint.

    Raises:
        InputError: as file_settings, or if the sizes do not fit together.
    """
    file = file_settings(args.init_from) if args.init_from else None
    given = without_none({key: getattr(args, FLAGS.get(key, key), None) for key in ENCODER + DECODER})
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    base = base_sizes(args.model, file)
    sizes = base | given
    if sizes['depth'] != base['depth'] and 'fuse_layers' not in given:
        sizes['fuse_layers'] = default_fuse_layers(sizes['depth'])
    pretraining = hasattr(args, 'fuse_layers')
    if pretraining and sizes['fuse_layers'] is None:
        raise InputError(f'{args.init_from}: it does not record which blocks it fuses; give them by --fuse_layers')
    with as_input_error():
        check_image_size(sizes['img_size'], sizes['patch_size'])
        check_width(sizes['embed_dim'], sizes['num_heads'])
        if pretraining:
            check_width(sizes['decoder_embed_dim'], sizes['decoder_num_heads'], 'decoder_')
            check_fuse_layers(sizes['fuse_layers'], sizes['depth'])

    statistics = default_statistics(sizes['in_chans'])
    if file and file.sizes['in_chans'] == sizes['in_chans']:
        statistics = {'mean': file.mean, 'std': file.std}
    for key in ('mean', 'std'):
        value = getattr(args, key, None)
        if value is not None and len(value) != sizes['in_chans']:
            raise InputError(f'--{key} has {len(value)} numbers, but the images have {sizes["in_chans"]} channels')
        statistics[key] = tuple(value or statistics[key])
    if not file:
        return Settings(sizes, **statistics)
    before, now = file.sizes | {'mean': file.mean, 'std': file.std}, sizes | statistics
    notes = [
        f'{FLAGS.get(key, key)} {show(now[key])}, where the checkpoint has {show(before[key])}'
        for key in before
        if key in file.known and now[key] != before[key] and (pretraining or key not in DECODER)
    ]
    return replace(file, sizes=sizes, notes=tuple(notes), **statistics)


def base_sizes(model, file):
    """Sizes before the flags of single ones. model: --model or None; file: Settings of the checkpoint or None."""
    with as_input_error():
        sizes = model_sizes(model or 'vit_base_patch16')
    if not file:
        return sizes
    same_name = model and model.removeprefix('mff_') == str(getattr(file.flags, 'model', '')).removeprefix('mff_')
    if not model or same_name:
        sizes = dict(file.sizes)
        if 'fuse_layers' not in file.known:  # of another project, without fusion: pre-training starts to fuse
            sizes['fuse_layers'] = fuse_layer_choices(sizes['embed_dim'], sizes['depth'])[0]
        return sizes
    return sizes | {key: file.sizes[key] for key in ('img_size', 'in_chans')}


def show(value):
    return ' '.join(map(str, value)) if isinstance(value, tuple) else value


# --- Into a model -------------------------------------------------------------------------------------------------

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


def load_weights(model, path, complete=False):
    """Load a file of any known origin into a MaskedAutoencoderMFF, timm's VisionTransformer, or an UperNet.

    Position embeddings are resampled to the model's grid, the patch embedding is adapted to its channels. What the
    model lacks (decoder, fusion, another head) is left out; what the file lacks of decoder, fusion, fc_norm, head and
    the parts of UperNet stays as the model initialised it. A head is taken only behind the normalisation that it was
    trained on.

    Args:
        complete: refuse a file that leaves anything of the model freshly initialised, as for evaluation.

    Returns:
        One line: what was read, left out, freshly initialised, resampled and adapted.

    Raises:
        InputError: as read_weights, and if anything else is missing, too much, or of another shape.
    """
    return load(model, read(path), complete)


def load(model, weights, complete):
    actual = {standard_name(name, model): name for name in model.state_dict()}
    ours = {standard_name(name, model): tensor for name, tensor in model.state_dict().items()}
    our_sides = find_sides(ours)
    check_size(weights, our_sides)
    state, notes = weights.state, []
    if not weights.is_segmenter:
        state, notes = fit(weights, next(part for part in model.modules() if isinstance(part, PatchEmbed)))
        if 'encoder.cls_token' in ours:
            state = into_beit(state)

    theirs_has, ours_has = ({part_of(name) for name in names} for names in (state, ours))
    left_out, fresh = theirs_has - ours_has, ours_has - theirs_has
    same_norm = all((part in theirs_has) == (part in ours_has) for part in ('fc_norm', 'bn'))
    for part in HEADS:
        if part in theirs_has & ours_has and not (same_norm and weights.sides.get('classes') == our_sides['classes']):
            left_out, fresh = left_out | {part}, fresh | {part}
    if 'norm' in fresh and not ('decoder' in ours_has and 'fc_norm' in theirs_has):
        hint = ' (a fine-tuned one has fc_norm instead: --global_pool avg)' if 'fc_norm' in theirs_has else ''
        raise InputError(f'{weights.path}: {weights.origin}; it lacks norm.weight and norm.bias{hint}')
    taken = {name: tensor for name, tensor in state.items() if part_of(name) not in left_out}
    wanted = {name: tensor for name, tensor in ours.items() if part_of(name) not in fresh}
    if 'decoder' in theirs_has & ours_has and weights.sides['C'] != our_sides['C']:  # it predicts other channels
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


def standard_name(name, model):
    """The name that convert_state_dict gives to a model's parameter: a probe may hold its BatchNorm in two places."""
    name = name.removeprefix('backbone.')  # of main_linprobe.LinearProbe
    if isinstance(getattr(model, 'fc_norm', None), torch.nn.BatchNorm1d):
        name = re.sub(r'^fc_norm\.', 'bn.', name)
    if isinstance(getattr(model, 'head', None), torch.nn.Sequential):
        name = re.sub(r'^head\.1\.', 'head.', re.sub(r'^head\.0\.', 'bn.', name))
    return name


def check_size(weights, ours):
    """Raise InputError if width, depth or patch size differ. ours: the sides of the model."""
    theirs, ours = (
        f'width {sides["D"]}, depth {sides["depth"]} and patch size {sides["p"]}' for sides in (weights.sides, ours)
    )
    if theirs != ours:
        hint = 'without --model and sizes, it follows the file'
        raise InputError(f'{weights.path}: a ViT of {theirs}, but the model has {ours}; {hint}')


def fit(weights, patch_embed):
    """(state, notes): a file's state resampled and adapted to the grid and channels of a model's patch embedding."""
    state, notes = dict(weights.state), []
    grid, new_grid = find_grid(weights), tuple(patch_embed.grid_size)
    if grid != new_grid:
        for name in {'pos_embed', 'decoder_pos_embed'} & state.keys():
            state[name] = resample_abs_pos_embed(state[name], new_grid, grid, antialias=False)  # as MAE does
        notes.append(f'position embedding resampled from {grid[0]} x {grid[1]} to {new_grid[0]} x {new_grid[1]}')
    channels, in_chans = weights.sides['C'], patch_embed.proj.in_channels
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
        ('has what this model has not:', [name for name in taken if name not in wanted]),
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


# --- Models from files --------------------------------------------------------------------------------------------


def load_model(path):
    """(MaskedAutoencoderMFF in eval mode, Settings) of a pre-training checkpoint of any known origin.

    Files that do not record how their pixels were predicted count as standardised in each patch; flags keep the None.
    Raises InputError as file_settings and load_weights do, and if the file has no decoder.
    """
    weights = read(path)
    settings = settings_of(weights)
    if settings.sizes['fuse_layers'] is None:
        raise InputError(f'{path}: {weights.origin}; it does not record which blocks it fuses')
    with as_input_error():
        if variants.is_default(settings.flags):
            norm_pix_loss = settings.flags.norm_pix_loss is not False
            model = MaskedAutoencoderMFF(**settings.sizes, norm_pix_loss=norm_pix_loss)
        else:
            model = variants.create_model(settings.flags, settings)
    load(model, weights, complete=True)
    return model.eval(), settings


def load_encoder(path):
    """(timm's VisionTransformer without a head in eval mode, Settings) of a checkpoint of any known origin."""
    weights = read(path)
    settings = settings_of(weights)
    with as_input_error():
        model = create_encoder(settings.sizes, global_pool='avg' if 'fc_norm.weight' in weights.state else 'token')
    load(model, weights, complete=True)
    return model.eval(), settings


def random_encoder(sizes):
    """create_encoder(sizes, 'token') with weights as pre-training starts from, not timm's. Raises ValueError."""
    start = MaskedAutoencoderMFF(**sizes | {'fuse_layers': [sizes['depth'] - 1]}).state_dict()
    encoder = create_encoder(sizes, global_pool='token')
    encoder.load_state_dict({name: start[name] for name in encoder.state_dict()})
    return encoder.eval()
