"""Semantic segmentation against mmsegmentation 1.2.2 (tests/data/README.md), then what users do."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from models_mff import create_encoder, model_sizes
from models_upernet import UperNet, default_levels
from util import masks, optim, segmentation, transforms, weights

REFERENCE = torch.load(Path(__file__).parent / 'data/seg_tiny.pt', weights_only=True)
CONFIG, IMGS, LABELS = REFERENCE['config'], REFERENCE['imgs'], REFERENCE['labels']


def build(drop_path=0.0):
    """The reference's model with its weights, and its dropout off."""
    model = UperNet(
        img_size=CONFIG['img'],
        patch_size=CONFIG['patch'],
        embed_dim=CONFIG['dim'],
        depth=CONFIG['depth'],
        num_heads=CONFIG['heads'],
        num_classes=CONFIG['classes'],
        levels=CONFIG['out'],
        channels=CONFIG['channels'],
        aux_channels=CONFIG['aux_channels'],
        drop_path=drop_path,
    )
    model.load_state_dict(weights.convert_state_dict(REFERENCE['state']))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    return model


def assert_equal(ours, theirs, tolerance=1e-5, scale=None):
    """To a share of the largest value."""
    scale = theirs.abs().max() if scale is None else scale
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= tolerance * scale


# --- The model ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_is_the_references():
    model, expected = build().eval(), REFERENCE['eval']
    levels = model.encoder.forward_intermediates(IMGS, model.levels, intermediates_only=True)
    pyramid = [scale(level) for scale, level in zip(model.neck, levels)]
    for ours, theirs in zip([*levels, *pyramid], [*expected['levels'], *expected['pyramid']], strict=True):
        assert_equal(ours, theirs)
    assert_equal(model(IMGS, resize=False), expected['logits'])
    assert_equal(model(IMGS), expected['full'])
    assert_equal(model.aux_head(levels[2]), expected['aux_logits'])


def test_losses_and_gradients_are_the_references():
    model, expected = build().train(), REFERENCE['train']
    logits, aux_logits = model(IMGS, resize=False)
    assert_equal(logits, expected['logits'])
    assert_equal(aux_logits, expected['aux_logits'])
    assert segmentation.pixel_loss(logits, LABELS).item() == pytest.approx(expected['loss_decode'].item(), rel=1e-5)
    aux_loss = segmentation.AUX_WEIGHT * segmentation.pixel_loss(aux_logits, LABELS)
    assert aux_loss.item() == pytest.approx(expected['loss_aux'].item(), rel=1e-5)
    loss = segmentation.segmentation_loss(logits, aux_logits, LABELS)
    assert loss.item() == pytest.approx(expected['loss'].item(), rel=1e-5)
    loss.backward()
    grads = weights.convert_state_dict(expected['grads'])
    largest = max(grad.abs().max() for grad in grads.values())
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, grads[name], scale=largest)
    buffers = weights.convert_state_dict(expected['buffers'])
    for name, buffer in model.state_dict().items():
        if name in buffers:
            assert_equal(buffer.float(), buffers[name].float())
    assert any('running_var' in name for name in buffers)


def test_training_mode_gives_both_logits_at_the_size_of_the_images():
    logits, aux_logits = build().train()(IMGS)
    assert logits.shape == aux_logits.shape == (len(IMGS), CONFIG['classes'], *CONFIG['img'])


@pytest.mark.parametrize('images', [1, 2, 100])
def test_loss_in_pieces_is_the_loss_at_once(images, monkeypatch):
    """So is its gradient; and ignored pixels count in the denominator."""
    monkeypatch.setattr(segmentation, 'CHUNK_BYTES', images * 4 * 5 * 24 * 32)
    logits = torch.randn(3, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (3, 24, 32)).masked_fill(torch.rand(3, 24, 32) < 0.3, transforms.IGNORE)
    full = interpolate(logits, (24, 32), mode='bilinear', align_corners=False).log_softmax(1)
    chosen = full.gather(1, target.clamp(max=4)[:, None])[:, 0]
    expected = -(chosen * (target != transforms.IGNORE)).mean()
    loss = segmentation.pixel_loss(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_learning_rates_and_decay_are_the_references():
    model, expected = build(), REFERENCE['optim']
    groups = optim.param_groups(model, CONFIG['weight_decay'], CONFIG['layer_decay'])
    ours = {id(p): (group['lr_scale'], group['weight_decay']) for group in groups for p in group['params']}
    as_tensors = {}
    for key in ('lr_scale', 'weight_decay'):
        values = {name: torch.full(REFERENCE['state'][name].shape, value) for name, value in expected[key].items()}
        as_tensors[key] = weights.convert_state_dict(values)
    for name, parameter in model.named_parameters():
        theirs = tuple(as_tensors[key][name].flatten()[0].item() for key in as_tensors)
        assert ours[id(parameter)] == pytest.approx(theirs), name


def schedule(lr, warmup, end, start_factor):
    return SimpleNamespace(
        lr=lr, min_lr=0.0, warmup_steps=warmup, total_steps=end, warmup_from=start_factor, decay='linear'
    )


def test_schedule_is_the_references():
    expected = REFERENCE['schedule']
    ours = schedule(1.0, expected['warmup'], expected['end'], expected['start_factor'])
    for step, factor in expected['factor'].items():
        assert optim.learning_rate(step, ours) == pytest.approx(factor, rel=1e-9, abs=1e-12)


def test_five_steps_are_the_references():
    model, expected = build().double().train(), REFERENCE['steps']
    plan = schedule(expected['lr'], expected['warmup'], expected['end'], expected['start_factor'])
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


def test_drop_path_grows_linearly():
    model = build(drop_path=CONFIG['drop_path'])
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.encoder.blocks]
    assert rates == pytest.approx(REFERENCE['drop_path'])


