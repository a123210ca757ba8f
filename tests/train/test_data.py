"""Data modules: right windows, clean splits, and loaders that resume to the sample."""

import csv
import hashlib
import json
import platform
from itertools import islice

import pytest
import torch

from seqzoo.train.data import Hub, Labelled, Stdlib, Text
from seqzoo.train.data.documents import Document, split
from seqzoo.train.data.loader import EpochLoader, Rows
from seqzoo.train.tokenizer import EOS, byte_tokenizer, decode_bytes


class Numbers(Rows):
    """Sample i holds i."""

    def __init__(self, count):
        super().__init__(input_ids=torch.arange(count)[:, None])


def samples(batches):
    return [int(i) for batch in batches for i in batch["input_ids"][:, 0]]


def loader(count=50, batch_size=4, **options):
    return EpochLoader(Numbers(count), batch_size, **options)


# Loaders


@pytest.mark.parametrize("count", [48, 50], ids=["even", "short_last_batch"])
def test_epoch_sees_every_sample_once_in_an_order_of_its_own(count):
    batches = loader(count)
    epochs = [samples(batches) for _ in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = loader(count)
    assert [samples(again) for _ in range(3)] == epochs
    assert samples(loader(count, seed=1)) != epochs[0]
    assert len(list(loader(count))) == len(loader(count))


@pytest.mark.parametrize("count", [48, 50], ids=["even", "short_last_batch"])
def test_resumed_loader_goes_on_where_each_batch_left_off(count):
    whole = loader(count)
    per_epoch = len(whole)
    expected = [samples([batch]) for _ in range(4) for batch in whole]
    running, seen = loader(count), 0
    for _ in range(2):
        for _ in running:
            seen += 1
            resumed = loader(count)
            resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
            left = per_epoch - seen % per_epoch
            assert [samples([b]) for b in resumed] == expected[seen : seen + left]
            assert [samples([b]) for b in islice(resumed, 3)] == expected[seen + left :][:3]


def test_workers_that_fetch_ahead_do_not_move_the_stored_place():
    plain, ahead = loader(), loader(num_workers=2)
    expected = samples(plain)
    running = iter(ahead)
    first = samples(islice(running, 3))
    resumed = loader()  # with another number of workers
    resumed.load_state_dict(ahead.state_dict())
    del running
    assert first + samples(resumed) == expected


def test_ranks_share_an_epoch_and_position_counts_all_of_them():
    ranks = [loader(51, world=2, rank=rank) for rank in range(2)]
    seen = [samples(rank) for rank in ranks]
    assert len(seen[0]) == len(seen[1]) == 25
    assert len(set(seen[0]) | set(seen[1])) == 50
    half = loader(48, world=2)
    head = samples(islice(iter(half), 3))
    other = loader(48, world=2, rank=1)
    head += samples(islice(iter(other), 3))
    assert half.state_dict() == other.state_dict()
    assert half.state_dict()["position"] == 24
    resumed = [loader(48, world=2, rank=rank) for rank in range(2)]
    for rank in resumed:
        rank.load_state_dict(half.state_dict())
    assert sorted(head + samples(resumed[0]) + samples(resumed[1])) == list(range(48))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world": 2}, "ranks was 1 and is 2"),
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"count": 60}, "samples was 50 and is 60"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_mid_epoch_with_another_shape_is_refused_and_at_its_end_allowed(change, said):
    running = loader()
    next(iter(running))
    with pytest.raises(ValueError, match=f"middle of epoch 0: {said}"):
        loader(**change).load_state_dict(running.state_dict())
    done = loader()
    list(done)
    other = loader(**change)
    other.load_state_dict(done.state_dict())
    assert len(samples(other)) == other.count // other.world


def test_epoch_cut_short_by_a_limit_resumes_in_the_next_one():
    running = loader()
    running.limit = 5
    for _ in islice(running, 5):
        pass
    second = samples(islice(running, 5))
    resumed = loader()
    fresh = loader()
    fresh.limit = 5
    for _ in islice(fresh, 5):
        pass
    resumed.load_state_dict(fresh.state_dict())
    assert samples(islice(resumed, 5)) == second


def test_loader_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    next(iter(loader()))
    assert torch.equal(before, torch.get_rng_state())


