"""Let a trained language model continue a text.

It comes from a checkpoint of `seqzoo fit` or from a folder of `seqzoo export`.
"""

import argparse
import sys

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompt and sampling."""
    parser.add_argument("model", help="checkpoint (.ckpt) or exported folder")
    parser.add_argument("--prompt", default="", help="text to continue; none by default")
    parser.add_argument("--tokens", type=int, default=256, help="how many to add (256)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)"
    )
    parser.add_argument("--top_k", type=int, default=50, help="sample from so many tokens (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")


def run(arguments: argparse.Namespace) -> None:
    """Print prompt and continuation."""
    from transformers import GenerationConfig

    from seqzoo.kernels.errors import check_positive
    from seqzoo.train.commands.loading import load_model
    from seqzoo.zoo.model import ZooForCausalLM

    check_positive(tokens=arguments.tokens, top_k=arguments.top_k)
    if arguments.temperature < 0:
        raise ValueError(
            f"temperature={arguments.temperature} is not allowed; it must be 0 or more"
        )
    model, tokenizer = load_model(arguments.model)
    if not isinstance(model, ZooForCausalLM):
        raise ValueError(f"{arguments.model} holds a {type(model).__name__}, which writes no text")
    model.to(arguments.device)
    # A model that was asked for nothing begins a document: the end of another one comes before it.
    ids = tokenizer(arguments.prompt, add_special_tokens=False).input_ids
    start = torch.tensor([ids or [tokenizer.eos_token_id]], device=arguments.device)
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    torch.manual_seed(arguments.seed)
    # transformers types the model that can generate, and its configuration, by hand.
    out = model.generate(  # type: ignore[misc]
        start,
        attention_mask=torch.ones_like(start),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=arguments.tokens,
            do_sample=arguments.temperature > 0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling if arguments.temperature > 0 else {}),
        ),
    )
    sys.stdout.write(f"{tokenizer.decode(out[0], skip_special_tokens=True)}\n")
