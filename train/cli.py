"""The command `seqzoo`.

Each command lives in a module of `seqzoo.train.commands` that is imported when it is called:
`seqzoo list` starts without Lightning. What a user got wrong is told in one line with exit code 2;
`--traceback` shows the whole story.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from seqzoo.kernels.errors import unknown
from seqzoo.train.commands.doctor import version_of
from seqzoo.train.commands.errors import explain


class Command(NamedTuple):
    """What `seqzoo --help` says of a command, and the module that runs it."""

    words: str
    module: str


COMMANDS = {
    "list": Command("show every mixer and what it promises", "list"),
    "doctor": Command("show what works on this machine, and why the rest does not", "doctor"),
    "fit": Command("train a model", "trainer"),
    "validate": Command("measure a checkpoint on the validation data", "trainer"),
    "test": Command("measure a checkpoint on the test data", "trainer"),
    "predict": Command("write a checkpoint's predictions to a file", "trainer"),
    "generate": Command("let a trained model continue a text", "generate"),
    "extrapolate": Command("measure a model beyond the length it was trained on", "extrapolate"),
    "export": Command("turn a checkpoint into a Hugging Face folder", "export"),
    "import": Command("turn published weights into a Hugging Face folder of seqzoo", "import_"),
    "gates": Command("train tiny models that must, or must not, solve synthetic tasks", "gates"),
    "ablate": Command("train a grid of small models that differ in their mixers", "ablate"),
    "report": Command("draw what ablate wrote: one HTML page, one table", "report"),
    "bench": Command("time a mixer against its own shorter runs", "bench"),
    "lra": Command("make samples of Long-Range Arena's ListOps or Pathfinder", "lra"),
    "demo": Command("train two models that differ in one layer and compare them", "demo"),
}
EXAMPLES = """\
examples:
  seqzoo list --causal
  seqzoo fit --model.decoder.mixer mamba2 --trainer.max_steps 500
  seqzoo fit -c configs/task/stdlib.yaml -c configs/mixer/hybrid.yaml -c configs/trainer/cpu.yaml
  seqzoo generate runs/default/checkpoints/last.ckpt --prompt "def "

`seqzoo COMMAND --help` explains a command. `--traceback` shows where an error comes from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after `seqzoo`; those of the process when None.

    Returns:
        0 done, 1 a gate that does not hold, 2 something the user can mend (told in one line), 130
        interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        sys.stderr.write("seqzoo: interrupted\n")
        return 130
    except SystemExit as stop:  # after --help, --version or --print_config
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if show:
            traceback.print_exc()
        sys.stderr.write(f"seqzoo {words[0]}: {line}\n")
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        _overview().parse_args(words or ["--help"])
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    module = import_module(f"seqzoo.train.commands.{COMMANDS[name].module}")
    if COMMANDS[name].module == "trainer":  # Lightning's command line has a parser of its own
        module.launch(words)
        return 0
    parser = _Parser(
        prog=f"seqzoo {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    module.run(parser.parse_args(rest))
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors travel like all others, instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {c.words}" for name, c in COMMANDS.items())
    parser = _Parser(
        prog="seqzoo",
        usage="seqzoo COMMAND [OPTIONS]",
        description=f"A zoo of sequence mixers. Commands:\n\n{listing}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"seqzoo {version_of('seqzoo')}"
    parser.add_argument("--version", action="version", version=version)
    return parser
