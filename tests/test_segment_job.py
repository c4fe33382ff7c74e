"""main_segment.py as users run it: data, training, resuming, evaluation, prediction, mistakes."""

import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

import main_segment
from models_upernet import UperNet
from tests.conftest import ROOT, Result, command
from util import masks, optim, segmentation, transforms, weights
from util.args import run_job
from util.images import read_image
from util.shapes import Shapes
from util.sources import Options

SMALL = (
    '--model vit_nano_patch4 --input_size 16 --channels 8 --aux_channels 8 --total_batch_size 4 --total_steps 6 '
    '--warmup_steps 2 --lr 1e-3 --num_workers 0 --log_every 1 --device cpu'
).split()


def write_pairs(root, split='train', count=12, size=(20, 18), names=('images', 'masks')):
    """Drawn pictures with masks of the classes 0 to 10, whose borders are unlabelled, 11."""
    shapes = Shapes(split, size)
    for index in range(count):
        for folder, tensor in zip(names, (shapes[index][0], shapes.picture_and_mask(index)[1][None])):
            if folder != names[0]:
                tensor[:, 0] = 11
            path = root / folder / split / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(tensor).save(path)
    (root / 'classes.txt').write_text('\n'.join(['background', *Shapes.classes]))
    return root


@pytest.fixture(scope='session')
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp('pairs')
    write_pairs(root)
    return write_pairs(root, 'val', count=5)


def segment(data_path, output_dir, *flags):
    arguments = ['--data_path', str(data_path), '--ignore_label', '11', *SMALL, '--output_dir', str(output_dir), *flags]
    run_job(main_segment.main, main_segment.get_parser(), arguments)
    return Result(output_dir)


def open_pairs(data_path, *flags, only_val=False, **labels):
    args = main_segment.get_parser().parse_args(['--data_path', str(data_path), *map(str, flags)])
    sizes = {'in_chans': 3, 'img_size': (16, 16)}
    return masks.open_pairs(args, sizes, masks.Labels(**labels), only_val)


# --- Data -----------------------------------------------------------------------------------------------------


def test_a_folder_and_a_tar_give_the_same_pairs(pairs, tmp_path):
    with tarfile.open(tmp_path / 'pairs.tar', 'w') as tar:
        tar.add(pairs, 'pairs')
    for split, sources in enumerate(
        zip(
            open_pairs(pairs, ignore=11),
            open_pairs(tmp_path / 'pairs.tar', '--download_dir', tmp_path, ignore=11),
            strict=True,
        )
    ):
        folder, tar = sources
        assert len(folder) == len(tar) == (12, 5)[split] and folder.classes == tar.classes
        for index in range(len(folder)):
            for ours, theirs in zip(folder[index], tar[index]):
                assert torch.equal(ours, theirs)


def test_image_and_mask_belong_together(pairs):
    train, _ = open_pairs(pairs, ignore=11)
    shapes = Shapes('train', (20, 18))
    for index in range(len(train)):
        image, mask = train[index]
        number = int(os.path.basename(train.path(index)).removesuffix('.png'))
        assert torch.equal(image, shapes[number][0])
        assert torch.equal(mask[1:], shapes.picture_and_mask(number)[1][1:]) and (mask[0] == transforms.IGNORE).all()


def test_folders_of_splits_may_come_first(pairs, tmp_path):
    for split in ('train', 'val'):
        for folder in ('images', 'masks'):
            shutil.copytree(pairs / folder / split, tmp_path / split / folder)
    shutil.copy(pairs / 'classes.txt', tmp_path)
    for ours, theirs in zip(open_pairs(tmp_path, ignore=11), open_pairs(pairs, ignore=11), strict=True):
        names = [[os.path.basename(source.path(index)) for index in range(len(source))] for source in (ours, theirs)]
        assert names[0] == names[1]


