"""Fine-tuning and probing: against reference tensors, formulas and libraries, and as whole runs."""

import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Processes, Result, our_names, read_val, same_weights
from timm.data import Mixup
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import v2

import engine_classify
import main_finetune
import main_linprobe
from models_mff import create_encoder, model_sizes
from util import checkpoint, data
from util.optim import param_groups
from util.weights import convert_state_dict

JOBS = {'finetune': main_finetune, 'linprobe': main_linprobe}
FLAGS = {  # of a run in which all that is random is on, with two micro-batches a step
    'finetune': '--mixup 0.8 --cutmix 1.0 --drop_path 0.2 --batch_size 8'.split(),
    'linprobe': '--lr 0.5 --batch_size 8'.split(),
}


@pytest.fixture(params=JOBS)
def job(request):
    """(module, a function that starts a small run of it, its flags) of both jobs."""
    name = request.param
    return JOBS[name], request.getfixturevalue(name), FLAGS[name]


@pytest.fixture(scope='module')
def reference():
    return torch.load(Path(__file__).parent / 'data/cls_tiny.pt', weights_only=True)


def tiny_encoder(c, global_pool):
    return VisionTransformer(
        img_size=c['img'], patch_size=c['patch'], embed_dim=c['dim'], depth=c['depth'],
        num_heads=c['heads'], num_classes=0, global_pool=global_pool,
    )  # fmt: skip


# --- Against mmpretrain's tensors, formulas and timm ----------------------------------------------


def test_fine_tuning_is_the_reference(reference):
    """Logits, the learning-rate scale of every parameter, and which do not decay."""
    expected = reference['finetune']
    model = tiny_encoder(reference['config'], 'avg')
    main_finetune.give_head(model, reference['config']['classes'])
    model.load_state_dict(convert_state_dict(expected['state']))
    assert torch.allclose(model.eval()(expected['imgs']), expected['logits'], atol=1e-5)

    groups = param_groups(model, 0.05, layer_decay=0.65)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales, undecayed = {}, set()
    for group in groups:
        scales |= {names[id(p)]: group['lr_scale'] for p in group['params']}
        undecayed |= {names[id(p)] for p in group['params'] if not group['weight_decay']}
    theirs = our_names(expected['lr_scale'], expected['state'])
    assert scales == pytest.approx(theirs, rel=1e-12)
    assert undecayed == our_names(dict.fromkeys(expected['no_decay']), expected['state']).keys()
    assert sum(len(group['params']) for group in groups) == len(names)


def test_linear_probe_is_the_reference(reference):
    expected, c = reference['linprobe'], reference['config']
    model = engine_classify.LinearProbe(tiny_encoder(c, 'token'), c['classes'])
    for name, value in convert_state_dict(expected['state']).items():
        own = name if name.startswith(('bn.', 'head.')) else f'backbone.{name}'
        model.state_dict()[own].copy_(value)
    assert torch.allclose(model.eval()(expected['imgs']), expected['logits'], atol=1e-5)


@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_lars_is_the_formula(decay):
    """You et al. (2017) as in MAE: the weight's step is scaled by 0.001 |w| / |g|, if it decays or
    not; the bias's is not, and it does not decay."""
    torch.manual_seed(0)
    layer, buffers = torch.nn.Linear(5, 3).double(), {'weight': 0.0, 'bias': 0.0}
    optimizer = main_linprobe.create_lars(layer, lr=0.7, momentum=0.9, weight_decay=decay)
    for lr in (0.7, 0.5, 0.1):
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.zero_grad()
        layer(torch.randn(8, 5).double()).square().mean().backward()
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        optimizer.step()
        for name, p in layer.named_parameters():
            gradient, w = p.grad, before[name]
            if name == 'weight':
                norms = gradient.norm() + decay * w.norm()
                gradient = (gradient + decay * w) * 0.001 * w.norm() / norms
            buffers[name] = 0.9 * buffers[name] + gradient
            assert torch.allclose(p, w - lr * buffers[name], rtol=1e-9)


