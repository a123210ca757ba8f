"""Synthetic tasks as data for `seqzoo fit`: batches, lengths, figures, exact resume."""

import csv
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from seqzoo.train.cli import main
from seqzoo.train.data import Synthetic
from seqzoo.train.data.synthetic import FreshLoader
from seqzoo.train.token_classification import TokenClassification
from seqzoo.zoo.config import DecoderSpec

IGNORED = -100
TINY = [
    "--model=TokenClassification",
    "--model.decoder.d_model=8",
    "--model.decoder.pattern=mingru",
    "--model.decoder.dropout=0.1",
    "--model.warmup_steps=2",
    "--data=Synthetic",
    "--data.task=parity",
    "--data.length=8",
    "--data.options.min_length=3",
    "--data.test_lengths=[16]",
    "--data.batch_size=4",
    "--data.val_samples=10",
    "--data.test_samples=12",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=6",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def parity(**options):
    return Synthetic("parity", **{"length": 8, "batch_size": 4, "epoch_batches": 5, **options})


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


# Data


def test_training_rows_are_fresh_in_every_batch_and_every_epoch():
    data = parity(length=40)
    loader = data.train_dataloader()
    epochs = [ids(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [5, 5, 5]
    rows = [tuple(row) for epoch in epochs for batch in epoch for row in batch]
    assert len(set(rows)) == 60
    wanted = data.task.sample(0, "train", range(60))["input_ids"]
    assert rows == [tuple(row) for row in wanted.tolist()]
    assert ids(parity(length=40, num_workers=2).train_dataloader()) == epochs[0]
    assert ids(parity(length=40, seed=1).train_dataloader()) != epochs[0]


def test_a_fixed_number_of_rows_is_shuffled_anew():
    loader = parity(length=40, samples=12).train_dataloader()
    first, second = ids(loader), ids(loader)
    assert len(first) == 3
    assert first != second
    assert sorted(r for b in first for r in b) == sorted(r for b in second for r in b)


def test_the_stream_resumes_after_each_batch_and_workers_do_not_move_the_place():
    whole = parity().train_dataloader()
    expected = [batch for _ in range(4) for batch in ids(whole)]
    for workers in (0, 2):
        running, seen = parity(num_workers=workers).train_dataloader(), 0
        for _ in range(2):
            for batch in running:
                assert batch["input_ids"].tolist() == expected[seen]
                seen += 1
                resumed = parity().train_dataloader()
                resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
                left = 5 - seen % 5
                assert ids(resumed) == expected[seen : seen + left]
                assert ids(islice(resumed, 3)) == expected[seen + left :][:3]


def test_an_epoch_cut_short_resumes_in_the_next_one():
    running, resumed = parity().train_dataloader(), parity().train_dataloader()
    running.limit = resumed.limit = 2
    head = ids(islice(running, 2))
    resumed.load_state_dict(running.state_dict())
    tail = ids(islice(resumed, 2))
    assert head + tail == ids(parity().train_dataloader())[:4]


def test_ranks_take_turns_and_share_nothing():
    data = parity(length=40)
    data.setup()
    rows = data.task.sample(0, "train", range(40))["input_ids"].tolist()
    ranks = [ids(data.train_loader(2, rank)) for rank in range(2)]
    turns = [row for pair in zip(*ranks, strict=True) for batch in pair for row in batch]
    assert turns == rows


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "seed was 0 and is 1"), ({"batch_size": 5}, "batch_size was 4 and is 5")],
)
def test_resume_with_other_data_is_refused(change, said):
    running = parity().train_dataloader()
    next(iter(running))
    with pytest.raises(ValueError, match=f"cannot resume in the stream of samples: {said}"):
        parity(**change).train_dataloader().load_state_dict(running.state_dict())


def test_other_data_than_those_of_the_checkpoint_are_noticed():
    class Fit:
        class state:  # noqa: N801
            fn = "fit"

    data = parity(options={"every": False})
    data.trainer = Fit()
    data.load_state_dict(parity(options={"every": False}).state_dict())
    with pytest.raises(ValueError, match="trained on other data"):
        data.load_state_dict(parity().state_dict())


def test_held_out_rows_are_fixed_at_every_length():
    data = parity(val_samples=10, test_samples=7, test_lengths=[16, 4, 8])
    shapes = [[b["input_ids"].shape for b in part] for part in data.val_dataloader()]
    assert shapes == [[(4, n), (4, n), (2, n)] for n in (8, 4, 16)]
    assert [len(part.dataset) for part in data.test_dataloader()] == [7, 7, 7]
    first = [ids(part) for part in data.val_dataloader()]
    torch.manual_seed(3)
    again = parity(val_samples=10, test_lengths=[16, 4], num_workers=1, samples=20)
    assert [ids(part) for part in again.val_dataloader()] == first
    assert [ids(part) for part in data.test_dataloader()] != first


