"""Semantic segmentation: every number against mmsegmentation 1.2.2; the job as users run it."""

import random
import re
import shutil
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT, Processes, Result, same_weights
from PIL import Image
from torch.nn.functional import interpolate

import main_segment
from models_mff import ENCODER, create_encoder, model_sizes
from models_upernet import UperNet, default_levels
from util import data, optim, segmentation, transforms, weights
from util.args import run_job
from util.errors import InputError
from util.images import read_image
from util.segmentation import IGNORE, PADDING
from util.shapes import Shapes

REFERENCE = torch.load(ROOT / 'tests/data/seg_tiny.pt', weights_only=True)
CONFIG, IMGS, LABELS = REFERENCE['config'], REFERENCE['imgs'], REFERENCE['labels']
PIPELINE = REFERENCE['pipeline']
SIZES = {'img_size': 'img', 'patch_size': 'patch', 'embed_dim': 'dim', 'num_heads': 'heads'}
SIZES |= {name: name for name in ('depth', 'channels', 'aux_channels')}
SIZES |= {'levels': 'out', 'num_classes': 'classes'}


def build():
    """The reference's model with its weights, and its dropout off."""
    model = UperNet(**{name: CONFIG[theirs] for name, theirs in SIZES.items()})
    model.load_state_dict(weights.convert_state_dict(REFERENCE['state']))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return model


def assert_equal(ours, theirs, tolerance=1e-5, scale=None):
    """To a share of the largest value."""
    scale = theirs.abs().max() if scale is None else scale
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= tolerance * scale


# --- The model ------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_is_the_references():
    model, expected = build().eval(), REFERENCE['eval']
    levels = model.encoder.forward_intermediates(IMGS, model.levels, intermediates_only=True)
    pyramid = [scale(level) for scale, level in zip(model.neck, levels)]
    theirs = [*expected['levels'], *expected['pyramid']]
    for ours, tensor in zip([*levels, *pyramid], theirs, strict=True):
        assert_equal(ours, tensor)
    assert_equal(model(IMGS, resize=False), expected['logits'])
    assert_equal(model(IMGS), expected['full'])
    assert_equal(model.aux_head(levels[2]), expected['aux_logits'])


def test_losses_and_gradients_are_the_references():
    model, expected = build().train(), REFERENCE['train']
    logits, aux_logits = model(IMGS, resize=False)
    assert_equal(logits, expected['logits'])
    assert_equal(aux_logits, expected['aux_logits'])
    assert_equal(segmentation.pixel_loss(logits, LABELS), expected['loss_decode'])
    loss = segmentation.segmentation_loss(logits, aux_logits, LABELS)
    assert_equal(loss, expected['loss'])
    loss.backward()
    grads = weights.convert_state_dict(expected['grads'])
    largest = max(grad.abs().max() for grad in grads.values())
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, grads[name], scale=largest)
    theirs = weights.convert_state_dict(REFERENCE['state'] | expected['buffers'])
    for name, buffer in model.named_buffers():
        if '.running_' in name:
            assert_equal(buffer, theirs[name])


@pytest.mark.parametrize('images', [1, 2, 100])
def test_loss_in_pieces_is_the_loss_at_once(images, monkeypatch):
    """So is its gradient; and ignored pixels count in the denominator."""
    monkeypatch.setattr(segmentation, 'CHUNK_BYTES', images * 4 * 5 * 24 * 32)
    logits = torch.randn(3, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (3, 24, 32)).masked_fill(torch.rand(3, 24, 32) < 0.3, IGNORE)
    full = interpolate(logits, (24, 32), mode='bilinear', align_corners=False).log_softmax(1)
    chosen = full.gather(1, target.clamp(max=4)[:, None])[:, 0]
    expected = -(chosen * (target != IGNORE)).mean()
    loss = segmentation.pixel_loss(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


def test_five_steps_and_their_rates_are_the_references():
    """So are the learning-rate scale and the decay of every parameter."""
    model, expected = build().double().train(), REFERENCE['steps']
    plan = SimpleNamespace(lr=expected['lr'], min_lr=0.0, decay='linear')
    plan.warmup_steps, plan.warmup_from = expected['warmup'], expected['start_factor']
    plan.total_steps = expected['end']
    groups = optim.param_groups(model, CONFIG['weight_decay'], CONFIG['layer_decay'])
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=CONFIG['betas'])
    for step, theirs in enumerate(expected['losses']):
        optim.set_learning_rate(optimizer, plan, step)
        loss = segmentation.segmentation_loss(*model(IMGS.double(), resize=False), LABELS)
        assert loss.item() == pytest.approx(theirs, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = weights.convert_state_dict(expected['final'])
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, final[name].double())
    published = REFERENCE['schedule']
    plan.lr, plan.warmup_steps, plan.total_steps = 1.0, published['warmup'], published['end']
    for step, factor in published['factor'].items():
        assert optim.learning_rate(step, plan) == pytest.approx(factor, rel=1e-9, abs=1e-12)


