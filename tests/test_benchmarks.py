"""The benchmarks: their operation counts, their tables, and one short run of each."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report, scaling, step
from models_mff import MaskedAutoencoderMFF, model_sizes
from util.args import run_job


@pytest.mark.parametrize('size, gigaflops', [('small', 25.4), ('base', 58.7), ('large', 124.5)])
def test_flops_are_those_of_mae(size, gigaflops):
    """Published arithmetic of a training step of plain MAE; fusion adds V + 1 tokens through K - 1 square layers."""
    with torch.device('meta'):
        model = step.model_of_size(size)
        plain = MaskedAutoencoderMFF(**model_sizes(f'vit_{size}_patch16', fuse_layers=(len(model.blocks) - 1,)))
    K, D = len(model.fuse_layers), model.pos_embed.shape[-1]
    assert 3e-9 * step.forward_flops(plain) == pytest.approx(gigaflops, abs=0.05)
    assert step.forward_flops(model) - step.forward_flops(plain) == 2 * 50 * (K - 1) * D**2


@pytest.mark.parametrize('ratio', [0.75, 0.5])
def test_backward_takes_twice_the_forward_pass(ratio):
    model = step.model_of_size('tiny')
    with sdpa_kernel(SDPBackend.MATH):  # which recomputes nothing in the backward pass
        loss = model(torch.randn(1, 3, 32, 32), ratio)[0]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    pixels = 2 * model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()  # need no gradient
    assert backward.get_total_flops() == 2 * step.forward_flops(model, ratio) - pixels


def test_table_of_steps():
    rates = {'mff': [20.0, 30.0, 36.0], 'mmpretrain': [10.0, 10.0, 12.0], 'product': [1e12, 2e12, 4e12]}
    rows = step.summarise('base', rates, {'mff': 1.5, 'mmpretrain': 3.0, 'product': 0.1})
    assert [row['variant'] for row in rows] == ['mff', 'mmpretrain']
    assert rows[0]['speed : mmpretrain'] == '3 (2 to 3)' and rows[0]['memory : mmpretrain'] == '0.5'
    assert rows[0]['images/s'] == '30 (20 to 36)'
    share = float(rows[0]['of the matrix product'].rstrip('%')) / 100
    assert share == pytest.approx(59.6e9 * 30 / 2e12, rel=0.01)  # the middle of the three rounds
    half = step.summarise(
        'base', rates | {'mmpretrain+fp16': [40.0] * 3}, dict.fromkeys(rates, 1) | {'mmpretrain+fp16': 3}
    )
    assert half[0]['speed : mmpretrain+fp16'] == '0.75 (0.5 to 0.9)' and half[0]['memory : mmpretrain+fp16'] == '0.333'
    without = step.summarise('base', {'mff': rates['mff']}, {'mff': 1.5})  # where the product failed
    assert 'of the matrix product' not in without[0]
    alone = step.summarise('base', {name: rates[name] for name in ('mff', 'product')}, {'mff': 1.5})
    assert alone[0]['speed : mff'] == '1 (1 to 1)'


def test_table_of_scaling():
    one, two = {'synchronised': 8.0, 'not': 8.0}, {'synchronised': 5.0, 'not': 4.0}
    rows = scaling.summarise({1: [one, one], 2: [two, two]}, images=40)
    assert [row['speed : 1'] for row in rows] == ['1 (1 to 1)', '1.6 (1.6 to 1.6)']
    assert [row['efficiency'] for row in rows] == ['100%', '80%']
    assert [row['lost to synchronising'] for row in rows] == ['0 (0 to 0) %', '20 (20 to 20) %']
    assert [row['images/s'] for row in rows] == ['5 (5 to 5)', '8 (8 to 8)']


def test_table_is_markdown():
    assert report.table([{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]) == '| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |'


@pytest.fixture
def benchmark(monkeypatch, capsys, tmp_path):
    """benchmark(module, flags) -> what it printed; it writes tmp_path / 'out.md' and 'out.json'."""

    def start(module, flags):
        argv = ['--device', 'cpu', *flags.split(), '--out', str(tmp_path / 'out')]
        monkeypatch.setattr('sys.argv', [module.__file__, *argv])
        run_job(module.main, module.get_parser(), argv)
        return capsys.readouterr().out

    return start


def test_step_runs(benchmark, tmp_path):
    flags = '--models nano --variants mff --batch_size 2 --steps 1 --rounds 1 --amp bf16'
    assert benchmark(step, flags).endswith((tmp_path / 'out.md').read_text())  # the table comes last
    result = json.loads((tmp_path / 'out.json').read_text())
    assert result['rounds']['nano']['rates']['mff'][0] > 0 and 'mff' in result['rounds']['nano']['memory']
    assert [row['variant'] for row in result['table']] == ['mff'] and 'benchmarks.step --device cpu' in result[
        'command'
    ]


def test_profile_finds_what_is_fused(benchmark):
    printed = benchmark(step, '--models nano --batch_size 2 --profile')
    assert 'scaled_dot_product_flash' in printed and '_fused_adamw_' in printed


def test_scaling_runs(benchmark, tmp_path):
    benchmark(scaling, '--processes 2 --model nano --total_batch_size 4 --batch_size 1 --steps 1 --rounds 1')
    result = json.loads((tmp_path / 'out.json').read_text())
    assert [row['processes'] for row in result['table']] == [2]
    assert all(seconds > 0 for seconds in result['rounds']['2'][0].values())


@pytest.mark.parametrize(
    'module, flags, message',
    [
        (scaling, '--processes 3 --total_batch_size 32', '30 or 33 can'),
        (step, '--models huge --variants mmpretrain --device abacus', 'no such device'),
    ],
)
def test_a_mistake_shows_before_anything_is_timed(benchmark, capsys, module, flags, message):
    with pytest.raises(SystemExit) as exit:
        benchmark(module, flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err
