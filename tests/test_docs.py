"""The documents: links, commands and names in them exist, and the README's Python runs."""

import importlib
import re
import shlex

import pytest
import torch
from conftest import ROOT

README = (ROOT / 'README.md').read_text()
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md')])


def links(page):
    found = re.findall(r'\]\(([^)#\s]+)[^)]*\)', page.read_text())
    return {(page.parent / link).resolve() for link in found if '://' not in link}


def test_the_readme_quotes_what_ci_runs_and_is_short():
    command = (ROOT / '.ci/run').read_text().splitlines()[-1]
    assert command.startswith('python3 -m venv') and f'\n{command}\n' in README
    assert len(README.split()) <= 1300


def test_links_lead_somewhere_and_every_page_is_reached():
    reached, left = {ROOT / 'README.md'}, [ROOT / 'README.md']
    while left:
        page = left.pop()
        for target in links(page):
            assert target.exists(), f'{page}: {target}'
            if target.suffix == '.md' and target not in reached:
                reached.add(target)
                left.append(target)
    assert set(PAGES) <= reached


def commands():
    """The commands of the documents: a job or tool and its arguments."""
    for page in PAGES:
        text = re.sub(r'\\\n\s*', '', page.read_text())
        text = re.sub(r'(`[^`\n]+)\n([^`\n]+`)', r'\1 \2', text)  # code that goes over two lines
        jobs = r'main_\w+\.py|bench\.py|(?:tools|ablation)\.\w+'
        for line in re.findall(rf'^.*?\b((?:{jobs}) [^|`\n]*)', text, re.M):
            line = re.sub(r'(\w+) \.\.\.', r'\1', line.split(' && ')[0].split('#')[0])
            if not any(mark in line for mark in ('…', '...', '$FEW', '--help')):
                yield pytest.param(line, id=f'{page.name}: {line[:70].strip()}')


@pytest.mark.parametrize('line', list(commands()))
def test_commands_parse(line, monkeypatch):
    name, *flags = shlex.split(line)
    monkeypatch.chdir(ROOT)
    importlib.import_module(name.removesuffix('.py')).get_parser().parse_args(flags)


def test_promises_name_tests_that_exist():
    tests = ' '.join(path.read_text() for path in ROOT.glob('tests/test_*.py'))
    promises = (ROOT / 'docs/promises.md').read_text()
    for name in re.findall(r'`(test_[a-z_0-9]+)(?:…|`)', promises):
        assert f'def {name}' in tests, name
    for name in re.findall(r'`(test_\w+\.py)`', promises):
        assert (ROOT / 'tests' / name).exists()


def test_the_readmes_python_runs():
    (code,) = re.findall(r'```python\n(from models_mff.*?)```', README, re.S)
    scope = {'images': torch.randn(1, 3, 224, 224)}
    exec(code, scope)
    assert scope['loss'].isfinite() and scope['features'].shape == (1, 197, 768)
