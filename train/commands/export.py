"""Turn a checkpoint into a Hugging Face folder that loads without seqzoo.

AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where to where."""
    parser.add_argument("checkpoint", help="a checkpoint of `seqzoo fit`, or an exported folder")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder and say where it is."""
    from seqzoo.train.commands.loading import load_model
    from seqzoo.zoo.export import AUTO, export

    model, tokenizer = load_model(arguments.checkpoint)
    if type(model) not in AUTO:
        names = ", ".join(cls.__name__ for cls in AUTO)
        kind = type(model).__name__
        raise ValueError(f"{arguments.checkpoint} holds a {kind}; it must be one of {names}")
    export(model, arguments.out, tokenizer=tokenizer, overwrite=arguments.overwrite)
    sys.stdout.write(f"{arguments.out}\n")
