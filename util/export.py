"""Weights out: a folder that timm.create_model loads, and that can be pushed to the Hugging Face hub as it is.

timm reads such a folder ('local-dir:') from 1.0.26, from the hub ('hf-hub:') also before.
"""

import argparse
import inspect
import json
import os

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file

from models_mff import MODELS
from util import checkpoint, design_choices, transforms
from util.args import InputError
from util.weights import convert_state_dict

# timm's architecture by encoder width; model_args in config.json say all sizes, so that any other size works too.
ARCHITECTURES = {
    192: 'tiny_patch16',
    384: 'small_patch16',
    768: 'base_patch16',
    1024: 'large_patch16',
    1280: 'huge_patch14',
}

# Flags of a run that its weights need; others, such as paths, stay at home.
KEPT_FLAGS = [
    *('model', 'input_size', 'in_chans', 'mean', 'std', 'fuse_layers', 'norm_pix_loss', 'mask_ratio', 'crop', 'epochs'),
    *design_choices.DEFAULTS,
]

CITATION = """@inproceedings{liu2023improving,
  title     = {Improving Pixel-based MIM by Reducing Wasted Modeling Capability},
  author    = {Liu, Yuan and Zhang, Songyang and Chen, Jiacheng and Yu, Zhaohui and Chen, Kai and Lin, Dahua},
  booktitle = {ICCV},
  year      = {2023}
}"""


def export(path, output_dir):
    """Write a pre-training or fine-tuning checkpoint of this project as a folder for timm.

    model.safetensors and config.json: the encoder (class token after the pre-training norm, no head), or the
    classifier with its class names. pretraining/model.safetensors: the whole model, for
    load_weights. README.md: a model card.

    Returns:
        A few lines for people: what was written and how to load it.

    Raises:
        InputError: if path is not such a checkpoint, or output_dir cannot be written.
    """
    state = checkpoint.read_file(path)
    flags = state.get('args') if isinstance(state, dict) else None
    if not isinstance(flags, dict) or not isinstance(state.get('model'), dict) or 'model' not in flags:
        raise InputError(f'{path}: not a checkpoint of this project; only these can be exported')
    flags, whole = {'in_chans': 3, 'mean': None, 'std': None, **flags}, convert_state_dict(state)
    name = flags['model'].removeprefix('mff_')
    if f'mff_{name}' not in MODELS:
        raise InputError(f'{path}: of an unknown model, {flags["model"]}')
    encoder = fold_batch_norm(
        {key: value for key, value in whole.items() if not key.startswith(('decoder_', 'mask_token', 'fuse_'))}
    )
    config = make_config(name, flags, encoder, state.get('classes'))
    try:
        model = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
        model.load_state_dict(encoder)
    except RuntimeError as error:
        raise InputError(f'{path}: its weights do not fit {flags["model"]}: {" ".join(str(error).split())}') from None

    files = ['model.safetensors', 'config.json', 'README.md']
    pretraining = 'decoder_embed.weight' in whole
    metadata = {'format': 'pt', 'args': json.dumps({flag: flags.get(flag) for flag in KEPT_FLAGS})}
    try:
        os.makedirs(output_dir, exist_ok=True)
        save_tensors(encoder, os.path.join(output_dir, files[0]), metadata)
        if pretraining:
            files.append('pretraining/model.safetensors')  # apart: timm takes the only one beside config.json
            os.makedirs(os.path.join(output_dir, 'pretraining'), exist_ok=True)
            save_tensors(whole, os.path.join(output_dir, files[-1]), metadata)
        elif os.path.exists(os.path.join(output_dir, 'pretraining/model.safetensors')):  # of an earlier export
            os.remove(os.path.join(output_dir, 'pretraining/model.safetensors'))
        for file_name, text in zip(files[1:], [json.dumps(config, indent=2), model_card(name, flags, state, config)]):
            with open(os.path.join(output_dir, file_name), 'w', encoding='utf-8') as file:
                file.write(text + '\n')
    except (OSError, SafetensorError) as error:
        raise InputError(f'{output_dir}: cannot write there ({getattr(error, "strerror", None) or error})') from None
    what = f'the classifier of {config["num_classes"]} classes' if config['num_classes'] else 'the encoder'
    return (
        f'In {output_dir}: {", ".join(files)}\n'
        f"  {what} in timm (from 1.0.26):  timm.create_model('local-dir:{output_dir}', pretrained=True)\n"
        f'  to the hub:  hf upload USER/NAME {output_dir}'
    )


def save_tensors(tensors, path, metadata):
    """Write a .safetensors file, whole or not at all."""
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path + '.tmp', metadata)
    os.replace(path + '.tmp', path)


def fold_batch_norm(state):
    """A linear probe's BatchNorm, eps 1e-6 and without parameters, is part of the linear layer behind it."""
    if 'bn.running_var' not in state:
        return state
    scale = (state['bn.running_var'].double() + 1e-6).rsqrt()
    weight = state['head.weight'].double() * scale  # (classes, D)
    bias = state['head.bias'].double() - weight @ state['bn.running_mean'].double()
    rest = {key: value for key, value in state.items() if not key.startswith('bn.')}
    return {**rest, 'head.weight': weight.float(), 'head.bias': bias.float()}


