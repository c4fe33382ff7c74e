"""Each number that a run reports, computed again from what it is about: images, weights, and a clock."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import Result
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms import v2

import engine
import main_finetune
import main_linprobe
import main_pretrain
from models_mff import MaskedAutoencoderMFF, model_sizes
from util import data
from util.args import run_job

JOBS = {'pretrain': main_pretrain, 'finetune': main_finetune, 'linprobe': main_linprobe}
MEAN, STD, CROP_PCT = (0.3, 0.4, 0.5), (0.2, 0.25, 0.35), 0.6

# 60 of 64 images an epoch: two epochs of five steps, each of two micro-batches of six images.
FLAGS = (
    '--model vit_nano_patch4 --input_size 16 --total_batch_size 12 --batch_size 6 --epochs 2 --warmup_epochs 1 '
    '--lr 0.01 --min_lr 1e-3 --log_every 2 --num_workers 0 --device cpu --mean 0.3 0.4 0.5 --std 0.2 0.25 0.35'
).split()
JOB_FLAGS = {
    'pretrain': [],
    'finetune': f'--mixup 0 --cutmix 0 --drop_path 0 --smoothing 0.2 --crop_pct {CROP_PCT} --layer_decay 0.5'.split(),
    'linprobe': f'--crop_pct {CROP_PCT}'.split(),
}
INTERVALS = [[0, 1], [2, 3], [4], [5], [6, 7], [8, 9]]  # steps of each log line: every two, and at an epoch's end
SKIPPED = 6  # the step whose loss is made infinite


class Watched:
    """A run, with the batches and weights of each of its steps, on a clock that stands still but for our advances.

    An image takes 0.1 s to load, and a forward pass of step i takes 1 + i s.
    """

    def __init__(self, job, folder, output_dir):
        self.job, self.folder, self.output_dir = job, folder, output_dir
        self.batches, self.states, self.clock = [[] for _ in range(10)], [], 0.0
        train, get_sample = engine.train, data.Samples.__getitem__

        def sample(samples, key):
            self.clock += 0.1
            return get_sample(samples, key)

        def watched_train(run, model, optimizer, loss_fn, *others):
            def loss_of(network, batch, place=None):
                if place is None:  # pre-training's evaluation
                    self.clock += 100
                    return loss_fn(network, batch)
                self.clock += 1 + place[0]
                if place[1] == 0:
                    self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
                self.batches[place[0]].append([tensor.clone() for tensor in batch])
                loss = loss_fn(network, batch, place)
                return loss * math.inf if place == (SKIPPED, 6) else loss

            train(run, model, optimizer, loss_of, *others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, 'train', watched_train)
            patch.setattr(data.Samples, '__getitem__', sample)
            patch.setattr('time.perf_counter', lambda: self.clock)
            flags = ['--data_path', str(folder), '--output_dir', str(output_dir), *FLAGS, *JOB_FLAGS[job]]
            run_job(JOBS[job].main, JOBS[job].get_parser(), flags)
        self.states.append(Result(output_dir).checkpoint['model'])
        entries = Result(output_dir).entries
        self.logged = [entry for entry in entries if 'loss' in entry]
        self.evaluated = [entry for entry in entries if 'val_loss' in entry]

    def loss_and_norm(self, step):
        """The loss of a step and the norm of its gradient, by our own forward pass with the weights of that step."""
        parameters = {name: tensor.clone() for name, tensor in self.states[step].items()}
        fixed = 'pos_embed' if self.job == 'pretrain' else 'backbone'
        trained = [parameters[name].requires_grad_() for name in parameters if not re.search(f'{fixed}|^bn', name)]
        losses = [training_loss(self.job, parameters, *batch) for batch in self.batches[step]]
        assert [len(batch[0]) for batch in self.batches[step]] == [6, 6]
        loss = sum(losses) / 2
        loss.backward()
        return loss.item(), math.sqrt(sum(p.grad.double().square().sum().item() for p in trained))


@pytest.fixture(scope='module', params=JOBS)
def watched(request, folder, tmp_path_factory):
    return Watched(request.param, folder, tmp_path_factory.mktemp(request.param))


# --- The same numbers, by timm's ViT and plain formulas -------------------------------------------------------------


def functional(model, parameters, *inputs):
    return torch.func.functional_call(model, parameters, inputs)


def classify(job, parameters, imgs, training=False):
    """Logits of a classifier, by timm's own ViT."""
    options = {'img_size': 16, 'patch_size': 4, 'embed_dim': 64, 'depth': 4, 'num_heads': 4}
    if job == 'finetune':
        return functional(VisionTransformer(**options, num_classes=10, global_pool='avg'), parameters, imgs)
    backbone = {name.removeprefix('backbone.'): parameters[name] for name in parameters if 'backbone' in name}
    tokens = functional(VisionTransformer(**options, num_classes=0, global_pool='token'), backbone, imgs)
    mean, variance = parameters['bn.running_mean'], parameters['bn.running_var']
    if training:
        mean, variance = tokens.mean(0), tokens.var(0, unbiased=False)
    return (tokens - mean) / (variance + 1e-6).sqrt() @ parameters['head.weight'].T + parameters['head.bias']


