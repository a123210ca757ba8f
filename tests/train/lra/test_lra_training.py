"""Long-Range Arena from the command line: two towers, real pixels, floors, self-pretraining."""

import csv
import signal
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from seqzoo.train.classification import Classification
from seqzoo.train.cli import main
from seqzoo.train.commands.loading import load_module
from seqzoo.train.lra.models import ZooForPixels, ZooForRetrieval
from seqzoo.train.optim import two_phases, warmup_cosine, warmup_linear
from seqzoo.train.pretrain import SelfPretraining
from seqzoo.train.retrieval import Retrieval
from seqzoo.zoo.config import DecoderSpec, ZooConfig

CONFIGS = Path(__file__).parents[3] / "configs"
SPEC = DecoderSpec(d_model=16, pattern=["attention", "mlp"], causal=False, options={})
MODEL = [
    "--model.decoder.d_model=16",
    "--model.decoder.pattern=attention, mlp",
    "--model.decoder.causal=false",
    "--model.warmup_steps=1",
]
TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--checkpoint.monitor=val/accuracy",
    "--checkpoint.mode=max",
]
DATA = [
    "--data=LRA",
    "--data.task=listops",
    "--data.cache=cache",
    "--data.processes=1",
    "--data.batch_size=4",
    "--data.samples={train: 48, val: 8, test: 8}",
    "--data.generator={min_length: 10, max_length: 24, max_depth: 3, roots: 500}",
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEQZOO_DATA", raising=False)
    return tmp_path


def fit(*words, model="Classification"):
    return main(["fit", f"--model={model}", *MODEL, *DATA, *TRAINER, *words])


def rows_of(path, column):
    with path.open() as file:
        return [row[column] for row in csv.DictReader(file) if row.get(column)]


# Models


def test_two_towers_see_one_document_each_and_the_head_compares():
    model = ZooForRetrieval(ZooConfig(decoder=SPEC.to_dict(), vocab_size=30, num_labels=2)).eval()
    ids = torch.randint(1, 30, (3, 2, 9))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = mask[2, 0, 7:] = 0
    labels = torch.tensor([0, 1, 1])
    out = model(ids, mask, labels)
    towers = [model.model(ids[:, i], mask[:, i]).last_hidden_state for i in range(2)]
    x1, x2 = (
        (h * m[..., None]).sum(1) / m.sum(1, keepdim=True)
        for h, m in zip(towers, mask.unbind(1), strict=True)
    )
    both = torch.cat([x1, x2, x1 * x2, x1 - x2], -1)
    expected = model.score(torch.relu(model.compare(both)))
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.loss, cross_entropy(expected, labels))
    changed = torch.where(mask == 0, 7, ids)
    torch.testing.assert_close(model(changed, mask).logits, out.logits)
    with pytest.raises(ValueError, match=r"input_ids is \(3, 9\); it must be \(B, 2, T\)"):
        model(ids[:, 0])


def test_real_pixels_take_the_embeddings_place():
    config = ZooConfig(decoder=SPEC.to_dict(), vocab_size=256, num_labels=3)
    model = ZooForPixels(config).eval()
    pixels, labels = torch.randn(2, 8), torch.tensor([2, 0])
    out = model(pixel_values=pixels, labels=labels, input_ids=torch.zeros(2, 8).long())
    inner = model.model(inputs_embeds=model.encoder(pixels[..., None])).last_hidden_state
    torch.testing.assert_close(out.logits, model.score(inner.mean(1)))
    out.loss.backward()
    assert model.encoder.weight.grad.abs().sum() > 0
    assert not model.model.embed_tokens.weight.requires_grad


# Schedules


