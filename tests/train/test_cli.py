"""`seqzoo fit` and its relatives: bad inputs, resume, and what the command line makes of files."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from seqzoo.train.checkpoint import SafeCheckpointIO
from seqzoo.train.cli import COMMANDS, main

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = [
    "--model.decoder.d_model=16",
    "--model.decoder.pattern=attention, mlp",
    "--model.warmup_steps=2",
    "--data=Text",
    "--data.path=text.txt",
    "--data.length=32",
    "--data.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text of its own."""
    monkeypatch.chdir(tmp_path)
    line = "".join(chr(97 + i * i % 26) for i in range(59)) + "\n"
    (tmp_path / "text.txt").write_text(line * 120)
    return tmp_path


def fit(*words: str) -> int:
    return main(["fit", *TINY, *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run what must fail: exit code 2, one line, no traceback. Returns the line."""
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


def checkpoint(path: str) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.decoder.pattern=mamba22"], "no mixer 'mamba22'; nearest: mamba2"),
        (["--model.decoder.mixer=mamba2"], "give one of them"),
        (["--preset=hybrid-tinny"], "no preset 'hybrid-tinny'; nearest: hybrid-tiny"),
        (["--model.decoder.position=ropee"], "no position 'ropee'; nearest: rope"),
        (["--model.decoder.d_model=18"], "d_model=18 is not divisible by n_heads=4; nearest: 16"),
        (["--model.decoder.options={attention: {heads: 2}}"], "named 'heads'; nearest: n_heads"),
        (["--model.decoder.repeets=2"], "no option --model.decoder.repeets; nearest: --model.dec"),
        (["--model.lrr=2"], "no option --model.lrr; nearest: --model.lr"),
        (["--model.lr=fast"], "model.lr: expected float. Got value: fast"),
        (["--model=Clasification"], "no model 'Clasification'; nearest: Classification"),
        (["--model=Classification"], "n_classes=0 is not allowed"),
        (["--data=Txt"], "no data 'Txt'; nearest: Text"),
        (["--data.lenght=3"], "no option --data.lenght; nearest: --data.length"),
        (["--data.path=nowhere.txt"], "there is no file or folder nowhere.txt"),
        (["--trainer.max_stps=3"], "no option --trainer.max_stps; nearest: --trainer.max_steps"),
        (["-c", "nowhere.yaml"], "File does not exist"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt: there is no such file"),
        (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "the schedule needs an end"),
    ],
)
def test_wrong_input_is_one_line_with_exit_code_2(capsys, words, line):
    assert line in refused(capsys, "fit", *TINY, *words)


def test_unknown_key_in_a_file_is_refused_by_its_path(capsys, place):
    (place / "typo.yaml").write_text("model: {decoder: {d_modl: 3}}\n")
    line = refused(capsys, "fit", *TINY, "-c", "typo.yaml")
    assert "no option --model.decoder.d_modl; nearest: --model.decoder.d_model" in line


def test_truncated_checkpoint_is_named_in_one_line(capsys, place):
    (place / "cut.ckpt").write_bytes(b"PK\x03\x04 and no more")
    line = refused(capsys, "validate", *TINY, "--ckpt_path=cut.ckpt")
    assert "cut.ckpt: it cannot be read" in line


def test_measuring_without_a_checkpoint_is_refused_instead_of_measuring_random_weights(capsys):
    assert "give --ckpt_path" in refused(capsys, "validate", *TINY)
    assert "there is no checkpoint in runs" in refused(capsys, "test", *TINY, "--ckpt_path=last")


def test_learning_rate_typed_with_a_checkpoint_is_the_one_trained_with(place):
    assert fit("--trainer.max_steps=2", "--model.lr=0.004") == 0
    first = checkpoint("runs/default/checkpoints/last.ckpt")
    assert first["hyper_parameters"]["lr"] == 0.004
    words = ["--ckpt_path=runs/default/checkpoints/last.ckpt", "--run=second"]
    assert (
        fit("--trainer.max_steps=6", "--model.lr=0.0001", "--model.schedule=constant", *words) == 0
    )
    second = checkpoint("runs/second/checkpoints/last.ckpt")
    groups = second["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.0001}
    assert {group["lr"] for group in groups} == {0.0001}
    with next(place.glob("runs/second/logs/*/metrics.csv")).open() as file:
        rates = {row["lr-AdamW/decay"] for row in csv.DictReader(file) if row["lr-AdamW/decay"]}
    assert {float(rate) for rate in rates} == {0.0001}


def test_settings_of_the_checkpoint_are_the_defaults_and_typed_ones_beat_them(place):
    words = ["--model.lr=0.004", "--model.weight_decay=0.3", "--trainer.max_steps=2"]
    assert fit(*words) == 0
    kept = [w for w in TINY if "decoder" not in w]  # the stack comes from the checkpoint
    words = ["--ckpt_path=last", "--model.weight_decay=0.2", "--trainer.max_steps=4"]
    assert main(["fit", *kept, *words]) == 0
    settings = checkpoint("runs/default/checkpoints/last.ckpt")["hyper_parameters"]
    assert settings["lr"] == 0.004
    assert settings["weight_decay"] == 0.2
    assert settings["decoder"]["pattern"] == "attention, mlp"


def test_ckpt_path_last_starts_afresh_then_resumes(capsys):
    words = ["--ckpt_path=last", "--model.schedule=constant"]
    assert fit("--trainer.max_steps=2", *words) == 0
    assert "starting afresh" in capsys.readouterr().err
    assert fit("--trainer.max_steps=5", *words) == 0
    assert "starting afresh" not in capsys.readouterr().err
    resumed = checkpoint("runs/default/checkpoints/last.ckpt")
    assert resumed["global_step"] == 4  # the last validation; a restart would have made its own 4
    assert fit("--trainer.max_steps=5", "--run=whole", "--model.schedule=constant") == 0
    whole = checkpoint("runs/whole/checkpoints/last.ckpt")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_second_start_does_not_write_over_the_first(capsys):
    assert fit("--trainer.max_steps=2") == 0
    assert "go on with `--ckpt_path last`" in refused(capsys, "fit", *TINY)


def test_weights_of_another_stack_are_refused_before_they_are_loaded(capsys):
    assert fit("--trainer.max_steps=2") == 0
    words = ["--ckpt_path=last", "--model.decoder.pattern=attention, swiglu"]
    line = refused(capsys, "fit", *TINY, *words)
    assert "decoder.pattern is 'attention, mlp' there and 'attention, swiglu' here" in line


def test_checkpoint_loads_weights_only_and_says_what_it_holds():
    assert fit("--trainer.max_steps=2") == 0
    stored = SafeCheckpointIO().load_checkpoint("runs/default/checkpoints/last.ckpt")
    assert stored["seqzoo"] == {"task": "LanguageModelling", "tokenizer": None}


def test_validate_test_and_predict_use_the_checkpoint_and_not_the_defaults(capsys, place):
    assert fit("--trainer.max_steps=2") == 0
    kept = [w for w in TINY if "model" not in w]
    capsys.readouterr()
    assert main(["validate", *kept, "--ckpt_path=last"]) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out
    assert main(["test", *kept, "--ckpt_path=last"]) == 0
    assert "test/bits_per_byte" in capsys.readouterr().out
    assert main(["predict", *kept, "--ckpt_path=last"]) == 0
    rows = (place / "runs/default/predictions.jsonl").read_text().splitlines()
    assert rows
    assert all(0 < yaml.safe_load(row)["bits"] < 20 for row in rows)


def test_run_folder_has_metrics_events_config_and_checkpoints(place):
    assert fit("--trainer.max_steps=2", "--run=mine") == 0
    logs = place / "runs/mine/logs/version_0"
    config = yaml.safe_load((logs / "config.yaml").read_text())
    assert config["model"]["init_args"]["decoder"]["d_model"] == 16
    assert list(logs.glob("events.out.tfevents.*"))
    with (logs / "metrics.csv").open() as file:
        names = next(csv.reader(file))
    assert {"train/loss", "train/tokens_per_second", "val/bits_per_byte"} <= set(names)
    files = {path.name for path in (place / "runs/mine/checkpoints").glob("*.ckpt")}
    assert files == {"last.ckpt", "step2.ckpt"}


def test_dict_options_merge_by_mixer_and_a_mixers_entry_is_replaced_whole(capsys, place):
    """Pins jsonargparse's behaviour, which the help text and configs rely on."""
    (place / "one.yaml").write_text(
        "model: {decoder: {options: {attention: {n_heads: 2, window: 8}, mlp: {expand: 3}}}}\n"
    )
    words = ["-c", "one.yaml", "--model.decoder.options.attention.n_heads=1", "--print_config"]
    assert main(["fit", *TINY, *words]) == 0
    options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["decoder"]["options"]
    assert options == {"attention": {"n_heads": 1}, "mlp": {"expand": 3}}
    (place / "two.yaml").write_text("model: {decoder: {options: {attention: {n_heads: 4}}}}\n")
    assert main(["fit", *TINY, "-c", "one.yaml", "-c", "two.yaml", "--print_config"]) == 0
    options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["decoder"]["options"]
    assert options == {"attention": {"n_heads": 4}}


def test_short_forms_of_a_stack_on_the_command_line(capsys):
    words = ["--model.decoder.mixer=mamba2", "--print_config"]
    assert main(["fit", *words]) == 0
    decoder = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["decoder"]
    assert decoder["mixer"] == "mamba2"
    words = ["--model.decoder.pattern=mamba2*3, attention", "--print_config"]
    assert main(["fit", *words]) == 0
    decoder = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["decoder"]
    assert decoder["pattern"] == "mamba2*3, attention"


TASKS = sorted((CONFIGS / "task").glob("*.yaml"))
MIXERS = sorted((CONFIGS / "mixer").glob("*.yaml"))
TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))
NEEDED = {"text": ["--data.path=text.txt"], "classify": ["--data.train=text.txt"]}
COMBINED = [
    *((task, MIXERS[0], TRAINERS[0]) for task in TASKS),
    *((CONFIGS / "task/stdlib.yaml", mixer, TRAINERS[0]) for mixer in MIXERS[1:]),
    *((CONFIGS / "task/stdlib.yaml", MIXERS[0], trainer) for trainer in TRAINERS[1:]),
]


