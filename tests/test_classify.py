"""Fine-tuning and probing: against the reference's tensors, formulas and libraries, and as whole runs."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Result, command
from timm.models.vision_transformer import VisionTransformer

import engine
import main_finetune
import main_linprobe
from models_mff import MODELS, create_encoder, model_sizes
from util import mix
from util.optim import param_groups
from util.weights import convert_state_dict


@pytest.fixture(scope='module')
def reference():
    return torch.load(Path(__file__).parent / 'data/cls_tiny.pt', weights_only=True)


def tiny_encoder(c, global_pool):
    return VisionTransformer(
        img_size=c['img'], patch_size=c['patch'], embed_dim=c['dim'], depth=c['depth'], num_heads=c['heads'],
        num_classes=0, global_pool=global_pool,
    )  # fmt: skip


# --- Against mmpretrain's tensors and formulas ------------------------------------------------------------------


def test_fine_tuning_is_the_reference(reference):
    """Logits, the learning-rate scale of every parameter, and which do not decay."""
    expected = reference['finetune']
    model = tiny_encoder(reference['config'], 'avg')
    main_finetune.give_head(model, reference['config']['classes'])
    model.load_state_dict(convert_state_dict(expected['state']))
    assert torch.allclose(model.eval()(expected['imgs']), expected['logits'], atol=1e-5)

    groups = param_groups(model, 0.05, layer_decay=0.65)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group['lr_scale'] for group in groups for p in group['params']}
    undecayed = {names[id(p)] for group in groups if not group['weight_decay'] for p in group['params']}
    assert scales == pytest.approx(convert_state_dict(expected['lr_scale']), rel=1e-12)
    assert undecayed == convert_state_dict(dict.fromkeys(expected['no_decay'])).keys()
    assert sum(len(group['params']) for group in groups) == len(names)


def test_linear_probe_is_the_reference(reference):
    expected = reference['linprobe']
    model = main_linprobe.LinearProbe(tiny_encoder(reference['config'], 'token'), reference['config']['classes'])
    state = convert_state_dict(expected['state'])
    state = {name if name.startswith(('bn.', 'head.')) else f'backbone.{name}': value for name, value in state.items()}
    model.load_state_dict(state)
    assert torch.allclose(model.eval()(expected['imgs']), expected['logits'], atol=1e-5)


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_lars_is_the_formula(weight_decay):
    """You et al. (2017) as MAE uses it: only the weight's step is scaled by 0.001 |w| / |g|, and only it may decay."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = main_linprobe.create_lars(layer, lr=0.7, momentum=0.9, weight_decay=weight_decay)
    values = {name: p.detach().double().clone() for name, p in layer.named_parameters()}
    buffers = dict.fromkeys(values, 0.0)
    for step in range(30):
        lr = optimizer.param_groups[0]['lr'] = optimizer.param_groups[1]['lr'] = 0.7 * (1 - step / 40)
        inputs = torch.randn(8, 5)
        optimizer.zero_grad()
        layer(inputs).square().mean().backward()
        for name, p in layer.named_parameters():
            gradient = p.grad.double()
            if name == 'weight':
                gradient = gradient * 0.001 * values[name].norm() / gradient.norm()
            buffers[name] = 0.9 * buffers[name] + gradient
            values[name] = values[name] - lr * buffers[name]
        optimizer.step()
        for name, p in layer.named_parameters():
            if name == 'bias' or not weight_decay:
                assert torch.allclose(p.double(), values[name], atol=1e-6), (step, name)


def test_head_and_drop_path():
    model = create_encoder(MODELS['vit_base_patch16'] | {'in_chans': 3}, drop_path=0.1)
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    main_finetune.give_head(model, 1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(86.57e6, rel=1e-4)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02) and (model.head.bias == 0).all()
    assert model.head.weight.abs().max() < 2


# --- Whole runs -------------------------------------------------------------------------------------------------

STRONG = '--mixup 0.8 --cutmix 1.0 --drop_path 0.2'.split()