@torch.no_grad()
def test_starts_equal_to_the_plain_vit(tmp_path):
    """A pre-training checkpoint gives the same four levels as timm's VisionTransformer."""
    sizes = model_sizes('vit_nano_patch4', img_size=(16, 24))
    plain = create_encoder(sizes, 'token').eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    record = {'model': plain.state_dict(), 'sizes': sizes, 'args': {'input_size': [16, 24]}}
    torch.save(record, tmp_path / 'vit.pth')
    levels = default_levels(sizes['depth'])
    sizes = {name: sizes[name] for name in ENCODER}
    model = UperNet(**sizes, num_classes=3, levels=levels, channels=8).eval()
    weights.load(model, weights.read(tmp_path / 'vit.pth'))
    ours, theirs = (
        encoder.forward_intermediates(torch.ones(2, 3, 16, 24), levels, intermediates_only=True)
        for encoder in (model.encoder, plain)
    )
    for level, expected in zip(ours, theirs, strict=True):
        assert_equal(level, expected)


def test_initialisation_is_the_references():
    """Convolutions kaiming-normal by fan-out, classifiers N(0, 0.01); norms 1, biases 0."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=4, num_classes=50)
    levels, rate = (0, 1, 2, 3), CONFIG['drop_path']
    model = UperNet(**sizes, levels=levels, channels=64, drop_path=rate)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, torch.nn.Conv2d) and not name.startswith('encoder'):
            is_classifier = name in ('classifier.1', 'aux_head.2')
            fan_out = module.out_channels * module.weight[0, 0].numel()
            expected = 0.01 if is_classifier else (2 / fan_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
            assert (module.bias is not None) == is_classifier
            assert module.bias is None or (module.bias == 0).all()
    rates = []
    for block in model.encoder.blocks:
        assert (block.gamma_1 == 1).all()
        assert (block.attn.relative_position_bias_table == 0).all()
        rates.append(getattr(block.drop_path1, 'drop_prob', 0.0))
    assert rates == pytest.approx(REFERENCE['drop_path'])


# --- Whole images and scores ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize('rows', [7, 1000])
def test_sliding_window_is_the_references(rows, monkeypatch):
    expected = REFERENCE['slide']
    strip = rows * 4 * CONFIG['classes'] * expected['ori'][1]
    monkeypatch.setattr(segmentation, 'CHUNK_BYTES', strip)
    model, image, size = build().eval(), expected['img'], expected['ori']
    logits = segmentation.slide(model, image)
    assert_equal(logits, expected['logits'])
    resized = interpolate(logits, size, mode='bilinear', align_corners=False)
    assert_equal(resized, expected['ori_logits'])
    ours = segmentation.segment(model, image, size, scale=image.shape[-2:])
    assert torch.equal(ours, expected['pred'].long())


@torch.no_grad()
def test_an_image_smaller_than_the_window_is_padded():
    model, (height, width) = build().eval(), CONFIG['img']
    image = torch.randn(1, 3, height - 9, width + 5)
    whole = segmentation.slide(model, torch.nn.functional.pad(image, (0, 0, 0, 9)))
    assert torch.equal(segmentation.slide(model, image), whole[..., :-9, :])


@torch.no_grad()
def test_scales_and_flip_average_probabilities():
    """Computed here in the plainest way, for images of exactly one window at every scale."""
    model, size = build().eval(), CONFIG['img']
    image = torch.randn(1, 3, *size)
    probabilities = model(image).softmax(1) + model(image.flip(-1)).flip(-1).softmax(1)
    ours = segmentation.segment(model, image, size, scale=size, ratios=(1.0, 1.0), flip=True)
    assert torch.equal(ours, probabilities.argmax(1))


def test_scores_are_the_references():
    """The last class is neither in the masks nor predicted, so it is not in the means."""
    expected, K = REFERENCE['metric'], REFERENCE['metric']['classes'] + 1
    confusion = sum(
        segmentation.confusion_matrix(predicted, labels, K)
        for predicted, labels in zip(expected['preds'], expected['labels'])
    )
    scores = segmentation.scores(confusion, range(K))
    ious = [scores.pop(f'val_iou/{number}') / 100 for number in range(K)]
    assert ious == pytest.approx([*expected['IoU'].tolist(), np.nan], rel=1e-6, nan_ok=True)
    assert scores.pop('val_classes_in_mean') == expected['IoU'].isfinite().sum()
    means = [scores[f'val_{name}'] / 100 for name in ('miou', 'macc', 'pixel_acc')]
    assert means == pytest.approx([expected[name] for name in ('mIoU', 'mAcc', 'aAcc')], rel=1e-6)


# --- The training transform -----------------------------------------------------------------------


def test_resized_sizes_are_the_references():
    for (height, width, ratio), size in PIPELINE['resize'].items():
        assert segmentation.fitted_size((height, width), (2048, 512), ratio) == list(size)


@pytest.mark.parametrize('direction', ['down', 'up'])
def test_resized_pixels_are_the_references(direction, monkeypatch):
    """To one level: OpenCV rounds otherwise."""
    monkeypatch.setattr(random, 'random', lambda: 0.9)  # neither mirrored nor distorted
    expected, pair = PIPELINE['resized'][direction], PIPELINE['resized']
    crop = {'size': expected['labels'].shape, 'scale': expected['labels'].shape}
    image, labels = pair['image'], pair['labels']
    image, labels = segmentation.transform_pair(image, labels, **crop, ratios=(1.0, 1.0))
    assert (image.int() - expected['image'].int()).abs().max() <= 1
    assert torch.equal(labels, expected['labels'].short())


def test_crop_rule_is_the_references(monkeypatch):
    crop = PIPELINE['crop']
    for run in crop['runs']:
        boxes = [*run['checked'], run['taken']]
        corners = iter([corner for box in boxes for corner in (box[0], box[2])])
        monkeypatch.setattr(random, 'randint', lambda low, high: next(corners))  # noqa: B023
        top, left, height, width = segmentation.choose_crop(crop['labels'], crop['size'])
        assert (top, top + height, left, left + width) == tuple(run['taken'])


def test_photometric_distortions_are_the_references(monkeypatch):
    """OpenCV rounds hue and saturation in other places: 0.05 levels on average."""
    expected = PIPELINE['photometric']
    for (kind, strength), theirs in expected['out'].items():
        order = ['brightness', 'saturation', 'hue']
        order.insert(1 if (kind, strength) == ('all', 1) else 3, 'contrast')  # second, or last
        strengths = expected['all'] if kind == 'all' else {kind: strength}
        draws = iter([strengths[name] for name in order if name in strengths])
        coins = [order[1] == 'contrast', *(name in strengths for name in order)]
        coins = iter([0.1 if coin else 0.9 for coin in coins])
        monkeypatch.setattr(random, 'random', lambda: next(coins))  # noqa: B023
        for name in ('uniform', 'randint'):
            monkeypatch.setattr(random, name, lambda low, high: next(draws))  # noqa: B023
        ours = segmentation.photometric_distortion(expected['image'])
        difference = (ours.int() - theirs.int()).abs().float()
        assert difference.mean() < (0.1 if kind == 'all' else 0.05)
        assert kind not in ('brightness', 'contrast') or difference.max() == 0


def test_the_transform_is_joint_and_of_the_crop_size():
    """Where the mask is a function of the image, it still is after it; padding is marked."""
    transform = partial(segmentation.transform_pair, size=(24, 32), scale=(96, 24))
    image = torch.arange(40, dtype=torch.uint8).view(1, 1, 40).repeat(1, 30, 1) * 5  # grey columns
    for seed in range(20):
        data.seed_generators(seed)
        crop, mask = transform(image, image[0] // 5)
        assert crop.shape == (1, 24, 32) and mask.shape == (24, 32)
        inside = mask != PADDING
        difference = (crop[0][inside].int() - 5 * mask[inside].int()).abs()
        assert difference.max() <= 12  # two columns: nearest rounds down
        imgs, targets = segmentation.fill_padding(crop[None].float() + 1, mask[None])
        assert (imgs[0, 0][~inside] == 0).all() and (targets[0][~inside] == IGNORE).all()
        assert (imgs[0, 0][inside] > 0).all()
        assert torch.equal(targets[0][inside], mask[inside].long())


# --- Images and masks -----------------------------------------------------------------------------

CLASSES = ['background', *Shapes.classes]
SMALL = (
    '--model vit_nano_patch4 --input_size 16 --channels 8 --aux_channels 8 --total_steps 6 '
    '--warmup_steps 2 --lr 1e-3 --ignore_label 11 --num_workers 0 --log_every 1 --device cpu'
).split()


def save_pair(root, name, image, mask, folder='masks'):
    for kind, array in (('images', image), (folder, mask)):
        path = root / kind / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture(scope='session')
def pairs(tmp_path_factory):
    """Drawn pictures with masks of the classes 0 to 10, whose first rows are unlabelled, 11."""
    root = tmp_path_factory.mktemp('pairs')
    for split, count in (('train', 12), ('val', 5)):
        shapes = Shapes(split, (20, 18))
        for index in range(count):
            image, mask = shapes.picture_and_mask(index)
            mask[0] = 11
            save_pair(root, f'{split}/{index}', image.permute(1, 2, 0).numpy(), mask.numpy())
    (root / 'classes.txt').write_text('\n'.join(CLASSES))
    return root


def job(*arguments):
    run_job(main_segment.main, main_segment.get_parser(), list(map(str, arguments)))


def segment(data_path, output_dir, *flags):
    job(*SMALL, '--data_path', data_path, '--output_dir', output_dir, *flags)
    return Result(output_dir)


@pytest.fixture(scope='session')
def trained(pairs, tmp_path_factory):
    return segment(pairs, tmp_path_factory.mktemp('segmenter'))


def open_pairs(data_path, *values):
    args = main_segment.get_parser().parse_args(list(map(str, values)))
    return segmentation.open_pairs(str(data_path), args, {'in_chans': 3, 'img_size': (16, 16)})


def test_image_and_mask_belong_together(pairs):
    for split, source in zip(('train', 'val'), open_pairs(pairs, '--ignore_label', 11)):
        shapes = Shapes(split, (20, 18))
        assert len(source) == {'train': 12, 'val': 5}[split] and source.classes == CLASSES
        for index in range(len(source)):
            image, mask = source[index]
            number = re.search(rf'images/{split}/(\d+).png$', source.path(index))[1]
            drawn = shapes.picture_and_mask(int(number))
            assert torch.equal(image, drawn[0]) and torch.equal(mask[1:], drawn[1][1:])
            assert (mask[0] == IGNORE).all()


def test_ade20k_as_downloaded(tmp_path):
    """Its folders, its masks that count from 1 with 0 for "other", and its 150 names."""
    root = tmp_path / 'ADEChallengeData2016'
    mask = np.tile(np.array([0, 1, 150, 255], dtype=np.uint8), (4, 1))
    for split in ('training', 'validation'):
        save_pair(root, f'{split}/ADE_1', np.zeros((4, 4, 3), np.uint8), mask, 'annotations')
    train, val = open_pairs(root)
    assert 'training' in train.path(0) and 'validation' in val.path(0)
    assert train[0][1][0].tolist() == [255, 0, 149, 255]
    assert len(train.classes) == 150 and train.classes[149] == 'flag'
    known = [*range(151), 255]  # what the reference makes of these
    assert train.table[known].tolist() == PIPELINE['reduce_zero_label'][known].tolist()


@pytest.mark.parametrize('mode', ['L', 'P', '1', 'I;16'])
def test_masks_are_read_raw(mode, tmp_path):
    """A palette's colours do not matter."""
    values = np.array([[0, 1], [1, 0]], {'1': bool, 'I;16': np.uint16}.get(mode, np.uint8))
    mask = Image.fromarray(values)
    if mode == 'P':
        mask.putpalette([7, 8, 9, 7, 8, 9])
    save_pair(tmp_path, 'a', np.zeros((2, 2, 3), np.uint8), values)
    mask.save(tmp_path / 'masks/a.png')
    assert Image.open(tmp_path / 'masks/a.png').mode == mode
    train, val = open_pairs(tmp_path, '--num_classes', 255)
    assert val is None and np.array_equal(train[0][1], values)


