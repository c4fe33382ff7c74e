"""Robustness: the formula of the mean corruption error, and sets whose classes are a part."""

import json
import shutil

import pytest
import torch

from tools import robustness
from util.args import run_job

# Hendrycks and Dietterich 2019: ResNet-50's errors by corruption, in percent, whose mean corruption
# error they give as 76.7 (table of ImageNet-C, standard ResNet-50).
RESNET50 = {
    'gaussian_noise': 80,
    'shot_noise': 82,
    'impulse_noise': 83,
    'defocus_blur': 75,
    'glass_blur': 89,
    'motion_blur': 78,
    'zoom_blur': 80,
    'snow': 78,
    'frost': 75,
    'fog': 66,
    'brightness': 57,
    'contrast': 71,
    'elastic_transform': 85,
    'pixelate': 77,
    'jpeg_compression': 77,
}  # each is already over AlexNet's


def test_mean_corruption_error_is_the_published_one():
    errors = {name: [robustness.ALEXNET[name] * ce / 100] * 5 for name, ce in RESNET50.items()} | {
        'saturate': [1.0, 2.0, 3.0, 4.0, 5.0]
    }
    result = robustness.corruption_errors(errors)
    assert result['mce'] == pytest.approx(76.7, abs=0.3)
    assert result['errors']['saturate'] == 3.0 and 'saturate' not in result['counted']
    assert result['mean_error'] == pytest.approx(
        sum(values[0] for name, values in errors.items() if name != 'saturate') / 15
    )


def test_a_set_with_some_classes_and_corruptions(finetune, folder, tmp_path, capsys):
    """Of ten classes three, in every severity the same images: the accuracy of --eval."""
    checkpoint = str(finetune('tuned').output_dir / 'checkpoint-last.pth')
    classes = sorted(path.name for path in (folder / 'val').iterdir())[2:5]
    for place in ['some', *(f'corrupted/blur/{severity}' for severity in range(1, 6))]:
        for name in classes:
            shutil.copytree(folder / 'val' / name, tmp_path / place / name)
    flags = ['--init_from', checkpoint, '--num_workers', '0', '--out', str(tmp_path / 'out')]
    sets = ['--imagenet_r', str(tmp_path / 'some'), '--imagenet_c', str(tmp_path / 'corrupted')]
    run_job(robustness.main, robustness.get_parser(), [*flags, *sets])
    results = json.loads((tmp_path / 'out.json').read_text())
    top1 = results['ImageNet-R']['top1']
    assert results['ImageNet-C']['errors']['blur'] == pytest.approx(100 - top1)
    assert 'mce' not in results['ImageNet-C']
    assert f'| ImageNet-R, top-1 | {top1:.2f} % |' in (tmp_path / 'out.md').read_text()

    shutil.rmtree(tmp_path / 'corrupted/blur/4')
    with pytest.raises(SystemExit) as exit:
        run_job(robustness.main, robustness.get_parser(), [*flags, *sets])
    assert exit.value.code == 2 and 'blur/4' in capsys.readouterr().err
    (tmp_path / 'some' / classes[0]).rename(tmp_path / 'some/unicorn')
    with pytest.raises(SystemExit) as exit:
        run_job(robustness.main, robustness.get_parser(), [*flags, *sets[:2]])
    assert exit.value.code == 2 and 'unicorn' in capsys.readouterr().err


def test_classes_without_names_are_not_guessed(finetune, tmp_path, folder, capsys):
    """A file of ten nameless classes, as timm's, and a set with three: which are they?"""
    last = finetune('tuned', '--epochs', '1').output_dir / 'checkpoint-last.pth'
    state = torch.load(last, weights_only=True)
    torch.save(state | {'classes': None}, last)
    for path in sorted((folder / 'val').iterdir())[2:5]:
        shutil.copytree(path, tmp_path / 'some' / path.name)
    flags = ['--init_from', str(last), '--num_workers', '0', '--out', str(tmp_path / 'out')]
    with pytest.raises(SystemExit) as exit:
        run_job(
            robustness.main,
            robustness.get_parser(),
            [*flags, '--imagenet_a', str(tmp_path / 'some')],
        )
    assert exit.value.code == 2 and '10 classes, without names, not 3' in capsys.readouterr().err
    assert not (tmp_path / 'out.json').exists()