@pytest.mark.parametrize("files", COMBINED, ids=lambda files: "+".join(path.stem for path in files))
def test_overlays_parse_in_every_family_and_describe_a_stack_that_can_be_built(capsys, files):
    from seqzoo.zoo.config import DecoderSpec

    words = [word for path in files for word in ("-c", str(path))]
    assert main(["fit", *words, *NEEDED.get(files[0].stem, []), "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(files[1].read_text())["model"]["decoder"]
    decoder = config["model"]["init_args"]["decoder"]
    assert decoder["pattern"] == given["pattern"]
    DecoderSpec(**decoder)


def test_debug_overlay_runs(place):
    assert main(["fit", *TINY, "-c", str(CONFIGS / "trainer/debug.yaml")]) == 0
    assert not [*place.glob("runs/**/*.ckpt"), *place.glob("runs/**/metrics.csv")]


def test_interrupt_is_exit_code_130(monkeypatch, capsys):
    from seqzoo.train.module import LanguageModelling

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModelling, "training_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert fit("--trainer.max_steps=2") == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_keeps_its_exit_code_and_its_checkpoint(monkeypatch, capsys, place):
    from seqzoo.train.module import LanguageModelling

    step = LanguageModelling.training_step

    def asked_to_end(module, batch, batch_idx):
        signal.raise_signal(signal.SIGTERM)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(LanguageModelling, "training_step", asked_to_end)
    assert fit("--trainer.max_steps=2") == 143
    assert checkpoint("runs/default/checkpoints/last.ckpt")["global_step"] == 1


def test_bug_of_ours_keeps_its_traceback(monkeypatch):
    from seqzoo.train.module import LanguageModelling

    def bug(*_):
        return torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(LanguageModelling, "training_step", bug)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fit("--trainer.max_steps=2")


def test_traceback_flag_shows_where_a_refusal_comes_from(capsys):
    assert main(["list", "--kind=nothing", "--traceback"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_help_names_every_command_and_unknown_ones_are_refused(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.words in text for name, command in COMMANDS.items())
    assert "no command 'fti'; nearest: fit" in refused(capsys, "fti")


def test_listing_mixers_does_not_import_lightning():
    source = Path(__file__).parents[2] / "src"
    code = (
        "import sys; from seqzoo.train.cli import main; code = main(['list', '--kind', 'channel'])"
        "; heavy = {'lightning', 'transformers', 'jsonargparse', 'triton'} & set(sys.modules)"
        "; sys.exit(f'imported {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "swiglu" in done.stdout


def test_a_preset_is_where_the_decoder_starts_from_and_what_is_typed_beats_it(place, capsys):
    words = ["--preset", "rwkv4-tiny", "--model.decoder.repeats", "1", "--print_config"]
    assert main(["fit", *words]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    decoder = printed["model"]["init_args"]["decoder"]
    assert decoder["pattern"] == ["rwkv4", "rwkv_channel"]
    assert (decoder["repeats"], decoder["norm"]) == (1, "layernorm")