def test_head():
    model = create_encoder(model_sizes('vit_tiny_patch4'))
    main_finetune.give_head(model, 1000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert (model.head.bias == 0).all()


def test_probes_backbone_stays_in_eval_mode():
    encoder = create_encoder(model_sizes('vit_nano_patch4'), 'token', drop_path=0.5)
    model = engine_classify.LinearProbe(encoder, 10).train()
    assert model.bn.training and not any(module.training for module in encoder.modules())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ['head.weight', 'head.bias']


def test_class_weights():
    """Inverse frequencies, at most ten times the smallest, of mean 1 over the images."""
    labels = np.repeat([0, 1, 2], [100, 40, 1])
    source = Namespace(labels=labels, classes=['a', 'b', 'c', 'none'])
    weights = engine_classify.class_weights(source)
    assert (weights / weights[0]).tolist() == pytest.approx([1, 2.5, 10, 10])
    assert weights[labels].mean().item() == pytest.approx(1)

    logits, hard = torch.randn(6, 4), torch.tensor([0, 0, 1, 2, 1, 0])
    soft, smooth = torch.rand(6, 4).softmax(1), 0.9 * F.one_hot(hard, 4) + 0.1 / 4
    args, device = Namespace(class_weights=True), torch.device('cpu')
    for given, targets in ((hard, smooth), (soft, soft)):
        criterion = engine_classify.create_criterion(args, source, device, 0.1, given is soft)
        expected = -(targets * weights * logits.log_softmax(1)).sum(1).mean()
        assert criterion(logits, given).item() == pytest.approx(expected.item(), rel=1e-5)


# --- Whole runs -----------------------------------------------------------------------------------


def test_mixing_is_timms_from_the_seed_of_step_and_place(finetune, monkeypatch):
    mixed = []

    class Recorded(Mixup):
        def __call__(self, imgs, labels):
            before = imgs.clone()
            mixed.append((before, labels, *super().__call__(imgs, labels)))
            return mixed[-1][2:]

    monkeypatch.setattr(main_finetune, 'Mixup', Recorded)
    finetune('run', *FLAGS['finetune'], '--epochs', '1', '--seed', '3')
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    for number, (before, labels, images, targets) in enumerate(mixed):
        step, micro_step = divmod(number, 2)
        data.seed_generators(3, step, 8 * micro_step)
        expected = mixup(before.clone(), labels)
        assert torch.equal(images, expected[0]) and torch.equal(targets, expected[1])
        assert number > 2 or not torch.equal(images, before)
    assert len(mixed) == 8


def test_processes_change_nothing_at_the_same_micro_batch(job, small_run, tmp_path, capsys):
    """Nor is an evaluation while training another than --eval, by one process or by two.

    Of 20 images, which are no multiple of 2 x 8; a probe has statistics that processes share.
    """
    module, start, flags = job
    flags = [*flags, '--epochs', '1']
    alone = start('alone', *flags)
    two = Processes(module, *[small_run('two', *flags)] * 2)
    assert two.wait() == [0, 0], two.printed(errors=True)
    two = Result(tmp_path / 'two')
    assert two.losses == pytest.approx(alone.losses, rel=1e-5)
    assert module is main_linprobe or same_weights(two, alone, atol=2e-5)

    evaluate = [*flags, '--eval', '--init_from', two.last]
    capsys.readouterr()
    start('eval', *evaluate)
    lines = capsys.readouterr().out.splitlines()[-2:]
    values = two.entries[-1]
    expected = 'top-1 {val_top1:.2f} %  top-5 {val_top5:.2f} %  balanced accuracy '
    expected += '{val_balanced:.2f} %  loss {val_loss:.4f}  on 20 images'
    assert lines[0] == expected.format(**values)
    both = Processes(module, *[small_run('eval', *evaluate)] * 2)
    assert both.wait() == [0, 0] and both.printed().splitlines()[-2:] == lines
    assert not (tmp_path / 'eval').exists()


def test_workers_and_interruptions_change_nothing(job, stop_at, error_of):
    """The batch on a device must stay, for mixing, drop path and BatchNorm."""
    _, start, flags = job
    flags = [*flags, '--epochs', '2']
    whole = start('whole', *flags)
    stop_at(6, start, 'cut', *flags)
    assert 'batch_size 8 -> 16' in error_of(start, 'cut', *flags, '--batch_size', '16')
    resumed = start('cut', *flags, '--num_workers', '2')
    assert resumed.losses == whole.losses and same_weights(resumed, whole)


def test_layer_decay_0_trains_norm_and_head_alone(finetune):
    flags = '--layer_decay 0 --epochs 1 --keep_every 1 --warmup_epochs 0 --lr 0.1'.split()
    trained = finetune('run', *flags).checkpoint['model']
    fresh = finetune('fresh', *flags[:-2], '--lr', '0', '--min_lr', '0').checkpoint['model']
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed == {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'}


@pytest.fixture
def scores(monkeypatch):
    """scores([...]): the accuracies of the evaluations to come."""

    def install(values):
        values = iter(values)

        def evaluate(*_):
            value = next(values)
            return {'val_loss': 1.0, 'val_top1': value, 'val_balanced': value}, {'bar': value}

        monkeypatch.setattr(engine_classify, 'evaluate', evaluate)

    return install


def test_the_best_checkpoint_has_the_best_weights(linprobe, scores):
    """Also after resuming; the best of another folder does not count."""
    scores([30.0, 50.0, 40.0, *[40.0, 45.0] * 2])  # on resuming, the last evaluation comes again
    first = linprobe('run', '--keep_every', '1')
    second = torch.load(first.output_dir / 'checkpoint-0002.pth', weights_only=True)
    best = torch.load(first.output_dir / 'checkpoint-best.pth', weights_only=True)
    assert best['best_top1'] == 50 and best['step'] == second['step'] == 8
    assert all(torch.equal(x, best['model'][name]) for name, x in second['model'].items())
    for name, score, step in (('elsewhere', 45, 16), ('run', 50, 8)):
        flags = ['--epochs', '4', '--force_resume', '--resume', first.last]
        resumed = linprobe(name, *flags)
        best = torch.load(resumed.output_dir / 'checkpoint-best.pth', weights_only=True)
        assert resumed.checkpoint['best_top1'] == score and best['step'] == step


def test_a_best_that_was_not_written_does_not_count(finetune, scores, monkeypatch):
    write = checkpoint.write

    def write_later(state, path):
        if state.get('best_top1') == 50:
            raise OSError('the disk is full')
        write(state, path)

    scores([50.0, 40.0])
    monkeypatch.setattr(checkpoint, 'write', write_later)
    run = finetune('run', '--epochs', '2')
    best = torch.load(run.output_dir / 'checkpoint-best.pth', weights_only=True)
    assert best['best_top1'] == run.checkpoint['best_top1'] == 40


# --- Evaluation and prediction --------------------------------------------------------------------


def call(module, *flags):
    """A job in this process, as a user calls it."""
    flags = [*map(str, flags), '--device', 'cpu', '--num_workers', '0']
    module.main(module.get_parser().parse_args(flags))


@pytest.fixture(scope='module')
def classifiers(folder, tmp_path_factory):
    """{'finetune', 'linprobe': Result of a run} with a crop and statistics of their own."""
    flags = (
        '--crop_pct 0.6 --mean 0.3 0.4 0.5 --std 0.2 0.25 0.35 --lr 0.01 --epochs 6 '
        '--model vit_nano_patch4 --input_size 16 --total_batch_size 16 --data_path'
    )
    folders = {name: tmp_path_factory.mktemp(name) for name in JOBS}
    for name, module in JOBS.items():
        call(module, *flags.split(), folder, '--output_dir', folders[name])
    return {name: Result(output_dir) for name, output_dir in folders.items()}


def validation(folder, name, state):
    """(paths, labels, logits (20, 10)) of val/ by timm's own ViT."""
    paths, images, labels = read_val(folder, int(16 / 0.6), v2.InterpolationMode.BICUBIC)
    probe = name == 'linprobe'
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=64, depth=4, num_heads=4,
        num_classes=0 if probe else 10, global_pool='token' if probe else 'avg',
    )  # fmt: skip
    vit.load_state_dict({n: state[f'backbone.{n}' if probe else n] for n in vit.state_dict()})
    with torch.no_grad():
        logits = vit.eval()(images)
        if probe:
            scale = (state['bn.running_var'] + 1e-6).sqrt()
            logits = (logits - state['bn.running_mean']) / scale @ state['head.weight'].T
            logits = logits + state['head.bias']
    return paths, labels, logits


@pytest.mark.parametrize('name', JOBS)
def test_an_evaluation_is_that_of_the_files(name, classifiers, folder, capsys, tmp_path):
    """Also --eval, which takes sizes, statistics and crop from the checkpoint; and its files."""
    result, module = classifiers[name], JOBS[name]
    paths, labels, logits = validation(folder, name, result.checkpoint['model'])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)  # of the right class
    recalls = [(ranks[labels == k] < 1).float().mean().item() for k in labels.unique()]
    expected = {
        'val_loss': F.cross_entropy(logits, labels).item(),
        'val_top1': 100 * (ranks < 1).float().mean().item(),
        'val_top5': 100 * (ranks < 5).float().mean().item(),
        'val_balanced': 100 * sum(recalls) / len(recalls),
    }
    values = {key: value for key, value in result.entries[-1].items() if 'val' in key}
    assert values == pytest.approx(expected, rel=1e-4)
    losses = list(result.losses.values())
    assert name == 'linprobe' or losses[-1] < losses[0]
    assert expected['val_top1'] < expected['val_top5']

    call(module, '--eval', '--data_path', folder, '--init_from', result.last, '--report', tmp_path)
    assert f'top-1 {expected["val_top1"]:.2f} %' in capsys.readouterr().out
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist()))
    rows = list(csv.reader(open(tmp_path / 'confusion.csv')))[1:]
    found = {(i, j): int(rows[i][j + 1]) for i in range(10) for j in range(10)}
    assert found == {pair: pairs.count(pair) for pair in found}
    rows = list(csv.DictReader(open(tmp_path / 'classes.csv')))
    assert [float(row['recall']) for row in rows] == pytest.approx(recalls)
    rows = list(csv.DictReader(open(tmp_path / 'mistakes.csv')))
    wrong = [str(path) for path, rank in zip(paths, ranks) if rank]
    assert sorted(row['image'] for row in rows) == wrong
    confidence = [float(row['probability']) for row in rows]
    assert confidence == sorted(confidence, reverse=True)


