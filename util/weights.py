"""Weights in: read files of any known origin as data, recognise them, and load them into a model.

Known are this project's checkpoints and exports, mmpretrain's (MFF, MAE, ViT classifiers, linear probes),
facebookresearch/mae's (pre-training with or without decoder, fine-tuned), timm's ViT and DeiT, and mmsegmentation's
MAE + UperNet; as .pth, .pt or .safetensors. Inside this project everything has timm's names: convert_state_dict
translates. A file also tells how to build its model, and the flags of a job follow it: settle.
"""

import argparse
import json
import math
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass, field, replace

import torch
from safetensors import safe_open
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

# --- A file, as data ----------------------------------------------------------------------------------------------

# What an honest file calls to make its numbers, dates and paths, beside torch's own.
VALUES = re.compile(
    r'numpy\.(_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|dtype|ndarray)|_codecs\.encode|'
    r'builtins\.(getattr|object|set|frozenset|bytearray|complex|list|dict|tuple|int|float|str|bool|range|slice)|'
    r'argparse\.Namespace|types\.SimpleNamespace|copyreg\._reconstructor|collections\.\w+|datetime\.\w+|'
    r'pathlib\.(Pure)?(Posix|Windows)?Path'
)
CONTAINERS = {'collections.defaultdict': lambda *args: {}, 'collections.deque': lambda *args: []}  # filled afterwards


class Value:
    """Stands in for an object of a class that is not imported: holds nothing, does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class Uncallable(Value):
    """Likewise, but to call the class, as a pickle does to run a function, is refused."""

    def __init__(self, *args, **kwargs):
        raise InputError(refusal(type(self).__name__))


def refusal(name):
    return f'refused: its pickle calls {name}, which may run code; weights are tensors, numbers and strings'


def read_file(path):
    """What a weights file holds, with nothing in it executed: dicts of tensors, and placeholders for other objects.

    torch's restricted unpickler reads. Each further class that a zip file names (mmengine's loggers,
    argparse.Namespace, numpy's arrays) becomes an inert placeholder; none is imported. Older files, which are no zip,
    may hold tensors and plain values only.

    Raises:
        InputError: if there is no such file, it is damaged or of another kind, or its pickle calls functions.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
        if start[8:] == b'{' and start[:1] != b'\x80':
            return read_safetensors(path)
        if start[:4] != b'PK\x03\x04' and start[:1] != b'\x80':
            raise InputError('not a weights file (.pth, .pt or .safetensors)')
        placeholders = find_placeholders(path) if start[:2] == b'PK' else []
        with torch.serialization.safe_globals(placeholders), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            content = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(content, dict):
            raise InputError(f'not a weights file: it holds a {type(content).__name__}, not a dict')
        return content
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    except Exception as error:  # the readers raise many kinds
        text = str(error)
        called = re.search(r'nsupported (?:global: )?GLOBAL (\S+)|unrecognized (function)', text)
        if called:
            hint = '' if start[:2] == b'PK' else '; in a file that is no zip, no class but those of tensors is read'
            raise InputError(f'{path}: {refusal(called[1] or "a function")}{hint}') from None
        reason = (re.findall(r'WeightsUnpickler error: (.+)', text) or text.splitlines() or [type(error).__name__])[0]
        raise InputError(f'{path}: damaged, or not a weights file ({reason})') from None


def find_placeholders(path):
    """(placeholder, name) for each name in a zip file's pickle that torch does not know. Checks every byte of it."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(f'damaged at {damaged}')
    placeholders = []
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)):
        is_value = VALUES.fullmatch(name)
        if not is_value and name.split('.')[0] in sys.stdlib_module_names:
            raise InputError(refusal(name))
        kind = Value if is_value else Uncallable
        placeholders.append((CONTAINERS.get(name) or type(name, (kind,), {}), name))
    return placeholders


def read_safetensors(path):
    """The tensors, or, of this project's export, {'model': tensors, 'args': ..., 'sizes': ..., ...}."""
    with safe_open(path, 'pt') as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    if 'args' not in metadata:
        return tensors
    return {'model': tensors} | {key: json.loads(value) for key, value in metadata.items() if key != 'format'}


# --- Names --------------------------------------------------------------------------------------------------------


def compile_renames(renames):
    return [(re.compile(pattern), new) for pattern, new in renames]


