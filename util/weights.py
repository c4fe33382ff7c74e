"""Weights in: a file of any known origin, what a job builds by it, and the file into the model.

docs/weights.md lists the origins. Parameters get this project's names, which are timm's and MAE's;
what a config.json tells becomes what this project's checkpoints record.
"""

import json
import math
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, resample_abs_pos_embed, to_2tuple

from models_mff import DECODER, ENCODER, MODELS, MaskedAutoencoderMFF, create_encoder, model_sizes
from util import distributed
from util.errors import InputError, as_input_error

# --- A file, or a folder, or a name on the hub ----------------------------------------------------

INERT = dict.fromkeys(['__init__', '__setstate__'], lambda *args: None)  # for unknown classes
CONTAINERS = {'collections.defaultdict': lambda *args: {}, 'collections.deque': lambda *args: []}


def read_file(path):
    """The dict that a .pth or .safetensors file holds, with nothing in it executed.

    Objects of unknown classes become inert; a zip's checksums are compared. Raises InputError.
    """
    with as_input_error(path), open(path, 'rb') as file:
        start = file.read(9)
    try:
        if start[4:] == b'\0\0\0\0{':  # the length of a safetensors header, and the header
            with safe_open(path, 'pt') as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
            if 'args' not in metadata:
                return tensors
            metadata.pop('format')  # exported by this project; the other values are JSON
            return {'model': tensors} | {key: json.loads(text) for key, text in metadata.items()}
        inert = []
        if start[:2] == b'PK':
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f'wrong checksum of {damaged}')
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
                inert.append((CONTAINERS.get(name) or type(name, (), INERT), name))
        with torch.serialization.safe_globals(inert):
            return dict(torch.load(path, map_location='cpu', weights_only=True))
    except Exception as error:  # the readers raise many kinds
        raise InputError(f'{path}: damaged, or not a weights file ({first_line(error)})') from None


def first_line(error):
    """What it says, without torch's advice to trust a file that it refuses."""
    text = re.sub(r'(?s).*WeightsUnpickler error:\s+', '', str(error)) or repr(error)
    return text.splitlines()[0].split('. ')[0]


# In a folder or on the hub: of these the first that is there, whole or in shards; and these.
FILES = 'model.safetensors', 'model-*.safetensors', 'pytorch_model.bin', 'pytorch_model-*.bin'
CONFIGS = 'preprocessor_config.json', 'config.json'


def read_with_config(path):
    """What a file, a folder or a name on the hub holds, and what its config.json tells."""
    if path.startswith('hf-hub:'):
        distributed.on_first(partial(download, path))
        path = download(path)  # from the cache, where the processes share it
    path, content, config = Path(path.removeprefix('local-dir:')), {}, {}
    folder = path if path.is_dir() else path.parent
    found = [sorted(path.glob(pattern)) for pattern in FILES] if path.is_dir() else [[path]]
    for path in next(filter(None, found), [folder / FILES[0]]):
        content |= read_file(path)
    for path in [folder / name for name in CONFIGS if (folder / name).exists()]:
        with as_input_error(path):
            config |= json.loads(path.read_text('utf-8'))
    return content, config


def download(path):
    """The folder in the hub's cache of hf-hub:ORG/NAME. Raises InputError."""
    name = path.removeprefix('hf-hub:')
    try:
        for pattern in FILES:
            folder = snapshot_download(name, allow_patterns=[*CONFIGS, pattern])
            if any(Path(folder).glob(pattern)):
                break
        return folder
    except Exception as error:  # of the network, the hub and the cache: many kinds
        raise InputError(f'{path}: neither cached nor downloaded ({first_line(error)})') from None


# --- Names ----------------------------------------------------------------------------------------

