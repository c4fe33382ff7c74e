"""What is wrong with users' images, and with the processes that load them: reported, counted, survived or refused."""

import io
import os
import re
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import Result, command
from PIL import Image

from util import data
from util.folders import ImageFiles


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, 'JPEG')
    return buffer.getvalue()


def png_that_claims(width, height):
    """A PNG of few bytes whose header promises so many pixels."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


# name: (bytes, or what makes the path, and the reason in bad_images.txt)
FAULTS = {
    'truncated.jpg': (jpeg()[:-700], 'truncated'),
    'header_only.jpg': (jpeg()[:200], ''),
    'empty.png': (b'', 'empty'),
    'text.jpg': (b'404 Not Found\n', 'not an image of a known format'),
    'flipped.png': (png_that_claims(8, 8), ''),
    'bomb.png': (png_that_claims(30_000, 30_000), 'decompression bomb'),
    'narrow.png': (png_that_claims(1, 2_000), '1 x 2000 pixels are too long and narrow'),
    'pickle.npy': (lambda path: np.save(path, np.array([print], dtype=object)), 'allow_pickle=False'),
    'folder.png': (os.mkdir, 'Is a directory'),
    'pipe.png': (os.mkfifo, 'empty'),
    'vanished.png': (lambda path: None, 'No such file'),
    'loop.png': (lambda path: os.symlink(path, path), 'Too many levels'),
    os.fsdecode(b'not \xff UTF-8.png'): (b'', 'empty'),
}


def make(folder, name):
    what = FAULTS[name][0]
    path = os.path.join(folder, name)
    if isinstance(what, bytes):
        with open(path, 'wb') as file:
            file.write(what)
    else:
        what(path)
    return path


@pytest.fixture
def faulty(folder, tmp_path):
    """A folder with train/ and val/, each the good images and after them, in name, every fault: (root, good root)."""
    root = tmp_path / 'faulty'
    shutil.copytree(folder, root)
    for split in ('train', 'val'):
        for name in FAULTS:
            make(next((root / split).iterdir()), name)
    return root


@pytest.mark.parametrize('name', FAULTS, ids=ascii)
def test_a_fault_is_reported_and_replaced(name, folder, tmp_path):
    good = sorted(str(path) for path in (folder / 'train').rglob('*.png'))[:5]
    bad = make(tmp_path, name)
    source = ImageFiles('', [os.fsencode(path) for path in (*good, bad)])
    with pytest.raises(ValueError, match=f'{re.escape(bad)}: .*{FAULTS[name][1]}'):
        source[5]
    samples = data.Samples(source, lambda image: image, 4, seed=1)
    (image, noise, problem), again = samples[3, 5], data.Samples(source, lambda image: image, 4, seed=1)[3, 5]
    assert all(re.match(f'{re.escape(bad)}\t.*{FAULTS[name][1]}', line) for line in problem.split('\n'))
    assert any(torch.equal(image, source[index][0]) for index in range(5))
    assert torch.equal(image, again[0]) and torch.equal(noise, again[1])
    stand_ins = {tuple(samples[epoch, 5][0].flatten().tolist()) for epoch in range(20)}
    assert len(stand_ins) > 1  # not always the same


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_run_with_every_fault(workers, faulty, pretrain):
    """A link that loops to a folder above is no image; 'vanished' and the folder are not listed."""
    os.symlink(faulty / 'train', next((faulty / 'train').iterdir()) / 'up')
    flags = ('--data_path', str(faulty), '--num_workers', workers, '--max_bad', '0.6', '--epochs', '2')
    result = pretrain('run', *flags, '--total_batch_size', '64')
    listed = {name for name in FAULTS if name not in ('vanished.png', 'folder.png')}
    with open(result.output_dir / 'bad_images.txt', encoding='utf-8', errors='surrogateescape') as file:
        paths = [line.split('\t')[0] for line in file.read().splitlines()]
    assert len(paths) == len(set(paths))
    assert {os.path.basename(path) for path in paths} <= listed
    counts = [entry for entry in result.entries if 'val_loss' in entry]
    assert [entry['val_bad_images'] for entry in counts] == [len(listed)] * 2


def test_evaluation_leaves_bad_images_out(faulty, folder, pretrain, finetune, linprobe, capsys):
    """Accuracy and neighbours are those of the folder without the faults."""
    jobs = [
        (linprobe, '--knn', '5', pretrain('a', '--epochs', '1')),
        (finetune, '--eval', finetune('b', '--epochs', '1')),
    ]
    printed = {faulty: [], folder: []}
    for root, lines in printed.items():
        for job, *flags, weights in jobs:
            capsys.readouterr()
            init_from = ('--init_from', str(weights.output_dir / 'checkpoint-last.pth'))
            job('measured', *flags, *init_from, '--data_path', str(root), '--max_bad', '0.5')
            lines += re.findall(r'top-1 .* on \d+ images', capsys.readouterr().out)
    assert printed[faulty] == printed[folder] and len(printed[folder]) == 3


def test_the_limit_in_evaluation(faulty, finetune, capsys):
    weights = ('--init_from', str(finetune('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'))
    with pytest.raises(SystemExit) as exit:
        finetune('eval', '--eval', *weights, '--data_path', str(faulty))
    assert exit.value.code == 1
    assert 'images cannot be read, more than --max_bad 0.01' in capsys.readouterr().err


def test_two_processes_of_which_one_can_read_nothing(folder, small_run, tmp_path, pretrain):
    images = sorted(map(str, (folder / 'train').rglob('*.png')))
    (tmp_path / 'val.txt').write_text('\n'.join([images[0], make(tmp_path, 'text.jpg')]))
    flags = ('--val_path', str(tmp_path / 'val.txt'), '--max_bad', '0.5', '--epochs', '1')
    done = command('main_pretrain.py', *small_run('two', *flags), torchrun=2)
    assert done.returncode == 0, done.stderr
    two, one = (
        [entry for entry in result.entries if 'val_loss' in entry]
        for result in (Result(tmp_path / 'two'), pretrain('one', *flags))
    )
    assert two[0]['val_bad_images'] == one[0]['val_bad_images'] == 1
    assert two[0]['val_loss'] == pytest.approx(one[0]['val_loss'], rel=1e-5)


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def test_the_limit_counts_over_processes(folder, small_run, tmp_path):
    images = sorted(map(str, (folder / 'train').rglob('*.png')))[:28]
    bad = [make(tmp_path, name) for name in ('text.jpg', 'empty.png', 'bomb.png', 'narrow.png')]
    (tmp_path / 'list.txt').write_text('\n'.join([*images, *bad]))
    flags = small_run('run', '--data_path', str(tmp_path / 'list.txt'), '--max_bad', '0.05', '--total_batch_size', '32')
    done = command('main_pretrain.py', *flags, torchrun=2)
    assert done.returncode == 1
    assert done.stderr.count('4 of 32 images cannot be read, more than --max_bad 0.05') == 1
    listed = [line for name in ('bad_images.txt', 'bad_images-1.txt') for line in lines_of(tmp_path / 'run' / name)]
    assert len(listed) >= 4 and {line.split('\t')[0] for line in listed} == set(bad)


# --- Loader processes -------------------------------------------------------------------------------------------


# A run of its own, as it ends its process; every read of an image in a worker does something else first.
PATCHED_RUN = """
import os, signal, sys, time, torch
from util import args, errors, folders
read = folders.ImageFiles.__getitem__
def act_and_read(source, index):
    worker = torch.utils.data.get_worker_info()
    if worker is not None:
        ACTION
    return read(source, index)
