"""The README says what is true: its table is the catalogue's and its example runs."""

import re
from pathlib import Path

import pytest

from seqzoo.train.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_of_the_zoo_is_the_one_made_from_the_catalogue(capsys):
    found = re.search(r"<!-- zoo: begin .*?-->\n(.*?)<!-- zoo: end -->", README, re.DOTALL)
    assert found
    assert main(["list", "--markdown"]) == 0
    assert found[1].strip() == capsys.readouterr().out.strip()


def test_the_example_runs():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[\w/-]+\.yaml", README))))
def test_every_named_config_exists(path: str):
    assert (Path(__file__).parent.parent / path).is_file()