def test_some_of_the_classes_are_evaluated_over_their_logits(classifiers, folder, tmp_path, capsys):
    result = classifiers['finetune']
    paths, labels, logits = validation(folder, 'finetune', result.checkpoint['model'])
    classes = result.checkpoint['classes']
    few = classes[1:8:2]
    for name in few:
        shutil.copytree(folder / 'val' / name, tmp_path / name)
    call(main_finetune, '--eval', '--data_path', tmp_path, '--init_from', result.last)
    index = torch.tensor([classes.index(name) for name in few])
    chosen = torch.isin(labels, index)
    right = (index[logits[chosen][:, index].argmax(1)] == labels[chosen]).float().mean().item()
    printed = capsys.readouterr().out
    assert f'top-1 {100 * right:.2f} %' in printed and f'on {chosen.sum()} images' in printed
    assert 'over the logits of 4 of its 10 classes' in printed and 'top-5' not in printed


def test_predictions(classifiers, folder, tmp_path, capsys):
    """Of a folder with a file that is no image, which is named, and makes the exit code 1."""
    result = classifiers['finetune']
    paths, labels, logits = validation(folder, 'finetune', result.checkpoint['model'])
    classes, bad = result.checkpoint['classes'], tmp_path / 'bar/0.png'
    names = [str(tmp_path / path.relative_to(folder / 'val')) for path in paths]
    expected = {}
    for name, label, row in zip(names, labels, logits.softmax(1).tolist()):
        expected[name] = classes[label], pytest.approx(dict(zip(classes, row)), abs=1e-4)
    shutil.copytree(folder / 'val', tmp_path, dirs_exist_ok=True)
    bad.write_bytes(b'no image')
    del expected[str(bad)]
    flags = '--json', '--init_from', result.last, '--predict', tmp_path
    with pytest.raises(SystemExit) as ended:
        call(main_finetune, *flags)
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and str(bad) in err
    lines = list(map(json.loads, out.splitlines()))
    assert {line['image']: (line['class'], line['classes']) for line in lines} == expected
    for line in lines:
        values = list(line['classes'].values())
        assert values == sorted(values, reverse=True)

    bad.unlink()
    arguments = list(map(str, flags))
    two = Processes(main_finetune, arguments, arguments)
    assert two.wait() == [0, 0]
    shown = [json.loads(line)['image'] for i in (0, 1) for line in two.printed(i).splitlines()]
    assert sorted(shown) == sorted(expected)