@torch.no_grad()
def test_starts_equal_to_the_plain_vit(tmp_path):
    """A pre-training checkpoint gives the same four levels as timm's VisionTransformer."""
    sizes = model_sizes('vit_nano_patch4', img_size=(16, 24))
    plain = create_encoder(sizes, 'token').eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save({'model': plain.state_dict(), 'sizes': sizes, 'args': {'input_size': [16, 24]}}, tmp_path / 'vit.pth')
    levels = default_levels(sizes['depth'])
    model = UperNet(
        img_size=(16, 24), patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=3, levels=levels, channels=8
    ).eval()
    weights.load_weights(model, tmp_path / 'vit.pth')
    imgs = torch.randn(2, 3, 16, 24)
    ours = model.encoder.forward_intermediates(imgs, model.levels, intermediates_only=True)
    for level, theirs in zip(ours, plain.forward_intermediates(imgs, list(levels), intermediates_only=True)):
        assert_equal(level, theirs)


@pytest.mark.parametrize('depth, levels', [(4, (0, 1, 2, 3)), (12, (3, 5, 7, 11)), (24, (7, 11, 15, 23))])
def test_default_levels(depth, levels):
    assert default_levels(depth) == levels


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(img_size=30), 'not a multiple of patch size'),
        (dict(levels=(0, 1, 2, 2)), 'increasing block indices'),
        (dict(levels=(0, 1, 2)), 'must be four blocks'),
        (dict(depth=5), 'which is 4 at depth 5'),
        (dict(img_size=8), 'two patches'),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=2, levels=(0, 1, 2, 3))
    with pytest.raises(ValueError, match=message):
        UperNet(**sizes | change, channels=8)


def test_initialisation_is_the_references():
    """ConvModule: kaiming-normal by fan-out, BatchNorm 1 and 0; classifiers N(0, 0.01), 0; the neck torch's default."""
    torch.manual_seed(0)
    model = UperNet(
        img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=4, num_classes=50, levels=(0, 1, 2, 3), channels=64
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, torch.nn.Conv2d) and not name.startswith('encoder'):
            is_classifier = name in ('classifier.1', 'aux_head.2')
            fan_out = module.out_channels * module.weight[0, 0].numel()
            expected = 0.01 if is_classifier else (2 / fan_out) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
            assert (module.bias is not None) == is_classifier and (module.bias is None or (module.bias == 0).all())
    for block in model.encoder.blocks:
        assert (block.gamma_1 == 1).all() and (block.attn.relative_position_bias_table == 0).all()


# --- Inference and scores -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize('rows', [7, 1000])
def test_sliding_window_is_the_references(rows, monkeypatch):
    monkeypatch.setattr(segmentation, 'CHUNK_BYTES', rows * 4 * CONFIG['classes'] * REFERENCE['slide']['ori'][1])
    model, expected = build().eval(), REFERENCE['slide']
    logits = segmentation.slide(model, expected['img'], CONFIG['img'], CONFIG['stride'])
    assert_equal(logits, expected['logits'])
    resized = interpolate(logits, expected['ori'], mode='bilinear', align_corners=False)
    assert_equal(resized, expected['ori_logits'])
    height, width = expected['img'].shape[-2:]
    scale = max(height, width), min(height, width)
    window = segmentation.Window(size=CONFIG['img'], stride=CONFIG['stride'], scale=scale)
    assert torch.equal(segmentation.segment(model, expected['img'], window, expected['ori']), expected['pred'].long())