def test_255_is_ignored_if_there_are_classes_besides_or_it_is_said(tmp_path):
    """In masks of 0 and 255 of two classes it is one of them, and mIoU would be 100 %."""
    mask = np.array([[0, 255], [255, 0]], dtype=np.uint8)
    save_pair(tmp_path, 'a', np.zeros((2, 2, 3), np.uint8), mask)
    for flags in [], ['--ignore_label', 3]:
        with pytest.raises(InputError, match=r'\[0, 255\].*not as \[255\]'):
            open_pairs(tmp_path, '--num_classes', 2, *flags)
    sources = [open_pairs(tmp_path, '--num_classes', 2, '--ignore_label', 255)[0]]
    save_pair(tmp_path, 'b', np.zeros((2, 2, 3), np.uint8), np.minimum(mask, 1))
    sources.append(open_pairs(tmp_path, '--num_classes', 2)[0])
    assert all(source[0][1].tolist() == mask.tolist() for source in sources)


# --- The job --------------------------------------------------------------------------------------


def test_run_and_resume_are_exact(pairs, trained, tmp_path, stop_at, capsys):
    """Stopped and started again, it ends with the same weights."""
    stop_at(4, segment, pairs, tmp_path)
    printed = capsys.readouterr().out
    assert '11 classes: background, bar' in printed and '12 training and 5 validation' in printed
    resumed = segment(pairs, tmp_path)
    assert resumed.losses == trained.losses and len(trained.losses) == 6
    assert same_weights(resumed, trained)
    assert trained.checkpoint['classes'] == CLASSES
    assert trained.checkpoint['best_miou'] == max(trained.values('val_miou').values())
    assert (trained.output_dir / 'checkpoint-best.pth').exists()