def test_held_out_images_are_evaluated_and_predicted(linprobe, folder, capsys):
    """--eval on the data of a run with --val_share: what was not trained on; or --split val."""
    flags = ['--data_path', folder / 'train', '--val_share', '0.2', '--epochs', '1']
    result, shown = linprobe('run', *flags), {}
    for split in ('train', 'val'):
        capsys.readouterr()
        split_flags = ['--predict', folder / 'train', '--split', split, '--topk', '1']
        call(main_finetune, *split_flags, '--init_from', result.last)
        shown[split] = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert len(shown['train']) == result.checkpoint['num_images'] == 64 - len(shown['val'])
    assert len(shown['train'] | shown['val']) == 64
    call(main_linprobe, '--eval', *flags[:2], '--init_from', result.last)
    assert f'on {len(shown["val"])} images' in capsys.readouterr().out


def test_pretrained_to_everything(pretrain, finetune, linprobe, tmp_path, capsys):
    """The weights go on: what starts has those of the file, at another size too."""
    weights = pretrain('pretrained', '--epochs', '1')
    expected = weights.checkpoint['model']['blocks.0.attn.qkv.weight']
    frozen = '--init_from', weights.last, '--epochs', '1', '--lr', '0', '--min_lr', '0'
    for start, prefix in ((finetune, ''), (linprobe, 'backbone.'), (pretrain, '')):
        state = start(f'next{start}'[-9:], *frozen).checkpoint['model']
        assert torch.equal(state[f'{prefix}blocks.0.attn.qkv.weight'], expected)
    larger = finetune('larger', *frozen, '--input_size', '24').checkpoint['model']
    assert larger['pos_embed'].shape == (1, 37, 64)
    assert torch.equal(larger['blocks.0.attn.qkv.weight'], expected)
