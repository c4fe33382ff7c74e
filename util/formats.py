"""Files of weights, whoever wrote them: read without running anything in them, with our names.

Known are files of this project, mmpretrain, mmsegmentation (MAE with UperNet), timm, DeiT,
facebookresearch/mae and transformers (ViTMAE, ViT). Parameters get this project's names, which are
timm's and MAE's; what a config.json tells becomes what this project's checkpoints record.
"""

import json
import math
import re
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from timm.layers import to_2tuple

from models_mff import DECODER, ENCODER, MODELS
from util import distributed
from util.errors import InputError, as_input_error

# --- A file ---------------------------------------------------------------------------------------


class Inert:
    """Stands in for an object of any class but torch's: holds nothing, does nothing."""

    def __init__(self, *args): ...

    def __setstate__(self, state): ...


CONTAINERS = {'collections.defaultdict': lambda *args: {}, 'collections.deque': lambda *args: []}


def read_file(path):
    """The dict that a .pth or .safetensors file holds, with nothing in it executed.

    torch's restricted unpickler reads; classes that it does not know become Inert. The checksums of
    a zip file, as torch.save writes it, are compared. Raises InputError.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
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
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f'wrong checksum of {damaged}')
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
                inert.append((CONTAINERS.get(name) or type(name, (Inert,), {}), name))
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f'it holds a {type(content).__name__}')
        return content
    except OSError as error:
        raise InputError(f'{path}: {error.strerror or error}') from None
    except Exception as error:  # the readers raise many kinds
        reason = re.sub(r'(?s).*WeightsUnpickler error:\s+', '', str(error)) or repr(error)
        reason = reason.splitlines()[0].split('. ')[0]  # without torch's advice to trust the file
        raise InputError(f'{path}: damaged, or not a weights file ({reason})') from None


# --- A folder, or a name on the hub ---------------------------------------------------------------


FILES = ('model.safetensors', 'pytorch_model.bin')
CONFIGS = ('preprocessor_config.json', 'config.json')


def read_with_config(path):
    """What a file, or a folder of transformers or timm, holds; and the config.json beside it."""
    path = Path(download(path) if path.startswith('hf-hub:') else path.removeprefix('local-dir:'))
    folder, paths, content, config = path.parent, [path], {}, {}
    if path.is_dir():
        folder, names = path, [f'{name}{end}' for name in FILES for end in ('', '.index.json')]
        paths = [folder / name for name in names if (folder / name).exists()][:1]
        if not paths:
            raise InputError(f'{folder}: a folder without {" or ".join(FILES)}; name a file')
    if paths[0].name.endswith('.index.json'):
        shards = read_json(paths[0])['weight_map'].values()
        paths = [folder / shard for shard in sorted(set(shards))]
    for path in paths:
        content |= read_file(path)
    for name in CONFIGS:
        config |= read_json(folder / name)
    return content, config


def read_json(path):
    with as_input_error(path):
        return json.loads(path.read_text('utf-8')) if path.exists() else {}


def download(path):
    """The folder in the hub's cache of hf-hub:ORG/NAME[@REVISION]. Raises InputError."""
    name, _, revision = path.removeprefix('hf-hub:').partition('@')

    def fetch():
        try:
            for file in ('model*.safetensors', 'pytorch_model*.bin'):
                patterns = [*CONFIGS, file, f'{file}.index.json']
                folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
                if any(Path(folder).glob(file)):
                    break
            return folder
        except Exception as error:  # of the network, the hub and the cache: many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f'{path}: not in the cache, and not downloaded ({reason})') from None

    distributed.on_first(fetch)
    return fetch()  # from the cache, where the processes share it


KEYS = {  # of transformers' and timm's config.json -> as our checkpoints record it
    'image_size': 'img_size',
    'input_size': 'img_size',
    'num_attention_heads': 'num_heads',
    'decoder_num_attention_heads': 'decoder_num_heads',
    'image_mean': 'mean',
    'image_std': 'std',
    'label_names': 'classes',
}


