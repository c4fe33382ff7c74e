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
from conftest import Processes, Result, close_weights, our_names, read_val, same_weights
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


@pytest.fixture(params=JOBS)
def job(request):
    """(module, a function that starts a small run of it) of both jobs."""
    return JOBS[request.param], request.getfixturevalue(request.param)


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


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_lars_is_the_formula(weight_decay):
    """You et al. (2017) as in MAE: the weight's step is scaled by 0.001 |w| / |g|, if it decays or
    not; the bias's is not, and it does not decay."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = main_linprobe.create_lars(layer, lr=0.7, momentum=0.9, weight_decay=weight_decay)
    values = {name: p.detach().double().clone() for name, p in layer.named_parameters()}
    buffers = dict.fromkeys(values, 0.0)
    for step in range(30):
        lr = 0.7 * (1 - step / 40)
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.zero_grad()
        layer(torch.randn(8, 5)).square().mean().backward()
        for name, p in layer.named_parameters():
            gradient = p.grad.double()
            if name == 'weight':
                decayed = gradient + weight_decay * values[name]
                norms = gradient.norm() + weight_decay * values[name].norm()
                gradient = decayed * 0.001 * values[name].norm() / norms
            buffers[name] = 0.9 * buffers[name] + gradient
            values[name] = values[name] - lr * buffers[name]
        optimizer.step()
        for name, p in layer.named_parameters():
            assert torch.allclose(p.double(), values[name], atol=1e-6), (step, name)


def test_head_and_drop_path():
    model = create_encoder(model_sizes('vit_tiny_patch4'), drop_path=0.1)
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
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
    soft = torch.rand(6, 4).softmax(1)
    args, expected = Namespace(class_weights=True), []
    smooth = 0.9 * F.one_hot(hard, 4) + 0.1 / 4
    for targets, options in ((smooth, {'smoothing': 0.1}), (soft, {'soft': True})):
        criterion = engine_classify.create_criterion(args, source, torch.device('cpu'), **options)
        given = soft if 'soft' in options else hard
        expected = -(targets * weights * logits.log_softmax(1)).sum(1).mean()
        assert criterion(logits, given).item() == pytest.approx(expected.item(), rel=1e-5)
        plain = engine_classify.create_criterion(
            Namespace(class_weights=False), source, torch.device('cpu'), **options
        )
        expected = -(targets * logits.log_softmax(1)).sum(1).mean()
        assert plain(logits, given).item() == pytest.approx(expected.item(), rel=1e-5)


# --- Whole runs -----------------------------------------------------------------------------------

PLAIN = '--mixup 0 --cutmix 0 --drop_path 0'.split()
STRONG = '--mixup 0.8 --cutmix 1.0 --drop_path 0.2 --batch_size 8'.split()


@pytest.fixture
def mixed_runs(monkeypatch):
    """(images and labels of each micro-batch, what the network is given) of a run to come."""
    loaded, seen = [], []
    advance, forward = data.Loader.__next__, VisionTransformer.forward

    def watched_advance(loader):
        loaded.append([tensor.clone() for tensor in advance(loader)])
        return [tensor.clone() for tensor in loaded[-1]]

    def watched_forward(model, images):
        if model.training:
            seen.append(images.clone())
        return forward(model, images)

    monkeypatch.setattr(data.Loader, '__next__', watched_advance)
    monkeypatch.setattr(VisionTransformer, 'forward', watched_forward)
    return loaded, seen


def test_mixing_is_timms_from_the_seed_of_step_and_place(mixed_runs, finetune):
    loaded, seen = mixed_runs
    finetune('run', *STRONG, '--epochs', '1', '--seed', '3')
    assert len(loaded) == len(seen) == 8
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    for number, ((images, labels), given) in enumerate(zip(loaded, seen)):
        step, micro_step = divmod(number, 2)
        data.seed_generators(3, step, 8 * micro_step)
        assert torch.equal(mixup(images.clone(), labels)[0], given)
    assert not any(torch.equal(images, given) for (images, _), given in zip(loaded[:3], seen))


def test_processes_change_nothing_at_the_same_micro_batch(job, small_run, tmp_path, capsys):
    """Nor is an evaluation while training another than --eval, by one process or by two.

    Of 20 images, which are no multiple of 2 x 8; a probe has statistics that processes share.
    """
    module, start = job
    flags = STRONG if module is main_finetune else ['--lr', '0.5', '--batch_size', '8']
    alone = start('alone', *flags)
    two = Processes(module, *[small_run('two', *flags)] * 2)
    assert two.wait() == [0, 0], two.printed(errors=True)
    two = Result(tmp_path / 'two')
    assert two.losses == pytest.approx(alone.losses, rel=1e-5)
    assert module is main_linprobe or close_weights(two, alone)

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


def test_workers_and_interruptions_change_nothing(job, stop_at):
    module, start = job
    flags = STRONG if module is main_finetune else []
    whole = start('whole', *flags)
    stop_at(6, start, 'cut', *flags)
    resumed = start('cut', *flags, '--num_workers', '2')
    assert resumed.losses == whole.losses and same_weights(resumed, whole)


def test_resuming_with_another_batch_on_a_device(finetune, linprobe, stop_at, error_of):
    """Refused where batches matter: for mixing, drop path and BatchNorm."""
    for start, flags in ((finetune, STRONG[:-2]), (linprobe, [])):
        stop_at(1, start, flags[0] if flags else 'probe', *flags)
        error = error_of(start, flags[0] if flags else 'probe', *flags, '--batch_size', '8')
        assert 'images on a device 16 -> 8' in error
    stop_at(1, finetune, 'plain', *PLAIN)
    whole = finetune('whole', *PLAIN)
    assert finetune('plain', *PLAIN, '--batch_size', '8').losses == pytest.approx(whole.losses)


def test_layer_decay_0_trains_norm_and_head_alone(finetune):
    flags = '--layer_decay 0 --epochs 1 --keep_every 1 --warmup_epochs 0 --lr 0.1'.split()
    trained = finetune('run', *flags).checkpoint['model']
    fresh = finetune('fresh', *flags[:-2], '--lr', '0', '--min_lr', '0').checkpoint['model']
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed == {'fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias'}


@pytest.mark.parametrize('elsewhere', [False, True])
def test_the_best_checkpoint_has_the_best_weights(elsewhere, job, monkeypatch):
    """With accuracies of our own. The best of another folder does not count."""
    scores = iter([30.0, 50.0, 40.0, 40.0, 45.0])  # on resuming, the last evaluation comes again

    def evaluate(*_):
        value = next(scores)
        return {'val_loss': 1.0, 'val_top1': value, 'val_balanced': value}, {'bar': value}

    monkeypatch.setattr(engine_classify, 'evaluate', evaluate)
    first = job[1]('run', '--keep_every', '1')
    second = torch.load(first.output_dir / 'checkpoint-0002.pth', weights_only=True)
    best = torch.load(first.output_dir / 'checkpoint-best.pth', weights_only=True)
    assert best['best_top1'] == 50 and best['step'] == second['step'] == 8
    assert all(torch.equal(x, best['model'][name]) for name, x in second['model'].items())
    flags = ['--epochs', '4', '--force_resume', '--resume', first.last]
    resumed = job[1]('elsewhere' if elsewhere else 'run', *flags)
    assert resumed.checkpoint['best_top1'] == (45 if elsewhere else 50)
    best = torch.load(resumed.output_dir / 'checkpoint-best.pth', weights_only=True)
    assert best['step'] == (16 if elsewhere else 8)


def test_a_best_that_was_not_written_does_not_count(finetune, monkeypatch):
    scores, write = iter([50.0, 40.0]), checkpoint.write

    def evaluate(*_):
        value = next(scores)
        return {'val_loss': 1.0, 'val_top1': value, 'val_balanced': value}, {'bar': value}

    def write_later(state, path):
        if state.get('best_top1') == 50:
            raise OSError('the disk is full')
        write(state, path)

    monkeypatch.setattr(engine_classify, 'evaluate', evaluate)
    monkeypatch.setattr(checkpoint, 'write', write_later)
    run = finetune('run', '--epochs', '2')
    best = torch.load(run.output_dir / 'checkpoint-best.pth', weights_only=True)
    assert best['best_top1'] == run.checkpoint['best_top1'] == 40


# --- Evaluation and prediction --------------------------------------------------------------------

CHOICES = '--crop_pct 0.6 --mean 0.3 0.4 0.5 --std 0.2 0.25 0.35 --lr 0.01 --epochs 6'.split()


@pytest.fixture(scope='module')
def classifiers(folder, tmp_path_factory):
    """{'finetune', 'linprobe': Result of a run} with a crop and statistics of their own."""
    results = {}
    for name, module in JOBS.items():
        output_dir = tmp_path_factory.mktemp(name)
        flags = ['--data_path', str(folder), '--output_dir', str(output_dir), *CHOICES]
        flags += '--model vit_nano_patch4 --input_size 16 --total_batch_size 16'.split()
        module.main(module.get_parser().parse_args([*flags, '--num_workers', '0', *DEVICE]))
        results[name] = Result(output_dir)
    return results


DEVICE = ['--device', 'cpu']


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
    assert expected['val_top1'] < expected['val_top5']

    flags = ['--eval', '--data_path', folder, '--init_from', result.last, '--report', tmp_path]
    module.main(module.get_parser().parse_args([*map(str, flags), *DEVICE, '--num_workers', '0']))
    assert f'top-1 {expected["val_top1"]:.2f} %' in capsys.readouterr().out
    confusion = torch.zeros(10, 10, dtype=torch.long)
    for label, predicted in zip(labels, logits.argmax(1)):
        confusion[label, predicted] += 1
    rows = list(csv.reader(open(tmp_path / 'confusion.csv')))
    assert [list(map(int, row[1:])) for row in rows[1:]] == confusion.tolist()
    rows = list(csv.DictReader(open(tmp_path / 'classes.csv')))
    assert [float(row['recall']) for row in rows] == pytest.approx(recalls)
    rows = list(csv.DictReader(open(tmp_path / 'mistakes.csv')))
    wrong = {str(path) for path, rank in zip(paths, ranks) if rank}
    assert {row['image'] for row in rows} == wrong and len(rows) == len(wrong)
    assert [float(r['probability']) for r in rows] == sorted(
        (float(r['probability']) for r in rows), reverse=True
    )


def test_some_of_the_classes_are_evaluated_over_their_logits(classifiers, folder, tmp_path, capsys):
    paths, labels, logits = validation(
        folder, 'finetune', classifiers['finetune'].checkpoint['model']
    )
    classes = sorted(path.name for path in (folder / 'val').iterdir())
    few = classes[1:8:2]
    for name in few:
        shutil.copytree(folder / 'val' / name, tmp_path / 'few' / name)
    flags = ['--eval', '--data_path', tmp_path / 'few', '--init_from', classifiers['finetune'].last]
    parser = main_finetune.get_parser()
    main_finetune.main(parser.parse_args([*map(str, flags), *DEVICE]))
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
    classes = result.checkpoint['classes']
    shutil.copytree(folder / 'val', tmp_path / 'val')
    (tmp_path / 'val/bar/0.png').write_bytes(b'no image')
    flags = ['--predict', tmp_path / 'val', '--json', '--init_from', result.last, *DEVICE]
    with pytest.raises(SystemExit) as ended:
        main_finetune.main(main_finetune.get_parser().parse_args(list(map(str, flags))))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and f'{tmp_path}/val/bar/0.png' in err
    lines = {line['image']: line for line in map(json.loads, out.splitlines())}
    for path, label, probabilities in zip(paths, labels, logits.softmax(1)):
        line = lines.pop(str(tmp_path / path.relative_to(folder)), None)
        if line is None:
            assert path.match('bar/0.png')
            continue
        assert line['class'] == classes[label]
        expected = dict(zip(classes, probabilities.tolist()))
        assert line['classes'] == pytest.approx(expected, abs=1e-4)
        assert list(line['classes'].values()) == sorted(line['classes'].values(), reverse=True)
    assert not lines

    flags[1] = folder / 'val'
    two = Processes(main_finetune, *[list(map(str, flags))] * 2)
    assert two.wait() == [0, 0]
    shown = [
        json.loads(line)['image'] for rank in (0, 1) for line in two.printed(rank).splitlines()
    ]
    assert sorted(shown) == sorted(map(str, paths))


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
