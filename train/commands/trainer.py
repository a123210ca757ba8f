"""`seqzoo fit | validate | test | predict`: Lightning's command line, with these habits.

- Everything of a run lies under runs/NAME (`--run NAME`): `checkpoints/`, and `logs/version_N/`
  with metrics.csv, TensorBoard's events and the resolved config.yaml of each start.
- A checkpoint's own settings are the defaults of a command that names it with `--ckpt_path`; what
  is typed or read from a file beats them. `--ckpt_path last` goes on with the run's newest whole
  checkpoint, and `fit` starts afresh when there is none: one command, run again after a crash.
- `--preset NAME` starts from a named decoder; what is typed or read from a file beats it too.
- Files given with `-c` merge from left to right. Typed fields merge; a list replaces a list, and a
  mixer's entry in `model.decoder.options` replaces that whole entry.
"""

import json
import logging
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from seqzoo.train.checkpoint import SafeCheckpointIO, find_last
from seqzoo.train.commands.loading import Stored, read_checkpoint
from seqzoo.train.commands.names import refuse
from seqzoo.train.data import Tokens
from seqzoo.train.guards import SaveOnSigterm, StopOnNaN
from seqzoo.train.module import LINKED, Training
from seqzoo.train.newest import Newest
from seqzoo.train.resume import ExactResume
from seqzoo.zoo.presets import list_models, preset

WORDS = {
    "fit": "Train a model.",
    "validate": "Measure a checkpoint on the validation data.",
    "test": "Measure a checkpoint on the test data.",
    "predict": "Write a checkpoint's predictions for the test data to runs/NAME/predictions.jsonl.",
}
USAGE = """%(prog)s [-c FILE ...] [--run NAME] [--ckpt_path FILE|last] [OPTION ...]

examples: -c configs/task/stdlib.yaml -c configs/mixer/hybrid.yaml --trainer.max_steps 500
          --model.decoder.mixer mamba2 --model.decoder.d_model 128 --model.lr 0.002
          --model.decoder.pattern "mamba2*3, attention" --data Text --data.path my_texts/
`--model.help LanguageModelling` and `--data.help Stdlib` explain what these take."""
TRAINER = {
    "max_steps": 1000,
    "val_check_interval": 250,
    "check_val_every_n_epoch": None,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
}
CHECKPOINT = {
    "monitor": "val/loss",
    "save_last": True,
    "filename": "step{step}",
    "auto_insert_metric_name": False,  # the names of metrics contain a "/"
}
# Said by Lightning at every start and of no use here.
NEEDLESS = (
    "does not have many workers",  # what is in memory needs none
    "is smaller than the logging interval",
    "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning, with torch 2.9 and later
    r"(JsonargparseDeprecationWarning|deprecated\s+in\s+v4)",  # Lightning, which pins what it uses
    "The dirpath has changed",  # by --run, with a checkpoint of another run
    "exists and is not empty",  # the run's own folder, when resuming
)
NO_NEWS = ("Tip:", "Seed set to", "TPU available", "HPU available")


def launch(words: list[str]) -> None:
    """Run one of Lightning's commands; `words` begin with its name."""
    with quiet():
        try:
            Cli(words)
        except ArgumentError as error:
            raise refuse(str(error)) from error