def test_flags_reach_what_they_are_for(pairs, tmp_path, monkeypatch):
    """The schedule, the model, the optimiser and the transform, as the job builds them."""
    train_epoch = MagicMock(side_effect=KeyError)
    monkeypatch.setattr('engine.train_epoch', train_epoch)
    flags = '--scale 64 20 --scale_range 1 1.5 --drop_path 0.3 --layer_decay 0.5'
    with pytest.raises(KeyError):
        segment(pairs, tmp_path, *flags.split())
    run, _, loader, _ = train_epoch.call_args.args
    plan = run.schedule
    assert (plan.total_steps, plan.warmup_steps, plan.total_batch_size) == (6, 2, 2)
    assert run.model.classifier[1].weight.shape[:2] == (11, 8)
    assert run.model.encoder.blocks[3].drop_path1.drop_prob == pytest.approx(0.3)
    scales = {group['lr_scale'] for group in run.optimizer.param_groups}
    assert scales == {0.5**layer for layer in range(6)}
    transform = loader.samples.transform.keywords
    assert transform == {'size': (16, 16), 'scale': [64, 20], 'ratios': [1, 1.5]}


def test_evaluation_on_one_and_two_processes(pairs, trained, capsys):
    """Each image counts once; it follows the segmenter in what is not given."""
    arguments = ['--eval', '--data_path', pairs, '--init_from', trained.last, '--device', 'cpu']
    job(*arguments)
    printed = capsys.readouterr().out
    two = Processes(main_segment, *[list(map(str, arguments))] * 2)
    assert two.wait() == [0, 0] and two.printed() == printed, two.printed(errors=True)
    last = [entry for entry in trained.entries if 'val_miou' in entry][-1]
    values = {name: np.float64(last[name]) for name in last if name.startswith('val_')}
    scores = dict(re.findall(r'^ *(val_\S+) +(\S+)$', printed, re.M))
    assert scores == {name: f'{value:.2f}' for name, value in values.items()}
    assert 'on 5 images, mean (0.485' in printed
    job(*arguments, '--scales', 1, 1.5, '--flip')
    assert capsys.readouterr().out != printed