# Corpora


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / "corpus" / f"d{i % 3}" / f"f{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i}: " + "abcdefghij" * (5 + i))
    (tmp_path / "corpus" / ".hidden").write_text("secret" * 1000)
    (tmp_path / "corpus" / "binary").write_bytes(bytes(range(256)))
    return tmp_path / "corpus"


def all_text(rows):
    ids = rows.columns["input_ids"].flatten()
    return decode_bytes(ids[ids != EOS])


def test_split_is_by_file_and_loses_nothing():
    documents = [Document(f"f{i}", bytes([i]) * 100) for i in range(60)]
    parts = split(documents, seed=0)
    assert sorted(d for part in parts.values() for d in part) == sorted(documents)
    assert [len(parts[p]) for p in ("train", "val", "test")] == [54, 3, 3]
    assert split(documents[::-1], seed=0) == parts
    assert split(documents, seed=1) != parts


@pytest.mark.parametrize("sizes", [[1000], [1000, 1000], [10, 10, 1000]])
def test_few_or_unequal_files_are_cut_by_position(sizes):
    line = b"0123456789\n"
    documents = [Document(f"f{i}", line * n) for i, n in enumerate(sizes)]
    parts = split(documents, seed=0)
    for i, document in enumerate(documents):
        pieces = [parts[part][i].data for part in ("train", "val", "test")]
        assert b"".join(pieces) == document.data
        assert all(piece.endswith(line) for piece in pieces if piece)
    assert 0.85 < sum(len(d.data) for d in parts["train"]) / (11 * sum(sizes)) < 0.95


def test_text_folder_gives_whole_windows_and_no_file_on_two_sides(folder):
    data = Text(str(folder), length=32, batch_size=3)
    data.setup()
    texts = {part: all_text(rows) for part, rows in data.rows.items()}
    for i in range(40):
        assert sum(b"file %d:" % i in text for text in texts.values()) <= 1
    assert not any(b"secret" in text for text in texts.values())
    assert bytes(range(256)) in b"".join(texts.values())
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (3, 32)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert set(batch) == {"input_ids", "labels"}


def test_validation_windows_do_not_depend_on_anything_but_the_data(folder):
    def windows(**options):
        batches = Text(str(folder), length=32, **options).val_dataloader()
        return torch.cat([batch["input_ids"] for batch in batches])

    torch.manual_seed(5)
    first = windows(batch_size=3)
    assert torch.equal(first, windows(batch_size=8, num_workers=0))
    assert torch.equal(first, windows(batch_size=1, pack=True))