class Cli(LightningCLI):
    """Model and data by class name, defaults that need no server, resume that is exact."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.stored: Stored | None = None
        settings = {
            name: {"description": _words(name), "usage": USAGE, "exit_on_error": False}
            for name in WORDS
        }
        super().__init__(
            Training,
            Tokens,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(TRAINER),
            seed_everything_default=0,
            parser_kwargs={"prog": "seqzoo", "exit_on_error": False, **settings},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the modules store plain settings themselves
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run's name, its checkpoints, and what the data tell the model."""
        parser.add_argument("--run", default="default", help="name of the folder under runs/")
        named = ", ".join(list_models())
        parser.add_argument("--preset", default=None, help=f"decoder to start from: {named}")
        parser.add_lightning_class_args(Newest, "checkpoint")
        parser.add_lightning_class_args(StopOnNaN, "guard")
        parser.set_defaults({f"checkpoint.{key}": value for key, value in CHECKPOINT.items()})
        parser.set_defaults(
            {"model": {"class_path": "LanguageModelling"}, "data": {"class_path": "Stdlib"}}
        )
        for name in LINKED:
            parser.link_arguments(
                "data",
                f"model.init_args.{name}",
                compute_fn=_attribute(name),
                apply_on="instantiate",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse twice: the settings of the checkpoint and preset that are named are defaults."""
        self.config = parser.parse_args([w for w in self.words if "--print_config" not in w])
        given = self.config[self.config.subcommand]
        checkpoint = self._checkpoint(given)
        default: dict[str, Any] = {"class_path": given.model.class_path, "init_args": {}}
        if checkpoint is not None:
            self.stored = read_checkpoint(checkpoint)
            own = {k: v for k, v in self.stored.settings.items() if k not in LINKED}
            default = {"class_path": self.stored.task, "init_args": own}
        if given.preset is not None:
            default["init_args"]["decoder"] = preset(given.preset).to_dict()
        if checkpoint is not None or given.preset is not None:
            self._subcommand_parsers[self.config.subcommand].set_defaults({"model": default})
        self.config = parser.parse_args(self.words)
        given = self.config[self.config.subcommand]
        given.ckpt_path = None if checkpoint is None else str(checkpoint)
        given.checkpoint.dirpath = given.checkpoint.dirpath or str(self._folder / "checkpoints")

    def _checkpoint(self, given: Any) -> Path | None:  # noqa: ANN401
        """The file that `--ckpt_path` means."""
        folder = Path(given.checkpoint.dirpath or self._folder / "checkpoints")
        fit = self.config.subcommand == "fit"
        if given.ckpt_path == "last":
            last = find_last(folder)
            if last is None and not fit:
                raise ValueError(f"there is no checkpoint in {folder}")
            if last is None:
                sys.stderr.write(f"seqzoo: no checkpoint in {folder} yet; starting afresh\n")
            return last
        if given.ckpt_path is not None:
            return Path(given.ckpt_path)
        if not fit:
            raise ValueError("which checkpoint? give --ckpt_path FILE, or `--ckpt_path last`")
        if any(folder.glob("*.ckpt")):
            raise ValueError(
                f"{folder} holds the checkpoints of an earlier start: go on with "
                "`--ckpt_path last`, or give this run another name with --run"
            )
        return None

    def _parse_ckpt_path(self) -> None:
        """Done above: Lightning's way lets a checkpoint beat what was typed, without a word."""

    @property
    def _folder(self) -> Path:
        return Path("runs", self.config[self.config.subcommand].run)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:  # noqa: ANN401
        """The trainer with this command line's loggers, callbacks and checkpoint files."""
        given = self._get(self.config_init, "trainer")
        logger = given.logger
        if logger in (None, True):
            files = CSVLogger(self._folder, name="logs")
            logger = [files, TensorBoardLogger(self._folder, name="logs", version=files.version)]
        callbacks = [*_list(given.callbacks), ExactResume(), SaveOnSigterm()]
        if logger and not given.fast_dev_run:
            callbacks.append(LearningRateMonitor())
        own = [self._get(self.config_init, "guard")]
        if given.enable_checkpointing is not False:
            own.append(self._get(self.config_init, "checkpoint"))
        return self._instantiate_trainer(
            {
                **given,
                "logger": logger,
                "callbacks": callbacks,
                "plugins": [*_list(given.plugins), SafeCheckpointIO()],
                "default_root_dir": str(self._folder),
                **kwargs,
            },
            own,
        )

    def after_instantiate_classes(self) -> None:
        """Refuse weights of another model while it can be told in words."""
        if self.stored is None:
            return
        was, now = self.stored.settings, dict(self.model.hparams)
        self.stored = None
        for name in ("decoder", *LINKED):
            if was.get(name) != now.get(name):
                words = _difference(name, was, now)
                raise ValueError(f"the checkpoint holds another model: {words}")

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning does, but an interrupt stays one: it would exit with code 1."""
        before = signal.getsignal(signal.SIGINT)
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if self.trainer.interrupted and stop.code == 1:
                raise KeyboardInterrupt from None
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def predict(self, **arguments: Any) -> None:  # noqa: ANN401
        """Lightning's predict, with the rows written to a file."""
        batches = self.trainer.predict(**arguments) or []
        target = self._folder / "predictions.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for batch in batches for row in batch)
        sys.stdout.write(f"{target}\n")


def _attribute(name: str) -> Callable[[Any], Any]:
    """What the data tell the model, or what stands for their silence."""
    return lambda data: getattr(data, name, LINKED[name])


def _list(value: Any) -> list[Any]:  # noqa: ANN401
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _difference(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, in words."""
    a, b = was.get(name), now.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        inner = next(key for key in {**a, **b} if a.get(key) != b.get(key))
        return f"{name}.{_difference(inner, a, b)}"
    return f"{name} is {a!r} there and {b!r} here"


@contextmanager
def quiet() -> Iterator[None]:
    """Without advertisements, and without warnings that are no news here."""
    logs = (
        logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")
    )
    handlers = [handler for log in logs for handler in log.handlers]
    for handler in handlers:
        handler.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            for words in NEEDLESS:
                warnings.filterwarnings("ignore", message=f"(?s).*{words}")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in NO_NEWS)


def _words(name: str) -> str:
    return f"{WORDS[name]} Everything of a run lies under runs/NAME; `--run NAME` names it."
