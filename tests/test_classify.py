"""Fine-tuning and probing: the reference's tensors, formulas and libraries, and whole runs."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Processes, Result, close_weights, our_names, same_weights
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy
from timm.models.vision_transformer import VisionTransformer

import engine_classify
import main_finetune
import main_linprobe
from models_mff import MODELS, create_encoder, model_sizes
from util import data
from util.optim import param_groups
from util.weights import convert_state_dict


@pytest.fixture(scope='module')
def reference():
    return torch.load(Path(__file__).parent / 'data/cls_tiny.pt', weights_only=True)


def tiny_encoder(c, global_pool):
    return VisionTransformer(
        img_size=c['img'],
        patch_size=c['patch'],
        embed_dim=c['dim'],
        depth=c['depth'],
        num_heads=c['heads'],
        num_classes=0,
        global_pool=global_pool,
    )


# --- Against mmpretrain's tensors and formulas ----------------------------------------------------


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
    undecayed = {
        names[id(p)] for group in groups if not group['weight_decay'] for p in group['params']
    }
    assert scales == pytest.approx(our_names(expected['lr_scale'], expected['state']), rel=1e-12)
    assert undecayed == our_names(dict.fromkeys(expected['no_decay']), expected['state']).keys()
    assert sum(len(group['params']) for group in groups) == len(names)


def test_linear_probe_is_the_reference(reference):
    expected = reference['linprobe']
    model = engine_classify.LinearProbe(
        tiny_encoder(reference['config'], 'token'), reference['config']['classes']
    )
    state = convert_state_dict(expected['state'])
    encoder = [name for name in state if not name.startswith(('bn.', 'head.'))]
    model.load_state_dict(state | {f'backbone.{name}': state.pop(name) for name in encoder})
    assert torch.allclose(model.eval()(expected['imgs']), expected['logits'], atol=1e-5)


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_lars_is_the_formula(weight_decay):
    """You et al. (2017) as MAE uses it: 0.001 |w| / |g| scales only the weight's step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = main_linprobe.create_lars(layer, lr=0.7, momentum=0.9, weight_decay=weight_decay)
    values = {name: p.detach().double().clone() for name, p in layer.named_parameters()}
    buffers = dict.fromkeys(values, 0.0)
    for step in range(30):
        lr = 0.7 * (1 - step / 40)
        for group in optimizer.param_groups:
            group['lr'] = lr
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
    model = create_encoder(MODELS['vit_base_patch16'], drop_path=0.1)
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    main_finetune.give_head(model, 1000)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(86.57e6, rel=1e-4)
    assert (
        model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
        and (model.head.bias == 0).all()
    )
    assert model.head.weight.abs().max() < 2


# --- Loss -----------------------------------------------------------------------------------------


def test_class_weights_by_hand():
    """30, 10 and 1 images: 1, 3 and 30, at most 10 times; divided by their mean over the images."""
    source = Namespace(labels=np.repeat([0, 1, 2], [30, 10, 1]), classes=['a', 'b', 'c'])
    weights = engine_classify.class_weights(source)
    mean = (30 * 1 + 10 * 3 + 1 * 10) / 41
    assert weights.tolist() == pytest.approx([1 / mean, 3 / mean, 10 / mean])
    args, cpu = Namespace(class_weights=True), torch.device('cpu')
    weighted = engine_classify.create_criterion(args, source, cpu, smoothing=0.1)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    soft = 0.9 * torch.eye(3)[labels] + 0.1 / 3
    by_hand = -(soft * weights * logits.log_softmax(1)).sum(1).mean()
    assert weighted(logits, labels).item() == pytest.approx(by_hand.item())
    same = Namespace(labels=np.array([0, 1, 2]), classes=['a', 'b', 'c'])  # equal counts: no change
    usual = LabelSmoothingCrossEntropy(0.1)(logits, labels).item()
    equal = engine_classify.create_criterion(args, same, cpu, smoothing=0.1)
    assert equal(logits, labels).item() == pytest.approx(usual)


