"""The benchmark of the loader: both pipelines give the same images, and a short run."""

import json
import shutil

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from benchmarks import loader
from util import data
from util.args import run_job
from util.shapes import Shapes
from util.sources import open_source


@pytest.mark.parametrize('crop, side, tolerance', [('simple', 224, 0), ('simple', 300, 2), ('rrc', 300, 2)])
def test_both_pipelines_give_the_same_images(crop, side, tolerance, tmp_path):
    """From the same seed: to the bit where nothing is resized, else as near as PIL's and torch's resizing are."""
    shapes = Shapes('train', (side, side))
    for index in range(6):
        to_pil_image(shapes[index][0]).save(tmp_path / f'{index}.png')
    source = open_source(str(tmp_path))
    plain, ours = loader.Plain(source, crop), loader.ours(source, crop)
    batches = data.Loader(ours, [[(0, index)] for index in range(6)], torch.device('cpu'), loader.STATISTICS, 0)
    std = torch.tensor(loader.STATISTICS[1]).view(3, 1, 1)
    for index, (images, noise) in enumerate(batches):
        data.seed_generators(0, 0, index)
        torch.rand(noise.shape[1])  # the masks come first
        levels = 255 * std * (images[0] - plain[0, index][0]).abs()
        assert levels.max() <= tolerance + 1e-3


def test_a_short_run(folder, tmp_path, capsys):
    flags = f'--data_path {folder} --crops simple --workers 1 --batch_size 8 --images 8 --rounds 2 --device cpu'
    loader.main(loader.get_parser().parse_args([*flags.split(), '--out', str(tmp_path / 'out')]))
    assert 'pixels of the copy: mean difference ' in capsys.readouterr().out
    result = json.loads((tmp_path / 'out.json').read_text())
    assert [row['by'] for row in result['table']] == ['one core', '1 worker']
    assert all(rate > 0 for turns in result['rounds'].values() for turn in turns for rate in turn.values())


def test_table():
    rounds = {('simple', 0): [{'plain': 2.0, 'ours': 4.0, 'resized': 8.0}, {'plain': 1.0, 'ours': 4.0, 'resized': 4.0}]}
    (row,) = loader.summarise(rounds)
    assert (row['crop'], row['by']) == ('simple', 'one core')
    assert row['ours : plain'] == '3 (2 to 4)' and row['resized : plain'] == '4 (4 to 4)'


def test_a_copy_that_lacks_an_image_is_not_compared(folder, tmp_path):
    """Images that cannot be read are left out of a copy, and replaced where the source is read."""
    shutil.copytree(folder / 'val', tmp_path / 'val')
    source = open_source(str(tmp_path / 'val'))
    next((tmp_path / 'val').rglob('*.png')).unlink()
    assert 'not compared' in loader.difference(source, open_source(str(tmp_path / 'val')))


def test_a_mistake_shows_before_anything_is_timed(capsys):
    with pytest.raises(SystemExit) as exit:
        run_job(loader.main, loader.get_parser(), ['--data_path', 'shapes'])
    assert exit.value.code == 2 and 'not a folder of images' in capsys.readouterr().err
