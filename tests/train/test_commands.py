"""The commands beside training, from one small checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from seqzoo.kernels.dispatch import BACKENDS, Backend
from seqzoo.layers import list_mixers, mixer_info
from seqzoo.train.classification import Classification
from seqzoo.train.cli import main
from seqzoo.train.data import Text
from seqzoo.train.module import LanguageModelling
from seqzoo.train.tasks import SYNTHETIC
from seqzoo.zoo.config import DecoderSpec

SPEC = {"d_model": 16, "pattern": ["rg_lru", "mlp"]}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec"
)


def train(module, folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("all work and no play makes a dull zoo\n" * 400)
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Text(str(text), length=32, batch_size=4))
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(train(LanguageModelling(DecoderSpec(**SPEC)), tmp_path_factory.mktemp("lm")))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("exported") / "model")
    assert main(["export", checkpoint, folder]) == 0
    return folder


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_list_shows_what_every_mixer_declares(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list_mixers()
    assert [line.split()[0] for line in lines[1:]] == names
    for name, line in zip(names, lines[1:], strict=True):
        info = mixer_info(name)
        assert line.split()[1:3] == [info.kind, info.caps.causality]
        assert line.endswith(info.summary)


def test_list_filters_and_speaks_markdown(capsys):
    assert (
        main(["list", "--causal", "--kind", "sequence", "--state", "constant", "--markdown"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == list_mixers(causal=True, kind="sequence", state="constant")
    assert {line.count("|") for line in lines} == {10}


def test_list_shows_tasks_and_says_which_are_of_our_own_making(capsys):
    assert main(["list", "--tasks"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "length", "answers", "paper", "summary"]
    assert [line.split()[0] for line in lines] == list(SYNTHETIC)
    said = {line.split()[0]: line for line in lines}
    assert {name for name in said if " one a row " in said[name]} == {
        "listops_gen",
        "pathfinder_gen",
    }
    assert " 2000 " in said["listops_gen"]
    assert said["parity"].endswith("Is the number of ones so far odd?")
    assert "--tasks shows every task" in refused(capsys, "list", "--tasks", "--causal")


def test_list_refuses_an_unknown_kind(capsys):
    assert "no kind 'chanel'; nearest: channel" in refused(capsys, "list", "--kind", "chanel")


def test_doctor_names_the_backend_that_runs_and_why_others_cannot(capsys, monkeypatch):
    trial = (Backend("fused", needs=("nothing_of_that_name",)), Backend("chunked"))
    monkeypatch.setitem(BACKENDS, "trial", trial)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f" {torch.__version__} " in text
    assert all(f"\n{kernel} " in text for kernel in ("scan", "short_conv"))
    line = next(x for x in text.splitlines() if x.startswith("trial"))
    assert line.split()[1] == "chunked"
    assert "fused: the package nothing_of_that_name is not installed" in line


def test_generate_is_the_same_from_checkpoint_and_from_exported_folder(
    capsys, checkpoint, exported
):
    texts = []
    for model in (checkpoint, exported):
        capsys.readouterr()
        assert main(["generate", model, "--prompt", "all wo", "--tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("all wo")
    assert texts[0] == texts[1]


def test_generate_without_a_prompt_begins_a_document(capsys, checkpoint):
    words = ["generate", checkpoint, "--tokens", "4", "--temperature", "0"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main([*words, "--seed", "1"]) == 0
    assert capsys.readouterr().out == first  # temperature 0 draws nothing


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["--tokens", "0"], "tokens=0 is not allowed"),
        (["--tokens", "many"], "invalid int value: 'many'"),
    ],
)
def test_generate_refuses_wrong_numbers(capsys, checkpoint, words, line):
    assert line in refused(capsys, "generate", checkpoint, *words)


def test_extrapolate_prints_tables_and_writes_them(capsys, checkpoint, tmp_path):
    words = ["extrapolate", checkpoint, "--text", str(Path(checkpoint).parent / "text.txt")]
    words += ["--lengths", "64,128", "--out", str(tmp_path / "x"), "--max_tokens", "256"]
    assert main(words) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "x/extrapolation.json").read_text())
    assert report["unit"] == "byte"
    assert [row["length"] for row in report["rows"]] == [64, 128]
    assert [row["targets"] for row in report["rows"]] == [256, 256]
    for row in report["rows"]:
        assert f"{row['bits']:.3f}" in text
        assert f"{row['final']:.3f}" in text
    assert (tmp_path / "x/extrapolation.png").stat().st_size > 1000
    assert main([*words, "--chunk", "48"]) == 0
    chunked = json.loads((tmp_path / "x/extrapolation.json").read_text())
    for a, b in zip(report["rows"], chunked["rows"], strict=True):
        assert a["bits"] == pytest.approx(b["bits"], abs=1e-5)


def test_extrapolate_refuses_lengths_that_share_no_targets(capsys, checkpoint):
    line = refused(capsys, "extrapolate", checkpoint, "--lengths", "48,64")
    assert "length 48 does not divide the longest, 64" in line
    line = refused(capsys, "extrapolate", checkpoint, "--lengths", "a,b")
    assert "'a,b' is no list of numbers" in line


def test_export_does_not_write_over_a_folder_unless_told(capsys, checkpoint, exported):
    assert "model" in refused(capsys, "export", checkpoint, exported)
    assert main(["export", checkpoint, exported, "--overwrite"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == exported


def test_classifier_exports_but_does_not_generate(capsys, tmp_path):
    path = tmp_path / "c.ckpt"
    module = Classification(DecoderSpec(**SPEC, causal=False), n_classes=2)
    module.configure_model()
    hparams = dict(module.hparams)
    about = {"task": "Classification", "tokenizer": None}
    state = {"seqzoo": about, "hyper_parameters": hparams, "state_dict": module.state_dict()}
    torch.save(state, path)
    assert "writes no text" in refused(capsys, "generate", str(path))
    assert main(["export", str(path), str(tmp_path / "out")]) == 0


def test_files_that_are_no_models_are_refused(capsys, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "was not written by seqzoo" in refused(capsys, "generate", str(tmp_path / "other.ckpt"))
    assert "has no config.json" in refused(capsys, "generate", str(tmp_path))
    assert "no such file" in refused(capsys, "generate", str(tmp_path / "none.ckpt"))


def test_demo_compares_exports_and_loads_where_seqzoo_is_not(capsys, tmp_path):
    words = ["demo", "--steps", "2", "--d_model", "32", "--length", "32", "--batch_size", "4"]
    words += ["--max_bytes", "200000", "--out", str(tmp_path), "--no_progress"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "def read(" in text.rpartition("it writes:")[2]
    results = json.loads((tmp_path / "results.json").read_text())
    first, second = results["models"]
    assert (first["swapped"], second["swapped"]) == ("attention", "mamba2")
    assert first["state_bytes_long"] > 10 * first["state_bytes_short"]
    assert second["state_bytes_short"] < first["state_bytes_short"]
    assert list(first["lengths"]) == ["32", "64", "128", "256"]
    assert results["data"]["python"] in text
    assert results["data"]["digest"][:16] in text
    assert f"{first['validation_bits']:.3f}" in text
    assert (tmp_path / "comparison.png").is_file()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3
