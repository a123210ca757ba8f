"""Every mixer, swapped into one decoder by one option, trains, generates, exports and reloads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import seqzoo
from seqzoo.train.tokenizer import byte_tokenizer

pytestmark = pytest.mark.xdist_group("every mixer")  # one process loads all the exported folders

DECODER = {
    "d_model": 32,
    "pattern": "attention, swiglu",
    "repeats": 4,
    "position": "rope",
    "max_length": 512,
}
SWAPS = {
    **{name: {4: name} for name in seqzoo.list_mixers(causal=True, kind="sequence")},
    **{name: {5: name} for name in seqzoo.list_mixers(causal=True, kind="channel")},
}
TEXT = b"the law: mixing [a; b] is mixing a, then mixing b from the state that a left. " * 40

LOAD = """
import json, sys
sys.modules["seqzoo"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(ids).logits, folder + ".logits")
        torch.save(model.generate(ids, max_new_tokens=8, do_sample=False), folder + ".ids")
"""


class Trained(NamedTuple):
    """What one swapped decoder did."""

    losses: list[float]
    logits: torch.Tensor
    generated: torch.Tensor
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("exports")
    tokenizer = byte_tokenizer()
    data = torch.tensor(tokenizer.encode(TEXT.decode(), add_special_tokens=False))
    prompt = data[None, :20]
    results = {name: run(name, data, prompt, tokenizer, root / name) for name in SWAPS}
    subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(prompt.tolist()), *(str(root / n) for n in SWAPS)],
        check=True,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
    )
    return results


def run(name, data, prompt, tokenizer, folder) -> Trained:
    torch.manual_seed(0)
    config = seqzoo.ZooConfig(
        decoder={**DECODER, "swap": SWAPS[name]}, vocab_size=tokenizer.vocab_size
    )
    model = seqzoo.ZooForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(50):
        starts = torch.randint(
            0, len(data) - 64, (4,), generator=torch.Generator().manual_seed(step)
        )
        batch = torch.stack([data[s : s + 64] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        logits = model(prompt).logits
        generated = model.generate(prompt, max_new_tokens=8, do_sample=False)
    seqzoo.export(model, folder, tokenizer=tokenizer)
    return Trained(losses, logits, generated, folder)


@pytest.mark.parametrize("name", SWAPS)
def test_the_loss_falls_in_fifty_steps(name: str, trained: dict[str, Trained]):
    losses = trained[name].losses
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


@pytest.mark.parametrize("name", SWAPS)
def test_it_generates(name: str, trained: dict[str, Trained]):
    generated = trained[name].generated
    assert generated.shape == (1, 28)
    assert generated.max() < byte_tokenizer().vocab_size


@pytest.mark.parametrize("name", SWAPS)
def test_it_loads_without_seqzoo_and_gives_the_same_bits(name: str, trained: dict[str, Trained]):
    folder = trained[name].folder
    assert torch.equal(torch.load(f"{folder}.logits", weights_only=True), trained[name].logits)
    assert torch.equal(torch.load(f"{folder}.ids", weights_only=True), trained[name].generated)