@torch.no_grad()
def test_an_image_smaller_than_the_window_is_padded():
    model = build().eval()
    image = torch.randn(1, 3, CONFIG['img'][0] - 9, CONFIG['img'][1] + 5)
    logits = segmentation.slide(model, image, CONFIG['img'], CONFIG['stride'])
    padded = torch.nn.functional.pad(image, (0, 0, 0, 9))
    whole = segmentation.slide(model, padded, CONFIG['img'], CONFIG['stride'])
    assert torch.equal(logits, whole[..., : image.shape[-2], :])


@torch.no_grad()
def test_scales_and_flip_average_probabilities():
    """Computed here in the plainest way, for images of exactly one window at every scale."""
    model, size = build().eval(), CONFIG['img']
    image = torch.randn(1, 3, *size)
    window = segmentation.Window(size, size, scale=(max(size), min(size)), ratios=(1.0, 1.0), flip=True)
    probabilities = model(image).softmax(1) + model(image.flip(-1)).flip(-1).softmax(1)
    assert torch.equal(segmentation.segment(model, image, window, size), probabilities.argmax(1))


def test_scores_are_the_references():
    expected = REFERENCE['metric']
    confusion = sum(
        segmentation.confusion_matrix(predicted, labels, expected['classes'])
        for predicted, labels in zip(expected['preds'], expected['labels'])
    )
    scores = segmentation.scores(confusion)
    for ours, theirs in (('iou', 'IoU'), ('acc', 'Acc')):
        torch.testing.assert_close(scores[ours] / 100, expected[theirs].double(), equal_nan=True, rtol=1e-6, atol=1e-7)
    for ours, theirs in (('miou', 'mIoU'), ('macc', 'mAcc'), ('pixel_acc', 'aAcc')):
        assert scores[ours] / 100 == pytest.approx(expected[theirs], rel=1e-6)


# --- The training transform -----------------------------------------------------------------------------------

PIPELINE = REFERENCE['pipeline']


def test_zero_label_is_reduced_as_in_the_reference():
    assert torch.equal(torch.from_numpy(masks.Labels(reduce_zero=True).table()), PIPELINE['reduce_zero_label'])
    assert masks.Labels(ignore=11).table()[[0, 10, 11, 255]].tolist() == [0, 10, 255, 255]


def test_resized_sizes_are_the_references():
    for (height, width, ratio), size in PIPELINE['resize'].items():
        assert transforms.fitted_size((height, width), (2048, 512), ratio) == list(size)


@pytest.mark.parametrize('direction', ['down', 'up'])
def test_resized_pixels_are_the_references(direction):
    expected = PIPELINE['resized'][direction]
    size = list(expected['labels'].shape)
    image = functional.resize(tv_tensors.Image(PIPELINE['resized']['image']), size, antialias=False)
    assert (image.int() - expected['image'].int()).abs().max() <= 1
    assert torch.equal(functional.resize(tv_tensors.Mask(PIPELINE['resized']['labels']), size), expected['labels'])


def test_crop_rule_is_the_references(monkeypatch):
    crop = PIPELINE['crop']
    for run in crop['runs']:
        boxes = [*run['checked'], run['taken']]
        corners = iter([corner for box in boxes for corner in (box[0], box[2])])
        monkeypatch.setattr(transforms.random, 'randint', lambda low, high: next(corners))  # noqa: B023
        top, left, height, width = transforms.choose_crop(crop['labels'], crop['size'], crop['cat_max_ratio'])
        assert (top, top + height, left, left + width) == tuple(run['taken'])


def test_photometric_distortions_are_the_references():
    """To 0.05 levels on average: OpenCV rounds hue and saturation in other places."""
    image, expected = PIPELINE['photometric']['image'], PIPELINE['photometric']
    functions = {
        'brightness': transforms.brighten,
        'contrast': functional.adjust_brightness,
        'saturation': lambda image, factor: transforms.shift_hsv(image, saturation=factor),
        'hue': lambda image, steps: transforms.shift_hsv(image, hue=steps),
    }
    for (kind, strength), theirs in expected['out'].items():
        if kind != 'all':
            difference = (functions[kind](image, strength).int() - theirs.int()).abs().float()
            assert difference.mean() < 0.05 and (kind in ('saturation', 'hue') or difference.max() == 0), kind
            continue
        strengths = expected['all']
        order = ['brightness', 'contrast', 'saturation', 'hue']
        if strength == 0:
            order = ['brightness', 'saturation', 'hue', 'contrast']
        ours = image
        for name in order:
            ours = functions[name](ours, strengths[name])
        assert (ours.int() - theirs.int()).abs().float().mean() < 0.1, strength
