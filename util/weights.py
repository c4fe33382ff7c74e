"""Weights in: files of any known origin tell how to build a model, and are loaded into it.

A file is read and renamed by util/formats.py, checked and recognised by util/recognise.py, fitted to a model by
util/loading.py. The flags of a job follow what --init_from tells: settle.
"""

import argparse
from dataclasses import dataclass, field, replace

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models_mff import ENCODER, MODELS, MaskedAutoencoderMFF, create_encoder, default_fuse_layers, model_sizes
from util import variants
from util.errors import InputError, as_input_error
from util.formats import convert_state_dict, read_file
from util.loading import load
from util.recognise import DECODER, Weights, check_tensors, find_dims, find_grid, find_records, recognise, without_none

# --- A file -------------------------------------------------------------------------------------------------------


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
    is_segmenter = 'classifier.1.weight' in state
    names = {name.removeprefix('encoder.') if is_segmenter else name for name in state}
    if not names.issuperset(['patch_embed.proj.weight', 'cls_token', 'pos_embed', 'blocks.0.attn.qkv.weight']):
        first = ', '.join(list(state)[:3]) or 'nothing'
        raise InputError(f'{path}: not the weights of a known ViT (it holds {first}, ...)')
    with as_input_error(path):
        check_tensors(state)
        dims, records = find_dims(state), find_records(content)
        return Weights(path, content, state, recognise(content, state), dims, records)


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
    segmenter: dict = field(default_factory=dict)  # the lengths of its head ('channels' and so on), if it is one
    known: frozenset = frozenset()  # the sizes, 'mean' and 'std' that the file records or shows; others are the usual

    @property
    def crop_pct(self):
        """Share of a test image that is seen: that of the run, or the usual."""
        return getattr(self.flags, 'crop_pct', None) or 0.875


def settings_of(weights):
    """The Settings of a checkpoint of any known origin, as read gives it.

    Widths, depths, patch size and channels are those of its tensors. The rest is what it records, or else the usual:
    a square image; the heads of the size in MODELS of that width, or one per 64 channels; ImageNet's mean and std for 3
    channels, 0.5 for others. fuse_layers is None where levels are fused, but it is not known which. In flags,
    norm_pix_loss is None and mask_ratio 0.75 where the file does not record them.

    Raises:
        InputError: if what it records contradicts its tensors.
    """
    dims, records, content = weights.dims, weights.records, weights.content
    recorded = {key: records[key] for key in ENCODER + DECODER if key in records}
    shown = shown_sizes(weights)
    sizes = usual_sizes(weights) | recorded | shown  # tensors win over records, records over what is usual
    mean, std = (records.get(key, default_statistics(dims['in_chans'])[key]) for key in ('mean', 'std'))
    if not len(mean) == len(std) == dims['in_chans']:
        raise InputError(f'{weights.path}: it records mean {mean} and std {std} for {dims["in_chans"]} channels')
    flags, classes = argparse.Namespace(norm_pix_loss=None, mask_ratio=0.75), None
    if weights.is_ours:
        vars(flags).update(without_none(content['args']))
        classes = content.get('classes')
    for name, (options, _) in variants.CHOICES.items():
        if getattr(flags, name, None) not in (None, *options):
            raise InputError(f'{weights.path}: it records a {name} that is none of {", ".join(options)}')
    if classes is not None and (not isinstance(classes, list) or not all(isinstance(name, str) for name in classes)):
        raise InputError(f'{weights.path}: its classes are not a list of names')
    if classes and len(classes) != dims.get('classes', len(classes)):
        raise InputError(f'{weights.path}: its head has {dims["classes"]} classes, but it names {len(classes)}')
    known = records.keys() | shown.keys()
    if fused(weights):
        known = known | {'fuse_layers'}
    segmenter = dims if weights.is_segmenter else {}
    return Settings(sizes, mean, std, flags=flags, classes=classes, segmenter=segmenter, known=frozenset(known))


def fused(weights):
    return any(name.startswith('fuse_') for name in weights.state)


def shown_sizes(weights):
    """The sizes that the shapes of a file's tensors show."""
    dims = weights.dims
    names = ENCODER + (DECODER if 'decoder_embed_dim' in dims else ())
    sizes = {name: dims[name] for name in names if name in dims}
    sizes['img_size'] = tuple(side * dims['patch_size'] for side in find_grid(weights))
    if 'mlp_dim' in dims:
        sizes['mlp_ratio'] = dims['mlp_dim'] / dims['embed_dim']
    return sizes


def usual_sizes(weights):
    """Those of the size in MODELS that has the file's width, or else the base model's."""
    width, depth, decoder = (weights.dims.get(key) for key in ('embed_dim', 'depth', 'decoder_embed_dim'))
    sizes = MODELS['vit_base_patch16'] | {'num_heads': max(1, width // 64)}
    sizes = next((model for model in MODELS.values() if model['embed_dim'] == width), sizes)
    choices = fuse_layer_choices(width, depth)
    if fused(weights):
        choices = [layers for layers in choices if len(layers) == weights.dims.get('fused')] or [None]
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


def settle(args):
    """What a job builds: its flags, else what --init_from tells, else the size of --model, by default vit_base_patch16.

    args: flags of a job (add_model_arguments and --init_from), None where not given; unchanged. --model sets all sizes
    but image size and channels, unless the file records a model of the same name.

    Returns:
        Settings, whose notes name each flag that differs from the checkpoint.

    Raises:
        InputError: as read and settings_of. Whether the sizes fit together, the model checks.
    """
    file = settings_of(read(args.init_from)) if args.init_from else None
    given = without_none({key: getattr(args, FLAGS.get(key, key), None) for key in ENCODER + DECODER})
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    base = base_sizes(args.model, file)
    sizes = base | given
    if sizes['depth'] != base['depth'] and 'fuse_layers' not in given:
        sizes['fuse_layers'] = default_fuse_layers(sizes['depth'])
    pretraining = hasattr(args, 'fuse_layers')
    if pretraining and sizes['fuse_layers'] is None:
        raise InputError(f'{args.init_from}: it does not record which blocks it fuses; give them by --fuse_layers')
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
    if not args.model and 'num_heads' not in file.known | given.keys():
        notes.append(f'num_heads {sizes["num_heads"]} is assumed, as the file does not tell')
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
        InputError: as read, and if anything else is missing, too much, or of another shape.
    """
    return load(model, read(path), complete)


def load_model(path):
    """(MaskedAutoencoderMFF in eval mode, Settings) of a pre-training checkpoint of any known origin.

    Files that do not record how their pixels were predicted count as standardised in each patch; flags keep the None.
    Raises InputError as read, settings_of and load_weights do, and if the file has no decoder.
    """
    weights = read(path)
    settings = settings_of(weights)
    if settings.sizes['fuse_layers'] is None:
        raise InputError(f'{path}: {weights.origin}; it does not record which blocks it fuses')
    with as_input_error():
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