def records_of(content, config):
    """What a checkpoint of this project records, or else a config.json tells, as one flat dict."""
    args = content.get('args')
    if isinstance(args, dict) and 'input_size' in args:  # ours; early ones have no 'sizes'
        usual = MODELS.get(str(args.get('model')).removeprefix('mff_'), {})
        parts = [usual, args, content, content.get('sizes', {})]
    else:
        if config.get('hidden_act', 'gelu') != 'gelu':
            raise ValueError(f'its activation is {config["hidden_act"]}, not gelu')
        labels = config.get('id2label') or {}
        classes = [labels[number] for number in sorted(labels, key=int)]
        flags = {key: config[key] for key in ('norm_pix_loss', 'mask_ratio') if key in config}
        inner = [config.get(key, {}) for key in ('pretrained_cfg', 'model_args')]
        parts = [{'classes': classes, 'args': flags}, config, *inner]
    unused = ('model', 'optimizer', 'scaler')
    return {
        KEYS.get(key, key): tuple(value) if isinstance(value, list) else value
        for part in parts
        for key, value in part.items()
        if value is not None and key not in unused
    }


# --- Names ----------------------------------------------------------------------------------------

RENAMES = [  # in order
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
    (r'^(backbone|neck(?!\.\d)|vit|decoder)\.', ''),
    (r'^(encoder\.layer|layers)\.', 'blocks.'),
    (r'^proj_layers\.', 'fuse_projs.'),
    (r'^proj_weights$', 'fuse_logits'),
    (r'^embeddings\.', ''),
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
UNUSED = (
    r'data_preproc|target_gen|projector|predictor|(vit\.)?(pooler|embeddings\.mask_token)|'
    r'.*position_index$'
)
PATCHES = r'(.*?)(patch_embed\.proj(ection)?|embeddings\.patch_embeddings\.projection)\.weight'


def convert_state_dict(state):
    """{name: tensor} of any known origin with this project's names; query, key and value as one."""
    segmenter = any(name.startswith('decode_head.') for name in state)
    renamed = {}
    for name, tensor in state.items():
        encoder = 'encoder.' if segmenter and name.startswith('backbone.') else ''
        if not re.match(UNUSED, name):
            for pattern, new in RENAMES:
                name = re.sub(pattern, new, name)
            renamed[encoder + name] = tensor
    if isinstance(renamed.get('fuse_logits'), torch.Tensor) and renamed['fuse_logits'].numel() == 1:
        del renamed['fuse_logits']  # mmpretrain's plain MAE has one, too
    for name in [name for name in renamed if '.attn.q.' in name]:
        parts = [renamed.pop(name.replace('.q.', f'.{part}.')) for part in 'qkv']
        renamed[name.replace('.q.', '.qkv.')] = torch.cat(parts)
    return split_bias(renamed) if segmenter else renamed


def split_bias(state):
    """The biases of qkv as UperNet's encoder has them. That of keys goes: softmax cancels it."""
    state = dict(state)
    for name in [name for name in state if name.endswith('attn.qkv.bias')]:
        bias, start = state.pop(name), name.removesuffix('qkv.bias')
        third = len(bias) // 3
        state |= {f'{start}q_bias': bias[:third], f'{start}v_bias': bias[2 * third :]}
    return state


def open_vit(content, key=None):
    """(parameters with their names, notes) of the ViT in a checkpoint. key: where, of several."""
    vits = {}
    for outer, value in {'': content, **content}.items():
        if isinstance(value, dict):
            wrappers = r'^((module|_orig_mod)\.)+'  # of DDP and torch.compile
            state = {re.sub(wrappers, '', str(name)): tensor for name, tensor in value.items()}
            for match in filter(None, [re.fullmatch(PATCHES, name) for name in state]):
                vits[f'{outer}.{match[1]}'.strip('.')] = state, match[1]
    preferred = [key] if key else ['state_dict_ema', 'model_ema', 'state_dict', 'model']
    inside = [[at for at in vits if f'{at}.'.startswith(f'{outer}.')] for outer in preferred]
    chosen = next(filter(None, inside), [] if key else list(vits))
    if not vits:
        raise InputError(f'no known ViT (it holds {", ".join(map(str, list(content)[:3]))}, ...)')
    if len(chosen) != 1:
        raise InputError(f'holds these ViTs, of which FILE:KEY chooses one: {", ".join(vits)}')
    state, prefix = vits[chosen[0]]
    if prefix not in ('', 'backbone.', 'vit.') and 'encoder.blocks.0.attn.q_bias' not in state:
        state = {
            name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)
        }
    averaged = chosen[0].split('.')[0].endswith('_ema')
    return state, [f'its averaged weights, {chosen[0]}'] if averaged else []