def test_evaluation_is_of_what_was_held_out(pairs, tmp_path, capsys):
    """Where there are no folders of splits, --val_share holds images out, also from --eval."""
    for folder in ('images', 'masks'):
        shutil.copytree(pairs / folder / 'train', tmp_path / 'all' / folder)
    flags = ['--total_steps', 2, '--num_classes', 11, '--val_share', 0.25]
    run = segment(tmp_path / 'all', tmp_path / 'run', *flags)
    assert '9 training and 3 validation images' in capsys.readouterr().out
    job('--eval', '--data_path', tmp_path / 'all', '--init_from', run.last, '--device', 'cpu')
    assert 'on 3 images' in capsys.readouterr().out


def test_a_segmenter_is_trained_further_as_it_was(pairs, tmp_path):
    """Its levels, widths and meaning of masks are recorded again, for what comes after."""
    flags = ['--total_steps', 2, '--levels', 0, 1, 2, 3, '--scale', 40, 20]
    first = segment(pairs, tmp_path / 'first', *flags)
    then = ['--init_from', first.last, '--output_dir', tmp_path / 'then', '--total_steps', 2]
    job(*then, '--data_path', pairs, '--num_workers', 0, '--device', 'cpu')
    before, after = (result.checkpoint['args'] for result in (first, Result(tmp_path / 'then')))
    for name in ('levels', 'channels', 'aux_channels', 'scale', 'ignore_label'):
        assert before[name] == after[name] is not None