def test_packed_documents_are_numbered_from_zero_and_their_first_token_has_no_label(folder):
    data = Text(str(folder), length=64, batch_size=4, pack=True)
    for batch in data.train_dataloader():
        ids, documents, labels = batch["input_ids"], batch["document_ids"], batch["labels"]
        for row in range(len(ids)):
            number = 0
            for t in range(64):
                begins = t > 0 and ids[row, t - 1] == EOS
                number += int(begins)
                assert documents[row, t] == number
                assert labels[row, t] == (-100 if begins else ids[row, t])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing", None, "no file or folder .*missing"),
        ("", None, "holds no text: 0 files"),
        ("empty", b"", "empty holds no text: 1 files"),
        ("short", b"hi", "short has 2 bytes.*not one window of length=32"),
    ],
)
def test_useless_path_is_refused_in_one_line_that_names_it(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        Text(str(path), length=32).setup()


def test_stdlib_is_this_pythons_own_source_within_its_cap():
    data = Stdlib(max_bytes=300_000, length=64)
    facts = data.describe()
    assert facts["python"] == platform.python_version()
    assert 0 < facts["bytes"] <= 300_000
    assert len(facts["digest"]) == 64
    assert facts == Stdlib(max_bytes=300_000, length=64).describe()
    names = [d.name for d in data.documents()]
    assert names == sorted(names)
    assert not any("test/" in n or "site-packages" in n for n in names)
    assert facts["digest"] != Stdlib(max_bytes=100_000, length=64).describe()["digest"]
    assert b"import" in all_text(data.rows["train"])
    assert data.vocab_size == 259
    assert data.tokens_per_batch == 512
    json.dumps(facts)


def test_changed_corpus_is_noticed_on_resume_but_not_on_validation(folder):
    class Fit:
        class state:  # noqa: N801
            fn = "fit"

    stored = Text(str(folder), length=32).state_dict()
    (folder / "d0" / "f0.txt").write_text("something else altogether")
    data = Text(str(folder), length=32)
    data.load_state_dict(stored)  # no trainer: measuring another text is fine
    data.trainer = Fit()
    with pytest.raises(ValueError, match=r"trained on other data.*digest"):
        data.load_state_dict(stored)


def test_data_say_which_tokenizer_a_model_of_theirs_needs(folder, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    name = str(tmp_path / "tokenizer")
    assert Text(str(folder), length=32, tokenizer=name).tokenizer_name == name
    assert Text(str(folder), length=32).tokenizer_name is None


@pytest.mark.parametrize("option", ["length", "batch_size", "num_workers"])
def test_impossible_numbers_are_refused_by_name(option):
    with pytest.raises(ValueError, match=f"{option}=-1 is not allowed"):
        Stdlib(**{option: -1})


# Labelled


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_labelled_rows_are_padded_masked_and_keep_their_class(tmp_path, suffix):
    rows = [
        {"body": f'{i}, "caf\u00e9"\n' + "x" * (i % 25), "kind": [10, 9, 2][i % 3]}
        for i in range(60)
    ]
    path = write_rows(tmp_path / f"train{suffix}", rows)
    data = Labelled(path, test=path, text="body", label="kind", length=20, batch_size=7)
    assert data.classes == ["2", "9", "10"]
    assert data.n_classes == 3
    expected = {r["body"].encode()[:20]: str(r["kind"]) for r in rows}
    seen = 0
    for batch in data.test_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape == (len(batch["labels"]), 20)
        for row, real, label in zip(ids, mask.bool(), batch["labels"], strict=True):
            text = decode_bytes(row[real])
            assert data.classes[label] == expected[text]
            assert int(real.sum()) == len(text) == int(real.long().cumprod(0).sum())
            assert not row[~real].any()
            seen += 1
    assert seen == 60
    train = [decode_bytes(r) for b in data.train_dataloader() for r in b["input_ids"]]
    val = [decode_bytes(r) for b in data.val_dataloader() for r in b["input_ids"]]
    assert sorted(train + val) == sorted(expected)
    assert 0 < len(val) < 20


def test_labelled_files_that_do_not_fit_are_refused_in_one_line(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"text": str(i), "label": i % 2} for i in range(60)])
    other = write_rows(tmp_path / "b.jsonl", [{"text": "x", "label": 7}])
    with pytest.raises(ValueError, match="no class named '7'"):
        Labelled(train, val=other).setup()
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: no column 'body'; it has text, label"):
        Labelled(train, text="body").setup()
    with pytest.raises(ValueError, match=r"no file .*nowhere"):
        Labelled(str(tmp_path / "nowhere.csv")).setup()
    (tmp_path / "c.jsonl").write_text('{"text": "x"\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        Labelled(str(tmp_path / "c.jsonl")).setup()
    (tmp_path / "d.pkl").write_text("x")
    with pytest.raises(ValueError, match=r"no reader for files ending in '\.pkl'.*\.jsonl"):
        Labelled(str(tmp_path / "d.pkl")).setup()


# Hub, offline


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Three files of documents, as a data set folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for part, files in (("train", 3), ("validation", 1)):
        for f in range(files):
            rows = [
                {"text": f"{part} {f} {i} " + hashlib.sha256(bytes([f, i])).hexdigest() * (i % 4)}
                for i in range(40)
            ]
            write_rows(folder / f"{part}-{f}.jsonl", rows)
    return folder


def hub(folder, **options):
    shared = {"length": 32, "batch_size": 2, "epoch_batches": 9, "shuffle": 4, "val_windows": 8}
    return Hub(str(folder), **{**shared, "val_split": "validation", **options})


def rows_of(batches):
    return [decode_bytes(row) for batch in batches for row in batch["input_ids"]]


def test_streamed_windows_are_the_packed_documents_in_order(hub_folder):
    data = hub(hub_folder, shuffle=1, epoch_batches=40, pack=True)
    batches = list(data.train_dataloader())
    assert len(batches) == 40
    stream = torch.cat([batch["input_ids"].flatten() for batch in batches])
    documents = []
    for f in range(3):
        lines = (hub_folder / f"train-{f}.jsonl").read_text().splitlines()
        documents += [json.loads(line)["text"].encode() for line in lines]
    packed = [t for d in documents for t in [*(b + 3 for b in d), EOS]]
    assert stream.tolist() == packed[: len(stream)]
    assert all(set(b) == {"input_ids", "labels", "document_ids"} for b in batches)


def test_stream_goes_round_and_shuffles_within_blocks(hub_folder):
    plain = rows_of(hub(hub_folder, shuffle=1, epoch_batches=400).train_dataloader())
    mixed = rows_of(hub(hub_folder, shuffle=4, epoch_batches=400).train_dataloader())
    blocks = [sorted(plain[i : i + 4]) == sorted(mixed[i : i + 4]) for i in range(0, 800, 4)]
    assert all(blocks)
    assert plain != mixed
    assert b"train 0 1 " in b"".join(plain[:50])
    assert b"train 0 1 " in b"".join(plain[-400:])  # another pass


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stream_resumes_to_the_window_in_an_epoch_and_between_two(
    hub_folder, tmp_path, workers, suffix
):
    for file in list(hub_folder.iterdir()) if suffix == ".parquet" else ():
        write_rows(file.with_suffix(suffix), [json.loads(x) for x in file.read_text().splitlines()])
        file.unlink()

    def build():
        return hub(hub_folder, num_workers=workers).train_dataloader()

    whole = build()
    expected = [rows_of([batch]) for _ in range(3) for batch in whole]
    assert len({row for batch in expected for row in batch}) > 30
    running, seen = build(), 0
    for _ in range(2):
        for _ in running:
            seen += 1
            if seen not in (1, 4, 8, 9, 13, 18):
                continue
            torch.save(running.state_dict(), tmp_path / "state")
            resumed = build()
            resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
            left = 9 - seen % 9
            assert [rows_of([b]) for b in resumed] == expected[seen : seen + left]
            if seen <= 9:
                ahead = expected[seen + left : seen + left + 2]
                assert [rows_of([b]) for b in islice(resumed, 2)] == ahead


def test_hub_holds_documents_out_when_there_is_no_validation_split(hub_folder):
    data = hub(hub_folder, val_split=None, epoch_batches=200, shuffle=1, val_windows=1000)
    data.setup()
    val = all_text(data.rows["val"])
    train = b"".join(rows_of(data.train_dataloader()))
    names = [b"train %d %d " % (f, i) for f in range(3) for i in range(40)]
    assert sum(name in val for name in names) >= 2
    assert not any(name in val and name in train for name in names)


def test_hub_refuses_what_it_cannot_do_in_one_line(hub_folder, monkeypatch):
    with pytest.raises(ValueError, match="no text in column 'body'; columns: text"):
        hub(hub_folder, column="body").setup()
    with pytest.raises(ValueError, match="cannot stream split 'nope' of data set"):
        hub(hub_folder, val_split="nope").setup()
    with pytest.raises(ValueError, match=r"num_workers=4 is not allowed; .* has 3 files"):
        hub(hub_folder, num_workers=4).train_dataloader()
    with pytest.raises(ValueError, match="no test samples"):
        hub(hub_folder).test_dataloader()
    state = hub(hub_folder).train_dataloader().state_dict()
    with pytest.raises(ValueError, match="workers was 0 and is 2"):
        hub(hub_folder, num_workers=2).train_dataloader().load_state_dict(state)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'seqzoo\[hub\]'"):
        hub(hub_folder).setup()


def test_hub_reads_files_given_by_format(hub_folder):
    files = {"train": str(hub_folder / "train-0.jsonl"), "held": str(hub_folder / "train-1.jsonl")}
    data = Hub("json", data_files=files, val_split="held", length=32, epoch_batches=2)
    assert b"train 1 0 " in all_text((data.setup(), data.rows["val"])[1])
    assert len(rows_of(data.train_dataloader())) == 16