def masked_loss(parameters, imgs, noise):
    """The squared error on the 12 of 16 patches with the largest noise, each standardised, over all images."""
    model = MaskedAutoencoderMFF(**model_sizes('vit_nano_patch4', img_size=16))
    _, pred, _ = functional(model, parameters, imgs, 0.75, noise)
    losses = []
    for image, predicted, drawn in zip(imgs, pred, noise):
        for index in drawn.argsort()[4:].tolist():
            row, column = divmod(index, 4)
            pixels = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            losses.append((predicted[index] - target).square().mean())
    return torch.stack(losses).mean()


def training_loss(job, parameters, imgs, target):
    if job == 'pretrain':
        return masked_loss(parameters, imgs, target)
    log_probabilities = classify(job, parameters, imgs, training=True).log_softmax(1)
    of_target, of_all = log_probabilities.gather(1, target[:, None]).mean(), log_probabilities.mean()
    return -of_target if job == 'linprobe' else -0.8 * of_target - 0.2 * of_all


def validation_images(folder, crop_pct, interpolation):
    """(imgs, labels) of the files in val/, by PIL and torchvision."""
    paths = sorted((folder / 'val').rglob('*.png'))
    classes = sorted({path.parent.name for path in paths})
    transform = v2.Compose([
        v2.PILToTensor(),
        v2.Resize(int(16 / crop_pct), interpolation, antialias=True),
        v2.CenterCrop(16),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    imgs = torch.stack([transform(Image.open(path)) for path in paths])
    return imgs, torch.tensor([classes.index(path.parent.name) for path in paths])


@torch.no_grad()
def validation(watched, step):
    """{name: value} of an evaluation with the weights after so many steps."""
    if watched.job == 'pretrain':
        imgs, _ = validation_images(watched.folder, 1.0, v2.InterpolationMode.BILINEAR)
        noise = []
        for index in range(20):  # drawn for (seed 0, epoch 0, index)
            data.seed_generators(0, 0, index)
            noise.append(torch.rand(16))
        noise = torch.stack(noise)
        return {'val_loss': masked_loss(watched.states[step], imgs, noise).item()}
    imgs, labels = validation_images(watched.folder, CROP_PCT, v2.InterpolationMode.BICUBIC)
    logits = classify(watched.job, watched.states[step], imgs)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)  # of the right class
    return {
        'val_loss': F.cross_entropy(logits, labels).item(),
        'val_top1': 100 * (ranks < 1).float().mean().item(),
        'val_top5': 100 * (ranks < 5).float().mean().item(),
    }


# --- Training -------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_all_images_since_the_last_line(watched):
    losses, norms = zip(*(watched.loss_and_norm(step) for step in range(10)))
    steps = [[step for step in interval if step != SKIPPED] for interval in INTERVALS]
    expected = [sum(losses[step] for step in interval) / len(interval) for interval in steps]
    assert [entry['loss'] for entry in watched.logged] == pytest.approx(expected, rel=1e-4)
    assert [entry['grad_norm'] for entry in watched.logged] == pytest.approx([norms[i[-1]] for i in steps], rel=1e-3)
    assert [entry.get('skipped', 0) for entry in watched.logged] == [0, 0, 0, 0, 1, 0]


def test_steps_epochs_and_learning_rates(watched):
    """Five steps of warm-up from 1e-4 of the rate; half a cosine over five more."""
    rates = [0.01 * (1e-4 + (1 - 1e-4) * step / 4) for step in range(5)]
    rates += [0.001 + 0.009 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert [entry['step'] for entry in watched.logged] == [2, 4, 5, 6, 8, 10]
    assert [entry['epoch'] for entry in watched.logged] == pytest.approx([0.4, 0.8, 1, 1.2, 1.6, 2])
    assert [entry['lr'] for entry in watched.logged] == pytest.approx([rates[i[-1]] for i in INTERVALS], rel=1e-6)


def test_speed_is_that_of_the_steps(watched):
    """Without the evaluation between them, which takes its time on this clock."""
    seconds = [sum(1.2 + 2 * (1 + step) for step in interval) for interval in INTERVALS]
    speeds = [12 * len(interval) / spent for interval, spent in zip(INTERVALS, seconds)]
    waits = [1.2 * len(interval) / spent for interval, spent in zip(INTERVALS, seconds)]
    assert [entry['images_per_s'] for entry in watched.logged] == pytest.approx(speeds)
    assert [entry['data_wait'] for entry in watched.logged] == pytest.approx(waits)


# --- Evaluation -----------------------------------------------------------------------------------------------------


def test_validation_is_that_of_the_files(watched):
    assert [entry['step'] for entry in watched.evaluated] == [5, 10]
    for entry in watched.evaluated:
        expected = validation(watched, entry['step'])
        assert {name: entry[name] for name in entry if 'val' in name} == pytest.approx(expected, rel=1e-4)
    if watched.job != 'pretrain':
        assert expected['val_top1'] < expected['val_top5']


@pytest.mark.parametrize('watched', ['finetune', 'linprobe'], indirect=True)
def test_evaluation_follows_the_checkpoint(watched, capsys):
    """--eval without the flags of the training: sizes, mean, deviation and crop are those of the checkpoint."""
    job, checkpoint = JOBS[watched.job], watched.output_dir / 'checkpoint-last.pth'
    flags = ['--eval', '--data_path', str(watched.folder), '--init_from', str(checkpoint), '--num_workers', '0']
    run_job(job.main, job.get_parser(), [*flags, '--device', 'cpu'])
    expected = validation(watched, 10)
    line = 'top-1 {val_top1:.2f} %  top-5 {val_top5:.2f} %  loss {val_loss:.4f}  on 20 images'.format(**expected)
    assert capsys.readouterr().out.splitlines()[-1] == line


@pytest.mark.parametrize('watched', ['finetune'], indirect=True)
def test_predictions_are_those_of_the_classifier(watched, capsys):
    paths = sorted((watched.folder / 'val').rglob('*.png'))
    flags = ['--predict', *map(str, paths), '--init_from', str(watched.output_dir / 'checkpoint-last.pth')]
    run_job(main_finetune.main, main_finetune.get_parser(), [*flags, '--json', '--device', 'cpu'])
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [prediction['image'] for prediction in predictions] == list(map(str, paths))
    imgs, _ = validation_images(watched.folder, CROP_PCT, v2.InterpolationMode.BICUBIC)
    classes = sorted(path.name for path in (watched.folder / 'val').iterdir())
    for prediction, probabilities in zip(predictions, classify('finetune', watched.states[10], imgs).softmax(1)):
        expected = sorted(zip(probabilities.tolist(), classes), reverse=True)[:5]
        assert list(prediction['classes']) == [name for _, name in expected]
        assert list(prediction['classes'].values()) == pytest.approx([p for p, _ in expected], abs=1e-4)
