"""Turn published weights into a Hugging Face folder of seqzoo, with the same logits.

Known: Mamba, Falcon-Mamba, Mamba-2, Llama and Mistral, as transformers has them.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where to where."""
    parser.add_argument("source", help="folder or Hub id of a model of transformers")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder and say where it is."""
    from transformers import AutoTokenizer

    from seqzoo.zoo.export import export
    from seqzoo.zoo.pretrained import import_pretrained

    model = import_pretrained(arguments.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.source, trust_remote_code=False)
    except (OSError, ValueError):
        tokenizer = None
        sys.stderr.write(f"{arguments.source} has no tokenizer; the weights go alone\n")
    export(model, arguments.out, tokenizer=tokenizer, overwrite=arguments.overwrite)
    sys.stdout.write(f"{arguments.out}\n")