def make_config(name, flags, encoder, classes):
    """config.json, as timm reads it (timm/models/_hub.py)."""
    sizes = defaults(name)
    img_size = flags.get('input_size') or [sizes['img_size']] * 2
    num_classes = len(encoder['head.weight']) if 'head.weight' in encoder else 0
    if classes and len(classes) != num_classes:
        raise InputError(f'its head has {num_classes} classes, but it names {len(classes)}')
    mean, std = transforms.pixel_statistics(argparse.Namespace(**flags))
    in_chans = flags['in_chans']
    return {
        'architecture': f'vit_{ARCHITECTURES[sizes["embed_dim"]]}_224',
        'num_classes': num_classes,
        'num_features': sizes['embed_dim'],
        **({'label_names': list(classes)} if classes else {}),
        'model_args': {
            'img_size': list(img_size),
            'in_chans': in_chans,
            **{key: sizes[key] for key in ('patch_size', 'embed_dim', 'depth', 'num_heads')},
            'global_pool': 'avg' if 'fc_norm.weight' in encoder else 'token',
        },
        'pretrained_cfg': {
            'input_size': [in_chans, *img_size],
            'fixed_input_size': True,
            'interpolation': 'bicubic',
            'crop_pct': flags.get('crop_pct') or 0.875,
            'mean': list(mean),
            'std': list(std),
            'num_classes': num_classes,
            'first_conv': 'patch_embed.proj' if in_chans == 3 else None,  # older timm would adapt it once more
            'classifier': 'head',
        },
    }


def defaults(name):
    """What a size of MODELS is made with, where a flag does not change it."""
    return {key: parameter.default for key, parameter in inspect.signature(MODELS[f'mff_{name}']).parameters.items()}


def model_card(name, flags, state, config):
    """README.md: what the weights are, and how to load them."""
    num_classes, pretraining = config['num_classes'], 'decoder_embed.weight' in state['model']
    channels, height, width = config['pretrained_cfg']['input_size']
    fused = flags.get('fuse_layers') or defaults(name)['fuse_layers']
    if not pretraining:
        tags, title = ['timm'], f'{"Classifier" if num_classes else "Encoder"} {name}'
        method = 'Trained with a PyTorch implementation of MFF, which is cited below.'
    elif len(fused) > 1:
        tags = ['timm', 'masked-image-modeling', 'mff']
        title = f'Encoder {name}, pre-trained with multi-level feature fusion (MFF)'
        method = 'Method: [arXiv 2308.00261](https://arxiv.org/abs/2308.00261), cited below.'
    else:
        tags = ['timm', 'masked-image-modeling']
        title = f'Encoder {name}, pre-trained as a masked autoencoder (MAE)'
        method = 'Method: [arXiv 2111.06377](https://arxiv.org/abs/2111.06377), without the fusion of MFF, cited below.'
    rows = {
        'architecture': f'{name}, {config["num_features"]} wide, {config["model_args"]["depth"]} blocks',
        'input': f'{channels} x {height} x {width}, mean {flatten(config["pretrained_cfg"]["mean"])}, '
        f'std {flatten(config["pretrained_cfg"]["std"])}',
        'trained': f'{state["epoch"]} epochs, {state["step"]} steps' if 'step' in state else None,
        'classes': num_classes or None,
        'fused blocks': flatten(fused) if pretraining else None,
        'mask ratio': flags.get('mask_ratio'),
        'crop': {'simple': "simple, MFF's", 'rrc': "random resized, MAE's"}.get(flags.get('crop')),
        'pixels predicted': {True: 'standardised in each patch', False: 'as they are'}.get(flags.get('norm_pix_loss')),
        **{
            choice: flags.get(choice) for choice, usual in design_choices.DEFAULTS.items() if flags.get(choice) != usual
        },
        'training images': state.get('num_images'),
        'top-1, validation images': f'{state["best_top1"]:.2f} %' if state.get('best_top1', -1) >= 0 else None,
    }
    output = f'logits (1, {num_classes})' if num_classes else f'class token (1, {config["num_features"]})'
    lines = [
        '---',
        'license: unknown  # of the weights: choose, with the data in mind',
        'library_name: timm',
        f'pipeline_tag: {"image-classification" if num_classes else "image-feature-extraction"}',
        f'tags: [{", ".join(tags)}]',
        '---',
        f'# {title}',
        '',
        method,
        '',
        '| | |',
        '|---|---|',
        *(f'| {key} | {value} |' for key, value in rows.items() if value is not None),
        '',
        '```python',
        'import timm',
        '',
        "model = timm.create_model('hf-hub:USER/NAME', pretrained=True).eval()   # or 'local-dir:FOLDER'",
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
        f'output = model(transform(image).unsqueeze(0))   # {output}',
        '```',
    ]
    if pretraining:
        lines += [
            '',
            '`pretraining/model.safetensors` is the whole model with its decoder, for continued pre-training.',
        ]
    lines += [
        *('', '## To fill in', ''),
        *([] if pretraining else ['- The weights that it started from, and how these were pre-trained.']),
        '- Training data: its name, source and licence, and who or what it leaves out.',
        '- Intended use, and uses that are out of scope.',
        '- Results on data of your own, with the number of runs; known failures and biases.',
        *('', '## Citation', '', '```bibtex', CITATION, '```'),
    ]
    return '\n'.join(lines)


def flatten(values):
    return ', '.join(f'{value:.4g}' for value in values)
