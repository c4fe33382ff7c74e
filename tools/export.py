"""Weights out: a folder that timm, transformers and the Hugging Face hub take as it is.

    python -m tools.export OUTPUT_DIR/checkpoint-last.pth DIR
    python -m tools.export OUTPUT_DIR/checkpoint-last.pth DIR --transformers

The first is in timm's format, which transformers reads, too: the encoder or the classifier, and in
pretraining/ the whole model. The second is for transformers' own classes: ViTMAEForPreTraining for
plain MAE, and for others ViTModel, the encoder without fusion and decoder.
"""

import json
import os
import re
import tempfile
from pathlib import Path

from jinja2 import Template
from safetensors.torch import save

from models_mff import ENCODER, create_encoder
from util import weights
from util.args import ArgumentParser, run_job
from util.errors import InputError, as_input_error

# timm's architecture by width, or else base: model_args in config.json hold all sizes.
TIMM = {192: 'tiny_patch16', 384: 'small_patch16', 1024: 'large_patch16', 1280: 'huge_patch14'}

# Flags of the run that come with its weights, beside sizes, mean and std; paths, for one, do not.
KEPT_FLAGS = (
    'model input_size norm_pix_loss mask_ratio crop epochs crop_pct global_pool resize_mode '
    'background max_value fuse_proj fusion target'
).split()

HUB_NAMES = [  # our names -> those of transformers' files on the hub, which all its versions read
    (r'^(decoder_|mask_token)', r'decoder.\1'),
    (r'^decoder\.decoder_blocks\.', 'decoder.decoder_layers.'),
    (r'^cls_token', 'vit.embeddings.cls_token'),
    (r'^pos_embed', 'vit.embeddings.position_embeddings'),
    (r'^patch_embed\.proj\.', 'vit.embeddings.patch_embeddings.projection.'),
    (r'^blocks\.', 'vit.encoder.layer.'),
    (r'^norm\.', 'vit.layernorm.'),
    (r'\.norm1\.', '.layernorm_before.'),
    (r'\.norm2\.', '.layernorm_after.'),
    (r'\.attn\.qkv\.', '.attention.attention.{}.'),
    (r'\.attn\.proj\.', '.attention.output.dense.'),
    (r'\.mlp\.fc1\.', '.intermediate.dense.'),
    (r'\.mlp\.fc2\.', '.output.dense.'),
]


def export(path, output_dir, transformers=False):
    """Write a checkpoint of pre-training, fine-tuning or a linear probe as a folder.

    Files of an earlier export are replaced or removed, once all new ones are written.

    Returns lines to print. Raises InputError if path is no such checkpoint, or output_dir cannot be
    written.
    """
    file = weights.read(path)
    settings = weights.settings_of(None, file)
    state = fold_batch_norm(file['model'])
    num_classes = len(state.get('head.weight', ()))
    if 'input_size' not in settings.args or transformers and num_classes:
        what = 'pre-training' if transformers else 'pre-training or a classifier'
        raise InputError(f'{path}: not of {what} of this project')
    with as_input_error(path):
        model = create_encoder(settings.sizes, settings.global_pool or 'token')
    model.reset_classifier(num_classes)
    weights.load(model, file | {'model': state}, complete=True)
    make = files_for_transformers if transformers else files_for_timm
    contents, words = make(file, settings, model)
    contents['README.md'] = model_card(file, settings, model, words)
    with as_input_error(output_dir):
        write_files(contents, output_dir)
    lines = [f'In {output_dir}: {", ".join(contents)}; README.md has the code that loads them']
    return '\n'.join([*lines, f'To the hub: hf upload USER/NAME {output_dir}', *settings.notes])


def fold_batch_norm(state):
    """A linear probe's BatchNorm, eps 1e-6 and without parameters, is part of the linear layer."""
    if 'bn.running_var' not in state:
        return state
    scale = (state['bn.running_var'].double() + 1e-6).rsqrt()
    weight = state['head.weight'].double() * scale  # (K, D)
    bias = state['head.bias'].double() - weight @ state['bn.running_mean'].double()
    rest = {name: tensor for name, tensor in state.items() if not name.startswith('bn.')}
    return {**rest, 'head.weight': weight.float(), 'head.bias': bias.float()}


