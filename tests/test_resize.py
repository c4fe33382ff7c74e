"""A resized copy: the images, labels and order of the source, whatever interrupts the copying."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from util import data, resize, transforms
from util.args import run


@pytest.fixture
def resized(tmp_path):
    """resized(src, *flags) -> tmp_path / 'copy', resized for 16 pixels."""

    def start(src, *flags):
        argv = [str(src), str(tmp_path / 'copy'), '--size', '16', '--num_workers', '0']
        run(resize.main, resize.get_parser(), [*argv, '--download_dir', str(tmp_path / 'cache'), *map(str, flags)])
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
    source, copy = data.open_source(str(src), 'train'), data.open_source(str(resized(src, *flags)), 'train')
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
        source = data.open_source(str(folder), split)
        expected = [(f'{name}.jpg', label) for name, label in labelled(source)]
        assert labelled(data.open_source(str(copy), split)) == expected
    size = sum(path.stat().st_size for path in copy.glob('train/*/*'))
    assert f'64 images, 0.0 MB, in {copy} {size / 1e6:.1f} MB' in capsys.readouterr().out


def test_a_tar(folder, resized, tmp_path):
    with tarfile.open(tmp_path / 'all.tar', 'w') as archive:
        archive.add(folder, 'shapes/deep')
    copy = resized(tmp_path / 'all.tar', '--lossless')
    cover = transforms.Cover((16, 16))
    for split in ('train', 'val'):
        source, copied = data.open_source(str(folder), split), data.open_source(str(copy), split)
        assert [label for _, label in labelled(copied)] == [label for _, label in labelled(source)]
        assert torch.equal(copied[5][0], cover(source[5][0]))


def test_a_list_stays_a_list(folder, resized, tmp_path):
    """Its order and its classes, which have nothing to do with the folders."""
    train = data.open_source(str(folder), 'train')
    paths = [train.path(index) for index in (40, 3, 3, 17)]
    lines = [paths[0], os.path.relpath(paths[1], tmp_path), paths[2], paths[3]]
    (tmp_path / 'list.txt').write_text(''.join(f'{line}\t{"ab"[i % 2]}\n' for i, line in enumerate(lines)))
    copy = resized(tmp_path / 'list.txt', '--lossless')
    copied, cover = data.open_source(str(copy / 'list.txt'), 'train'), transforms.Cover((16, 16))
    assert [label for _, label in labelled(copied)] == ['a', 'b', 'a', 'b']
    for index, number in enumerate((40, 3, 3, 17)):
        assert torch.equal(copied[index][0], cover(train[number][0]))
    assert len(list(copy.rglob('*.bmp'))) == 3


def test_arrays_and_grey(resized, tmp_path):
    array = np.random.default_rng(0).integers(0, 65536, (30, 20, 5), dtype=np.uint16)
    (tmp_path / 'arrays').mkdir()
    np.save(tmp_path / 'arrays/a.npy', array)
    copy = resized(tmp_path / 'arrays', '--in_chans', '5')
    expected = transforms.Cover((16, 16))(transforms.array_to_tensor(array, 5))
    assert torch.equal(data.open_source(str(copy), 'train', 5)[0][0], expected)
    shutil.rmtree(copy)
    copy = resized(photographs(tmp_path / 'grey'), '--in_chans', '1')
    assert Image.open(copy / '0.JPEG').mode == 'L' and (copy / 'drawn.png.jpg').exists()


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
    for count in (1, 30, 40):  # the third is killed in val/
        killed_at(count, resized, folder)
        there = {name: text for name, text in contents(tmp_path / 'copy').items() if '.tmp' not in name}
        assert there.items() <= whole.items()
        written = {name: (tmp_path / 'copy' / name).stat().st_ino for name in there}
    assert len(there) == 1 + 29 + 39
    assert contents(resized(folder)) == whole
    assert all((tmp_path / 'copy' / name).stat().st_ino == number for name, number in written.items())


def test_bad_images_are_left_out_and_listed(folder, resized, tmp_path, capsys):
    shutil.copytree(folder / 'train', tmp_path / 'src')
    bad = sorted((tmp_path / 'src').rglob('*.png'))[10]
    bad.write_bytes(b'no image')
    with pytest.raises(SystemExit) as exit:
        resized(tmp_path / 'src')
    assert exit.value.code == 1 and '1 of 64 images cannot be read, more than --max_bad' in capsys.readouterr().err
    for _ in range(2):
        copy = resized(tmp_path / 'src', '--max_bad', '0.1')
        assert (copy / 'bad_images.txt').read_text() == f'{bad}\tno image of a known format\n'
        assert len(data.open_source(str(copy), 'train')) == 63
    assert '1 that cannot be read left out' in capsys.readouterr().out


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--quality', '90'], 'was made with'),
        (['--lossless'], 'was made with'),
        (['--in_chans', '1'], 'was made with'),
        (['--size', '16', '24'], 'was made with'),
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

    refused('shapes', 'only images in files can be copied')
    refused(tmp_path / 'nothing', 'no such folder or file')
    photographs(tmp_path / 'src', 2)
    shutil.copy(tmp_path / 'src/drawn.png', tmp_path / 'src/drawn.png.jpg')
    refused(tmp_path / 'src', 'two images would get one name')
    shutil.rmtree(tmp_path / 'copy')
    photographs(tmp_path / 'copy')
    refused(folder, 'not empty')
    shutil.copytree(tmp_path / 'copy', tmp_path / 'above/images')
    refused(tmp_path, 'lies inside')