def read(path):
    """The weights of any known origin at a path.

    path: a file, FILE:KEY where it holds several ViTs, a folder, or hf-hub:ORG/NAME[@REVISION].

    Returns:
        {'model': {name: tensor}, 'path', 'notes', 'sizes': what its tensors show or it records},
        and what else a checkpoint of this project records or a config.json tells: 'mean', 'std',
        'classes', 'args', 'step' and so on.

    Raises:
        InputError: as read_file, or if it does not hold one ViT of finite numbers.
    """
    path, (file, _, key) = str(path), str(path).rpartition(':')
    if not Path(file).is_file():
        file, key = path, None
    content, config = read_with_config(file)
    try:
        state, notes = open_vit(content, key)
        state = convert_state_dict(state)
        state = {name.removeprefix('encoder.'): tensor for name, tensor in state.items()}
        for name, tensor in state.items():
            dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
            counts = name.endswith('.num_batches_tracked')
            floats = dense and tensor.ndim and tensor.is_floating_point()
            if not counts and not (floats and tensor.isfinite().all()):
                raise InputError(f'{name} is not a dense tensor of finite floating-point numbers')
        records = records_of(content, config)
        sizes = {name: records[name] for name in ENCODER + DECODER if name in records}
        sizes |= shown_sizes(state)
        sizes['img_size'] = to_2tuple(sizes.get('img_size', 0))[-2:]  # timm's: channels, H, W
        grid = [side // sizes['patch_size'] for side in sizes['img_size']]
        if math.prod(grid) != state['pos_embed'].shape[1] - 1:
            del sizes['img_size']
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    except Exception as error:  # of tensors that are no ViT's: many kinds
        raise InputError(f'{path}: no known ViT ({error!r})') from None
    return {**records, 'sizes': sizes, 'model': state, 'path': path, 'notes': notes}


def shown_sizes(state):
    """The sizes that the shapes of a ViT's parameters show. Raises InputError for a DeiT."""
    if not state.keys().isdisjoint(['dist_token', 'distillation_token']):
        raise InputError('a distilled DeiT, which has a second class token')
    width, in_chans, patch_size, _ = state['patch_embed.proj.weight'].shape
    if state['pos_embed'].shape[::2] != (1, width):
        raise InputError(f'pos_embed is {tuple(state["pos_embed"].shape)} at a width of {width}')
    sizes = {'in_chans': in_chans, 'patch_size': patch_size, 'embed_dim': width}
    sizes['mlp_ratio'] = len(state['blocks.0.mlp.fc1.weight']) / width
    if 'blocks.0.attn.relative_position_bias_table' in state:  # of UperNet
        sizes['num_heads'] = state['blocks.0.attn.relative_position_bias_table'].shape[1]
    if 'decoder_embed.weight' in state:
        sizes['decoder_embed_dim'] = len(state['decoder_embed.weight'])
    for size, blocks in (('depth', 'blocks.'), ('decoder_depth', 'decoder_blocks.')):
        numbers = {name.split('.')[1] for name in state if name.startswith(blocks)}
        sizes |= {size: len(numbers)} if numbers else {}
    return sizes
