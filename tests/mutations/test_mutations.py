"""The suite is itself tested: each fault planted in a copy of the package must make it fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations.faults import FAULTS, Fault
from tests.properties import Case

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("kernels", "layers", "long_context", "zoo", "train", "configs", "src", "tests")


@pytest.fixture(scope="module")
def zygote():
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("zygote.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout; each test puts its fault in and takes it out again."""
    copy = tmp_path_factory.mktemp("mutated")
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def ask(zygote, tree: Path, **question) -> dict:
    zygote.stdin.write(json.dumps({"tree": str(tree), **question}) + "\n")
    zygote.stdin.flush()
    answer = json.loads(zygote.stdout.readline())
    assert "error" not in answer, answer["error"]
    return answer


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_planted_fault_is_caught(fault: Fault, zygote, tree):
    file = tree / fault.file
    text = file.read_text()
    assert text.count(fault.old) == 1, f"the line to break is not once in {fault.file}"
    file.write_text(text.replace(fault.old, fault.new))
    try:
        question = {"name": fault.mixer, "options": fault.options, "tests": list(fault.tests)}
        answer = ask(zygote, tree, **question)
    finally:
        file.write_text(text)
    assert answer["caught"], f"the suite passes although {fault.what}"


@pytest.mark.parametrize(
    "case", sorted({Case(f.mixer, f.options) for f in FAULTS if f.mixer}, key=str), ids=str
)
def test_the_checks_pass_where_no_fault_is_planted(case: Case, zygote, tree):
    """Else every fault above would seem caught."""
    answer = ask(zygote, tree, name=case.name, options=case.options, tests=[])
    assert answer["caught"] == ""


def test_there_are_at_least_thirty_faults():
    assert len(FAULTS) >= 30
    assert len({f.what for f in FAULTS}) == len(FAULTS)