def test_linear_schedule_warms_up_and_falls_to_its_floor():
    settings = {"warmup": 4, "total": 14, "floor": 0.1}
    assert [warmup_linear(s, **settings) for s in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert warmup_linear(9, **settings) == pytest.approx(0.55)
    assert warmup_linear(14, **settings) == warmup_linear(99, **settings) == 0.1


@pytest.mark.parametrize("shape", [warmup_linear, warmup_cosine])
def test_a_schedule_of_two_phases_begins_again(shape):
    settings = {"warmup": 2, "floor": 0.0}
    both = [two_phases(s, shape=shape, first=6, total=16, **settings) for s in range(16)]
    assert both[:6] == [shape(s, total=6, **settings) for s in range(6)]
    assert both[6:] == [shape(s, total=10, **settings) for s in range(10)]


# Floors and names


def test_floors_stand_beside_every_accuracy_and_generated_results_say_so(capsys, place):
    assert fit("--trainer.max_steps=2") == 0
    metrics = place / "runs/default/logs/version_0/metrics.csv"
    assert rows_of(metrics, "val/accuracy-gen")
    with metrics.open() as file:
        names = next(csv.reader(file))
    assert not {"val/accuracy", "val/loss", "test/accuracy"} & set(names)
    capsys.readouterr()
    for command, stage in (("validate", "val"), ("test", "test")):
        assert main([command, *DATA, *TRAINER, "--ckpt_path=last"]) == 0
        said = capsys.readouterr().out
        for name in ("accuracy", "floor_majority", "floor_first_operator", "loss"):
            assert f"{stage}/{name}-gen" in said
            assert f"{stage}/{name} " not in said
    stored = torch.load("runs/default/checkpoints/last.ckpt", weights_only=True)
    facts = stored["LRA"]
    assert facts["task"] == "listops-gen"
    assert set(facts["floors"]["test"]) == {"majority", "first_operator"}


def test_pairs_and_single_documents_need_their_own_model(capsys, place):
    folder = place / "aan/tsv_data"
    folder.mkdir(parents=True)
    lines = [f"{i % 2}.0\ta\tb\ttext {i}\tother {i}\n" for i in range(12)]
    for name in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))
    pairs = ["--data=LRA", "--data.task=retrieval", "--data.root=aan", "--data.batch_size=4"]
    words = ["fit", *MODEL, *pairs, *TRAINER, "--trainer.max_steps=2"]
    assert main([*words, "--model=Classification"]) == 2
    assert "2 document(s) a sample and Classification reads 1; give --model Retrieval" in (
        capsys.readouterr().err
    )
    pretrained = ["--model.self_pretrain=masked", "--model.pretrain_steps=1"]
    assert main([*words, "--model=Retrieval", *pretrained]) == 0
    module = load_module("runs/default/checkpoints/last.ckpt")
    assert isinstance(module, Retrieval)
    assert main(["export", "runs/default/checkpoints/last.ckpt", "out"]) == 2
    assert "holds a ZooForRetrieval; it must be one of ZooForCausalLM" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["test", *pairs, *TRAINER, "--ckpt_path=last"]) == 0
    said = capsys.readouterr().out
    assert "test/accuracy " in said
    assert "test/floor_majority " in said
    assert fit("--trainer.max_steps=2", "--run=other", model="Retrieval") == 2
    assert "give --model Classification" in capsys.readouterr().err


def test_real_pixels_from_the_command_line(place):
    images = [
        "--data=LRA",
        "--data.task=pathfinder32",
        "--data.pixels=values",
        "--data.cache=cache",
    ]
    images += ["--data.difficulty=easy", "--data.samples={train: 4, val: 2, test: 2}"]
    images += ["--data.processes=1", "--data.batch_size=2", "--data.generator={images: 8}"]
    pretrained = ["--model.self_pretrain=masked", "--model.pretrain_steps=1"]
    words = ["fit", "--model=Classification", *MODEL, *images, *TRAINER, *pretrained]
    assert main([*words, "--trainer.max_steps=2"]) == 0
    module = load_module("runs/default/checkpoints/last.ckpt")
    assert isinstance(module.network, ZooForPixels)
    metrics = place / "runs/default/logs/version_0/metrics.csv"
    assert len(rows_of(metrics, "train/pretrain_loss")) == 1


def test_last_checkpoint_is_the_newest_while_the_monitor_does_not_improve(place):
    words = ["--checkpoint.monitor=val/floor_majority-gen", "--trainer.max_steps=6"]
    assert fit(*words) == 0  # a figure that never changes
    folder = place / "runs/default/checkpoints"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["last.ckpt", "step2.ckpt"]


# Self-pretraining