def test_prediction_is_at_the_images_own_size(pairs, trained, tmp_path, capsys):
    """Class numbers in a PNG, an overlay, and shares; a bad image is reported at the end."""
    image = pairs / 'images/val/1.png'
    (tmp_path / 'bad.png').write_text('no image')
    twin = shutil.copy(image, tmp_path / '1_overlay.png')
    with pytest.raises(SystemExit) as exit:
        paths = ['--predict', tmp_path / 'bad.png', image, twin, '--output_dir', tmp_path]
        job('--init_from', trained.last, '--device', 'cpu', *paths)
    output = capsys.readouterr()
    assert exit.value.code == 1 and 'bad.png' in output.err
    predicted = Image.open(tmp_path / 'predictions/1.png')
    assert predicted.size == Image.open(image).size and predicted.mode == 'P'
    again = Image.open(tmp_path / 'predictions/1_overlay_.png')  # the twin's own
    assert np.array_equal(again, predicted)
    overlay = Image.open(tmp_path / 'predictions/1_overlay.png')
    mean = (np.array(Image.open(image)).astype(int) + np.array(predicted.convert('RGB'))) / 2
    assert np.abs(np.array(overlay) - mean).max() <= 1
    counts = np.bincount(np.array(predicted).flat)
    assert re.search(rf'{CLASSES[counts.argmax()]} +{counts.max() / counts.sum():.2%}', output.out)


def test_a_segmenter_of_mmsegmentation_predicts(pairs, tmp_path):
    """Its sizes follow from its tensors; the prediction is that of the model itself."""
    torch.save({'state_dict': REFERENCE['state'], 'meta': {}}, tmp_path / 'mmseg.pth')
    image = pairs / 'images/val/1.png'
    places = ['--init_from', tmp_path / 'mmseg.pth', '--output_dir', tmp_path]
    job('--predict', image, *places, '--device', 'cpu')
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    imgs, side = transforms.normalise(read_image(image)[None], *statistics), CONFIG['img'][0]
    with torch.no_grad():
        model = build().eval()
        expected = segmentation.segment(model, imgs, imgs.shape[-2:], scale=(4 * side, side))
    assert np.array_equal(np.array(Image.open(tmp_path / 'predictions/1.png')), expected[0].numpy())


# --- Recipes and mistakes -------------------------------------------------------------------------


def read_recipe(name):
    return main_segment.get_parser().parse_args([f'@{ROOT / "recipes" / name}'])


