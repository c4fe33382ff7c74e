"""The documents: links, commands and names in them exist, and the README's Python runs."""

import re
import shlex

import pytest
import torch
from conftest import ROOT

import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from ablation import gpu, pretrain, run
from tools import export, features, robustness, visualize

README = (ROOT / 'README.md').read_text()
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md')])
MAINS = main_pretrain, main_finetune, main_linprobe, main_segment
TOOLS = export, features, robustness, visualize, pretrain, run, gpu
JOBS = {f'{main.__name__}.py': main for main in MAINS} | {tool.__name__: tool for tool in TOOLS}


def links(page):
    found = re.findall(r'\]\(([^)#\s]+)[^)]*\)', page.read_text())
    return {(page.parent / link).resolve() for link in found if '://' not in link}


def test_the_readme_quotes_what_ci_runs():
    command = (ROOT / '.ci/run').read_text().splitlines()[-1]
    assert command.startswith('python3 -m venv') and f'\n{command}\n' in README


def test_the_readme_is_short():
    assert len(README.split()) <= 1300


def test_links_lead_somewhere_and_every_page_is_reached():
    reached, left = set(), [ROOT / 'README.md']
    while left:
        page = left.pop()
        for target in links(page):
            assert target.exists(), f'{page}: {target}'
            if target.suffix == '.md' and target not in reached:
                reached.add(target)
                left.append(target)
    assert {page.resolve() for page in PAGES} <= reached | {ROOT / 'README.md'}


def commands():
    """(page, argument list) of every line of the documents that runs one of the jobs."""
    for page in PAGES:
        text = re.sub(r'\\\n\s*', '', page.read_text())
        jobs = r'main_\w+\.py|(?:tools|ablation)\.\w+'
        for line in re.findall(rf'^.*?\b((?:{jobs}) [^|`\n]*)', text, re.M):
            line = re.sub(r'(\w+) \.\.\.', r'\1', line.split(' && ')[0].split('#')[0])
            if not any(mark in line for mark in ('…', '...', '$FEW', '--help')):
                yield pytest.param(line, id=f'{page.name}: {line[:70].strip()}')


@pytest.mark.parametrize('line', list(commands()))
def test_commands_parse(line):
    """Flags and recipes of the jobs as the documents call them."""
    name, *flags = shlex.split(line)
    JOBS[name].get_parser().parse_args(flags)


def test_recipes_are_named():
    pages = ' '.join(page.read_text() for page in PAGES)
    for path in ROOT.glob('recipes/*.txt'):
        family = path.stem.split('_')[0]
        names = path.stem, f'`{family}_*`', f'_{path.stem.split("_")[-1]}`'
        assert any(name in pages for name in names), path


def test_promises_name_tests_that_exist():
    tests = ' '.join(path.read_text() for path in ROOT.glob('tests/test_*.py'))
    for name in re.findall(r'`(test_[a-z_0-9]+)(?:…|`)', (ROOT / 'docs/promises.md').read_text()):
        assert f'def {name}' in tests, name


def test_the_readmes_python_runs():
    (code,) = re.findall(r'```python\n(from models_mff.*?)```', README, re.S)
    scope = {'images': torch.randn(1, 3, 224, 224)}
    exec(code, scope)
    assert scope['loss'].isfinite() and scope['features'].shape == (1, 197, 768)
