"""Weights out: a folder that timm.create_model loads, and that can be pushed to the Hugging Face hub as it is.

    python -m util.export OUTPUT_DIR/checkpoint-last.pth DIR

timm reads such a folder from a disk ('local-dir:') and from the hub ('hf-hub:').
"""

import contextlib
import json
import os

import timm
from safetensors.torch import save

from util import variants, weights
from util.args import ArgumentParser, run_job
from util.errors import InputError
from util.loading import part_of

# timm's architecture by encoder width, or else base: model_args in config.json hold all sizes, so any works.
ARCHITECTURES = {192: 'tiny_patch16', 384: 'small_patch16', 1024: 'large_patch16', 1280: 'huge_patch14'}

# Flags of the run that come with its weights, besides sizes, mean and std; others, such as paths, do not.
KEPT_FLAGS = ['model', 'input_size', 'norm_pix_loss', 'mask_ratio', 'crop', 'crop_pct', 'epochs', *variants.CHOICES]

MODEL_CARD = """---
license: unknown  # of the weights: choose, with the data in mind
library_name: timm
pipeline_tag: {task}
tags: [{tags}]
---
# {title}

{method}, cited below.

| | |
|---|---|
{table}

```python
import timm

model = timm.create_model('hf-hub:USER/NAME', pretrained=True).eval()   # or 'local-dir:FOLDER'
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
output = model(transform(image).unsqueeze(0))   # {output}
```

{pretraining}

## To fill in

- Training data: its name, source and licence, and who or what it leaves out.
- Intended use, and uses that are out of scope.
- Results on data of your own, with the number of runs; known failures and biases.

## Citation

```bibtex
@inproceedings{{liu2023improving,
  title     = {{Improving Pixel-based MIM by Reducing Wasted Modeling Capability}},
  author    = {{Liu, Yuan and Zhang, Songyang and Chen, Jiacheng and Yu, Zhaohui and Chen, Kai and Lin, Dahua}},
  booktitle = {{ICCV}},
  year      = {{2023}}
}}
```
"""


def export(path, output_dir):
    """Write a checkpoint of pre-training, fine-tuning or a linear probe of this project as a folder for timm.

    model.safetensors and config.json: the encoder (class token after the pre-training norm, no head), or the classifier
    with the names of its classes. pretraining/model.safetensors: the whole model, for --init_from. README.md: a model
    card.

    Returns:
        A few lines to print: what was written and how to load it.

    Raises:
        InputError: if path is no such checkpoint, or output_dir cannot be written.
    """
    file = weights.read(path)
    settings = weights.settings_of(file) if file.is_ours else None
    if settings is None or file.is_segmenter or settings.sizes['fuse_layers'] is None:
        raise InputError(f'{path}: not a checkpoint of pre-training or a classifier of this project, as export needs')
    encoder = fold_batch_norm(
        {name: tensor for name, tensor in file.state.items() if part_of(name) not in ('decoder', 'fusion')}
    )
    config = make_config(settings, encoder)
    try:
        model = timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
        model.load_state_dict(encoder)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'{path}: its weights do not fit its sizes: {" ".join(str(error).split())}') from None

    metadata = {
        'args': {flag: getattr(settings.flags, flag, None) for flag in KEPT_FLAGS},
        'sizes': settings.sizes,
        'mean': settings.mean,
        'std': settings.std,
        'classes': settings.classes,
    }
    metadata = {'format': 'pt', **{key: json.dumps(value, default=str) for key, value in metadata.items()}}
    contents = {
        'model.safetensors': to_bytes(encoder, metadata),
        'config.json': json.dumps(config, indent=2).encode() + b'\n',
        'README.md': model_card(file, settings, config).encode(),
    }
    if 'decoder_embed.weight' in file.state:  # apart: timm takes the only one beside config.json
        contents['pretraining/model.safetensors'] = to_bytes(file.state, metadata)
    try:
        write_files(contents, output_dir)
    except OSError as error:
        raise InputError(f'{output_dir}: cannot write there ({error.strerror or error})') from None
    what = f'the classifier of {config["num_classes"]} classes' if config['num_classes'] else 'the encoder'
    return (
        f'In {output_dir}: {", ".join(contents)}\n'
        f"  {what} in timm:  timm.create_model('local-dir:{output_dir}', pretrained=True)\n"
        f'  to the hub:  hf upload USER/NAME {output_dir}'
    )


def to_bytes(tensors, metadata):
    return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, metadata)


def write_files(contents, folder):
    """Write {name: bytes} into a folder; what an earlier export of pre-training left there goes."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, 'pretraining', 'model.safetensors'))
    for name, content in contents.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(content)


def fold_batch_norm(state):
    """A linear probe's BatchNorm, eps 1e-6 and without parameters, is part of the linear layer behind it."""
    if 'bn.running_var' not in state:
        return state
    scale = (state['bn.running_var'].double() + 1e-6).rsqrt()
    weight = state['head.weight'].double() * scale  # (classes, D)
    bias = state['head.bias'].double() - weight @ state['bn.running_mean'].double()
    rest = {key: value for key, value in state.items() if not key.startswith('bn.')}
    return {**rest, 'head.weight': weight.float(), 'head.bias': bias.float()}


