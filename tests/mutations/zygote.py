"""A process that has torch loaded and forks a child for each planted fault (a second, not ten).

It reads one JSON line a fault, {"tree", "name", "options", "tests"}, and answers with one line,
{"caught": the check and what it said, or "" when every check passed, or "error": ...}.
"""

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

SLOW = ("compiles", "exports")  # the faults here are of numbers, not of tracing


def contract(name: str, options: dict) -> dict:
    from tests.properties import CHECKS, Case, backends  # of the mutated tree

    case = Case(name, options)
    for check in (*CHECKS, backends):
        if check.__name__ in SLOW:
            continue
        try:
            check(case)
        except (AssertionError, GradcheckError) as failure:
            return {"caught": f"{check.__name__}: {failure}"[:300]}
    return {"caught": ""}


def suite(tree: str, tests: list[str]) -> dict:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", tree, *tests])
    if code == pytest.ExitCode.TESTS_FAILED:
        return {"caught": ", ".join(tests)}
    if code == pytest.ExitCode.OK:
        return {"caught": ""}
    return {"error": out.getvalue()[-2000:]}


def run(fault: dict) -> dict:
    tree = fault["tree"]
    os.chdir(tree)
    sys.path[:0] = [f"{tree}/src", tree]
    torch.set_num_threads(1)
    try:
        if fault["tests"]:
            return suite(tree, fault["tests"])
        return contract(fault["name"], fault["options"])
    except BaseException:
        return {"error": traceback.format_exc()[-2000:]}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            answer = run(json.loads(line))
            with os.fdopen(send, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        print(answer or json.dumps({"error": "the child died"}), flush=True)


if __name__ == "__main__":
    main()