def test_recipes_are_the_published_one():
    """mmsegmentation configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py and its bases."""
    args = read_recipe('vit_base_segment.txt')
    sizes = dict(img_size=(512, 512), patch_size=16, in_chans=3, embed_dim=768, depth=12)
    sizes |= dict(num_heads=12, mlp_ratio=4.0, levels=(3, 5, 7, 11), channels=768, aux_channels=256)
    assert main_segment.follow(args, None).sizes == sizes
    assert default_levels(12) == (3, 5, 7, 11) and default_levels(24) == (7, 11, 15, 23)
    expected = dict(
        scale=[2048, 512], scale_range=[0.5, 2.0], scales=[1.0], flip=False, ignore_label=None,
        reduce_zero_label=True, betas=[0.9, 0.999], weight_decay=0.05, clip_grad=None, amp='fp16',
        layer_decay=0.65, drop_path=0.1, classifier_std=0.01,
    )  # fmt: skip
    assert vars(args) == vars(args) | expected and segmentation.AUX_WEIGHT == 0.4
    plan = main_segment.make_schedule(args, 20210, at_least=2)
    assert (plan.total_batch_size, plan.total_steps, plan.warmup_steps) == (16, 160000, 1500)
    rates = (plan.lr, plan.min_lr, plan.warmup_from, plan.decay)
    assert rates == (1e-4, 0.0, 1e-6, 'linear')
    large = dict(channels=1024, levels=[7, 11, 15, 23], drop_path=0.2, layer_decay=0.75)
    large['grad_checkpointing'] = True
    for name, changes in (('vit_small', {'channels': 384}), ('vit_large', large)):
        other = vars(read_recipe(f'{name}_segment.txt'))
        different = {key: value for key, value in other.items() if value != vars(args)[key]}
        own = {'model': f'{name}_patch16', 'output_dir': f'output/{name}_segment'}
        assert different == changes | own


MISTAKES = [  # (name: new content of a file or None, flags, what the line has to say)
    ({'masks/train/3.png': None}, '', 'masks/train/3.png'),
    ({'masks': None}, '', 'masks'),
    ({'classes.txt': None}, '', '--num_classes'),
    ({'classes.txt': 'x'}, '', "'x'.*--num_classes"),
    ({'classes.txt': 'a\nb\na'}, '', 'classes.txt'),
    ({'classes.txt': 'a\n\nb'}, '', 'classes.txt'),
    ({'images/val': None}, '', '--val_share'),
    ({}, '--ignore_label 255', r'not as \[11\].*--ignore_label'),
    ({}, '--input_size 18', 'patch'),
    ({}, '--input_size 4', 'two patches'),
    ({}, '--levels 0 1 2 2', 'levels'),
    ({}, '--total_batch_size 4 --batch_size 2', 'BatchNorm'),
    ({}, '--total_batch_size 1', 'BatchNorm'),
    ({}, '--warmup_steps 7', 'warm-up'),
    ({}, '--predict x.png', '--init_from'),
]


@pytest.mark.parametrize('changes, flags, message', MISTAKES)
def test_mistakes_get_one_line_before_training(changes, flags, message, pairs, tmp_path, error_of):
    root = shutil.copytree(pairs, tmp_path / 'data')
    for name, content in changes.items():
        (root / name).rename(root / 'old')
        if content:
            (root / name).write_text(content)
    assert re.search(message, error_of(segment, root, tmp_path / 'run', *flags.split()))


BAD_MASKS = [
    (lambda mask: mask.convert('RGB'), r'\(20, 18, 3\)'),
    (lambda mask: mask.resize((9, 9)), r'\(9, 9\).*\(20, 18\)'),
    (lambda mask: mask.point(lambda value: 12), 'up to 12'),
]


@pytest.mark.parametrize('change, message', BAD_MASKS)
def test_a_bad_mask_is_a_bad_image(change, message, pairs, tmp_path):
    root = shutil.copytree(pairs, tmp_path / 'data')
    train, _ = open_pairs(root, '--ignore_label', 11)
    path = root / 'masks/train/0.png'
    change(Image.open(path)).save(path)
    with pytest.raises(ValueError, match=f'{path}.*{message}'):
        train[0]


def test_other_classes_are_not_evaluated(pairs, trained, tmp_path, error_of):
    root = shutil.copytree(pairs, tmp_path / 'pairs')
    (root / 'classes.txt').write_text('\n'.join([CLASSES[1], CLASSES[0], *CLASSES[2:]]))
    for path, *flags in [root], [pairs, '--num_classes', 12]:
        evaluation = ['--eval', '--data_path', path, '--init_from', trained.last, *flags]
        assert 'background' in error_of(job, '--device', 'cpu', *evaluation)
    assert 'background' in error_of(segment, pairs, tmp_path / 'run', '--val_path', root)
