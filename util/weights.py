"""Weights in: read files of any known origin as data, recognise them, and load them into a model.

Known are this project's checkpoints, mmpretrain's (MFF, MAE, ViT classifiers, linear probes), facebookresearch/mae's
(pre-training with or without decoder, fine-tuned), and timm's ViT and DeiT; as .pth, .pt (zip or legacy) or
.safetensors. Everything has timm's names inside this project: convert_state_dict translates.
"""

import json
import math
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed

from util.args import InputError

# --- A file, as data ------------------------------------------------------------------------------------------

# What an honest file calls to make its numbers, dates and paths, beside torch's own. Read as a placeholder.
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
    """Likewise, but calling the class, as a pickle does to run a function, is refused."""

    def __init__(self, *args, **kwargs):
        raise InputError(refusal(type(self).__name__))


def refusal(name):
    return f'refused: its pickle calls {name}, which may run code; weights are tensors, numbers and strings'


def read_file(path):
    """What a weights file holds, with nothing in it executed: dicts of tensors, and placeholders for other objects.

    torch's restricted unpickler reads. Every further class that the file names (mmengine's loggers,
    argparse.Namespace, numpy's arrays) stands for an inert placeholder; none is imported.

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
        placeholders = []
        for name in sorted(pickled_names(path, legacy=start[:1] == b'\x80')):
            if not VALUES.fullmatch(name) and name.split('.')[0] in sys.stdlib_module_names:
                raise InputError(refusal(name))
            kind = Value if VALUES.fullmatch(name) else Uncallable
            placeholders.append((CONTAINERS.get(name) or type(name, (kind,), {}), name))
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
        called = re.search(r'Unsupported global: GLOBAL (\S+)|unrecognized (function)', text)
        if called:
            raise InputError(f'{path}: {refusal(called[1] or "a function")}') from None
        reason = (re.findall(r'WeightsUnpickler error: (.+)', text) or text.splitlines() or [type(error).__name__])[0]
        raise InputError(f'{path}: not a whole weights file, or one of another kind ({reason})') from None


def read_safetensors(path):
    """{'model': tensors, 'args': flags that this project's export wrote, or none}."""
    with safe_open(path, 'pt') as file:
        content = {'model': {name: file.get_tensor(name) for name in file.keys()}}
        args = json.loads((file.metadata() or {}).get('args', 'null'))
    return {**content, 'args': args} if args else content['model']


def pickled_names(path, legacy):
    """Names of all classes and functions in a torch file's pickle, 'module.name', found without unpickling.

    A zip is checked byte by byte on the way; raises InputError if it is damaged.
    """
    names = set()
    if not legacy:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise InputError(f'damaged at {damaged}')
            member = next(name for name in archive.namelist() if name.split('/')[-1] == 'data.pkl')
            with archive.open(member) as file:
                add_names(file, names)
    else:  # magic number, version, system, content, keys of the tensors that follow; or one foreign pickle
        with open(path, 'rb') as file:
            for _ in range(5):
                try:
                    add_names(file, names)
                except ValueError:
                    break
    return names


def add_names(file, names):
    """Add the names in the pickle that starts here. Protocol 4's STACK_GLOBAL takes the last two strings."""
    strings = ['', '']
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ('GLOBAL', 'INST', 'STACK_GLOBAL'):
            module, name = strings[-2:] if opcode.name == 'STACK_GLOBAL' else argument.split(' ', 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            if module.split('.')[0] != 'torch':  # torch's reader knows which of its own to allow
                names.add(f'{module}.{name}')
        elif isinstance(argument, str):
            strings.append(argument)


# --- Names and origin -----------------------------------------------------------------------------------------

# mmpretrain's name -> this project's, which are timm's and MAE's; applied in order.
RENAMES = [
    (re.compile(pattern), new)
    for pattern, new in [
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
]


def inner_state(state):
    """The parameters of a checkpoint, out of its outer dict, without the prefixes of DDP and torch.compile."""
    for key in ('state_dict', 'model'):
        if isinstance(state.get(key), dict):
            state = state[key]
    return {re.sub(r'^((module|_orig_mod)\.)+', '', str(name)): tensor for name, tensor in state.items()}


def convert_state_dict(state):
    """Names of any known origin -> this project's: its own, mmpretrain's, facebookresearch/mae's and timm's.

    The last two already agree. A checkpoint's outer dict ('model' or 'state_dict') is opened; prefixes of DDP and
    torch.compile go. A linear probe's BatchNorm is 'bn', its layer 'head'. mmpretrain's unused fusion weight of a
    single level is dropped, plain MAE has none here; so is what is no parameter of the network.
    """
    converted = {}
    for name, tensor in inner_state(state).items():
        if name.startswith(('data_preprocessor.', 'target_generator.')):
            continue
        if name.startswith(('backbone.', 'neck.', 'head.', 'fc_norm.')):
            for pattern, new in RENAMES:
                name = pattern.sub(new, name)
        converted[name] = tensor
    if 'fuse_logits' in converted and converted['fuse_logits'].numel() == 1:
        del converted['fuse_logits']
    return converted


def read_weights(path):
    """Read a weights file of any known origin.

    Returns:
        state: {name: tensor} with this project's names.
        origin: what it is, for people, such as 'mmpretrain MFF pre-training'.

    Raises:
        InputError: as read_file, and if it holds no ViT, or a distilled DeiT.
    """
    return read_with_grid(path)[:2]


def read_with_grid(path):
    """(state, origin, (rows, columns) of the position embedding)."""
    content = read_file(path)
    state = convert_state_dict(content)
    if 'dist_token' in state or 'head_dist.weight' in state:
        raise InputError(f'{path}: a distilled DeiT, which has a second class token; use the undistilled weights')
    if not {'patch_embed.proj.weight', 'cls_token', 'pos_embed', 'blocks.0.attn.qkv.weight'} <= state.keys():
        names = ', '.join(list(state)[:3]) or 'nothing'
        raise InputError(f'{path}: no weights of a ViT that is known here (it holds {names}, ...)')
    odd = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if odd:
        raise InputError(f'{path}: {odd[0]} is not a tensor')
    return state, recognise(content, state), find_grid(path, content, state)


def recognise(content, state):
    """The origin of a file's content, of which state is the converted form, in words."""
    decoder, head = 'decoder_embed.weight' in state, state.get('head.weight')
    fusion = any(name.startswith('fuse_') for name in state)
    ours = isinstance(content.get('args'), dict) and 'input_size' in content['args']
    if not ours and any(name.startswith('backbone.') for name in inner_state(content)):
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
        return f'{project} {"linear probe" if "bn.running_var" in state else "classifier"} with {len(head)} classes'
    if project == 'timm':
        return 'timm encoder'
    kind = 'MFF ' if fusion else 'MAE ' if decoder and project != 'facebookresearch/mae' else ''
    return f'{project} {kind}pre-training{"" if decoder else ", encoder only"}'


def find_grid(path, content, state):
    """(rows, columns) of the patches: from the flags that this project stores, or else a square."""
    num_patches, patch_size = state['pos_embed'].shape[1] - 1, state['patch_embed.proj.weight'].shape[-1]
    args = content.get('args')
    size = args.get('input_size') if isinstance(args, dict) else None
    known = isinstance(size, (list, tuple)) and len(size) == 2
    rows, columns = (side // patch_size for side in size) if known else [math.isqrt(num_patches)] * 2
    if rows * columns != num_patches:
        raise InputError(f'{path}: its position embedding, of {num_patches} patches, is of an unknown rectangle')
    return rows, columns


# --- Into a model ---------------------------------------------------------------------------------------------

# Parts that a file or a model may lack; everything else is the encoder, which must be there as a whole.
PARTS = {
    'decoder': ('decoder_', 'mask_token'),
    'fusion': ('fuse_',),
    'norm': ('norm.',),
    'fc_norm': ('fc_norm.',),
    'bn': ('bn.',),
    'head': ('head.',),
}


def part_of(name):
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), 'encoder')


def load_weights(model, path, whole=False):
    """Load a file of any known origin into a MaskedAutoencoderMFF or into timm's VisionTransformer.

    Position embeddings are resampled to the model's grid, the patch embedding is adapted to its channels. What the
    model lacks (decoder, fusion, another head) is left out; what the file lacks of decoder, fusion, fc_norm and head
    stays as the model initialised it. A head is taken only behind the normalisation that it was trained on.

    Args:
        whole: refuse a file that leaves anything of the model freshly initialised, as for evaluation.

    Returns:
        One line: what was read, left out, freshly initialised, resampled and adapted.

    Raises:
        InputError: as read_weights, and if anything else is missing, too much, or of another shape.
    """
    state, origin, grid = read_with_grid(path)
    ours = {probe_name(name, model): tensor for name, tensor in model.state_dict().items()}
    check_size(path, state, ours)
    notes = fit(state, model, grid)

    theirs_has, ours_has = ({part_of(name) for name in names} for names in (state, ours))
    left_out, fresh = theirs_has - ours_has, ours_has - theirs_has
    same_norm = all((part in theirs_has) == (part in ours_has) for part in ('fc_norm', 'bn'))
    if {'head'} <= theirs_has & ours_has and not (same_norm and len(state['head.weight']) == len(ours['head.weight'])):
        left_out, fresh = left_out | {'head'}, fresh | {'head'}
    if 'norm' in fresh and not ('decoder' in ours_has and 'fc_norm' in theirs_has):
        kind = ' (a fine-tuned one has fc_norm instead: --global_pool avg)' if 'fc_norm' in theirs_has else ''
        raise InputError(f'{path}: {origin}; it lacks norm.weight and norm.bias{kind}')
    taken = {name: tensor for name, tensor in state.items() if part_of(name) not in left_out}
    wanted = {name: tensor for name, tensor in ours.items() if part_of(name) not in fresh}
    if 'decoder' in theirs_has & ours_has and any('channels' in note for note in notes):  # pixels of other channels
        left_out, fresh = left_out | {'decoder_pred'}, fresh | {'decoder_pred'}
        taken, wanted = (
            {name: tensor for name, tensor in tensors.items() if not name.startswith('decoder_pred.')}
            for tensors in (taken, wanted)
        )
    check_names(path, origin, taken, wanted)
    if whole and fresh:
        instead = f'; it has {in_words(left_out, state)} instead' if left_out else ''
        raise InputError(f'{path}: {origin}; it lacks {in_words(fresh, ours)}, needed here{instead}')

    actual = {probe_name(name, model): name for name in model.state_dict()}
    model.load_state_dict(model.state_dict() | {actual[name]: tensor for name, tensor in taken.items()})
    summary = [f'{path}: {origin}']
    summary += [f'left out: {in_words(left_out, state)}'] * bool(left_out)
    summary += [f'freshly initialised: {in_words(fresh, ours)}'] * bool(fresh)
    return '; '.join(summary + notes)


def probe_name(name, model):
    """The name that convert_state_dict gives to a model's parameter: a probe may hold its BatchNorm in two places."""
    if isinstance(getattr(model, 'fc_norm', None), torch.nn.BatchNorm1d):
        name = re.sub(r'^fc_norm\.', 'bn.', name)
    if isinstance(getattr(model, 'head', None), torch.nn.Sequential):
        name = re.sub(r'^head\.1\.', 'head.', re.sub(r'^head\.0\.', 'bn.', name))
    return name


def in_words(parts, state):
    """'decoder, fusion, head of 10 classes', in the order of the network."""
    order = [*PARTS, 'decoder_pred']
    return ', '.join(
        f'head of {len(state["head.weight"])} classes' if part == 'head' else part
        for part in sorted(parts, key=order.index)
    )


def check_size(path, state, ours):
    """Raise InputError if width, depth or patch size differ."""

    def size(tensors):
        depth = 1 + max(int(name.split('.')[1]) for name in tensors if name.startswith('blocks.'))
        width, _, *patch = tensors['patch_embed.proj.weight'].shape
        return f'width {width}, depth {depth} and patch size {" x ".join(str(side) for side in patch)}'

    if size(state) != size(ours):
        raise InputError(f'{path}: a ViT of {size(state)}, but --model has {size(ours)}')


def check_names(path, origin, taken, wanted):
    """Raise InputError, naming the parameters, unless both have the same names and shapes."""
    for problem, names in (
        ('lacks', [name for name in wanted if name not in taken]),
        ('has what this model has not:', [name for name in taken if name not in wanted]),
        ('differs in shape:', [name for name in wanted if name in taken and taken[name].shape != wanted[name].shape]),
    ):
        if names:
            shapes = (
                f' ({tuple(taken[names[0]].shape)} there, {tuple(wanted[names[0]].shape)} here)'
                if problem == 'differs in shape:'
                else ''
            )
            more = f' and {len(names) - 1} more' if len(names) > 1 else ''
            hint = (
                '; --fuse_layers, --fuse_proj and --fusion must be those of the file'
                if part_of(names[0]) == 'fusion'
                else ''
            )
            raise InputError(f'{path}: {origin}; it {problem} {names[0]}{shapes}{more}{hint}')


def fit(state, model, grid):
    """Resample and adapt state, in place, to the grid and channels of model. Returns notes on what was done."""
    notes = []
    new_grid = tuple(model.patch_embed.grid_size)
    if grid != new_grid:
        for name in {'pos_embed', 'decoder_pos_embed'} & state.keys():
            state[name] = resample_abs_pos_embed(state[name], new_grid, grid, antialias=False)  # as MAE does
        notes.append(f'position embedding resampled from {grid[0]} x {grid[1]} to {new_grid[0]} x {new_grid[1]}')
    weight = state['patch_embed.proj.weight']
    in_chans = model.patch_embed.proj.weight.shape[1]
    if weight.shape[1] != in_chans:
        state['patch_embed.proj.weight'] = adapt_channels(weight, in_chans)
        notes.append(f'patch embedding adapted from {weight.shape[1]} to {in_chans} channels')
    return notes


def adapt_channels(weight, in_chans):
    """(D, c, p, p) -> (D, in_chans, p, p): summed to one channel, else repeated and scaled, as timm does."""
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans] * (channels / in_chans)