def copying(rows, T=12):
    """Rows whose second half repeats the first."""
    half = torch.randint(1, 9, (rows, T // 2))
    ids = torch.cat([half, half], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_pretraining_learns_the_inputs_own_regularities(objective):
    spec = DecoderSpec(
        d_model=32, pattern="attention*2", causal=objective == "causal", position="rope"
    )
    network = Classification(spec, vocab_size=9).network
    head = SelfPretraining(objective, 32, 9)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=5e-3)
    losses = []
    for _ in range(150):
        loss = head(network, copying(32), 0.2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 1.9
    # Without looking at the other half nothing is better than log 8 = 2.08; causally, half of that.
    assert sum(losses[-10:]) / 10 < 0.75 * (2.08 if objective == "masked" else 1.7)


def test_hidden_tokens_are_hidden_and_padding_is_never_asked_for():
    spec = DecoderSpec(d_model=16, pattern=["attention", "mlp"], causal=False)
    network, head = Classification(spec, vocab_size=9).network, SelfPretraining("masked", 16, 9)
    batch = copying(4)
    batch["attention_mask"][:, 8:] = 0
    seen = {}
    head.head.register_forward_hook(lambda _m, inputs, _o: seen.update(rows=len(inputs[0])))
    head(network, batch, 0.999_999)
    assert seen["rows"] == 4 * 8
    losses = []
    for token in (3, 5):  # what stood where all is hidden reaches nobody
        batch["input_ids"] = torch.full((4, 12), token)
        torch.manual_seed(0)
        out = network.model(
            inputs_embeds=head.hidden_token.expand(4, 12, 16),
            attention_mask=batch["attention_mask"],
        )
        torch.manual_seed(0)
        loss = head(network, batch, 0.999_999).loss
        logits = head.head(out.last_hidden_state[:, :8])
        wanted = cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, :8].flatten())
        torch.testing.assert_close(loss, wanted)
        losses.append(loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "last_step",
    [
        pytest.param(1, id="before", marks=pytest.mark.slow),
        pytest.param(2, id="at_the_border"),
        pytest.param(4, id="after", marks=pytest.mark.slow),
    ],
)
def test_two_phases_in_one_command_and_resume_across_their_border(place, monkeypatch, last_step):
    words = ["--model.self_pretrain=masked", "--model.pretrain_steps=3"]
    words += ["--checkpoint.monitor=null", "--checkpoint.mode=min"]  # the newest, not the best
    assert fit(*words, "--trainer.max_steps=8", "--run=whole") == 0
    metrics = place / "runs/whole/logs/version_0/metrics.csv"
    assert len(rows_of(metrics, "train/pretrain_loss")) == 3
    assert len(rows_of(metrics, "train/loss")) == 5
    step = Classification.training_step

    def asked_to_end(module, batch, batch_idx):
        if module.global_step == last_step:
            signal.raise_signal(signal.SIGTERM)
        return step(module, batch, batch_idx)

    cut = [*words, "--trainer.max_steps=8", "--run=cut"]
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "training_step", asked_to_end)
        assert fit(*cut) == 143
    saved = torch.load("runs/cut/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == last_step + 1
    assert fit(*cut, "--ckpt_path=last") == 0
    weights = [
        torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "cut")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_the_task_begins_with_a_new_optimizer_and_the_pretrained_weights():
    from lightning.pytorch import Callback, Trainer

    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            state = trainer.optimizers[0].state
            seen.append(max(int(s["step"]) for s in state.values()))

    batch = {**copying(4), "labels": torch.tensor([0, 1, 0, 1])}
    module = Classification(
        SPEC, vocab_size=9, self_pretrain="masked", pretrain_steps=3, warmup_steps=2, lr=0.01
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=[Watch()],
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        **quiet,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 6, batch_size=None))
    assert seen == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"self_pretrain": "mask"}, "no self_pretrain 'mask'; nearest: masked"),
        (
            {"self_pretrain": "causal"},
            "self_pretrain=causal is not allowed: this decoder reads both",
        ),
        ({"pretrain_rate": 1.0}, "pretrain_rate=1.0 is not allowed"),
        ({"pretrain_steps": 0}, "pretrain_steps=0 is not allowed"),
    ],
)
def test_impossible_pretraining_is_refused_at_construction(settings, said):
    with pytest.raises(ValueError, match=said):
        Classification(SPEC, **settings)


def test_pretraining_that_leaves_no_step_for_the_task_is_refused(capsys):
    words = ["--model.self_pretrain=masked", "--model.pretrain_steps=5", "--trainer.max_steps=5"]
    assert fit(*words) == 2
    assert "nothing is left of the 5 steps in all" in capsys.readouterr().err


# Configs and the command


PROTOCOLS = sorted((CONFIGS / "protocol").glob("*.yaml"))


QUICK = ("listops", "pathx")  # the others take as long and go wrong alike


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=() if path.stem.endswith(QUICK) else pytest.mark.slow
        )
        for path in PROTOCOLS
    ],
)
def test_protocols_go_over_their_task_and_can_be_built(capsys, path):
    task = CONFIGS / f"task/lra-{path.stem.partition('-')[2]}.yaml"
    assert main(["fit", "-c", str(task), "-c", str(path), "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    for name, value in given["model"]["init_args"].items():
        found = config["model"]["init_args"][name]
        if name == "decoder":
            found = {key: found[key] for key in value if key != "options"}
            value = {key: item for key, item in value.items() if key != "options"}
        assert found == value, name
    assert config["data"]["init_args"]["task"] == given["data"]["init_args"]["task"]
    assert config["trainer"]["max_steps"] == given["trainer"]["max_steps"]
    spec = DecoderSpec(**config["model"]["init_args"]["decoder"])
    assert spec.repeats == len(spec.resolve()) // len(
        given["model"]["init_args"]["decoder"]["pattern"]
    )


def test_there_are_three_protocols_for_each_of_six_tasks():
    tasks = {path.stem.removeprefix("lra-") for path in (CONFIGS / "task").glob("lra-*.yaml")}
    assert len(tasks) == 6
    names = {f"{line}-{task}" for line in ("s4", "s5", "mega") for task in tasks}
    assert {path.stem for path in PROTOCOLS} == names


def test_command_makes_samples_measures_and_draws(capsys, place):
    words = ["lra", "pathfinder32", "--difficulty=easy", "--cache=cache", "--processes=1"]
    words += ["--train=4", "--val=4", "--test=8"]
    assert main([*words, "--sheet=sheet.png"]) == 0
    said = capsys.readouterr().out
    assert "pathfinder32-easy-gen, test: floors majority" in said
    assert (place / "sheet.png").stat().st_size > 500
    assert main(["lra", "listops", "--measure=20"]) == 0
    assert "listops-gen: " in capsys.readouterr().out
    assert main(["lra", "text"]) == 2
    assert "no task that can be generated 'text'" in capsys.readouterr().err
