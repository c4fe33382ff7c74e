"""A resized copy: the images, labels and order of the source, whatever interrupts the copying."""

import io
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from util import resize, transforms
from util.args import ArgumentParser, add_common_arguments, run_job
from util.folders import Options
from util.images import array_to_tensor
from util.sources import open_source, open_sources


@pytest.fixture
def resized(tmp_path):
    """resized(src, *flags) -> tmp_path / 'copy', resized for 16 pixels."""

    def start(src, *flags):
        argv = [str(src), str(tmp_path / 'copy'), '--size', '16', '--num_workers', '0']
        run_job(resize.main, resize.get_parser(), [*argv, *map(str, flags)])
        return tmp_path / 'copy'

    return start


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def labelled(source):
    return [(os.fsdecode(name), source.classes[label]) for name, label in zip(source.names, source.labels)]


def photographs(root, count=12):
    """JPEGs of many sizes with detail at all scales, and one PNG that needs a new suffix."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for index in range(count):
        height, width = rng.integers(20, 90, 2)
        noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
        noise.save(root / f'{index}.JPEG', quality=90)
    noise.save(root / 'drawn.png')
    return root


# --- The same images ------------------------------------------------------------------------------------------


def test_a_lossless_copy_gives_the_same_run(folder, resized, pretrain):
    copy = resized(folder, '--lossless')
    assert Image.open(next(copy.rglob('*.bmp'))).size == (16, 17)  # of 18 x 20 pixels
    assert pretrain('copy', '--data_path', str(copy)).losses == pretrain('source').losses


@pytest.mark.parametrize('flags', [['--lossless'], ['--quality', '95'], ['--quality', '60']])
def test_pixels_are_those_of_the_uncached_path(flags, resized, tmp_path):
    src = photographs(tmp_path / 'src')
    source, copy = open_source(str(src), 'train'), open_source(str(resized(src, *flags)), 'train')
    cover = transforms.Cover((16, 16))
    for index in range(len(source)):
        uncached, cached = cover(source[index][0]), copy[index][0]
        assert cover(cached) is cached  # nothing is resized twice
        if flags == ['--lossless']:
            assert torch.equal(cached, uncached)
        else:  # what PIL makes of it at this quality
            buffer = io.BytesIO()
            Image.fromarray(uncached.permute(1, 2, 0).numpy()).save(buffer, 'JPEG', quality=int(flags[1]))
            assert np.array_equal(cached.permute(1, 2, 0).numpy(), np.array(Image.open(buffer)))


@pytest.mark.parametrize('workers', [0, 2])
def test_names_labels_and_order(folder, resized, tmp_path, workers, capsys):
    shutil.copytree(folder, tmp_path / 'src')
    (tmp_path / 'src/val').rename(tmp_path / 'src/validation')
    copy = resized(tmp_path / 'src', '--num_workers', workers)
    assert sorted(path.name for path in copy.iterdir()) == ['resize.json', 'train', 'validation']
    for split in ('train', 'val'):
        source = open_source(str(folder), split)
        expected = [(f'{name}.jpg', label) for name, label in labelled(source)]
        assert labelled(open_source(str(copy), split)) == expected
    assert f'84 images, 0.1 MB, in {copy} 0.1 MB' in capsys.readouterr().out


@pytest.mark.parametrize('flags', [[], ['--lossless']])
def test_a_copy_holds_out_what_its_source_does(flags, resized, tmp_path):
    src, sizes = photographs(tmp_path / 'src'), {'in_chans': 3, 'img_size': (16, 16)}
    held_out = []
    for root in (src, resized(src, *flags)):
        args = ArgumentParser()
        add_common_arguments(args)
        val = open_sources(args.parse_args(['--data_path', str(root), '--val_share', '0.4']), sizes)[1]
        held_out.append([val.path(index).removeprefix(f'{root}/').partition('.')[0] for index in range(len(val))])
    assert held_out[0] == held_out[1] and len(held_out[0]) > 1


def test_arrays_and_grey(resized, tmp_path):
    array = np.random.default_rng(0).integers(0, 65536, (30, 20, 5), dtype=np.uint16)
    (tmp_path / 'arrays').mkdir()
    np.save(tmp_path / 'arrays/a.npy', array)
    copy = resized(tmp_path / 'arrays', '--in_chans', '5')
    expected = transforms.Cover((16, 16))(array_to_tensor(array, 5))
    assert torch.equal(open_source(str(copy), options=Options(in_chans=5))[0][0], expected)
    shutil.rmtree(copy)
    copy = resized(photographs(tmp_path / 'grey'), '--in_chans', '1')
    assert Image.open(copy / '0.JPEG').mode == 'L' and (copy / 'drawn.png.jpg').exists()


def test_transparent_images_are_composited_once(resized, tmp_path):
    (tmp_path / 'src').mkdir()
    Image.new('RGBA', (20, 20)).save(tmp_path / 'src/a.png')
    copy = resized(tmp_path / 'src', '--lossless', '--background', '1', '2', '3')
    assert np.array(Image.open(copy / 'a.png.bmp')).reshape(-1, 3).tolist() == [[1, 2, 3]] * 256


# --- Interruptions and faults ---------------------------------------------------------------------------------


def killed_at(count, start, *arguments):
    """start(...) in a process that is killed as it is about to put its count-th file in place."""

    def work():
        replace, calls = os.replace, []

        def replace_or_die(*names):
            calls.append(names)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = replace_or_die
        start(*arguments)

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_copy_goes_on(folder, resized, tmp_path):
    whole = contents(resized(folder))
    shutil.rmtree(tmp_path / 'copy')
    for count in (1, 30, 40):  # the first is about to write resize.json
        killed_at(count, resized, folder)
        there = {name: text for name, text in contents(tmp_path / 'copy').items() if '.tmp' not in name}
        assert there.items() <= whole.items()
        written = {name: (tmp_path / 'copy' / name).stat().st_ino for name in there}
    assert len(there) == 29 + 39
    assert contents(resized(folder)) == whole
    assert all((tmp_path / 'copy' / name).stat().st_ino == number for name, number in written.items())


def test_bad_images_are_left_out_and_listed(folder, resized, tmp_path, capsys):
    shutil.copytree(folder / 'train', tmp_path / 'src')
    bad = sorted((tmp_path / 'src').rglob('*.png'))[10:14]
    for path in bad:
        path.write_bytes(b'no image')
    with pytest.raises(SystemExit) as exit:
        resized(tmp_path / 'src')
    assert exit.value.code == 1 and '4 of 64 images cannot be read, more than --max_bad' in capsys.readouterr().err
    for _ in range(2):
        copy = resized(tmp_path / 'src', '--max_bad', '0.1')
        listed = (copy / 'bad_images.txt').read_text()
        assert listed == ''.join(f'{path}\tnot an image of a known format\n' for path in bad)
        assert len(open_source(str(copy), 'train')) == 60
    assert 'Left out, as they cannot be read: 4 (see ' in capsys.readouterr().out


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--quality', '90'], 'was made with'),
        (['--lossless'], 'was made with'),
        (['--in_chans', '1'], 'was made with'),
        (['--size', '16', '24'], 'was made with'),
        (['--background', '0', '0', '0'], 'was made with'),
    ],
)
def test_a_copy_is_of_one_kind(flags, message, folder, resized, capsys):
    copy = resized(folder)
    before = contents(copy)
    with pytest.raises(SystemExit) as exit:
        resized(folder, *flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err and contents(copy) == before
    assert json.loads((copy / 'resize.json').read_text())['size'] == [16, 16]


def test_mistakes(folder, resized, tmp_path, capsys):
    def refused(src, message):
        with pytest.raises(SystemExit) as exit:
            resized(src)
        assert exit.value.code == 2 and message in capsys.readouterr().err

    refused('shapes', 'not a folder of images')
    refused(tmp_path, 'no image')
    photographs(tmp_path / 'src', 2)
    shutil.copy(tmp_path / 'src/drawn.png', tmp_path / 'src/drawn.png.jpg')
    refused(tmp_path / 'src', 'two images would get one name')
    assert not (tmp_path / 'copy').exists()
    photographs(tmp_path / 'copy')
    refused(folder, 'not empty')
    (tmp_path / 'src/drawn.png.jpg').unlink()
    refused(tmp_path, 'lies inside')