RENAMES = [  # in order; what becomes empty is not of a ViT
    (r'^(data_preproc|target_gen|projector|predictor).*', ''),
    (r'.*(pooler\.|embeddings\.mask_token|position_index).*', ''),
    # mmsegmentation's head -> models_upernet.UperNet's
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
    # mmpretrain; MAE's probes; transformers, as on the hub, as version 5 writes it, in memory
    (r'^neck\.ln1\.', 'decoder_norm.'),
    (r'^(backbone\.ln1|(vit\.)?layernorm)\.', 'norm.'),
    (r'^backbone\.ln2\.', 'fc_norm.'),
    (r'^(head\.0|fc_norm)\.(running|num)_', r'bn.\2_'),
    (r'^(head\.(fc|layers\.head|1)|classifier)\.(?=weight|bias)', 'head.'),
    (r'^decoder\.(decoder_layers|decoder_encoder\.layer)\.', 'decoder_blocks.'),
    (r'^((backbone|neck(?!\.\d)|vit|decoder|embeddings)\.)+', ''),
    (r'^(encoder\.layer|layers)\.', 'blocks.'),
    (r'^proj_layers\.', 'fuse_projs.'),
    (r'^proj_weights$', 'fuse_logits'),
    (r'^position_embeddings$', 'pos_embed'),
    (r'^patch_embed(dings)?\.projection\.', 'patch_embed.proj.'),
    (r'\.(ln1|layernorm_before)\.', '.norm1.'),
    (r'\.(ln2|layernorm_after)\.', '.norm2.'),
    (r'\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.', r'.attn.\2.'),
    (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
    (r'\.(ffn\.layers\.0\.0|intermediate\.dense)\.', '.mlp.fc1.'),
    (r'\.(ffn\.layers\.1|output\.dense)\.', '.mlp.fc2.'),
    (r'\.conv\.', '.0.'),
    (r'\.bn\.', '.1.'),
]


def convert_state_dict(state):
    """{name: tensor} of any known origin with this project's names; query, key and value as one."""
    segmenter = any(name.startswith('decode_head.') for name in state)
    renamed = {}
    for name, tensor in state.items():
        encoder = 'encoder.' if segmenter and name.startswith('backbone.') else ''
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if name:
            renamed[encoder + name] = tensor
    if len(renamed.get('fuse_logits', ())) == 1:
        del renamed['fuse_logits']  # mmpretrain's plain MAE has one, too
    for name in [name for name in renamed if '.attn.q.' in name]:
        parts = [renamed.pop(name.replace('.q.', f'.{part}.')) for part in 'qkv']
        renamed[name.replace('.q.', '.qkv.')] = torch.cat(parts)
    return split_bias(renamed) if segmenter else renamed


def split_bias(state):
    """Make the biases of qkv those of UperNet's encoder: softmax cancels that of the keys."""
    for name in [name for name in state if name.endswith('attn.qkv.bias')]:
        query, _, value = state.pop(name).chunk(3)
        start = name.removesuffix('qkv.bias')
        state |= {f'{start}q_bias': query, f'{start}v_bias': value}
    return state


def open_vit(content, key=None):
    """(parameters, prefix of their names) of the one ViT in a file, or at key; else ValueError."""
    flat = {}
    for outer, value in content.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f'{outer}.{name}': inner[name] for name in inner} or {outer: value}
    wrappers = r'(?<![^.])(module|_orig_mod)\.'  # of DDP and torch.compile
    flat = {re.sub(wrappers, '', str(name)): tensor for name, tensor in flat.items()}
    pattern = r'(.*?)((backbone|vit)\.)?(embeddings\.)?patch_embed(dings)?\.proj(ection)?\.weight'
    vits = [match[1] for match in (re.fullmatch(pattern, name) for name in flat) if match]
    found = ', '.join(map(str, vits or list(content)[:3]))
    for place in [key] if key else ['state_dict_ema', 'model_ema', 'state_dict', 'model']:
        vits = [vit for vit in vits if vit.startswith(f'{place}.')] or ([] if key else vits)
    if len(vits) != 1:
        raise ValueError(f'it holds {found}; of several, FILE:KEY chooses one')
    vit = vits[0]
    if f'{vit}blocks.0.attn.q_bias' in flat:  # UperNet
        vit = vit.removesuffix('encoder.')
    return {name.removeprefix(vit): flat[name] for name in flat if name.startswith(vit)}, vit