# mmpretrain's name -> this project's, which are timm's and MAE's; applied in order.
RENAMES = compile_renames([
    (r'^backbone\.ln1\.', 'norm.'),
    (r'^backbone\.ln2\.', 'fc_norm.'),
    (r'^neck\.ln1\.', 'decoder_norm.'),
    (r'^head\.(fc|layers\.head)\.', 'head.'),
    (r'^(backbone|neck)\.', ''),
    (r'^proj_layers\.', 'fuse_projs.'),
    (r'^proj_weights$', 'fuse_logits'),
    (r'^layers\.', 'blocks.'),
    (r'patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'\.ln([12])\.', r'.norm\1.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    (r'^head\.0\.(running|num)_', r'bn.\1_'),  # facebookresearch/mae's probe: Sequential(BatchNorm1d, Linear)
    (r'^head\.1\.', 'head.'),
    (r'^fc_norm\.(running|num)_', r'bn.\1_'),
])  # fmt: skip

# mmsegmentation's names outside its backbone -> models_upernet.UperNet's.
SEGMENTATION_RENAMES = compile_renames([
    (r'^neck\.upsample_4x\.', 'neck.0.'),
    (r'^neck\.upsample_2x\.0\.', 'neck.1.'),
    (r'^decode_head\.psp_modules\.', 'pools.'),
    (r'^decode_head\.bottleneck\.', 'pool_conv.'),
    (r'^decode_head\.lateral_convs\.', 'laterals.'),
    (r'^decode_head\.fpn_convs\.', 'smooth.'),
    (r'^decode_head\.fpn_bottleneck\.', 'fuse.'),
    (r'^decode_head\.conv_seg\.', 'classifier.1.'),
    (r'^auxiliary_head\.convs\.', 'aux_head.'),
    (r'^auxiliary_head\.conv_seg\.', 'aux_head.2.'),
    (r'\.conv\.', '.0.'),
    (r'\.bn\.', '.1.'),
])  # fmt: skip


def inner_state(state):
    """The parameters of a checkpoint, out of its outer dict, without the prefixes of DDP and torch.compile."""
    for key in ('state_dict', 'model'):
        if isinstance(state.get(key), dict):
            state = state[key]
    return {re.sub(r'^((module|_orig_mod)\.)+', '', str(name)): tensor for name, tensor in state.items()}


def convert_state_dict(state):
    """Names of any known origin -> this project's: its own, mmpretrain's, facebookresearch/mae's and timm's, which
    agree, and mmsegmentation's MAE + UperNet, which become those of models_upernet.UperNet.

    A checkpoint's outer dict ('model' or 'state_dict') is opened; prefixes of DDP and torch.compile go. A linear
    probe's BatchNorm is 'bn', its layer 'head'. mmpretrain's unused fusion weight of a single level is dropped, plain
    MAE has none here; so is what is no parameter of the network.
    """
    state = inner_state(state)
    if 'encoder.cls_token' in state:  # of models_upernet.UperNet, whose neck is not mmpretrain's
        return state
    segmenter = any(name.startswith('decode_head.') for name in state)
    converted = {}
    for name, tensor in state.items():
        if name.startswith(('data_preprocessor.', 'target_generator.')) or name.endswith('.relative_position_index'):
            continue
        if segmenter and not name.startswith('backbone.'):
            renames = SEGMENTATION_RENAMES
        else:
            renames = RENAMES if name.startswith(('backbone.', 'neck.', 'head.', 'fc_norm.')) else []
        encoder = segmenter and name.startswith('backbone.')
        for pattern, new in renames:
            name = pattern.sub(new, name)
        converted.update(beit_names(name, tensor) if encoder else {name: tensor})
    logits = converted.get('fuse_logits')
    if isinstance(logits, torch.Tensor) and logits.numel() == 1:
        del converted['fuse_logits']
    return converted


def into_beit(state):
    """A pre-trained ViT's state with the names of UperNet's encoder; other parts keep theirs."""
    converted = {}
    for name, tensor in state.items():
        converted.update(beit_names(name, tensor) if part_of(name) == 'encoder' else {name: tensor})
    return converted


def beit_names(name, tensor):
    """A ViT's parameter as those of timm's Beit in UperNet. The key part of a qkv bias goes: softmax cancels it."""
    if not name.endswith('.attn.qkv.bias'):
        return {f'encoder.{name}': tensor}
    prefix = f'encoder.{name.removesuffix("qkv.bias")}'
    if not isinstance(tensor, torch.Tensor):  # what someone knows about each parameter, such as its rate
        return {f'{prefix}q_bias': tensor, f'{prefix}v_bias': tensor}
    third = tensor.numel() // 3
    return {f'{prefix}q_bias': tensor.flatten()[:third], f'{prefix}v_bias': tensor.flatten()[2 * third :]}


# --- Checks and origin --------------------------------------------------------------------------------------------

# Shapes of what is read before a model of that size exists. Equal letters, equal sides.
SHAPES = {
    'patch_embed.proj.weight': ('D', 'C', 'p', 'p'),
    'cls_token': (1, 1, 'D'),
    'pos_embed': (1, '1+L', 'D'),
    'blocks.0.attn.qkv.weight': ('3D', 'D'),
    'blocks.0.mlp.fc1.weight': ('M', 'D'),
    'fuse_logits': ('K', 1, 1, 1),
    'decoder_embed.weight': ('E', 'D'),
    'decoder_pos_embed': (1, '1+L', 'E'),
    'head.weight': ('classes', 'D'),
    'classifier.1.weight': ('classes', 'channels', 1, 1),
}


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that was read and checked."""

    path: str
    content: dict
    state: dict  # {name: tensor} with this project's names
    origin: str  # for people
    sides: dict  # {letter of SHAPES: length}, and 'depth' and 'decoder_depth'


def read_weights(path):
    """Read a weights file of any known origin.

    Returns:
        state: {name: tensor} with this project's names.
        origin: what it is, for people, such as 'mmpretrain MFF pre-training'.

    Raises:
        InputError: as read_file, and if it holds no ViT, a distilled DeiT, or tensors that are no weights (of integers,
            not finite, sparse, of another rank).
    """
    file = read_whole(path)
    return file.state, file.origin


def read_whole(path):
    """The WeightsFile of a path. Raises InputError as read_weights does."""
    content = read_file(path)
    state = convert_state_dict(content)
    if 'dist_token' in state or 'head_dist.weight' in state:
        raise InputError(f'{path}: a distilled DeiT, which has a second class token; use the undistilled weights')
    names = {name.removeprefix('encoder.') for name in state}
    if not names.issuperset(['patch_embed.proj.weight', 'cls_token', 'pos_embed', 'blocks.0.attn.qkv.weight']):
        first = ', '.join(list(state)[:3]) or 'nothing'
        raise InputError(f'{path}: no weights of a ViT that is known here (it holds {first}, ...)')
    check_tensors(path, state)
    return WeightsFile(path, content, state, recognise(content, state), find_sides(path, state))


def check_tensors(path, state):
    """Raise InputError unless every value is a dense tensor of finite floating-point numbers."""
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            problem = 'is not a tensor'
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
            problem = 'is not a dense tensor in memory'
        elif name.endswith('.num_batches_tracked') and tensor.dtype == torch.int64:
            continue
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            problem = f'holds numbers of type {tensor.dtype}, which are no weights'.replace('torch.', '')
        elif not tensor.isfinite().all():
            problem = 'holds numbers that are not finite (NaN or infinity)'
        else:
            continue
        raise InputError(f'{path}: {name} {problem}')


def find_sides(path, state):
    """The lengths that SHAPES names, and the numbers of blocks. Raises InputError where a shape disagrees."""
    state = {name.removeprefix('encoder.'): tensor for name, tensor in state.items()}
    sides = {1: 1}
    for name, letters in SHAPES.items():
        shape = tuple(state[name].shape) if name in state else None
        if shape is None:
            continue
        agrees = len(shape) == len(letters) and 0 not in shape
        if not agrees or any(sides.setdefault(letter, side) != side for letter, side in zip(letters, shape)):
            raise InputError(
                f'{path}: {name} has shape {shape}, which is that of no ViT ({", ".join(map(str, letters))})'
            )
    for key, blocks in (('depth', 'blocks'), ('decoder_depth', 'decoder_blocks')):
        sides[key] = 0
        while f'{blocks}.{sides[key]}.attn.qkv.weight' in state:
            sides[key] += 1
    return sides


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


# --- What a model is built with -----------------------------------------------------------------------------------

ENCODER = ('img_size', 'in_chans', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')
DECODER = ('decoder_embed_dim', 'decoder_depth', 'decoder_num_heads', 'fuse_layers')


@dataclass(frozen=True)
class Settings:
    """What a model is built with, and what a file says of the run that made it."""

    sizes: dict  # as model_sizes gives them
    mean: tuple  # of the pixels, in 0..1, per channel
    std: tuple
    notes: tuple = ()  # lines: flags that differ from the checkpoint's
    flags: argparse.Namespace = field(default_factory=argparse.Namespace)  # of the run; 'model' in it: one of ours
    classes: list | None = None  # names
    known: frozenset = frozenset()  # of sizes, 'mean' and 'std': what the file records or shows; others are the usual


FLAGS = {'img_size': 'input_size'}  # the flag of a size, where it has another name


def is_ours(content):
    return isinstance(content.get('args'), dict) and 'input_size' in content['args']


# Key: type, least value and number of values (None: one or more) of what a checkpoint records. Others: a whole number.
RECORDS = {
    'img_size': (int, 1, 2),
    'fuse_layers': (int, 0, None),
    'mlp_ratio': (float, 1e-3, 1),
    'mean': (float, -1e9, None),
    'std': (float, 1e-9, None),
    'mask_ratio': (float, 0, 1),
    'crop_pct': (float, 1e-3, 1),
}


def check_record(path, key, value):
    """A recorded value, a sequence as a tuple. Raises InputError if it is none that this key can have."""
    kind, low, count = RECORDS.get(key, (int, 1, 1))
    types = (int,) if kind is int else (int, float)
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    enough = len(values) == count if count else values
    if not enough or any(type(number) not in types or not low <= number < math.inf for number in values):
        raise InputError(f'{path}: it records {key} {value!r}, which is not possible')
    return values[0] if count == 1 else values


def recorded(path, content):
    """The sizes, 'mean' and 'std' that a checkpoint of this project records; {} of another file.

    Checkpoints without 'sizes' say the same by their flags: --model, --input_size and so on. Raises InputError.
    """
    if not is_ours(content):
        return {}
    args, sizes = content['args'], content.get('sizes')
    if not isinstance(sizes, dict):
        sizes = dict(MODELS.get(str(args.get('model')).removeprefix('mff_'), {}), img_size=args['input_size'])
        sizes |= without_none({key: args.get(key) for key in ('in_chans', 'fuse_layers')})
    statistics = {key: content.get(key) or args.get(key) for key in ('mean', 'std')}
    found = {key: sizes.get(key) for key in ENCODER + DECODER} | statistics
    return {key: check_record(path, key, value) for key, value in without_none(found).items()}


def without_none(values):
    return {key: value for key, value in values.items() if value is not None}


def file_settings(path):
    """The Settings of a checkpoint of any known origin.

    Widths, depths, patch size and channels are those of its tensors. The rest is what it records, or else the usual:
    a square image; the heads of the size in MODELS of that width, or one per 64 channels; ImageNet's mean and std for 3
    channels, 0.5 for others. fuse_layers is None where levels are fused, but it is not known which. In flags,
    norm_pix_loss is None and mask_ratio 0.75 where the file does not record them.

    Raises:
        InputError: as read_weights, and if what it records is impossible or contradicts its tensors.
    """
    return settings_of(read_whole(path))


def settings_of(file):
    path, sides, found = file.path, file.sides, recorded(file.path, file.content)
    shown = {
        'img_size': tuple(side * sides['p'] for side in find_grid(file)),
        'in_chans': sides['C'],
        'patch_size': sides['p'],
        'embed_dim': sides['D'],
        'depth': sides['depth'],
    }
    if 'M' in sides:
        shown['mlp_ratio'] = sides['M'] / sides['D']
    usual = next((sizes for sizes in MODELS.values() if sizes['embed_dim'] == sides['D']), None)
    usual = usual or MODELS['vit_base_patch16'] | {'num_heads': max(1, sides['D'] // 64)}
    if 'E' in sides:
        shown |= {'decoder_embed_dim': sides['E'], 'decoder_depth': sides['decoder_depth']}
        same = next((sizes for sizes in MODELS.values() if sizes['decoder_embed_dim'] == sides['E']), None)
        usual = usual | {'decoder_num_heads': same['decoder_num_heads'] if same else max(1, sides['E'] // 32)}
    fused = any(name.startswith('fuse_') for name in file.state)
    choices = fuse_layer_choices(sides['D'], sides['depth'])
    if fused:
        choices = [layers for layers in choices if len(layers) == sides.get('K')] or [None]
    elif 'E' in sides:
        choices = [(sides['depth'] - 1,)]  # MAE
    sizes = usual | {'fuse_layers': choices[0]} | found | shown
    known = found.keys() | shown.keys() | ({'fuse_layers'} if fused else set())

    flags = argparse.Namespace(norm_pix_loss=None, mask_ratio=0.75)
    if is_ours(file.content):
        vars(flags).update({name: value for name, value in file.content['args'].items() if isinstance(name, str)})
    for name in ('mask_ratio', 'crop_pct'):
        if getattr(flags, name, None) is not None:
            check_record(path, name, getattr(flags, name))
    mean, std = (sizes.pop(key, default_statistics(sides['C'])[key]) for key in ('mean', 'std'))
    if not len(mean) == len(std) == sides['C']:
        raise InputError(f'{path}: it records mean {mean} and std {std}, but its images have {sides["C"]} channels')
    classes = file.content.get('classes') if is_ours(file.content) else None
    if classes is not None and (not isinstance(classes, list) or not all(isinstance(name, str) for name in classes)):
        raise InputError(f'{path}: its classes are no list of names')
    if classes and len(classes) != sides.get('classes', len(classes)):
        raise InputError(f'{path}: its head has {sides["classes"]} classes, but it names {len(classes)}')
    return Settings(sizes, mean, std, flags=flags, classes=classes, known=frozenset(known))


def default_statistics(in_chans):
    if in_chans == 3:
        return {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    return {'mean': (0.5,) * in_chans, 'std': (0.5,) * in_chans}


def find_grid(file):
    """(rows, columns) of the patches: from the image size that this project records, or else a square."""
    num_patches, patch_size = file.sides['1+L'] - 1, file.sides['p']
    recorded_size = recorded(file.path, file.content).get('img_size')
    if recorded_size:
        rows, columns = (side // patch_size for side in recorded_size)
    else:
        rows, columns = [math.isqrt(num_patches)] * 2
    if not rows * columns == num_patches > 0:
        raise InputError(f'{file.path}: its position embedding, of {num_patches} patches, is of an unknown rectangle')
    return rows, columns


def fuse_layer_choices(width, depth):
    """Usual choices of the fused blocks of a ViT, the best first."""
    same = [sizes['fuse_layers'] for sizes in MODELS.values() if (sizes['embed_dim'], sizes['depth']) == (width, depth)]
    return [*same, default_fuse_layers(depth)]


def settle(args):
    """What a job builds: its flags, else what --init_from says, else the size of --model, by default vit_base_patch16.

    args: flags of a job (add_model_arguments and --init_from), None where not given; unchanged. --model sets all sizes
    but image size and channels, unless the file records a model of the same name.

    Returns:
        Settings, whose notes name each flag that differs from the checkpoint.

    Raises:
        InputError: as file_settings, or if the sizes do not fit together.
    """
    given = {key: getattr(args, FLAGS.get(key, key), None) for key in ENCODER + DECODER}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in without_none(given).items()}
    file = file_settings(args.init_from) if args.init_from else None
    model = args.model and args.model.removeprefix('mff_')
    with as_input_error():
        base = model_sizes(model or 'vit_base_patch16')
    if file and (not model or model == str(getattr(file.flags, 'model', '')).removeprefix('mff_')):
        base = dict(file.sizes)
        if 'fuse_layers' not in file.known:  # of another project, without fusion: pre-training starts to fuse
            base['fuse_layers'] = fuse_layer_choices(base['embed_dim'], base['depth'])[0]
    elif file:
        base |= {key: file.sizes[key] for key in ('img_size', 'in_chans')}
        if 'fuse_layers' in file.known and file.sizes['depth'] == base['depth']:
            base['fuse_layers'] = file.sizes['fuse_layers']
    sizes = base | given
    if sizes['depth'] != base['depth'] and 'fuse_layers' not in given:
        sizes['fuse_layers'] = default_fuse_layers(sizes['depth'])

    statistics = default_statistics(sizes['in_chans'])
    if file and file.sizes['in_chans'] == sizes['in_chans']:
        statistics = {'mean': file.mean, 'std': file.std}
    for key in ('mean', 'std'):
        value = getattr(args, key, None)
        if value is not None and len(value) != sizes['in_chans']:
            raise InputError(f'--{key} has {len(value)} numbers, but the images have {sizes["in_chans"]} channels')
        statistics[key] = tuple(value or statistics[key])

    pretraining = hasattr(args, 'fuse_layers')
    if pretraining and sizes['fuse_layers'] is None:
        raise InputError(f'{args.init_from}: it does not record which blocks it fuses; give them by --fuse_layers')
    with as_input_error():
        check_image_size(sizes['img_size'], sizes['patch_size'])
        check_width(sizes['embed_dim'], sizes['num_heads'])
        if pretraining:
            check_width(sizes['decoder_embed_dim'], sizes['decoder_num_heads'], 'decoder_')
            check_fuse_layers(sizes['fuse_layers'], sizes['depth'])
    notes = []
    if file:
        before, now = (
            each.sizes | {'mean': each.mean, 'std': each.std} for each in (file, Settings(sizes, **statistics))
        )
        for key in [*before] if pretraining else [key for key in before if key not in DECODER]:
            if key in file.known and now[key] != before[key]:
                notes.append(f'{FLAGS.get(key, key)} {show(now[key])}, where the checkpoint has {show(before[key])}')
        return replace(file, sizes=sizes, notes=tuple(notes), **statistics)
    return Settings(sizes, **statistics)


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
    return load_file(model, read_whole(path), complete)


def load_file(model, file, complete):
    path, origin, state, notes = file.path, file.origin, file.state, []
    actual = {standard_name(name, model): name for name in model.state_dict()}
    ours = {standard_name(name, model): tensor for name, tensor in model.state_dict().items()}
    check_size(file, find_sides('the model', ours))
    if 'encoder.cls_token' not in state:
        state, notes = fit(file, next(module for module in model.modules() if isinstance(module, PatchEmbed)))
        if 'encoder.cls_token' in ours:
            state = into_beit(state)

    theirs_has, ours_has = ({part_of(name) for name in names} for names in (state, ours))
    left_out, fresh = theirs_has - ours_has, ours_has - theirs_has
    same_norm = all((part in theirs_has) == (part in ours_has) for part in ('fc_norm', 'bn'))
    for part, name in HEADS.items():
        if part in theirs_has & ours_has and not (same_norm and len(state[name]) == len(ours[name])):
            left_out, fresh = left_out | {part}, fresh | {part}
    if 'norm' in fresh and not ('decoder' in ours_has and 'fc_norm' in theirs_has):
        hint = ' (a fine-tuned one has fc_norm instead: --global_pool avg)' if 'fc_norm' in theirs_has else ''
        raise InputError(f'{path}: {origin}; it lacks norm.weight and norm.bias{hint}')
    taken = {name: tensor for name, tensor in state.items() if part_of(name) not in left_out}
    wanted = {name: tensor for name, tensor in ours.items() if part_of(name) not in fresh}
    if (
        'decoder' in theirs_has & ours_has and file.sides['C'] != find_sides(path, ours)['C']
    ):  # pixels of other channels
        left_out, fresh = left_out | {'decoder_pred'}, fresh | {'decoder_pred'}
        for tensors in (taken, wanted):
            for name in [name for name in tensors if name.startswith('decoder_pred.')]:
                del tensors[name]
    check_names(file, taken, wanted)
    if complete and fresh:
        instead = f'; it has {list_parts(left_out, state)} instead' if left_out else ''
        raise InputError(f'{path}: {origin}; it lacks {list_parts(fresh, ours)}, needed here{instead}')

    model.load_state_dict(model.state_dict() | {actual[name]: tensor for name, tensor in taken.items()})
    summary = [f'{path}: {origin}']
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


def list_parts(parts, state):
    """'decoder, fusion, head of 10 classes', in the order of the network."""
    order = [*PARTS, 'decoder_pred']
    words = {part: f'{part} of {len(state[name])} classes' for part, name in HEADS.items() if name in state}
    return ', '.join(words.get(part, part) for part in sorted(parts, key=order.index))


def check_size(file, ours):
    """Raise InputError if width, depth or patch size differ. ours: the sides of the model."""
    theirs, ours = (
        f'width {sides["D"]}, depth {sides["depth"]} and patch size {sides["p"]}' for sides in (file.sides, ours)
    )
    if theirs != ours:
        raise InputError(
            f'{file.path}: a ViT of {theirs}, but the model has {ours}; without --model and sizes, it follows the file'
        )


def check_names(file, taken, wanted):
    """Raise InputError, naming the parameters, unless both have the same names and shapes."""
    other = [name for name in wanted if name in taken and taken[name].shape != wanted[name].shape]
    for problem, names in (
        ('lacks', [name for name in wanted if name not in taken]),
        ('has what this model has not:', [name for name in taken if name not in wanted]),
        ('differs in shape:', other),
    ):
        if not names:
            continue
        text = f'{file.path}: {file.origin}; it {problem} {names[0]}'
        if names is other:
            text += f' ({tuple(taken[names[0]].shape)} there, {tuple(wanted[names[0]].shape)} here)'
        if len(names) > 1:
            text += f' and {len(names) - 1} more'
        if part_of(names[0]) == 'fusion':
            text += '; --fuse_layers, --fuse_proj and --fusion must be those of the file'
        raise InputError(text)


def fit(file, patch_embed):
    """(state, notes): a file's state resampled and adapted to the grid and channels of a model's patch embedding."""
    state, notes = dict(file.state), []
    grid, new_grid = find_grid(file), tuple(patch_embed.grid_size)
    if grid != new_grid:
        for name in {'pos_embed', 'decoder_pos_embed'} & state.keys():
            state[name] = resample_abs_pos_embed(state[name], new_grid, grid, antialias=False)  # as MAE does
        notes.append(f'position embedding resampled from {grid[0]} x {grid[1]} to {new_grid[0]} x {new_grid[1]}')
    weight, in_chans = state['patch_embed.proj.weight'], patch_embed.proj.in_channels
    if weight.shape[1] != in_chans:
        state['patch_embed.proj.weight'] = adapt_channels(weight, in_chans)
        notes.append(f'patch embedding adapted from {weight.shape[1]} to {in_chans} channels')
    return state, notes


def adapt_channels(weight, in_chans):
    """(D, c, p, p) -> (D, in_chans, p, p): summed to one channel, else repeated and scaled, as timm does."""
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans] * (channels / in_chans)


# --- Models from files --------------------------------------------------------------------------------------------


def load_model(path):
    """(MaskedAutoencoderMFF in eval mode, Settings) of a pre-training checkpoint of any known origin.

    Files that do not record how their pixels were predicted count as standardised in each patch; flags keep the None.
    Raises InputError as file_settings and load_weights do, and if the file has no decoder.
    """
    file = read_whole(path)
    settings = settings_of(file)
    if settings.sizes['fuse_layers'] is None:
        raise InputError(f'{path}: {file.origin}; it fuses {file.sides["K"]} blocks, but does not record which')
    with as_input_error():
        if variants.is_default(settings.flags):
            norm_pix_loss = settings.flags.norm_pix_loss is not False
            model = MaskedAutoencoderMFF(**settings.sizes, norm_pix_loss=norm_pix_loss)
        else:
            model = variants.create_model(settings.flags, settings)
    load_file(model, file, complete=True)
    return model.eval(), settings


def load_encoder(path):
    """(timm's VisionTransformer without a head in eval mode, Settings) of a checkpoint of any known origin."""
    file = read_whole(path)
    settings = settings_of(file)
    with as_input_error():
        model = create_encoder(settings.sizes, global_pool='avg' if 'fc_norm.weight' in file.state else 'token')
    load_file(model, file, complete=True)
    return model.eval(), settings


def random_encoder(sizes):
    """create_encoder(sizes, 'token') with weights as pre-training starts from, not timm's. Raises ValueError."""
    start = MaskedAutoencoderMFF(**sizes | {'fuse_layers': [sizes['depth'] - 1]}).state_dict()
    encoder = create_encoder(sizes, global_pool='token')
    encoder.load_state_dict({name: start[name] for name in encoder.state_dict()})
    return encoder.eval()