def test_fine_tuning_learns(finetune):
    flags = '--mixup 0 --cutmix 0 --smoothing 0 --aa none --reprob 0 --epochs 8 --layer_decay 1'
    losses = list(finetune('run', *flags.split()).losses.values())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_the_best_checkpoint_has_the_best_weights(job, request, monkeypatch):
    """Accuracies of our own: the best is after two of four epochs, and stays it on resuming for a fifth."""
    start = request.getfixturevalue(job)
    scores = iter([30.0, 50.0, 40.0, 50.0, 50.0, 45.0])  # on resuming, the last evaluation comes again
    metrics = {'val_loss': 1.0, 'val_top5': 90.0}
    monkeypatch.setattr(engine, 'evaluate_classifier', lambda *_: {'val_top1': next(scores), **metrics})
    result = start('run', '--epochs', '4', '--keep_every', '1')
    second = torch.load(result.output_dir / 'checkpoint-0002.pth', weights_only=True)['model']
    last = result.checkpoint
    assert not torch.equal(last['model']['head.weight'], second['head.weight']) and last['best_top1'] == 50

    def check():
        best = torch.load(result.output_dir / 'checkpoint-best.pth', weights_only=True)
        assert best['best_top1'] == 50 and best['step'] == 8 and best['classes'][0] == 'bar'
        assert all(torch.equal(tensor, best['model'][name]) for name, tensor in second.items())

    check()
    resumed = start('run', '--epochs', '5', '--keep_every', '1', '--force_resume')
    assert resumed.checkpoint['step'] == 20 and resumed.checkpoint['best_top1'] == 50
    check()


def test_another_folder_has_a_best_checkpoint_of_its_own(finetune, monkeypatch):
    """A run that resumes from elsewhere does not count the best of there, which is not in its folder."""
    scores = iter([50.0, 30.0, 40.0])
    metrics = {'val_loss': 1.0, 'val_top5': 90.0}
    monkeypatch.setattr(engine, 'evaluate_classifier', lambda *_: {'val_top1': next(scores), **metrics})
    first = finetune('run', '--epochs', '1')
    other = finetune(
        'other', '--epochs', '2', '--force_resume', '--resume', str(first.output_dir / 'checkpoint-last.pth')
    )
    assert other.checkpoint['best_top1'] == 40 and (other.output_dir / 'checkpoint-best.pth').exists()

    monkeypatch.setattr(engine, 'evaluate_classifier', lambda *_: {'val_top1': 45.0, **metrics})
    flags = ['--epochs', '2', '--force_resume', '--resume', str(first.output_dir / 'checkpoint-last.pth')]
    assert finetune('other', *flags).checkpoint['best_top1'] == 45  # not 50, though a best checkpoint is there


def test_other_classes_of_as_many_images_do_not_resume(finetune, folder, tmp_path, capsys):
    images = shutil.copytree(folder, tmp_path / 'images')
    finetune('run', '--epochs', '1', '--data_path', str(images))
    for split in ('train', 'val'):
        (images / split / 'bar').rename(images / split / 'zebra')
    with pytest.raises(SystemExit) as stopped:
        finetune('run', '--epochs', '1', '--data_path', str(images))
    assert stopped.value.code == 2 and 'other classes, or another order of them' in capsys.readouterr().err