def test_facts_name_task_floor_and_seed():
    data = parity(seed=3)
    facts = data.describe()
    assert facts["task"] == parity().task.to_dict()
    assert (facts["floor"], facts["floor_is"]) == (0.5, "a coin")
    assert (facts["vocab_size"], facts["tokenizer"], facts["seed"]) == (2, None, 3)
    json.dumps(facts)
    assert isinstance(data.train_loader(1, 0), FreshLoader)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "listops_gen"}, "task=listops_gen is not allowed: .*-c configs/task/lra-"),
        ({"task": "parrity"}, "no synthetic task 'parrity'; nearest: parity"),
        ({"options": {"evry": True}}, "no option of task 'parity' named 'evry'; nearest: every"),
        ({"length": 0}, "length=0 is not allowed"),
        ({"test_lengths": [0]}, "length=0 is not allowed"),
        ({"samples": 0}, "samples=0 is not allowed"),
        ({"epoch_batches": 0}, "epoch_batches=0 is not allowed"),
        ({"val_samples": 0}, "val_samples=0 is not allowed"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, said):
    with pytest.raises(ValueError, match=said):
        Synthetic(**{"task": "parity", **options})


# Training


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fit_validates_at_every_length_resumes_bit_for_bit_tests_and_predicts(place, capsys):
    every = ["--checkpoint.every_n_train_steps=3", "--checkpoint.save_top_k=-1"]
    every += ["--checkpoint.monitor=null"]
    assert main(["fit", *TINY, *every]) == 0
    rows = metrics(place / "runs/default/logs/version_0/metrics.csv")
    looks = [row for row in rows if row["val/accuracy"]]
    assert len(looks) == 3
    assert all(0 <= float(row["val/accuracy_at_16"]) <= 1 for row in looks)
    assert all(float(row["val/loss_at_16"]) > 0 for row in looks)

    middle = "runs/default/checkpoints/step3.ckpt"
    assert main(["fit", *TINY, *every, "--run=other", f"--ckpt_path={middle}"]) == 0
    files = [place / f"runs/{run}/checkpoints/last.ckpt" for run in ("default", "other")]
    whole, resumed = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    capsys.readouterr()
    last = f"--ckpt_path={files[0]}"
    data = [word for word in [*TINY, *every] if not word.startswith("--model")]
    assert main(["test", *data, last]) == 0
    said = capsys.readouterr().out
    assert "test/accuracy" in said
    assert "test/accuracy_at_16" in said
    assert main(["predict", *data, last]) == 0
    lines = (place / "runs/default/predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 12
    assert all(len(row["answers"]) == row["asked"] == 8 for row in answers)

    for command in (["generate", str(files[0])], ["export", str(files[0]), "out"]):
        capsys.readouterr()
        assert main(command) == 2
        assert "it has no text and no tokenizer" in capsys.readouterr().err


def test_a_model_of_tokens_needs_data_that_say_where_answers_are(place, capsys):
    assert main(["fit", "--model=TokenClassification"]) == 2
    assert "readout='' is not allowed; it must be token or last" in capsys.readouterr().err


def test_a_language_model_would_shift_the_answers_and_is_refused(place, capsys):
    words = [w for w in TINY if "TokenClassification" not in w]
    assert main(["fit", *words]) == 2
    said = capsys.readouterr().err
    assert "data Synthetic has an answer at each token; train it with `--model Token" in said


@pytest.mark.parametrize("name", ["mqar", "parity", "induction", "selective_copying"])
def test_the_overlays_train(place, name):
    configs = Path(__file__).parents[2] / "configs"
    words = ["-c", str(configs / f"task/{name}.yaml"), "-c", str(configs / "trainer/debug.yaml")]
    words += ["--model.decoder.pattern=mingru", "--model.decoder.d_model=16"]
    words += ["--data.val_samples=4", "--data.batch_size=4"]
    assert main(["fit", *words, "--trainer.enable_model_summary=false"]) == 0


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec")
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("memorization", {"length": 8, "options": {"vocab_size": 17}}),
        ("compression", {"length": 4, "options": {"vocab_size": 5}}),
    ],
)
def test_answers_are_learned_unshifted_and_accuracy_is_a_mean_over_answers(task, options):
    data = Synthetic(task, val_samples=67, **options)
    pattern = ["short_conv", "mlp"]
    torch.manual_seed(0)
    module = TokenClassification(
        DecoderSpec(d_model=32, pattern=pattern, options={"short_conv": {"d_conv": 4}}),
        vocab_size=data.vocab_size,
        readout=data.readout,
        lr=0.02,
        warmup_steps=5,
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=250, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    accuracy = trainer.validate(module, data, verbose=False)[0]["val/accuracy"]
    assert accuracy > 0.95
    right = asked = 0
    for batch in data.val_dataloader()[0]:
        with torch.no_grad():
            said = module.network(input_ids=batch["input_ids"]).logits.argmax(-1)
        known = batch["labels"] != IGNORED
        right, asked = right + int((said == batch["labels"])[known].sum()), asked + int(known.sum())
    assert accuracy == pytest.approx(right / asked)
