"""What a file of weights is: checks of its tensors and of what it records, and its origin."""

import math
from dataclasses import dataclass

import torch

from models_mff import ENCODER, MODELS
from util.errors import InputError
from util.formats import inner_state

# Shapes of what is used before a model of that size exists. Equal names: equal dimensions.
SHAPES = {
    'patch_embed.proj.weight': ('embed_dim', 'in_chans', 'patch_size', 'patch_size'),
    'cls_token': (1, 1, 'embed_dim'),
    'pos_embed': (1, '1 + patches', 'embed_dim'),
    'blocks.0.attn.qkv.weight': ('3 embed_dim', 'embed_dim'),
    'blocks.0.attn.relative_position_bias_table': ('distances', 'num_heads'),
    'blocks.0.mlp.fc1.weight': ('mlp_dim', 'embed_dim'),
    'fuse_logits': ('fused', 1, 1, 1),
    'decoder_embed.weight': ('decoder_embed_dim', 'embed_dim'),
    'decoder_pos_embed': (1, '1 + patches', 'decoder_embed_dim'),
    'head.weight': ('classes', 'embed_dim'),
    'classifier.1.weight': ('classes', 'channels', 1, 1),
    'aux_head.2.weight': ('classes', 'aux_channels', 1, 1),
}

DECODER = ('decoder_embed_dim', 'decoder_depth', 'decoder_num_heads', 'fuse_layers')

# What a checkpoint of this project records, where it is not a whole number from 1: type, bounds and number of values
# (None: one or more).
RECORDS = {
    'img_size': (int, 1, 1e6, 2),
    'fuse_layers': (int, 0, 1e6, None),
    'mlp_ratio': (float, 1e-3, 1e3, 1),
    'mean': (float, -1e9, 1e9, None),
    'std': (float, 1e-9, 1e9, None),
    'mask_ratio': (float, 0, 0.9999, 1),
    'crop_pct': (float, 0.01, 100, 1),
}


@dataclass(frozen=True)
class Weights:
    """A file of weights that was read and checked."""

    path: str
    content: dict
    state: dict  # {name: tensor} with this project's names
    origin: str  # to print, such as 'mmpretrain MFF pre-training'
    dims: dict  # {name in SHAPES: length}, and 'depth' and 'decoder_depth'
    records: dict  # sizes, 'mean', 'std', 'mask_ratio' and 'crop_pct' that a checkpoint of this project records

    @property
    def is_ours(self):
        return is_ours(self.content)

    @property
    def is_segmenter(self):
        return 'encoder.cls_token' in self.state


def check_tensors(state):
    """Raise InputError unless every value is a dense tensor of finite floating-point numbers."""
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            problem = 'is not a tensor'
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or 0 in tensor.stride():
            problem = 'is not a dense tensor in memory'
        elif name.endswith('.num_batches_tracked') and tensor.dtype == torch.int64:
            continue
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            problem = f'holds numbers of type {str(tensor.dtype).removeprefix("torch.")}, which cannot be weights'
        elif not tensor.isfinite().all():
            problem = 'holds numbers that are not finite (NaN or infinity)'
        else:
            continue
        raise InputError(f'{name} {problem}')


def find_dims(state):
    """The lengths that SHAPES names, and the numbers of blocks. Raises InputError where a shape disagrees."""
    state = {name.removeprefix('encoder.'): tensor for name, tensor in state.items()}
    dims = {1: 1}
    for name, names in SHAPES.items():
        if name not in state:
            continue
        shape = tuple(state[name].shape)
        fits = len(shape) == len(names) and 0 not in shape
        if not fits or any(dims.setdefault(key, length) != length for key, length in zip(names, shape)):
            raise InputError(f'{name} has shape {shape}, which does not fit ({", ".join(map(str, names))}) of a ViT')
    for key, blocks in (('depth', 'blocks'), ('decoder_depth', 'decoder_blocks')):
        dims[key] = 0
        while f'{blocks}.{dims[key]}.attn.qkv.weight' in state:
            dims[key] += 1
    return dims


def is_ours(content):
    return isinstance(content.get('args'), dict) and 'input_size' in content['args']


def find_records(content):
    """What a checkpoint of this project records, {} for others. Raises InputError if it is not possible.

    Checkpoints without 'sizes' say the same by their flags: --model, --input_size and so on.
    """
    if not is_ours(content):
        return {}
    args, sizes = content['args'], content.get('sizes')
    if not isinstance(sizes, dict):
        sizes = MODELS.get(str(args.get('model')).removeprefix('mff_'), {}) | {'img_size': args['input_size']}
        sizes = sizes | without_none({key: args.get(key) for key in ('in_chans', 'fuse_layers')})
    records = {key: sizes.get(key) for key in ENCODER + DECODER}
    records |= {key: content.get(key, args.get(key)) for key in ('mean', 'std')}
    records |= {key: args.get(key) for key in ('mask_ratio', 'crop_pct')}
    return {key: check_record(key, value) for key, value in without_none(records).items()}


def check_record(key, value):
    """A recorded value, a sequence as a tuple. Raises InputError if it is none that this key can have."""
    kind, low, high, count = RECORDS.get(key, (int, 1, 1e6, 1))
    types = (int,) if kind is int else (int, float)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    enough = len(values) == count if count else values
    if not enough or any(type(number) not in types or not low <= number <= high for number in values):
        raise InputError(f'it records {key} {" ".join(repr(value).split())}, which is not possible')
    return values[0] if count == 1 else values


def without_none(values):
    return {key: value for key, value in values.items() if value is not None}


def find_grid(weights):
    """(rows, columns) of the patches: from the image size that this project records, or else a square."""
    num_patches, patch_size = weights.dims['1 + patches'] - 1, weights.dims['patch_size']
    if 'img_size' in weights.records:
        rows, columns = (side // patch_size for side in weights.records['img_size'])
    else:
        rows, columns = [math.isqrt(num_patches)] * 2
    if not rows * columns == num_patches > 0:
        raise InputError(
            f'{weights.path}: its position embedding, of {num_patches} patches, belongs to an unknown rectangle'
        )
    return rows, columns


def recognise(content, state):
    """The origin of a file's content, of which state is the converted form, in words."""
    decoder, head = 'decoder_embed.weight' in state, state.get('head.weight', state.get('classifier.1.weight'))
    fusion = any(name.startswith('fuse_') for name in state)
    ours, segmenter = is_ours(content), 'encoder.cls_token' in state
    if not ours and segmenter:
        project = 'mmsegmentation'
    elif not ours and any(name.startswith('backbone.') for name in inner_state(content)):
        project = 'mmpretrain'
    elif ours or fusion:
        project = "this project's"
    elif decoder or ('model' in content and (head is None or 'fc_norm.weight' in state or 'bn.running_var' in state)):
        project = 'facebookresearch/mae'
    elif 'model' in content:
        project = 'DeiT'
    else:
        project = 'timm'
    if head is not None:
        kind = 'segmenter' if segmenter else 'linear probe' if 'bn.running_var' in state else 'classifier'
        return f'{project} {kind} with {len(head)} classes'
    if project == 'timm':
        return 'timm encoder'
    kind = 'MFF ' if fusion else 'MAE ' if decoder and project != 'facebookresearch/mae' else ''
    return f'{project} {kind}pre-training{"" if decoder else ", encoder only"}'
