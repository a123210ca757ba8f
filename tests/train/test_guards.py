"""A run that goes wrong ends with a reason, and spoils nothing."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from seqzoo.train.checkpoint import SafeCheckpointIO
from seqzoo.train.guards import NotFiniteError, SaveOnSigterm, StopOnNaN

# Lightning's own: advice on workers, and a name that this torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


class Fault(nn.Module):
    """x * scale, whose output or gradient is spoilt on request."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.spoil = ""

    def forward(self, x):
        y = x * self.scale
        if self.spoil == "output":
            y = y / 0
        if self.spoil == "gradient":
            # sqrt'(0) is infinite, its value is not.
            y = y + torch.sqrt((y - y.detach()).square())
        return y


class Model(LightningModule):
    def __init__(self, kind="", steps=()):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), Fault(), nn.Linear(4, 4)
        self.kind, self.steps, self.logged = kind, steps, 0

    def training_step(self, batch, batch_idx):
        self.middle.spoil = self.kind if batch_idx in self.steps else ""
        loss = self.last(self.middle(nn.functional.dropout(self.first(batch)))).square().mean()
        self.log("loss", loss, on_step=True)
        self.logged += 1
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.kind == "parameter" and batch_idx in self.steps:
            with torch.no_grad():
                self.middle.scale[2] = torch.nan

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def fit(model, folder, *callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": 8,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    trainer = Trainer(
        **{**settings, **options}, callbacks=[*callbacks, saver], plugins=[SafeCheckpointIO()]
    )
    trainer.fit(model, DataLoader(torch.randn(64, 4), batch_size=4))
    return trainer


def finite(folder):
    state = SafeCheckpointIO().load_checkpoint(folder / "last.ckpt")
    return state["global_step"], all(t.isfinite().all() for t in state["state_dict"].values())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("output", r"step 5: loss nan; first not finite: the output of middle \(Fault\)"),
        ("gradient", r"step 5: gradient not finite, first in middle \(middle\.scale\)"),
    ],
)
def test_bad_number_stops_the_run_before_the_step_and_names_step_and_layer(tmp_path, kind, said):
    model = Model(kind, steps=[5])
    with pytest.raises(NotFiniteError, match=said) as error:
        fit(model, tmp_path, StopOnNaN())
    assert "\n" not in str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())
    assert finite(tmp_path) == (5, True)
    assert "log" not in vars(model), "the repeated step left its stand-in for log behind"


def test_last_finite_checkpoint_is_not_overwritten_by_one_that_is_not(tmp_path):
    with pytest.raises(NotFiniteError, match=r"parameter middle\.scale is not finite; .*not writ"):
        fit(Model("parameter", steps=[5]), tmp_path, StopOnNaN())
    assert finite(tmp_path) == (5, True)


@pytest.mark.parametrize("kind", ["output", "gradient"])
def test_skip_drops_the_step_whole_and_goes_on(tmp_path, kind):
    class Keep(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *rest):
            moments = trainer.optimizers[0].state_dict()["state"]
            weights = [p.detach().clone() for p in pl_module.parameters()]
            self.seen.append([weights, [m["exp_avg"].clone() for m in moments.values()]])

    model, guard, keep = Model(kind, steps=[4]), StopOnNaN(on_nan="skip"), Keep()
    fit(model, tmp_path, guard, keep)
    assert guard.skipped == 1

    def same(a, b):
        return all(
            torch.equal(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)
        )

    assert same(keep.seen[3], keep.seen[4]), "the skipped step moved weights or moments"
    assert not same(keep.seen[4], keep.seen[5])
    assert all(p.isfinite().all() for p in model.parameters())


def test_skipping_for_ever_is_refused(tmp_path):
    with pytest.raises(NotFiniteError, match="3 steps before it were skipped already"):
        fit(Model("output", range(2, 99)), tmp_path, StopOnNaN(on_nan="skip", patience=3))
    with pytest.raises(ValueError, match="no on_nan 'ignore'"):
        StopOnNaN(on_nan="ignore")


def test_bad_micro_batch_spoils_its_accumulated_step_and_no_other(tmp_path):
    guard = StopOnNaN(on_nan="skip")
    model = Model("output", steps=[4])
    fit(model, tmp_path, guard, accumulate_grad_batches=2, max_steps=5)
    assert guard.skipped == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_guard_changes_no_number_of_a_healthy_run(tmp_path):
    def weights(*callbacks):
        torch.manual_seed(0)
        model = Model()
        fit(model, tmp_path / str(len(callbacks)), *callbacks)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), model.logged

    plain, guarded = weights(), weights(StopOnNaN())
    assert torch.equal(plain[0], guarded[0])
    assert plain[1] == guarded[1]


class Terminate(Callback):
    def __init__(self, at, times=1):
        self.at, self.times = at, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_finishes_the_step_saves_and_exits_with_143(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        fit(Model(), tmp_path, Terminate(at=3), SaveOnSigterm())
    assert leaving.value.code == 143
    assert finite(tmp_path) == (4, True)
    assert "at step 4" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_waits_for_the_gradients_being_accumulated(tmp_path):
    with pytest.raises(SystemExit):
        fit(Model(), tmp_path, Terminate(at=4), SaveOnSigterm(), accumulate_grad_batches=3)
    step, _ = finite(tmp_path)
    assert step == 2  # after batches 3, 4 and 5


def test_second_sigterm_ends_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        guard = SaveOnSigterm()
        guard.on_train_start(None, None)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