def test_ade20k_as_downloaded(tmp_path):
    """Its folders, its masks that count from 1 with 0 for "other", and its 150 names."""
    root = tmp_path / 'ADEChallengeData2016'
    values = torch.tensor([0, 1, 150, 255], dtype=torch.uint8).repeat(1, 4, 1)
    for split in ('training', 'validation'):
        for folder, tensor, ending in (
            ('images', torch.zeros(3, 4, 4, dtype=torch.uint8), 'jpg'),
            ('annotations', values, 'png'),
        ):
            (root / folder / split).mkdir(parents=True)
            to_pil_image(tensor).save(root / folder / split / f'ADE_{split}_1.{ending}')
    (root / 'objectInfo150.txt').write_text('Idx\n')
    for path, reduce_zero in ((root, True), (tmp_path, True), (root, None)):
        train, val = open_pairs(path, reduce_zero=reduce_zero)
        assert 'training' in train.path(0) and 'validation' in val.path(0)
        assert train[0][1][0].tolist() == [255, 0, 149, 255]
        assert len(train.classes) == 150 and (train.classes[0], train.classes[149]) == ('wall', 'flag')


@pytest.mark.parametrize('mode', ['L', 'P', '1'])
def test_masks_are_read_raw(mode, tmp_path):
    """A palette's colours do not matter."""
    values = (
        np.array([[0, 1], [1, 0]], dtype=np.uint8) if mode == '1' else np.array([[0, 7], [254, 255]], dtype=np.uint8)
    )
    image = Image.fromarray(values.astype(bool)) if mode == '1' else Image.fromarray(values)
    if mode == 'P':
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert image.mode == mode
    image.save(tmp_path / 'mask.png')
    files = masks.open_files(str(tmp_path), Options())
    assert np.array_equal(masks.read_mask(files, 0), values)


def test_without_splits_and_with_val_share(tmp_path):
    """Where there are no folders for splits, --val_share holds some out."""
    write_pairs(tmp_path / 'all')
    for folder in ('images', 'masks'):
        for path in (tmp_path / 'all' / folder / 'train').iterdir():
            path.rename(tmp_path / 'all' / folder / path.name)
    train, val = open_pairs(tmp_path / 'all', '--val_share', 0.25, ignore=11)
    paths = {source.path(index) for source in (train, val) for index in range(len(source))}
    assert (len(train), len(val), len(paths)) == (9, 3, 12)
    with pytest.raises(ValueError, match='--val_share'):
        open_pairs(tmp_path / 'all', ignore=11)


