"""bench.py: its operation counts, that its peers are the same model, and short runs."""

from argparse import Namespace
from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
from util import data
from util.args import run_job
from util.weights import convert_state_dict


def arguments(model, task='pretrain'):
    return Namespace(model=model, task=task, input_size=None)


@pytest.mark.parametrize('size, gigaflops', [('small', 25.4), ('base', 58.7)])
def test_operations_are_those_of_mae(size, gigaflops):
    """Published, of a training step; fusion sends 50 tokens through K - 1 square layers."""
    args = arguments(f'vit_{size}_patch16')
    mae, mff = bench.forward_flops('mae+compile', args), bench.forward_flops('ours', args)
    assert 3e-9 * mae == pytest.approx(gigaflops, abs=0.05)
    sizes = bench.MODELS[args.model]
    assert mff - mae == 2 * 50 * (len(sizes['fuse_layers']) - 1) * sizes['embed_dim'] ** 2


@pytest.mark.parametrize('task', ['pretrain', 'finetune', 'segment'])
def test_backward_takes_twice_the_operations_of_forward(task):
    args = arguments('vit_nano_patch4', task)
    model, images, targets, loss_fn = bench.create('ours', args, 2)
    images.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # recomputes nothing in the backward pass
        loss = loss_fn(model.train(), images, targets)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    forward = 2 * bench.forward_flops('ours', args)
    assert backward.get_total_flops() == pytest.approx(2 * forward, rel=0.02)


@pytest.mark.parametrize('peer', bench.PEERS)
def test_peers_are_the_same_model(peer):
    """Its weights in ours give its loss, and all are trained in both."""
    pytest.importorskip(peer)
    args = arguments('vit_base_patch16')
    theirs, images, noise, their_loss = bench.create(peer, args, 1)
    ours, _, _, our_loss = bench.create(bench.PEERS[peer], args, 1)
    ours.load_state_dict(convert_state_dict(theirs.state_dict()))
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trained[0] == trained[1]
    with torch.no_grad(), mock.patch('torch.rand', lambda *shape, **options: noise):
        losses = our_loss(ours, images, noise), their_loss(theirs, images, noise)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


def test_both_loaders_give_the_same_images(folder, monkeypatch):
    """From the same seed: nothing is resized."""
    words = f'loader --data_path {folder}/train --batch_size 1 --num_workers 0'
    args, cpu, folders = bench.get_parser().parse_args(words.split()), torch.device('cpu'), []
    sizes = {'img_size': (18, 18), 'in_chans': 3, 'patch_size': 6}
    monkeypatch.setattr(bench, 'model_sizes', lambda *_, **__: sizes)
    monkeypatch.setattr(bench, 'DataLoader', lambda images, *_, **__: folders.append(images) or [])
    bench.open_image_folder(args, cpu)
    paths = [path for path, _ in folders[0].imgs]
    loader = bench.open_loader(args, cpu)
    for index in range(6):
        images, noise = next(loader)
        data.seed_generators(0, 0, index)
        torch.rand(len(noise[0]))  # the masks come first
        expected, _ = folders[0][paths.index(loader.samples.source.path(index))]
        assert torch.allclose(images[0], expected, atol=1e-6)


def test_the_product_on_a_cpu_is_in_fp32():
    """bf16 without instructions for it takes a minute."""
    call, operations = bench.product(Namespace(amp='bf16'), torch.device('cpu'))
    assert call().dtype == torch.float32 and operations == 2 * 1024**3


def test_ratios_are_of_the_same_round():
    rows = bench.compare({'a': [10.0, 10.0, 12.0], 'b': [20.0, 30.0, 36.0]})
    assert [row['speed : a'] for row in rows] == ['1 (1 to 1)', '3 (2 to 3)']
    assert rows[1]['images/s'] == '30 (20 to 36)'


@pytest.mark.parametrize(
    'flags, variants',
    [
        ('step --variants ours mae+checkpointing ours+data', 'ours mae+checkpointing ours+data'),
        ('step --task finetune --variants ours', 'ours'),
        ('step --task segment --variants ours', 'ours'),
        ('loader', 'ImageFolder ours'),
    ],
)
def test_short_runs(folder, capsys, flags, variants):
    flags += ' --model vit_nano_patch4 --batch_size 2 --rounds 2 --num_workers 1'
    flags += f' --device cpu --data_path {folder}/train'
    run_job(bench.main, bench.get_parser(), flags.split())
    cells = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line[:1] == '|']
    assert [line[0].strip('| ') for line in cells] == ['variant', '---', *variants.split()]
    assert all(float(line[2].split()[0]) > 0 for line in cells[2:])


def test_unknown_variants_are_not_taken_for_ours(error_of):
    flags = ['step', '--device', 'cpu', '--model', 'vit_nano_patch4', '--variants', 'ours+fast']
    assert 'ours+fast' in error_of(run_job, bench.main, bench.get_parser(), flags)
