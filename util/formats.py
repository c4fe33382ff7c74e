"""Files of weights as data, whoever wrote them: read without running anything in them, and with this project's names.

Known are the names of this project, mmpretrain (MFF, MAE, ViT classifiers, linear probes), facebookresearch/mae, timm's
ViT and DeiT, and mmsegmentation's MAE + UperNet; in .pth, .pt and .safetensors.
"""

import json
import os
import re
import warnings
import zipfile

import torch
from safetensors import safe_open

from util.errors import InputError

# --- A file, as data ----------------------------------------------------------------------------------------------

# What an honest file calls to make its numbers, dates and paths, beside torch's own.
VALUES = re.compile(
    r'numpy\.(_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|dtype|ndarray)|_codecs\.encode|'
    r'builtins\.(getattr|object|set|frozenset|bytearray|complex|list|dict|tuple|int|float|str|bool|range|slice)|'
    r'argparse\.Namespace|types\.SimpleNamespace|copyreg\._reconstructor|collections\.\w+|datetime\.\w+|'
    r'pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path'
)
CONTAINERS = {'collections.defaultdict': lambda *args: {}, 'collections.deque': lambda *args: []}  # filled afterwards


class Value:
    """Stands in for an object of a class that is not imported: holds nothing, does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class Uncallable(Value):
    """Likewise, but to call the class, as a pickle does to run a function, is refused."""

    def __init__(self, *args):
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
        if start[4:] == b'\0\0\0\0{':  # the length of a safetensors header, which may start with any byte
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
    except IsADirectoryError:
        files = sorted(name for name in os.listdir(path) if name.endswith(('.pth', '.pt', '.safetensors')))
        hint = f', such as {os.path.join(path, files[0])}' if files else ''
        raise InputError(f'{path}: a folder; name a weights file{hint}') from None
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    except Exception as error:  # the readers raise many kinds
        text = str(error)
        called = re.search(r'nsupported (?:global: )?GLOBAL (\S+)|unrecognized (function)', text)
        if called:
            text = refusal(called[1] or 'a function')
            if start[:2] != b'PK':
                text += '; a file that is not a zip archive may hold tensors and plain values only'
            raise InputError(f'{path}: {text}') from None
        reason = (re.findall(r'WeightsUnpickler error:\s+(.+)', text) or text.splitlines() or [type(error).__name__])[0]
        raise InputError(f'{path}: damaged, or not a weights file ({reason})') from None


def find_placeholders(path):
    """(placeholder, name) for each name in a zip file's pickle that torch does not know. Checks every byte of it."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(f'damaged at {damaged}')
    placeholders = []
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)):
        kind = Value if VALUES.fullmatch(name) else Uncallable
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

# mmpretrain's name -> this project's, which are timm's and MAE's; applied in order.
RENAMES = [
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
]

# mmsegmentation's names outside its backbone -> models_upernet.UperNet's.
SEGMENTATION_RENAMES = [
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
]


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
    if any(name.startswith('encoder.') for name in state):  # an UperNet of this project
        return state
    segmenter = any(name.startswith('decode_head.') for name in state)
    converted = {}
    for name, tensor in state.items():
        in_backbone = name.startswith('backbone.')
        if name.startswith(('data_preprocessor.', 'target_generator.')) or name.endswith('.relative_position_index'):
            continue
        if segmenter and not in_backbone:
            renames = SEGMENTATION_RENAMES
        elif name.startswith(('backbone.', 'neck.', 'head.', 'fc_norm.')):
            renames = RENAMES
        else:
            renames = []
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        converted.update(beit_names(name, tensor) if segmenter and in_backbone else {name: tensor})
    logits = converted.get('fuse_logits')
    if isinstance(logits, torch.Tensor) and logits.numel() == 1:
        del converted['fuse_logits']
    return converted


def beit_names(name, tensor):
    """A ViT's parameter as those of timm's Beit in UperNet. The key part of a qkv bias goes: softmax cancels it."""
    if not name.endswith('.attn.qkv.bias'):
        return {f'encoder.{name}': tensor}
    prefix = f'encoder.{name.removesuffix("qkv.bias")}'
    if not isinstance(tensor, torch.Tensor) or tensor.is_nested or tensor.layout != torch.strided:  # refused later
        return {f'{prefix}q_bias': tensor, f'{prefix}v_bias': tensor}
    third = tensor.numel() // 3
    return {f'{prefix}q_bias': tensor.flatten()[:third], f'{prefix}v_bias': tensor.flatten()[2 * third :]}
