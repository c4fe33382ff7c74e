"""Robustness: mean corruption error, sets whose classes are a part, and corrupted copies."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ablation import corrupt
from tools import robustness
from util.errors import InputError

# Hendrycks and Dietterich 2019: ResNet-50's errors by corruption, each over AlexNet's, in percent
# and in the order of ALEXNET, whose mean they give as 76.7 (table of ImageNet-C, standard).
RESNET50 = [80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77]


def test_mean_corruption_error_is_the_published_one():
    alexnet = robustness.ALEXNET.items()
    errors = {name: [error * ce / 100] * 5 for (name, error), ce in zip(alexnet, RESNET50)}
    mean = sum(values[0] for values in errors.values()) / 15
    result = robustness.corruption_errors(errors | {'saturate': [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert result['mce'] == pytest.approx(76.7, abs=0.3)
    assert result['errors']['saturate'] == 3.0 and 'saturate' not in result['counted']
    assert result['mean_error'] == pytest.approx(mean)


@pytest.fixture
def some_classes(folder, tmp_path):
    """some_classes(place) -> tmp_path / place with validation images of three of ten classes."""

    def copy(place):
        for path in sorted((folder / 'val').iterdir())[2:5]:
            shutil.copytree(path, tmp_path / place / path.name)
        return tmp_path / place

    return copy


def measure(*flags):
    robustness.main(robustness.get_parser().parse_args(list(map(str, flags))))


def test_a_set_with_some_classes_and_corruptions(finetune, tmp_path, some_classes):
    """The same images in every severity have the same accuracy; what is missing is an error."""
    out, rendition = tmp_path / 'out', some_classes('some')
    flags = ['--init_from', finetune('tuned').last, '--num_workers', 0, '--out', out]
    for severity in range(1, 6):
        some_classes(f'corrupted/blur/{severity}')
    sets = ['--imagenet_r', rendition, '--imagenet_c', tmp_path / 'corrupted']
    measure(*flags, *sets)
    results = json.loads((tmp_path / 'out.json').read_text())
    top1 = results['ImageNet-R']['top1']
    assert results['ImageNet-C']['errors']['blur'] == pytest.approx(100 - top1)
    assert 'mce' not in results['ImageNet-C']
    assert f'| ImageNet-R, top-1 | {top1:.2f} % |' in (tmp_path / 'out.md').read_text()

    shutil.rmtree(tmp_path / 'corrupted/blur/4')
    with pytest.raises(InputError, match='blur/4'):
        measure(*flags, *sets)
    next(rendition.iterdir()).rename(rendition / 'unicorn')
    with pytest.raises(InputError, match='unicorn'):
        measure(*flags, *sets[:2])


def test_classes_without_names_are_not_guessed(finetune, tmp_path, some_classes):
    """A file of ten nameless classes, as timm's, and a set with three: which are they?"""
    last = finetune('tuned', '--epochs', '1').last
    torch.save(torch.load(last, weights_only=True) | {'classes': None}, last)
    flags = ['--init_from', last, '--num_workers', 0, '--out', tmp_path / 'out']
    with pytest.raises(InputError, match='10 classes, without names, not 3'):
        measure(*flags, '--imagenet_a', some_classes('some'))
    assert not (tmp_path / 'out.json').exists()


def test_corrupted_copies(tmp_path):
    """Noise of the stated deviation, PIL's JPEG, and all do more damage at severity 5."""
    pixels = np.random.default_rng(0).integers(110, 146, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (tmp_path / 'images/a').mkdir(parents=True)
    image.save(tmp_path / 'images/a/0.png')
    flags = [str(tmp_path / 'images'), str(tmp_path / 'out')]
    corrupt.main(corrupt.get_parser().parse_args(flags))

    def difference(name, severity):
        copy = Image.open(tmp_path / f'out/{name}/{severity}/a/0.png')
        return (np.asarray(copy, dtype=float) - np.asarray(image)) / 255

    for name, (_, strengths) in corrupt.CORRUPTIONS.items():
        damage = [np.square(difference(name, severity)).mean() for severity in range(1, 6)]
        assert 0 < damage[0] < damage[4], name
        if name == 'our-noise':
            assert np.sqrt(damage) == pytest.approx(strengths, rel=0.05)
        if name == 'our-jpeg':
            image.save(tmp_path / 'pil.jpg', quality=strengths[4])
            pil = np.asarray(Image.open(tmp_path / 'pil.jpg'), dtype=float) / 255
            assert difference(name, 5) + np.asarray(image) / 255 == pytest.approx(pil, abs=1e-9)