def write_files(contents, folder):
    """Write {name: bytes} into a folder: first all beside what is there, then in its place."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as new:
        for number, content in enumerate(contents.values()):
            Path(new, str(number)).write_bytes(content)
        for name in ('pretraining/model.safetensors', 'preprocessor_config.json'):
            Path(folder, name).unlink(missing_ok=True)  # of an earlier export
        for number, name in enumerate(contents):
            Path(folder, name).parent.mkdir(exist_ok=True)
            os.replace(Path(new, str(number)), Path(folder, name))


def to_safetensors(state, **records):
    """The bytes of a file; records: what a checkpoint holds beside its tensors."""
    records = {key: json.dumps(value) for key, value in records.items()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    return save(tensors, {'format': 'pt', **records})


# --- The files of each library, and words for the card --------------------------------------------


def files_for_timm(file, settings, model):
    """({name: bytes} of a folder for timm.create_model, words)."""
    sizes, padded = settings.sizes, settings.args.get('resize_mode') == 'pad'
    config = {  # timm/models/_hub.py
        'architecture': f'vit_{TIMM.get(sizes["embed_dim"], "base_patch16")}_224',
        'num_classes': model.num_classes,
        'num_features': sizes['embed_dim'],
        'label_names': settings.classes,
        'background': settings.args.get('background', (255, 255, 255)),
        'model_args': {key: sizes[key] for key in ENCODER} | {'global_pool': model.global_pool},
        'pretrained_cfg': {
            'input_size': [sizes['in_chans'], *sizes['img_size']],
            'fixed_input_size': True,
            'interpolation': 'bicubic',
            'crop_pct': 1.0 if padded else settings.crop_pct,
            'crop_mode': 'border' if padded else 'center',
            'mean': settings.mean,
            'std': settings.std,
            'num_classes': model.num_classes,
            'first_conv': 'patch_embed.proj' if sizes['in_chans'] == 3 else None,  # timm adapts it
            'classifier': 'head',
        },
    }
    records = {key: getattr(settings, key) for key in ('sizes', 'mean', 'std', 'classes')}
    records['args'] = {key: value for key, value in settings.args.items() if key in KEPT_FLAGS}
    contents = {
        'config.json': json.dumps(config, indent=2).encode(),
        'model.safetensors': to_safetensors(model.state_dict(), **records),
    }
    note = 'The names of the classes are `model.pretrained_cfg["label_names"]`.'
    if 'decoder_embed.weight' in file['model']:  # apart: timm takes what lies beside config.json
        contents['pretraining/model.safetensors'] = to_safetensors(file['model'], **records)
        note = 'The whole model, with its decoder, lies in pretraining/.'
    return contents, {'library': 'timm', 'note': note}


def files_for_transformers(file, settings, model):
    """({name: bytes} of a folder for from_pretrained, words): ViTMAEForPreTraining or ViTModel."""
    sizes, state = settings.sizes, model.state_dict()
    height, width = sizes['img_size']
    config = {
        'model_type': 'vit',
        'image_size': height if height == width else [height, width],
        'patch_size': sizes['patch_size'],
        'num_channels': sizes['in_chans'],
        'hidden_size': sizes['embed_dim'],
        'num_hidden_layers': sizes['depth'],
        'num_attention_heads': sizes['num_heads'],
        'intermediate_size': int(sizes['embed_dim'] * sizes['mlp_ratio']),
        'layer_norm_eps': 1e-6,
    }
    words = {
        'library': 'transformers',
        'name': 'ViTModel',
        'options': ', add_pooling_layer=False',
        'output': 'last_hidden_state (1, 1 + patches, width), the class token first',
        'note': 'This is the encoder alone: the fusion and the decoder are dropped.',
    }
    has_decoder = 'decoder_embed.weight' in file['model']
    if has_decoder and len(sizes['fuse_layers']) == 1 and height == width:  # ViTMAE: squares only
        state = file['model']
        words |= {'name': 'ViTMAEForPreTraining', 'options': '', 'output': 'loss, logits, mask'}
        words['note'] = 'This is the whole model, with its decoder.'
        config |= {
            'model_type': 'vit_mae',
            'decoder_hidden_size': sizes['decoder_embed_dim'],
            'decoder_num_hidden_layers': sizes['decoder_depth'],
            'decoder_num_attention_heads': sizes['decoder_num_heads'],
            'decoder_intermediate_size': int(sizes['decoder_embed_dim'] * sizes['mlp_ratio']),
            'norm_pix_loss': settings.args.get('norm_pix_loss', True),
            'mask_ratio': settings.args.get('mask_ratio', 0.75),
        }
    config['architectures'] = [words['name']]
    processor = {
        'image_processor_type': 'BitImageProcessor',  # the shorter side, then the centre
        'size': {'shortest_edge': int(max(height, width) / settings.crop_pct)},
        'crop_size': {'height': height, 'width': width},
        'resample': 3,  # bicubic
        'do_convert_rgb': False,
        'do_rescale': sizes['in_chans'] in (1, 3),  # image files; others are in 0..1
        'image_mean': settings.mean,
        'image_std': settings.std,
    }
    contents = {
        'config.json': json.dumps(config, indent=2).encode(),
        'preprocessor_config.json': json.dumps(processor, indent=2).encode(),
        'model.safetensors': to_safetensors(dict(rename(state))),
    }
    return contents, words


def rename(state):
    """Yield (name in transformers' files, tensor); qkv as three."""
    for name, tensor in state.items():
        for pattern, new in HUB_NAMES:
            name = re.sub(pattern, new, name)
        parts = ('query', 'key', 'value') if '{}' in name else ('',)
        for part, chunk in zip(parts, tensor.chunk(len(parts))):
            yield name.format(part), chunk


def model_card(file, settings, model, words):
    """README.md: how to load the weights, and what the run recorded of them."""
    sizes, has_decoder = settings.sizes, 'decoder_embed.weight' in file['model']
    rows = {key: sizes[key] for key in (sizes if has_decoder else ENCODER)}
    rows |= {key: file[key] for key in ('epoch', 'step', 'num_images', 'best_top1') if key in file}
    rows |= {'mean': settings.mean, 'std': settings.std}
    rows |= {key: settings.args[key] for key in KEPT_FLAGS if settings.args.get(key) is not None}
    card = Template(Path(__file__).with_name('model_card.md').read_text())
    background = tuple(settings.args.get('background', (255, 255, 255)))
    fused = has_decoder and len(sizes['fuse_layers'])
    known = {'num_classes': model.num_classes, 'fused': fused, 'in_chans': sizes['in_chans']}
    return card.render(words, rows=rows, background=background, **known).encode()


def get_parser():
    parser = ArgumentParser('Export a checkpoint for timm, transformers and the Hugging Face hub')
    parser.add_argument('checkpoint', help='of pre-training, fine-tuning or a linear probe')
    parser.add_argument('dir', metavar='DIR', help='the folder to write')
    parser.add_argument(
        '--transformers',
        action='store_true',
        help="of pre-training: for transformers' ViTMAEForPreTraining or ViTModel",
    )
    return parser


def main(args):
    print(export(args.checkpoint, args.dir, args.transformers))


if __name__ == '__main__':
    run_job(main, get_parser())