folders.ImageFiles.__getitem__ = act_and_read
import main_pretrain
args.run_job(main_pretrain.main, main_pretrain.get_parser(), sys.argv[1:])
"""


def run_with_workers(action, arguments):
    """main_pretrain with two workers that do an action, a line of Python, before each image."""
    return command('-c', PATCHED_RUN.replace('ACTION', action), *arguments, '--num_workers', '2', timeout=120)


@pytest.mark.parametrize('name', ['SIGKILL', 'SIGBUS'])
def test_a_worker_that_dies_is_reported(name, small_run):
    done = run_with_workers(f'os.kill(os.getpid(), signal.{name})', small_run('run'))
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert re.search(r'error: DataLoader worker .*(killed|exited|bus error)', done.stderr, re.IGNORECASE), done.stderr


def test_a_worker_that_hangs_does_not_keep_a_failed_run(small_run):
    action = "time.sleep(worker.id * 600); raise errors.RunError('the disk is gone')"
    done = run_with_workers(action, small_run('run'))
    assert done.returncode == 1 and done.stderr.endswith('error: the disk is gone\n'), done.stderr
    assert 'Traceback' not in done.stderr


def test_workers_leave_signals_to_the_run(small_run, pretrain, tmp_path):
    signals = '(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)'
    done = run_with_workers(f'[os.kill(os.getpid(), s) for s in {signals}]', small_run('signals', '--epochs', '1'))
    assert done.returncode == 0, done.stderr
    assert Result(tmp_path / 'signals').losses == pretrain('undisturbed', '--epochs', '1').losses


def test_a_slow_source_is_reported_once(pretrain, monkeypatch, capsys):
    """With the share of a logged window, which is not the first, as that includes the start of the workers."""
    read = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, '__getitem__', lambda *key: time.sleep(0.05) or read(*key))
    shares = [entry['data_wait'] for entry in pretrain('slow', '--epochs', '1').entries if 'data_wait' in entry]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'waits for data' in line]
    assert any(f'{share:.0%} of the time; see "Slow data" in docs/data.md' in line for share in shares[1:])
    pretrain('short', '--epochs', '1', '--log_every', '99')
    assert 'waits for data' not in capsys.readouterr().out


def test_flat_images_are_reported_once(folder, pretrain, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / 'images')
    for name in ('white.png', 'black.png'):
        Image.new('RGB', (20, 20), name.split('.')[0]).save(next((tmp_path / 'images/train').iterdir()) / name)
    result = pretrain('run', '--data_path', str(tmp_path / 'images'), '--total_batch_size', '66', '--epochs', '2')
    (line,) = [line for line in capsys.readouterr().out.splitlines() if data.FLAT in line]
    assert '2 images are one flat colour, such as ' in line and len(lines_of(result.output_dir / 'bad_images.txt')) == 2