@pytest.mark.parametrize('change', ['shape', 'empty', 'groups'])
def test_the_optimiser_of_another_run(change, finetune, capsys):
    """A fused kernel would write beyond the end of a tensor of another shape."""
    path = finetune('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'
    state = torch.load(path, weights_only=True)
    if change == 'shape':
        state['optimizer']['state'][0]['exp_avg'] = torch.zeros(3)
    elif change == 'groups':
        state['optimizer']['param_groups'].pop()
    else:
        state['optimizer'] = {}
    torch.save(state, path)
    with pytest.raises(SystemExit) as stopped:
        finetune('run', '--epochs', '2', '--force_resume')
    assert stopped.value.code == 2 and 'has the optimiser of another run' in capsys.readouterr().err


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_workers_and_interruptions_change_nothing(job, request, kill_after_saving):
    start = request.getfixturevalue(job)
    flags = STRONG if job == 'finetune' else []
    whole = start('whole', *flags)
    assert start('workers', *flags, '--num_workers', '2').losses == whole.losses
    kill_after_saving(start, 'cut', *flags, '--save_every', '6')
    resumed = start('cut', *flags)
    assert resumed.losses == whole.losses
    for name, tensor in whole.checkpoint['model'].items():
        assert torch.equal(tensor, resumed.checkpoint['model'][name]), name


def test_the_batch_on_a_device_changes_nothing(finetune):
    """Mixup, CutMix and drop path are drawn by an image's place in the total batch."""
    losses = [finetune(f'batch{n}', *STRONG, '--batch_size', str(n)).losses for n in (16, 8, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != finetune('without', '--mixup', '0', '--cutmix', '0').losses


def test_mixing_is_timms_on_every_pair():
    imgs, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    mixing = mix.Mix(0.8, 1.0, 0.1, num_classes=5, seed=3)
    ours, targets = mixing(imgs.clone(), labels, (7, 4))
    again, _ = mixing(imgs[2:].clone(), labels[2:], (7, 6))
    assert torch.equal(again, ours[2:])
    for i in (0, 2, 4):  # each image is a mixture of its own and its neighbour's pixels, with the weights of its target
        share = ((targets[i, labels[i]] - 0.02) / 0.9).item()
        assert targets[i].sum().item() == pytest.approx(1)
        assert targets[i, labels[i + 1]].item() == pytest.approx(0.9 * (1 - share) + 0.02, abs=1e-6)
        kept = (ours[i] == imgs[i]).all(0)
        cut = (ours[i] == imgs[i + 1]).all(0)[~kept].all() and kept.float().mean().item() == pytest.approx(share)
        assert cut or torch.allclose(ours[i], share * imgs[i] + (1 - share) * imgs[i + 1], atol=1e-6)


def test_drop_path_is_drawn_for_each_image():
    model = create_encoder(model_sizes('vit_nano_patch4'), drop_path=0.5)
    paths = mix.PlacedDropPath(model, seed=1)
    assert [path.drop_prob for path in paths.paths] == pytest.approx([p / 3 * 0.5 for p in (1, 2, 3) for _ in (1, 2)])
    paths.draw(20000, (0, 0), torch.device('cpu'))
    for path in paths.paths:
        assert sorted(path.scale.unique().tolist()) == pytest.approx([0, 1 / (1 - path.drop_prob)])
        assert path.scale.mean().item() == pytest.approx(1, abs=0.03)
    whole = paths.paths[0].scale
    paths.draw(100, (0, 700), torch.device('cpu'))
    assert torch.equal(paths.paths[0].scale, whole[700:800])
    paths.draw(100, (1, 700), torch.device('cpu'))
    assert not torch.equal(paths.paths[0].scale, whole[700:800])
    x = torch.ones(100, 2, 3)
    assert torch.equal(paths.paths[0].train()(x)[:, 1, 2], paths.paths[0].scale)
    assert torch.equal(paths.paths[0].eval()(x), x)


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_processes_change_nothing(job, request, small_run, tmp_path, capsys):
    """Two processes train as one does, and evaluate each of 20 images once (20 is no multiple of 2 x 8).

    While training they evaluate as one process does with their checkpoint: with the same running statistics.
    """
    defaults = ['--model', 'vit_nano_patch4', '--batch_size', '8', *(STRONG if job == 'finetune' else ['--lr', '0.5'])]
    start = request.getfixturevalue(job)
    alone = start('alone', *defaults)
    done = command(f'main_{job}.py', *small_run('two', *defaults), torchrun=2)
    assert done.returncode == 0, done.stderr
    two = Result(tmp_path / 'two')
    assert two.losses == pytest.approx(alone.losses, rel=1e-5)

    evaluate = ['--eval', '--init_from', str(two.output_dir / 'checkpoint-last.pth')]
    capsys.readouterr()
    start('eval', *defaults, *evaluate)
    line = capsys.readouterr().out.splitlines()[-1]
    expected = 'top-1 {val_top1:.2f} %  top-5 {val_top5:.2f} %  loss {val_loss:.4f}  on 20 images'
    assert line == expected.format(**two.entries[-1])
    if job == 'finetune':
        done = command('main_finetune.py', *small_run('eval', *defaults, *evaluate), torchrun=2)
        assert done.stdout.splitlines()[-1] == line, done.stderr


def test_probe_trains_the_head_only(linprobe):
    result = linprobe('run')
    state = result.checkpoint
    fresh = linprobe('fresh', '--lr', '0', '--epochs', '1').checkpoint['model']
    for name, tensor in state['model'].items():
        if name.startswith('backbone.'):
            assert torch.equal(tensor, fresh[name]), name
    assert not torch.equal(state['model']['head.weight'], fresh['head.weight'])
    assert len(state['optimizer']['state']) == 2  # weight and bias of the head


def test_batch_norm_of_one_image_is_a_mistake(linprobe, capsys):
    with pytest.raises(SystemExit) as stopped:
        linprobe('run', '--batch_size', '1')
    assert stopped.value.code == 2 and 'BatchNorm needs at least two images' in capsys.readouterr().err


def test_probes_backbone_is_in_eval_mode():
    model = main_linprobe.LinearProbe(
        create_encoder(model_sizes('vit_nano_patch4'), 'token', drop_path=0.5), 10
    ).train()
    imgs = torch.randn(4, 3, 32, 32)
    assert model.bn.training and not any(module.training for module in model.backbone.modules())
    assert torch.equal(model.backbone(imgs), model.backbone(imgs))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ['head.weight', 'head.bias']


def test_pretrained_to_everything(pretrain, finetune, linprobe, folder, capsys, tmp_path):
    """The chain: pre-train, neighbours, probe, fine-tune, evaluate; tests/test_reports.py has the predictions."""
    weights = pretrain('pretrained', '--epochs', '1').output_dir / 'checkpoint-last.pth'
    capsys.readouterr()
    start = ['--init_from', str(weights), '--epochs', '1']
    main_linprobe_result = linprobe('probe', *start)
    probe_top1 = main_linprobe_result.entries[-1]['val_top1']
    finetune('tuned', *start, *STRONG)
    tuned = tmp_path / 'tuned/checkpoint-last.pth'
    top1 = Result(tmp_path / 'tuned').entries[-1]['val_top1']
    capsys.readouterr()

    finetune('none', '--eval', '--init_from', str(tuned))
    assert f'top-1 {top1:.2f} %' in capsys.readouterr().out
    linprobe('none', '--eval', '--init_from', str(tmp_path / 'probe/checkpoint-last.pth'))
    printed = capsys.readouterr().out
    assert f'top-1 {probe_top1:.2f} %' in printed and "this project's linear probe" in printed
    assert 'left out' not in printed
    linprobe('none', '--knn', '5', '--init_from', str(weights))
    printed = capsys.readouterr().out
    assert len(re.findall(r'5-nearest-neighbour top-1 \d+\.\d+ %  by the (?:cls token|mean of patches)', printed)) == 2
    assert not (tmp_path / 'none').exists()


# --- A user's mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--data_path', '{flat}', '--val_path', '{flat}'], 'no labels'),
        (['--data_path', '{one}', '--val_path', '{one}'], 'only one class, bar'),
        (['--val_path', '{one}'], 'the classes differ: circle, crescent'),
        (['--data_path', '{one}'], 'has no validation images'),
        (['--model', 'vit_giant'], 'no model'),
        (['--batch_size', '1'], 'give even numbers'),
        (['--eval'], '--eval needs the weights'),
        (['--predict', 'image.png'], '--predict needs a fine-tuned checkpoint'),
        (['--init_from', 'missing.pth'], 'missing.pth'),
        (['--aa', 'random'], '--aa'),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(flags, message, finetune, folder, tmp_path, capsys):
    (tmp_path / 'flat').mkdir()
    (tmp_path / 'one').mkdir()
    image = next((folder / 'train/bar').iterdir())
    (tmp_path / 'flat/1.png').write_bytes(image.read_bytes())
    (tmp_path / 'one/bar').mkdir()
    (tmp_path / 'one/bar/1.png').write_bytes(image.read_bytes())
    places = {'flat': tmp_path / 'flat', 'one': tmp_path / 'one'}
    with pytest.raises(SystemExit) as exit:
        finetune('run', *(flag.format(**places) for flag in flags))
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert message in printed.err and re.fullmatch(r'[^\n]*error: [^\n]+\n', printed.err), printed.err