def test_mixing_is_timms_by_the_seed_of_the_step(finetune, monkeypatch):
    """The images and targets that a step trains on, from the seed of (seed, step, first image)."""
    seen = []

    class Recorded(Mixup):
        def __call__(self, imgs, labels):
            before = imgs.clone(), labels.clone()
            after = super().__call__(imgs, labels)
            seen.append((*before, after[0].clone(), after[1]))
            return after

    monkeypatch.setattr(main_finetune, 'Mixup', Recorded)
    finetune('run', '--epochs', '1', '--batch_size', '8')
    ours = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    assert len(seen) == 8
    for number, (imgs, labels, mixed, targets) in enumerate(seen):
        data.seed_generators(0, number // 2, 8 * (number % 2))
        expected = ours(imgs, labels)
        assert torch.equal(expected[0], mixed) and torch.equal(expected[1], targets)


# --- Whole runs -----------------------------------------------------------------------------------

PLAIN = '--mixup 0 --cutmix 0 --drop_path 0'.split()


def test_fine_tuning_learns(finetune):
    flags = '--smoothing 0 --aa none --reprob 0 --epochs 8 --layer_decay 1 --class_weights'
    losses = list(finetune('run', *PLAIN, *flags.split()).losses.values())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_workers_and_interruptions_change_nothing(job, request, stop_at, tmp_path):
    start = request.getfixturevalue(job)
    whole = start('whole')
    stop_at(6, start, 'cut', '--num_workers', '2')
    assert same_weights(start('cut'), whole)


@pytest.mark.parametrize('job', [main_finetune, main_linprobe], ids=lambda job: job.__name__)
def test_processes_change_nothing_at_the_same_batch_on_a_device(job, small_run, tmp_path):
    """Mixup, drop path and augmentation of one process with two micro-batches, and of two."""
    flags = ['--batch_size', '8', '--lr', '1e-3']
    if job is main_linprobe:  # BatchNorm's statistics are those of rank 0's images
        flags = ['--batch_size', '16', '--lr', '0.5']
    one = Processes(job, small_run('one', *flags))
    assert one.wait() == [0], one.printed(errors=True)
    two = Processes(job, *[small_run('two', *flags)] * 2)
    assert two.wait() == [0, 0], two.printed(errors=True)
    if job is main_finetune:
        assert close_weights(Result(tmp_path / 'one'), Result(tmp_path / 'two'))
    values = [Result(tmp_path / name).entries[-1] for name in ('one', 'two')]
    assert values[0].keys() == values[1].keys() and 'val_balanced' in values[0]


@pytest.mark.parametrize('job, flags', [('finetune', []), ('linprobe', [])])
def test_another_batch_on_a_device_does_not_resume(job, flags, request, capsys):
    start = request.getfixturevalue(job)
    start('run', '--epochs', '1')
    with pytest.raises(SystemExit):
        start('run', '--epochs', '1', '--batch_size', '8')
    assert 'images on a device 16 -> 8' in capsys.readouterr().err


def test_plain_fine_tuning_resumes_with_another_batch_on_a_device(finetune):
    whole = finetune('whole', *PLAIN)
    finetune('cut', *PLAIN, '--keep_every', '1')
    half = str(whole.output_dir.parent / 'cut/checkpoint-0001.pth')
    resumed = finetune('again', *PLAIN, '--resume', half, '--keep_every', '1', '--batch_size', '8')
    assert close_weights(resumed, whole)


@pytest.mark.parametrize('job', ['finetune', 'linprobe'])
def test_the_best_checkpoint_has_the_best_weights(job, request, monkeypatch):
    """Accuracies of our own: the best is after two of four epochs, and stays it on resuming."""
    start = request.getfixturevalue(job)
    scores = iter([30.0, 50.0, 40.0, 50.0, 50.0, 45.0])  # on resuming, the last comes again
    values = {'val_loss': 1.0, 'val_balanced': 10.0}
    monkeypatch.setattr(
        engine_classify, 'evaluate', lambda *_: (values | {'val_top1': next(scores)}, {'bar': 1.0})
    )
    result = start('run', '--epochs', '4', '--keep_every', '1')
    second = torch.load(result.output_dir / 'checkpoint-0002.pth', weights_only=True)['model']
    assert not torch.equal(result.checkpoint['model']['head.weight'], second['head.weight'])

    def check():
        best = torch.load(result.output_dir / 'checkpoint-best.pth', weights_only=True)
        assert best['best_top1'] == 50 and best['step'] == 8 and best['classes'][0] == 'bar'
        assert all(torch.equal(tensor, best['model'][name]) for name, tensor in second.items())

    check()
    resumed = start('run', '--epochs', '5', '--keep_every', '1', '--force_resume')
    assert resumed.checkpoint['step'] == 20 and resumed.checkpoint['best_top1'] == 50
    check()


def test_other_classes_of_as_many_images_do_not_resume(finetune, folder, tmp_path, capsys):
    finetune('run', '--epochs', '1')
    for split in ('train', 'val'):
        for path in (folder / split).iterdir():
            name = path.name.replace('bar', 'baz')
            (tmp_path / 'other' / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'other' / split / name).symlink_to(path)
    with pytest.raises(SystemExit) as exit:
        finetune('run', '--epochs', '1', '--data_path', str(tmp_path / 'other'))
    assert exit.value.code == 2 and 'classes' in capsys.readouterr().err


def test_probe_trains_the_head_only():
    encoder = create_encoder(model_sizes('vit_nano_patch4'), 'token', drop_path=0.5)
    model = engine_classify.LinearProbe(encoder, 10).train()
    imgs = torch.randn(4, 3, 32, 32)
    assert model.bn.training and not any(part.training for part in model.backbone.modules())
    assert torch.equal(model.backbone(imgs), model.backbone(imgs))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ['head.weight', 'head.bias']


def test_layer_decay_0_freezes_the_encoder(finetune, pretrain):
    """Only the norm and the head are trained."""
    start = pretrain('start', '--epochs', '1')
    flags = ['--epochs', '1', '--layer_decay', '0', '--init_from', str(start.last)]
    before, after = start.checkpoint['model'], finetune('run', *flags).checkpoint['model']
    for name, tensor in after.items():
        if not name.startswith(('fc_norm', 'head')):
            assert torch.equal(tensor, before[name]), name
    assert after['head.bias'].any()


def test_few_images_train_with_the_usual_batch(folder, tmp_path):
    """Of 12 images a tenth is one, which Mixup and BatchNorm refuse."""
    for split in ('train', 'val'):
        for number, path in enumerate(sorted((folder / split).rglob('*.png'))[:12]):
            place = tmp_path / 'few' / split / 'ab'[number % 2] / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    for job in (main_finetune, main_linprobe):
        parser = job.get_parser()
        flags = '--model vit_nano_patch4 --input_size 16 --epochs 1 --num_workers 0 --device cpu'
        places = f'--data_path {tmp_path}/few --output_dir {tmp_path}/{job.__name__}'
        job.main(parser.parse_args([*flags.split(), *places.split()]))


# --- Evaluation and prediction --------------------------------------------------------------------


@pytest.fixture(scope='module')
def tuned(folder, tmp_path_factory):
    """A classifier's last checkpoint, its logits for the validation images, and their labels."""
    flags = '--model vit_nano_patch4 --input_size 16 --total_batch_size 16 --epochs 2 --lr 4e-3'
    output_dir = tmp_path_factory.mktemp('tuned')
    places = f'--data_path {folder} --output_dir {output_dir} --num_workers 0 --device cpu'
    words = [*flags.split(), *places.split(), '--layer_decay', '1', '--aa', 'none']
    main_finetune.main(main_finetune.get_parser().parse_args(words))
    return Result(output_dir)


def predictions(tuned, paths, capsys):
    """{path: line of --json} of --predict."""
    words = ['--predict', *map(str, paths), '--init_from', str(tuned.last), '--json']
    capsys.readouterr()
    main_finetune.main(main_finetune.get_parser().parse_args([*words, '--num_workers', '0']))
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return {line['image']: line for line in lines}


def test_evaluation_report_and_predictions_agree(tuned, folder, tmp_path, capsys):
    """Accuracies by hand from the predictions, against the log, --eval and --report."""
    found = predictions(tuned, [folder / 'val'], capsys)
    assert len(found) == 20
    pairs = [
        (line['class'], max(line['classes'], key=line['classes'].get)) for line in found.values()
    ]
    assert all(Path(path).parent.name == line['class'] for path, line in found.items())
    assert all(
        sum(line['classes'].values()) == pytest.approx(1, abs=1e-3) for line in found.values()
    )
    top1 = 100 * np.mean([true == predicted for true, predicted in pairs])
    recalls = {
        name: np.mean([predicted == name for true, predicted in pairs if true == name])
        for name in {true for true, _ in pairs}
    }
    entry = [entry for entry in tuned.entries if 'val_top1' in entry][-1]
    assert entry['val_top1'] == pytest.approx(top1)
    assert entry['val_balanced'] == pytest.approx(100 * np.mean(list(recalls.values())))

    words = (
        f'--eval --data_path {folder} --init_from {tuned.last} --report {tmp_path} --num_workers 0'
    )
    main_finetune.main(main_finetune.get_parser().parse_args(words.split()))
    printed = capsys.readouterr().out
    assert f'top-1 {top1:.2f} %' in printed and 'on 20 images' in printed
    with open(tmp_path / 'classes.csv') as file:
        rows = {row['class']: row for row in csv.DictReader(file)}
    assert {name: float(row['recall']) for name, row in rows.items()} == pytest.approx(recalls)
    with open(tmp_path / 'mistakes.csv') as file:
        mistakes = list(csv.DictReader(file))
    assert len(mistakes) == sum(true != predicted for true, predicted in pairs)
    confidences = [float(row['probability']) for row in mistakes]
    assert confidences == sorted(confidences, reverse=True)
    assert (tmp_path / 'confusion.png').stat().st_size > 5000


@pytest.mark.parametrize('count', [3, 1000])
def test_a_confusion_matrix_of_any_size(count, tmp_path):
    labels = np.arange(count)
    probabilities = np.roll(np.eye(count), 1, axis=0)  # every image is taken for the class before
    names = [f'class {number}' for number in range(count)]
    engine_classify.write_report(str(tmp_path), names, names, labels, probabilities)
    with open(tmp_path / 'confusion.csv') as file:
        rows = list(csv.reader(file))[1:]
    confusion = np.array([row[1:] for row in rows], dtype=int)
    assert (confusion == probabilities).all()


def test_some_of_the_classes_are_evaluated_over_their_logits(tuned, folder, tmp_path, capsys):
    names = sorted(path.name for path in (folder / 'val').iterdir())[3:6]
    for name in names:
        (tmp_path / 'some').mkdir(exist_ok=True)
        (tmp_path / 'some' / name).symlink_to(folder / 'val' / name)
    found = predictions(tuned, [folder / 'val' / name for name in names], capsys)
    right = [max(names, key=line['classes'].get) == line['class'] for line in found.values()]
    words = f'--eval --data_path {tmp_path}/some --init_from {tuned.last} --num_workers 0'
    main_finetune.main(main_finetune.get_parser().parse_args(words.split()))
    printed = capsys.readouterr().out
    assert f'top-1 {100 * np.mean(right):.2f} %' in printed and '3 of its 10 classes' in printed


def test_held_out_images_are_predicted_and_evaluated(folder, tmp_path, capsys):
    """--split val of a run with --val_share: exactly those that were not trained on."""
    flags = (
        '--model vit_nano_patch4 --input_size 16 --total_batch_size 16 --epochs 1 --val_share 0.2'
    )
    places = f'--data_path {folder}/train --output_dir {tmp_path} --num_workers 0 --device cpu'
    main_linprobe.main(main_linprobe.get_parser().parse_args([*flags.split(), *places.split()]))
    count = torch.load(tmp_path / 'checkpoint-last.pth', weights_only=True)['num_images']
    parse, names = main_finetune.get_parser().parse_args, {}
    for split in ('train', 'val'):
        words = (
            f'--predict {folder}/train --split {split} --init_from {tmp_path}/checkpoint-last.pth'
        )
        capsys.readouterr()
        main_finetune.main(parse([*words.split(), '--topk', '1', '--num_workers', '0']))
        names[split] = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert len(names['train']) == count and not names['train'] & names['val']
    assert len(names['train'] | names['val']) == 64
    words = f'--eval --data_path {folder}/train --init_from {tmp_path}/checkpoint-last.pth'
    main_finetune.main(parse([*words.split(), '--num_workers', '0']))
    assert f'on {len(names["val"])} images' in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_said_and_exit_code_1(tuned, folder, tmp_path, capsys):
    (tmp_path / 'broken.png').write_text('not an image')
    good = next((folder / 'val').rglob('*.png'))
    with pytest.raises(SystemExit) as exit:
        predictions(tuned, [tmp_path / 'broken.png', good], capsys)
    printed = capsys.readouterr()
    assert exit.value.code == 1 and 'broken.png' in printed.err
    assert json.loads(printed.out)['image'] == str(good)