def make_config(settings, encoder):
    """config.json, as timm reads it (timm/models/_hub.py)."""
    sizes = settings.sizes
    num_classes = len(encoder['head.weight']) if 'head.weight' in encoder else 0
    names = {'label_names': settings.classes} if settings.classes else {}
    return {
        'architecture': f'vit_{ARCHITECTURES.get(sizes["embed_dim"], "base_patch16")}_224',
        'num_classes': num_classes,
        'num_features': sizes['embed_dim'],
        **names,
        'model_args': {
            **{key: sizes[key] for key in weights.ENCODER},
            'global_pool': 'avg' if 'fc_norm.weight' in encoder else 'token',
        },
        'pretrained_cfg': {
            'input_size': [sizes['in_chans'], *sizes['img_size']],
            'fixed_input_size': True,
            'interpolation': 'bicubic',
            'crop_pct': settings.crop_pct,
            'mean': settings.mean,
            'std': settings.std,
            'num_classes': num_classes,
            'first_conv': 'patch_embed.proj' if sizes['in_chans'] == 3 else None,  # timm adapts it to other channels
            'classifier': 'head',
        },
    }


def model_card(file, settings, config):
    """README.md: what the weights are, and how to load them."""
    sizes, flags, num_classes = settings.sizes, settings.flags, config['num_classes']
    name = str(getattr(flags, 'model', 'ViT')).removeprefix('mff_')
    is_pretraining = 'decoder_embed.weight' in file.state
    if not is_pretraining:
        tags, title = 'timm', f'{"Classifier" if num_classes else "Encoder"} {name}'
        method = 'Trained with a PyTorch implementation of MFF, which is'
        pretraining = 'To add: the weights that it started from, and how these were pre-trained.'
    else:
        tags, title = 'timm, masked-image-modeling', f'Encoder {name}, pre-trained as a masked autoencoder (MAE)'
        method = 'Method: [arXiv 2111.06377](https://arxiv.org/abs/2111.06377), without the fusion of MFF'
        pretraining = '`pretraining/model.safetensors` is the whole model with its decoder, for continued pre-training.'
    if is_pretraining and len(sizes['fuse_layers']) > 1:
        tags, title = f'{tags}, mff', f'Encoder {name}, pre-trained with multi-level feature fusion (MFF)'
        method = 'Method: [arXiv 2308.00261](https://arxiv.org/abs/2308.00261)'
    channels, height, width = config['pretrained_cfg']['input_size']
    step, epoch, top1 = (file.content.get(key) for key in ('step', 'epoch', 'best_top1'))
    pixels = {'True': 'standardised in each patch', 'False': 'as they are'}
    rows = {
        'architecture': f'{name}, {sizes["embed_dim"]} wide, {sizes["depth"]} blocks, patch {sizes["patch_size"]}',
        'input': f'{channels} x {height} x {width}, mean {flatten(settings.mean)}, std {flatten(settings.std)}',
        'trained': None if step is None else f'{epoch} epochs, {step} steps',
        'classes': num_classes or None,
        'training images': file.content.get('num_images'),
        'top-1, validation images': f'{top1:.2f} %' if isinstance(top1, float) and top1 >= 0 else None,
    }
    if is_pretraining:
        rows |= {
            'fused blocks': flatten(sizes['fuse_layers']),
            'mask ratio': flags.mask_ratio,
            'crop': {'simple': "simple, MFF's", 'rrc': "random resized, MAE's"}.get(str(getattr(flags, 'crop', None))),
            'pixels predicted': pixels.get(str(flags.norm_pix_loss)),  # not known of every file
            **({} if variants.is_default(flags) else variants.chosen(flags)),
        }
    return MODEL_CARD.format(
        task='image-classification' if num_classes else 'image-feature-extraction',
        tags=tags,
        title=title,
        method=method,
        table='\n'.join(f'| {key} | {value} |' for key, value in rows.items() if value is not None),
        output=f'logits (1, {num_classes})' if num_classes else f'class token (1, {config["num_features"]})',
        pretraining=pretraining,
    )


def flatten(values):
    return ', '.join(f'{value:.4g}' for value in values)


def get_parser():
    parser = ArgumentParser('Export a checkpoint as a folder that timm loads and the Hugging Face hub takes')
    parser.add_argument('checkpoint', help='of pre-training, fine-tuning or a linear probe')
    parser.add_argument('dir', metavar='DIR', help='for model.safetensors, config.json, README.md')
    return parser


def main(args):
    print(export(args.checkpoint, args.dir))


if __name__ == '__main__':
    run_job(main, get_parser())