def test_the_transform_is_joint_and_of_the_crop_size():
    """Where the mask is a function of the image, it still is after resize, crop and flip; padding is marked."""
    transform = transforms.SegmentationTransform((24, 32), (96, 24))
    image = torch.arange(40, dtype=torch.uint8).view(1, 1, 40).repeat(1, 30, 1) * 5  # each column its own grey
    for seed in range(20):
        segmentation.data.seed_generators(seed)
        crop, mask = transform(image, image[0] // 5)
        assert crop.shape == (1, 24, 32) and mask.shape == (24, 32)
        inside = mask != transforms.PADDING
        assert (crop[0][inside].int() - 5 * mask[inside].int()).abs().max() <= 12  # two columns: nearest rounds down
        imgs, targets = segmentation.fill_padding(crop[None].float() + 1, mask[None])
        assert (imgs[0, 0][~inside] == 0).all() and (targets[0][~inside] == transforms.IGNORE).all()
        assert (imgs[0, 0][inside] > 0).all() and torch.equal(targets[0][inside], mask[inside].long())


# --- Training -------------------------------------------------------------------------------------------------


def test_run_and_resume_are_exact(pairs, tmp_path, kill_after_saving):
    """Killed after a checkpoint and started again, a run ends with the same weights; workers make no difference."""
    whole = segment(pairs, tmp_path / 'whole')
    kill_after_saving(segment, pairs, tmp_path / 'cut', '--save_every', '2')
    resumed = segment(pairs, tmp_path / 'cut', '--save_every', '2', '--num_workers', '2')
    assert resumed.losses == whole.losses and len(whole.losses) == 6
    for name, tensor in whole.checkpoint['model'].items():
        assert torch.equal(tensor, resumed.checkpoint['model'][name]), name
    assert whole.checkpoint['classes'] == ['background', *Shapes.classes]
    last = [entry for entry in whole.entries if 'val_miou' in entry][-1]
    assert whole.checkpoint['best_miou'] >= last['val_miou'] and 'val_iou/background' in last
    for name in ('checkpoint-best.pth', 'segmentation.png'):
        assert (tmp_path / 'whole' / name).stat().st_size > 1000


def test_flags_reach_what_they_are_for(pairs, tmp_path, monkeypatch):
    """The schedule, the model, the optimiser and the transform, as the job builds them."""
    seen = {}

    def stop(run, model, optimizer, loss_fn, loader, events, title):
        seen.update(run=run, model=model, optimizer=optimizer, loader=loader, events=events)

    monkeypatch.setattr(main_segment.engine, 'train', stop)
    flags = '--scale 64 20 --scale_range 1 1.5 --levels 0 1 2 3 --drop_path 0.3 --layer_decay 0.5'.split()
    flags += '--weight_decay 0.1 --betas 0.8 0.9'.split()
    with pytest.raises(KeyError, match='best_miou'):
        segment(pairs, tmp_path, *flags)
    schedule, model = seen['run'].schedule, seen['model']
    assert (schedule.total_steps, schedule.warmup_steps, schedule.decay) == (6, 2, 'linear')
    assert optim.learning_rate(0, schedule) == pytest.approx(1e-9) and optim.learning_rate(5, schedule) == 0
    assert model.classifier[1].weight.shape[:2] == (11, 8) and model.aux_head[2].weight.shape[:2] == (11, 8)
    groups = seen['optimizer'].param_groups
    assert {group['weight_decay'] for group in groups} == {0.0, 0.1} and groups[0]['betas'] == (0.8, 0.9)
    assert {group['lr_scale'] for group in groups} == {0.5**layer for layer in range(6)}
    transform = seen['loader'].batches.dataset.transform
    assert (transform.size, transform.scale, transform.ratios) == ((16, 16), (64, 20), [1, 1.5])
    assert seen['events'].best == 'val_miou'


def test_two_processes_evaluate_each_image_once(pairs, tmp_path, capsys):
    """The table is that of one process, and the last line that of the training."""
    segment(pairs, tmp_path / 'run', '--total_steps', '2', '--warmup_steps', '0')
    init = ['--eval', '--init_from', str(tmp_path / 'run/checkpoint-last.pth')]
    capsys.readouterr()
    segment(pairs, tmp_path / 'one', *init)
    flags = ['--data_path', pairs, '--device', 'cpu', '--num_workers', '0', '--output_dir', tmp_path / 'two']
    done = command('main_segment.py', *flags, *init, torchrun=2)
    assert done.returncode == 0, done.stderr
    trained = [entry for entry in Result(tmp_path / 'run').entries if 'val_miou' in entry][-1]
    assert done.stdout == capsys.readouterr().out
    assert f'mIoU {trained["val_miou"]:.2f} %' in done.stdout and 'on 5 images' in done.stdout


def test_evaluation_at_several_scales_with_flip(pairs, tmp_path, capsys):
    segment(pairs, tmp_path / 'run', '--total_steps', '2', '--warmup_steps', '0')
    init = ['--init_from', str(tmp_path / 'run/checkpoint-last.pth')]
    segment(pairs, tmp_path / 'eval', *init, '--eval', '--scales', '1', '1.5', '--flip')
    assert 'mean accuracy' in capsys.readouterr().out


def test_prediction_is_at_the_images_own_size(pairs, tmp_path, capsys):
    """Class numbers in a PNG, and an overlay; they are what the model says; a bad image is reported at the end."""
    segment(pairs, tmp_path / 'run')
    init = ['--init_from', str(tmp_path / 'run/checkpoint-last.pth')]
    image = pairs / 'images/val/1.png'
    (tmp_path / 'bad.png').write_text('no image')
    twin = shutil.copy(image, tmp_path / '1_overlay.png')
    with pytest.raises(SystemExit) as exit:
        segment(pairs, tmp_path / 'run', *init, '--predict', str(tmp_path / 'bad.png'), str(image), str(twin))
    assert exit.value.code == 1 and 'bad.png' in capsys.readouterr().err
    predicted = Image.open(tmp_path / 'run/predictions/1.png')
    assert predicted.size == Image.open(image).size and predicted.mode == 'P'
    assert np.array(predicted).max() < 11
    overlay = Image.open(tmp_path / 'run/predictions/1_overlay.png')
    assert overlay.width > predicted.width and overlay.height >= predicted.height
    assert np.array_equal(Image.open(tmp_path / 'run/predictions/1_overlay_.png'), predicted)  # the twin's own


def test_a_segmenter_of_mmsegmentation_predicts(pairs, tmp_path):
    """Its sizes follow from its tensors; the prediction is that of the model itself."""
    reference = torch.load(ROOT / 'tests/data/seg_tiny.pt', weights_only=True)
    torch.save({'state_dict': reference['state'], 'meta': {}}, tmp_path / 'mmseg.pth')
    image = pairs / 'images/val/1.png'
    flags = ['--predict', str(image), '--init_from', str(tmp_path / 'mmseg.pth'), '--output_dir', str(tmp_path)]
    run_job(main_segment.main, main_segment.get_parser(), [*flags, '--device', 'cpu'])
    config = reference['config']
    model = UperNet(
        img_size=config['img'],
        patch_size=config['patch'],
        embed_dim=config['dim'],
        depth=config['depth'],
        num_heads=config['heads'],
        num_classes=config['classes'],
        levels=config['out'],
        channels=config['channels'],
        aux_channels=config['aux_channels'],
    )
    model.load_state_dict(weights.convert_state_dict(reference['state']))
    imgs = transforms.normalise(read_image(image)[None], *weights.default_statistics(3).values())
    window = segmentation.Window(config['img'], (32, 32), (4 * config['img'][0], config['img'][0]))
    with torch.no_grad():
        expected = segmentation.segment(model.eval(), imgs, window, imgs.shape[-2:])
    assert np.array_equal(np.array(Image.open(tmp_path / 'predictions/1.png')), expected[0].numpy())


# --- Recipes --------------------------------------------------------------------------------------------------


def read_recipe(name):
    return main_segment.get_parser().parse_args([f'@{ROOT / "recipes" / name}'])


def test_vit_base_is_the_published_recipe():
    """mmsegmentation configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py and what it is based on."""
    args = read_recipe('vit_base_segment.txt')
    settings, labels, window = main_segment.settle(args)
    sizes = dict(img_size=(512, 512), patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)
    assert settings.sizes == sizes | dict(levels=(3, 5, 7, 11), channels=768, aux_channels=256)
    assert (window.size, window.stride, window.scale) == ((512, 512), (341, 341), (2048, 512))
    assert (window.ratios, window.flip) == ((1.0,), False)
    assert labels.reduce_zero and labels.ignore == 255
    assert args.scale_range == [0.5, 2.0]
    schedule = main_segment.make_schedule(args, 20210)
    assert (schedule.total_batch_size, schedule.total_steps, schedule.warmup_steps) == (16, 160000, 1500)
    assert (schedule.lr, schedule.min_lr, schedule.warmup_from, schedule.decay) == (1e-4, 0.0, 1e-6, 'linear')
    assert args.betas == [0.9, 0.999] and args.weight_decay == 0.05 and args.clip_grad is None
    assert args.layer_decay == 0.65 and args.drop_path == 0.1 and args.amp == 'fp16'
    assert segmentation.AUX_WEIGHT == 0.4


@pytest.mark.parametrize(
    'name, changes',
    [
        ('vit_small', {'channels': 384}),
        ('vit_large', {'channels': 1024, 'levels': [7, 11, 15, 23], 'drop_path': 0.2, 'layer_decay': 0.75,
                       'grad_checkpointing': True}),
    ],
)  # fmt: skip
def test_other_sizes_follow_vit_base(name, changes):
    base, args = (vars(read_recipe(f'{each}_segment.txt')) for each in ('vit_base', name))
    different = {key: value for key, value in args.items() if value != base[key]}
    own = {'model': f'{name}_patch16', 'output_dir': f'output/{name}_segment'}
    assert different == changes | own


# --- Mistakes -------------------------------------------------------------------------------------------------


MISTAKES = {
    'image without mask': (
        lambda root: (root / 'masks/train/3.png').unlink(),
        [],
        'image without mask.*images/train/3',
    ),
    'mask without image': (lambda root: (root / 'images/val/1.png').unlink(), [], 'mask without image.*masks/val/1'),
    'no masks': (lambda root: (root / 'masks').rename(root / 'mask'), [], 'image without mask'),
    'no classes': (lambda root: (root / 'classes.txt').unlink(), [], r'classes.txt.*--num_classes.*0 1 2'),
    'no classes, and a mask that is none': (
        lambda root: [(root / 'classes.txt').unlink(), (root / 'masks/val/0.png').write_text('x')],
        [],
        'masks/val/0.png: not an image',
    ),
    'one class': (lambda root: (root / 'classes.txt').write_text('background\n'), [], 'one class only, background'),
    'a class twice': (lambda root: (root / 'classes.txt').write_text('a\nb\na'), [], 'an empty line or a name twice'),
    'two images of one name': (
        lambda root: shutil.copy(root / 'images/train/3.png', root / 'images/train/3.jpg'),
        [],
        'two files for one name: .*images/train/3.jpg and .*images/train/3.png',
    ),
    'gaps': (lambda root: None, ['--stride', '17'], 'leaves gaps between windows'),
    'labels above': (lambda root: None, ['--ignore_label', '255'], 'holds 11, above the last of 11 classes'),
    'fewer classes': (lambda root: None, ['--num_classes', '3'], 'above the last of 3 classes'),
    'crop and patch': (lambda root: None, ['--input_size', '18'], 'not a multiple of patch size'),
    'images too small': (lambda root: None, ['--scale', '20', '6'], 'smaller than the crop'),
    'levels': (lambda root: None, ['--levels', '0', '1', '2', '2'], 'levels .* must be increasing block indices'),
    'accumulation': (lambda root: None, ['--batch_size', '2'], 'BatchNorm'),
    'one image': (lambda root: None, ['--total_batch_size', '1'], 'two images'),
    'warm-up': (lambda root: None, ['--warmup_steps', '7'], 'warm-up'),
    'nothing to evaluate': (lambda root: None, ['--eval'], '--init_from'),
    'nothing to predict with': (lambda root: None, ['--predict', 'x.png'], '--init_from'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_get_one_line_before_training(mistake, tmp_path, capsys):
    write, flags, message = MISTAKES[mistake]
    write_pairs(tmp_path / 'data')
    write_pairs(tmp_path / 'data', 'val', count=3)
    write(tmp_path / 'data')
    with pytest.raises(SystemExit) as exit:
        segment(tmp_path / 'data', tmp_path / 'run', *flags)
    lines = capsys.readouterr().err
    assert exit.value.code == 2 and lines.count('\n') == 1
    assert re.search(message, lines), lines


BAD_MASKS = {
    'colours': (lambda mask: mask.convert('RGB'), 'RGB'),
    'another size': (lambda mask: mask.resize((9, 9)), 'differ in size, 18 x 20 and 9 x 9'),
    'all ignored': (lambda mask: mask.point(lambda value: 11), 'all pixels are ignored'),
    'label too high': (lambda mask: mask.point(lambda value: 12), 'holds 12'),
}


@pytest.mark.parametrize('fault', BAD_MASKS)
def test_a_bad_mask_is_a_bad_image_and_many_are_a_mistake(fault, tmp_path, capsys):
    spoil, message = BAD_MASKS[fault]
    root = write_pairs(tmp_path / 'data')
    write_pairs(root, 'val', count=3)

    def spoil_mask(index):
        path = root / f'masks/train/{index}.png'
        with Image.open(path) as mask:
            spoil(mask).save(path)

    spoil_mask(5)
    result = segment(root, tmp_path / 'run', '--max_bad', '0.5')
    listed = (result.output_dir / 'bad_images.txt').read_text()
    assert message in listed and listed.count('\n') == 1
    for index in set(range(12)) - {5}:
        spoil_mask(index)
    with pytest.raises(SystemExit) as exit:
        segment(root, tmp_path / 'all')
    lines = capsys.readouterr().err
    assert exit.value.code == 2 and message in lines and lines.count('\n') == 1


def test_a_checkpoint_with_other_classes(pairs, tmp_path, capsys):
    segment(pairs, tmp_path / 'run', '--total_steps', '1', '--warmup_steps', '0')
    init = ['--init_from', str(tmp_path / 'run/checkpoint-last.pth'), '--eval', '--num_classes', '12']
    with pytest.raises(SystemExit) as exit:
        segment(pairs, tmp_path / 'eval', *init)
    assert exit.value.code == 2 and '11 classes' in capsys.readouterr().err
    other_order = shutil.copytree(pairs, tmp_path / 'pairs')
    (other_order / 'classes.txt').write_text('\n'.join(reversed((pairs / 'classes.txt').read_text().split())))
    with pytest.raises(SystemExit) as exit:
        segment(other_order, tmp_path / 'eval', *init[:3])
    assert exit.value.code == 2 and 'the classes differ: their order' in capsys.readouterr().err