KEYS = {  # of config.json and flags -> as our checkpoints record it
    'image_size': 'img_size',
    'input_size': 'img_size',
    'num_attention_heads': 'num_heads',
    'decoder_num_attention_heads': 'decoder_num_heads',
    'image_mean': 'mean',
    'image_std': 'std',
    'label_names': 'classes',
}


def read(path):
    """{'model': {name: tensor}, 'sizes': of model_sizes, 'path', ...} of any known origin.

    And all that a config.json tells, our checkpoints record, or shapes show: 'mean', 'step', ...
    path: a file, FILE:KEY where it holds several ViTs, a folder, or hf-hub:ORG/NAME. Raises
    InputError if there is not one ViT of finite numbers.
    """
    path, (file, _, key) = str(path), str(path).rpartition(':')
    if not Path(file).is_file():
        file, key = path, None
    content, config = read_with_config(file)
    try:
        state, place = open_vit(content, key)
        state = {strip(name): tensor for name, tensor in convert_state_dict(state).items()}
        for name, tensor in state.items():
            is_number = tensor.is_floating_point() or name.endswith('.num_batches_tracked')
            if not (is_number and tensor.isfinite().all()):
                raise ValueError(f'{name} is not of finite floating-point numbers')
        records = records_of(content, config, state)
        count, width = state['pos_embed'].shape[1] - 1, records['embed_dim']
        size = to_2tuple(records.pop('img_size', 0))[-2:]  # timm's: channels, H, W
        if math.prod(side // records['patch_size'] for side in size) == count:
            records['img_size'] = size
        usual = {MODELS[name]['embed_dim']: name for name in MODELS}.get(width)
        guesses = {'img_size': math.isqrt(count) * records['patch_size']}
        guesses['num_heads'] = None if usual else max(1, width // 64)
        sizes = {name: (guesses | records).get(name) for name in ENCODER + DECODER}
        sizes = model_sizes(usual or 'vit_base_patch16', **sizes)
    except Exception as error:  # of tensors that are no ViT's: many kinds
        raise InputError(f'{path}: not one known, finite ViT ({first_line(error)})') from None
    if '_ema.' in place and not key:  # averaged weights: say so
        path = f'{path}:{place[:-1]}'
    return {**records, 'sizes': sizes, 'model': state, 'path': path}


def records_of(content, config, state):
    """What a config.json tells, what our checkpoints record, what shapes show: as one flat dict."""
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise ValueError(f'its activation is {config["hidden_act"]}, not gelu')
    args = content['args'] if isinstance(content.get('args'), dict) else config
    early = MODELS.get(str(args.get('model')).removeprefix('mff_'))  # which did not record sizes
    theirs = [config, config.get('pretrained_cfg'), config.get('model_args')]

    width, in_chans, patch_size, _ = state['patch_embed.proj.weight'].shape
    depths = Counter(name.split('.')[0] for name in state if name.endswith('.norm1.weight'))
    shown = {'in_chans': in_chans, 'patch_size': patch_size, 'embed_dim': width}
    shown['depth'] = depths['blocks']
    shown['mlp_ratio'] = len(state['blocks.0.mlp.fc1.weight']) / width
    if 'blocks.0.attn.relative_position_bias_table' in state:  # of UperNet
        shown['num_heads'] = state['blocks.0.attn.relative_position_bias_table'].shape[1]
    if 'decoder_embed.weight' in state:
        shown['decoder_embed_dim'] = len(state['decoder_embed.weight'])
        shown['decoder_depth'] = depths['decoder_blocks']

    labels = config.get('id2label') or {}
    records = {'classes': [labels[number] for number in sorted(labels, key=int)]}
    for part in (*theirs, early, args, content, content.get('sizes'), shown):
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, (int, float, str, list, tuple)):
                records[KEYS.get(key, key)] = tuple(value) if isinstance(value, list) else value
    return records | {'args': args}


# --- What a job builds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a model is built with: by flags, then a file, then --model or what is usual."""

    sizes: dict  # as model_sizes gives them
    mean: tuple = IMAGENET_DEFAULT_MEAN  # of the pixels, in 0..1, per channel
    std: tuple = IMAGENET_DEFAULT_STD
    classes: list | None = None  # names, of the file
    crop_pct: float = 0.875  # share of a test image that is seen
    args: dict = field(default_factory=dict)  # flags of the run that made it, or config.json
    notes: tuple = ()  # lines to print: what differs from the file, and what was assumed
    global_pool: str | None = None  # what the file's head sees: 'avg' or 'token'


def settings_of(args, file):
    """The Settings by flags (None: not given), and read(init_from) or None. Raises InputError."""
    file = file or {'sizes': {}, 'model': {}, 'args': {}}
    state, notes = file['model'], []
    flags = vars(args).items() if args else ()
    flags = {KEYS.get(key, key): value for key, value in flags if value is not None}
    given = {name: flags[name] for name in ENCODER + DECODER if name in flags}
    model = flags.get('model', 'vit_base_patch16')
    with as_input_error():
        sizes = model_sizes(model, **file['sizes'] | given)
    if 'model' in flags and model_sizes(model, **given)['embed_dim'] != sizes['embed_dim']:
        notes.append(f'the sizes are those of the file, not of {model}')
    for name in given:
        if file.get(name, sizes[name]) != sizes[name]:
            notes.append(f'{name} {sizes[name]}, where the file has {file[name]}')
    for width, heads in (('embed_dim', 'num_heads'), ('decoder_embed_dim', 'decoder_num_heads')):
        if width in file and heads not in file:
            notes.append(f'{heads} {sizes[heads]} assumed')

    in_chans = sizes['in_chans']
    usual = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    if in_chans != 3:
        usual = dict.fromkeys(usual, (0.5,) * in_chans)
    theirs = {key: file[key] for key in usual if len(file.get(key, ())) == in_chans}
    statistics = {key: tuple(flags.get(key) or theirs.get(key, usual[key])) for key in usual}
    if any(len(values) != in_chans for values in statistics.values()):
        raise InputError(f'{statistics} is not of {in_chans} channels')
    if state and not theirs and statistics == usual:
        notes.append(f'{statistics} assumed')

    head = state.get('head.weight', state.get('classifier.1.weight', ()))
    classes = list(file.get('classes', ()))
    pool = 'avg' if 'fc_norm.weight' in state else None
    return Settings(
        sizes,
        **statistics,
        classes=classes if classes and len(classes) == len(head) else None,
        crop_pct=flags.get('crop_pct') or file.get('crop_pct') or 0.875,
        args=file['args'],
        notes=tuple(notes),
        global_pool=(file.get('global_pool') or pool or 'token') if len(head) else pool,
    )


# --- Into a model ---------------------------------------------------------------------------------

OPTIONAL = (  # what a file or a model may lack; a file may have norm besides
    r'(decoder_|mask_token|fuse_|fc_norm\.|bn\.|head\.|neck|pool|laterals|smooth|fuse\.|aux_head|'
    r'classifier|blocks.*(relative_position_bias_table|gamma_[12])$)'
)
strip = partial(re.sub, r'^(backbone|encoder)\.', '')  # of the encoder's names in a larger model
HEADS = r'decoder_pred|head\.|classifier|aux_head\.2'  # of pixels or classes


def load(model, file, complete=False, classes=None):
    """Load read(path) into a MaskedAutoencoderMFF, timm VisionTransformer, LinearProbe or UperNet.

    What only one of both has is left out, or stays as the model was initialised, if it is OPTIONAL;
    a head is taken for the same classes, behind the norm that it was trained on.

    complete: refuse a file without some part of the model, and take its eps of LayerNorm.
    Returns one line to print. Raises InputError, which names a parameter that does not fit.
    """
    path, (state, notes) = file['path'], fit(model, file)
    wanted = {strip(name): tensor for name, tensor in model.state_dict().items()}
    if 'blocks.0.attn.q_bias' in wanted:  # UperNet
        state = split_bias(state)
    both = wanted.keys() & state.keys()
    wrong = {name for name in both if wanted[name].shape != state[name].shape}

    heads = {name for name in wanted | state if re.match(HEADS, name)}
    other_norm = {'fc_norm.weight', 'bn.running_mean'} & (wanted.keys() ^ state.keys())
    other_classes = classes and file.get('classes') and list(classes) != list(file['classes'])
    notes += ['its classes have other names'] if other_classes else []
    taken = both - heads if wrong & heads or other_norm or other_classes else both
    fresh, left_out = wanted.keys() - taken, state.keys() - taken
    bad = wrong & taken | {name for name in fresh if complete or not re.match(OPTIONAL, name)}
    bad |= {name for name in left_out if not re.match(OPTIONAL + r'|norm\.', name)}
    if bad:
        name = min(bad)
        sizes = [tuple(x[name].shape) if name in x else 'missing' for x in (state, wanted)]
        raise InputError('{}: {} is {} in the file, {} in the model'.format(path, name, *sizes))
    for name in taken:
        wanted[name].copy_(state[name])

    eps = file.get('layer_norm_eps', 1e-6)
    if eps != 1e-6 and not complete:
        notes.append(f'eps of LayerNorm 1e-06, not {eps}')
    for module in model.modules() if complete else ():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    for text, names in (('fresh', fresh), ('left out', left_out)):
        parts = {re.sub(r'^blocks.*\.|\..*', '', name) for name in names}
        notes += [f'{text}: {", ".join(sorted(parts))}'] if parts else []
    return '; '.join([path, *notes])


def fit(model, file):
    """(state, notes): a file's parameters, resampled and adapted to a model's grid and channels."""
    state, notes = dict(file['model']), []
    patch_embed = next(module for module in model.modules() if isinstance(module, PatchEmbed))
    count, new = state['pos_embed'].shape[1] - 1, tuple(patch_embed.grid_size)
    old = new if math.prod(new) == count else (math.isqrt(count),) * 2
    if 'img_size' in file:
        old = tuple(side // file['patch_size'] for side in file['img_size'])
    if math.prod(old) != count:
        what = f'{1 + count} positions, not of one class token and a square grid of patches'
        raise InputError(f'{file["path"]}: {what}; if the grid is a rectangle, give --input_size')
    if old != new:
        for name in {'pos_embed', 'decoder_pos_embed'} & state.keys():
            state[name] = resample_abs_pos_embed(state[name], new, old, antialias=False)  # as MAE
        notes.append(f'positions resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]}')
    theirs, ours = file['in_chans'], patch_embed.proj.in_channels
    if theirs != ours:  # as timm does: the sum for one channel, else repeated and scaled
        weight = state['patch_embed.proj.weight']
        repeated = weight.repeat(1, math.ceil(ours / theirs), 1, 1)[:, :ours] * (theirs / ours)
        summed = weight.sum(1, keepdim=True)
        state['patch_embed.proj.weight'] = summed if ours == 1 else repeated
        notes.append(f'patch embedding adapted from {theirs} to {ours} channels')
    return state, notes


def load_model(path, encoder=False):
    """(MaskedAutoencoderMFF in eval mode, its Settings) of pre-trained weights with a decoder.

    Without a record, pixels count as standardised in each patch, and a file without fusion as MAE.
    """
    file = read(path)
    if 'fuse_layers' not in file and 'fuse_logits' not in file['model']:
        file['sizes']['fuse_layers'] = (file['depth'] - 1,)
    settings = settings_of(None, file)
    norm_pix_loss = settings.args.get('norm_pix_loss') is not False
    with as_input_error(path):
        if encoder:
            model = create_encoder(settings.sizes, settings.global_pool or 'token')
        else:
            model = MaskedAutoencoderMFF(**settings.sizes, norm_pix_loss=norm_pix_loss)
    load(model, file, complete=True)
    return model.eval(), settings


def load_encoder(path):
    """(timm's VisionTransformer without a head in eval mode, its Settings) of any weights."""
    return load_model(path, encoder=True)
