"""An exported folder loads where seqzoo and Triton are not, and gives the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_imports

from seqzoo.layers import CATALOGUE
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.export import export, verify
from seqzoo.zoo.model import ZooForCausalLM, ZooForSequenceClassification
from seqzoo.zoo.rewrite import rewrite
from seqzoo.zoo.sources import Module, imported, read

ROOT = Path(__file__).parents[2]
USER = "zoo_test_user.mixers:Average"
EVERYTHING = {
    "d_model": 16,
    "pattern": [*CATALOGUE, USER],
    "position": "rope",
    "max_length": 64,
    "options": {"attention": {"window": 8}},
}
OTHER = {"d_model": 8, "pattern": ["rg_lru", "alibi"], "position": "learned", "max_length": 64}
OTHER["options"] = {"alibi": {"is": "attention", "position": "alibi", "n_heads": 2}}
ENCODER = {"d_model": 16, "pattern": ["attention", "rg_lru", "swiglu"], "causal": False}

# Runs without the library: what it finds goes to standard output.
ALONE = """
import json, sys
from pathlib import Path
sys.modules["seqzoo"] = sys.modules["triton"] = sys.modules["zoo_test_user"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
torch.set_num_threads(1)
folder, report = Path(sys.argv[1]), {}
wanted = load_file(folder / "wanted.safetensors")
ids = wanted["ids"]
for name in ("everything", "other", "encoder"):
    auto = AutoModelForSequenceClassification if name == "encoder" else AutoModelForCausalLM
    model = auto.from_pretrained(folder / name, trust_remote_code=True)
    report[name] = {"logits": model(ids).logits.equal(wanted[name])}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    held = {k.removeprefix(f"{name}."): v for k, v in wanted.items() if k.startswith(f"{name}.")}
    report[name]["tensors"] = [k for k in held if not held[k].equal(tensors[k])]
    model.train()(ids, labels=ids[:, 0] % 2 if name == "encoder" else ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = all(g.isfinite().all().item() for g in gradients)
    report[name]["gradients"] = finite and len(gradients) > 5
    if name != "encoder":
        made = model.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        report[name]["tokens"] = made.equal(wanted[f"{name}_tokens"])
    else:
        AutoConfig.from_pretrained(folder / name, trust_remote_code=True)
report["namespaces"] = sorted(n for n in dir(torch.ops) if n.startswith("seqzoo"))
print(json.dumps(report))
"""

# Two folders with the same code, as two checkpoints of one run have: operators meet by name.
TWINS = """
import json, sys
from pathlib import Path
sys.modules["seqzoo"] = None
import torch
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
sums = []
for name in ("one", "two", "one"):
    model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    sums.append(model(torch.arange(9)[None]).logits.sum().item())
print(json.dumps({"sums": sums}))
"""

# The library's kernels and a bundle in one process; the library's models are not imported.
TOGETHER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from seqzoo.kernels.scan import scan
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder = Path(sys.argv[1])
wanted = load_file(folder / "wanted.safetensors")
x = torch.rand(1, 5, 3)
before = scan(x, x)[0]
model = AutoModelForCausalLM.from_pretrained(folder / "other", trust_remote_code=True)
report = {
    "logits": model(wanted["ids"]).logits.equal(wanted["other"]),
    "scan": scan(x, x)[0].equal(before),
    "remote": type(model).__module__.startswith("transformers_modules"),
    "namespaces": sorted(n for n in dir(torch.ops) if n.startswith("seqzoo")),
}
print(json.dumps(report))
"""


def run(code: str, folder: Path, path: str = "") -> dict:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three exported models, and what they compute."""
    folder = tmp_path_factory.mktemp("exported")
    ids = torch.randint(1, 41, (2, 9))
    wanted = {"ids": ids}
    for name, decoder in (("everything", EVERYTHING), ("other", OTHER), ("encoder", ENCODER)):
        config = ZooConfig(decoder=decoder, vocab_size=259, initializer_range=0.5)
        kind = ZooForSequenceClassification if name == "encoder" else ZooForCausalLM
        model = kind(config).eval()
        export(model, folder / name, tokenizer=byte_tokenizer(), facts={"score": "0.5 | <b>"})
        with torch.no_grad():
            wanted[name] = model(ids).logits
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            wanted[f"{name}.{key}"] = tensor.detach().clone()
        if name != "encoder":
            wanted[f"{name}_tokens"] = model.generate(
                ids, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
    save_file(
        {key: tensor.contiguous() for key, tensor in wanted.items()}, folder / "wanted.safetensors"
    )
    return folder


def test_exports_load_and_run_side_by_side_without_the_library_or_triton(exported):
    report = run(ALONE, exported)
    namespaces = report.pop("namespaces")
    assert len(namespaces) == 3  # one a bundle
    assert "seqzoo" not in namespaces
    for name, found in report.items():
        assert found["tensors"] == [], name
        assert found["logits"], name
        assert found["gradients"], name
        assert found.get("tokens", True), name


def test_a_bundle_and_the_library_live_in_one_process(exported):
    report = run(TOGETHER, exported, path=str(ROOT / "src"))
    namespaces = report.pop("namespaces")
    assert "seqzoo" in namespaces
    assert len(namespaces) == 2
    assert all(report.values()), report


def test_two_exports_with_the_same_code_live_in_one_process(tmp_path):
    for name in ("one", "two"):
        decoder = {"d_model": 32, "pattern": ["mamba", "rg_lru", "hyena"], "max_length": 64}
        export(ZooForCausalLM(ZooConfig(decoder=decoder, vocab_size=20)), tmp_path / name)
    first, second, again = run(TWINS, tmp_path)["sums"]
    assert first == again != second


def test_with_the_library_its_own_class_is_used_and_no_flag_is_needed(exported):
    assert type(AutoConfig.from_pretrained(exported / "other")) is ZooConfig
    assert type(AutoModelForCausalLM.from_pretrained(exported / "other")) is ZooForCausalLM


def test_the_folder_holds_what_is_used_and_nothing_else(exported):
    names = {file.name for file in (exported / "other").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "README.md", "SHA256SUMS"} <= names
    assert "seqzoo_layers_rg_lru.py" in names
    assert "seqzoo_long_context_positions_learned.py" in names
    assert "seqzoo_layers_mamba2.py" not in names
    assert "seqzoo_zoo_export.py" not in names
    catalogue = (exported / "other/seqzoo_layers.py").read_text()
    assert "RGLRU" in catalogue
    assert "Mamba2" not in catalogue


def test_the_card_is_a_table_that_facts_cannot_break(exported):
    card = (exported / "everything/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "pipeline_tag: text-generation" in card
    assert "arXiv:2402.19427" in card
    assert "| score | 0.5 \\| &lt;b> |" in card
    assert "text-classification" in (exported / "encoder/README.md").read_text()


def test_verify_finds_every_kind_of_change(exported, tmp_path):
    config = ZooConfig(decoder={"d_model": 8, "pattern": ["swiglu"]})
    folder = export(ZooForCausalLM(config), tmp_path / "small")
    assert "model.safetensors" in verify(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file"):
        verify(folder)
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    verify(folder)
    (folder / "more.py").write_text("")
    with pytest.raises(ValueError, match=r"more.py is not listed"):
        verify(folder)
    (folder / "more.py").unlink()
    sums = (folder / "SHA256SUMS").read_text()
    for outside in ("../small/README.md", "/etc/hostname"):
        (folder / "SHA256SUMS").write_text(f"{sums}{'0' * 64}  {outside}\n")
        with pytest.raises(ValueError, match="outside of the folder"):
            verify(folder)
    (folder / "SHA256SUMS").write_text(sums)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        verify(folder)
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        verify(tmp_path)


def test_an_existing_target_is_replaced_only_when_asked_and_only_an_export(tmp_path):
    model = ZooForCausalLM(ZooConfig(decoder={"d_model": 8, "pattern": ["swiglu"]}))
    folder = export(model, tmp_path / "out")
    with pytest.raises(ValueError, match="exists; pass overwrite=True"):
        export(model, folder)
    (folder / "left-over.txt").write_text("")
    export(model, folder, overwrite=True)
    assert not (folder / "left-over.txt").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="no earlier export"):
        export(model, precious, overwrite=True)
    with pytest.raises(ValueError, match="letters, digits"):
        export(model, tmp_path / "a b")
    with pytest.raises(TypeError, match="ZooForCausalLM"):
        export(torch.nn.Linear(2, 2), tmp_path / "linear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


def test_a_mixer_that_is_no_single_file_is_refused_and_the_target_stays(tmp_path):
    fine = ZooForCausalLM(ZooConfig(decoder={"d_model": 8, "pattern": ["swiglu"]}))
    folder = export(fine, tmp_path / "out")
    tangled = {"d_model": 8, "pattern": ["zoo_test_user.tangled:Average"]}
    model = ZooForCausalLM(ZooConfig(decoder=tangled))
    with pytest.raises(ValueError, match=r"imports zoo_test_user.mixers; .* single file"):
        export(model, folder, overwrite=True)
    assert verify(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def module(text: str, tmp_path: Path) -> Module:
    (tmp_path / "some_module_of_mine.py").write_text(text)
    sys.path.insert(0, str(tmp_path))
    try:
        return read("some_module_of_mine")
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import seqzoo.layers", "write `from seqzoo.x import Name`"),
        ("from seqzoo import create_mixer", "name the module"),
        ("from . import other", "relative import"),
        ("import numpy", "imports numpy"),
    ],
)
def test_imports_that_cannot_travel_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(imported(module(text, tmp_path)))


def test_only_what_must_change_changes(tmp_path):
    text = (
        '"""Words: é, and from seqzoo.layers.base import Mixer."""\n'
        "from seqzoo.layers.base import Caps, Mixer as M  # why\n"
        "NAME = 'seqzoo::op'; é = torch.ops.seqzoo.op\n"
    )
    new = rewrite(module(text, tmp_path), {"seqzoo.layers.base"}, set())
    before, after = text.splitlines(), new.splitlines()
    assert after[0] == before[0]
    assert after[1] == "from .seqzoo_layers_base import Caps, Mixer as M  # why"
    assert after[2].startswith("NAME = 'seqzoo_")
    assert "é = torch.ops.seqzoo_" in after[2]


def test_a_package_that_may_be_missing_is_imported_where_transformers_does_not_look(tmp_path):
    text = rewrite(read("seqzoo.kernels.scan.fused"), set(), set())
    (tmp_path / "fused.py").write_text(text)
    assert "triton" in text
    assert "triton" not in get_imports(tmp_path / "fused.py")
