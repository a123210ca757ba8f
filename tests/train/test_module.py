"""Lightning modules and their optimiser."""

import math
from collections import Counter
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

from seqzoo.train.classification import Classification
from seqzoo.train.module import LanguageModelling
from seqzoo.train.optim import build_optimizer, build_schedule, override, parameter_groups
from seqzoo.train.optim import warmup_cosine as factor
from seqzoo.zoo.config import DecoderSpec

V = 11
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec"
)


class Slow(nn.Module):
    """A mixer's parameters: one matrix, one state-space matrix, a norm, a 2-D bias."""

    ssm_parameters: ClassVar[tuple[str, ...]] = ("A_log",)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.gate_bias = nn.Parameter(torch.zeros(2, 4))
        self.head = nn.Linear(4, V, bias=False)
        self.head.weight = self.embed.weight


class Rows(LightningDataModule):
    """Given batches, as they are."""

    tokenizer_name = None

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    val_dataloader = predict_dataloader = train_dataloader


def tiny(**settings) -> LanguageModelling:
    torch.manual_seed(0)
    spec = DecoderSpec(d_model=8, pattern=["attention", "mlp"], repeats=2)
    module = LanguageModelling(spec, vocab_size=V, **settings)
    module.configure_model()
    return module


def batch(rows: int, length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": ids.clone()}


def test_norms_biases_embeddings_and_states_do_not_decay_and_tied_weights_come_once():
    model = Slow()
    groups = {g["name"]: g for g in parameter_groups(model, lr=0.01, weight_decay=0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    members = {key: sorted(names[id(p)] for p in g["params"]) for key, g in groups.items()}
    assert members == {
        "decay": ["proj.weight"],
        "plain": ["embed.weight", "gate_bias", "norm.bias", "norm.weight", "proj.bias"],
        "state": ["A_log"],
    }
    assert {key: g["weight_decay"] for key, g in groups.items()} == {
        "decay": 0.1,
        "plain": 0.0,
        "state": 0.0,
    }


@pytest.mark.parametrize(("given", "used"), [(None, 1e-3), (5e-4, 5e-4)])
def test_state_space_parameters_have_a_rate_of_their_own(given, used):
    groups = parameter_groups(Slow(), lr=0.01, weight_decay=0.1, ssm_lr=given)
    assert {g["name"]: g["lr"] for g in groups} == {"decay": 0.01, "plain": 0.01, "state": used}


def test_every_trainable_parameter_of_a_hybrid_is_in_exactly_one_group():
    spec = DecoderSpec(d_model=16, pattern=["mamba", "rg_lru", "attention", "swiglu"])
    network = LanguageModelling(spec, vocab_size=V).network
    groups = parameter_groups(network, lr=0.01, weight_decay=0.1)
    count = Counter(id(p) for g in groups for p in g["params"])
    assert count == Counter({id(p): 1 for p in network.parameters()})
    slow = next(g for g in groups if g["name"] == "state")
    assert slow["params"]


def test_warm_up_reaches_the_rate_and_the_cosine_ends_at_its_floor():
    settings = {"warmup": 4, "total": 14, "floor": 0.1}
    assert [factor(step, **settings) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(9, **settings) == pytest.approx(0.55)
    assert factor(14, **settings) == factor(99, **settings) == 0.1


def test_restored_optimizer_takes_the_rates_asked_for_now_at_the_same_place_of_the_schedule():
    def made(lr: float):
        model = Slow()
        optimizer = build_optimizer(model, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
        return model, optimizer, build_schedule(optimizer, warmup=2, total=8, floor=0.0)

    _, before, schedule = made(0.1)
    for _ in range(3):
        before.step()
        schedule.step()
    model, after, restored = made(0.02)
    after.load_state_dict(before.state_dict())
    restored.load_state_dict(schedule.state_dict())
    override(after, restored, parameter_groups(model, lr=0.02, weight_decay=0.3))
    wanted = 0.02 * factor(3, warmup=2, total=8, floor=0.0)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in after.param_groups}
    assert rates["decay"] == (pytest.approx(wanted), 0.3)
    assert rates["plain"] == (pytest.approx(wanted), 0.0)
    assert rates["state"][0] == pytest.approx(wanted / 20)
    after.step()
    restored.step()
    wanted = 0.02 * factor(4, warmup=2, total=8, floor=0.0)
    assert after.param_groups[0]["lr"] == pytest.approx(wanted)


def test_module_built_in_python_with_a_dataclass_loads_weights_only(tmp_path):
    module, path = tiny(lr=0.003), tmp_path / "a.ckpt"
    trainer = Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(module, datamodule=Rows([batch(2)]))
    trainer.save_checkpoint(path)
    again = LanguageModelling.load_from_checkpoint(path, weights_only=True)
    assert again.decoder == module.decoder
    assert again.hparams["lr"] == 0.003
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_validation_averages_over_targets_not_over_batches_or_rows():
    module = tiny()
    short, long = batch(1), batch(5, 9)
    short["labels"][:, 3:] = -100
    (figures,) = Trainer(**QUIET).validate(module, Rows([short, long]), verbose=False)
    with torch.no_grad():
        network = module.network.eval()
        sums = [network(**b).loss * n for b, n in ((short, 2), (long, 40))]
    assert figures["val/loss"] == pytest.approx(float(sum(sums)) / 42, rel=1e-5)
    assert figures["val/bits_per_byte"] == pytest.approx(figures["val/loss"] / math.log(2))


def test_other_tokenizers_are_measured_in_bits_per_token():
    data = Rows([batch(2)])
    data.tokenizer_name = "some/tokenizer"
    (figures,) = Trainer(**QUIET).validate(tiny(), data, verbose=False)
    assert "val/bits_per_token" in figures
    assert "val/bits_per_byte" not in figures


def test_auxiliary_losses_train_and_are_logged_but_are_not_validated_on():
    spec = DecoderSpec(d_model=8, pattern=["switch"], options={"switch": {"n_experts": 4}})
    module = LanguageModelling(spec, vocab_size=V, lr=1e-9)
    trainer = Trainer(max_steps=1, enable_checkpointing=False, log_every_n_steps=1, **QUIET)
    trainer.fit(module, datamodule=Rows([batch(4)]))
    figures = trainer.callback_metrics
    assert figures["train/aux_loss"] > 0
    difference = figures["train/loss"] - figures["train/aux_loss"]
    assert difference == pytest.approx(float(figures["val/loss"]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # the compiler's own imports
def test_compiled_entries_keep_the_names_of_the_state_dict():
    plain, compiled = tiny(), tiny(compile=True)
    entries = compiled.network.model.entries
    assert all(entry._compiled_call_impl is not None for entry in entries)
    assert list(compiled.state_dict()) == list(plain.network.state_dict(prefix="model."))
    with torch.compiler.set_stance("force_eager"):
        out = compiled.network.eval()(**batch(2)).logits
    assert torch.equal(out, plain.network.eval()(**batch(2)).logits)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        network = tiny(gradient_checkpointing=recompute).network.train()
        assert network.model.entries[0].gradient_checkpointing is recompute
        network(**batch(2)).loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_classifier_learns_which_token_a_row_is_made_of():
    torch.manual_seed(0)
    ids = torch.arange(3).repeat(4)[:, None].expand(12, 5)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0].clone()}
    spec = DecoderSpec(d_model=8, pattern=["attention", "mlp"], causal=False)
    module = Classification(spec, n_classes=3, vocab_size=V, lr=0.02, warmup_steps=1)
    trainer = Trainer(
        max_epochs=15, enable_checkpointing=False, limit_val_batches=0, log_every_n_steps=1, **QUIET
    )
    trainer.fit(module, datamodule=Rows([rows]))
    (figures,) = Trainer(**QUIET).validate(module, Rows([rows]), verbose=False)
    assert figures["val/accuracy"] == 1
    (predicted,) = Trainer(**QUIET).predict(module, Rows([rows]))
    assert [row["class"] for row in predicted] == rows["labels"].tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": 0.0}, "lr=0.0 is not allowed"), ({"vocab_size": 0}, "vocab_size=0 is not allowed")],
)
def test_settings_that_cannot_train_are_refused_at_construction(settings, words):
    with pytest.raises(ValueError, match=words):
        LanguageModelling(DecoderSpec(d_model=8, pattern=["mlp"]), **settings)
