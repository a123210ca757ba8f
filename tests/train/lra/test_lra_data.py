"""The files of Long-Range Arena, each with its traps, and the batches made of them."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seqzoo.train.data import LRA, lra_sources
from seqzoo.train.lra import formats
from seqzoo.train.lra.listops import IDS, evaluate

TINY = {"generator": {"min_length": 10, "max_length": 40, "max_depth": 4, "roots": 1000}}
TINY |= {"samples": {"train": 60, "val": 20, "test": 20}, "processes": 1}
REAL = os.environ.get("SEQZOO_DATA")
needs_data = pytest.mark.skipif(
    not (REAL and (Path(REAL) / "imdb_train.parquet").is_file()),
    reason="SEQZOO_DATA names no folder with imdb_*.parquet and cifar_gray_*.npz",
)


@pytest.fixture(autouse=True)
def no_folder_from_outside(monkeypatch):
    monkeypatch.delenv("SEQZOO_DATA", raising=False)


def batches(loader):
    seen = {"input_ids": [], "attention_mask": [], "labels": []}
    for batch in loader:
        for name, rows in seen.items():
            rows.extend(batch[name])
    return seen


def texts(loader):
    """Bytes of every row, or of both documents of it, with its label."""
    seen = batches(loader)
    rows = []
    for ids, mask, label in zip(*seen.values(), strict=True):
        parts = [
            bytes((i[m.bool()] - 1).tolist())
            for i, m in zip(ids.view(-1, ids.shape[-1]), mask.view(-1, ids.shape[-1]), strict=True)
        ]
        rows.append((*parts, int(label)))
    return rows


# ListOps


def write_listops(root, below="lra_release/lra_release"):
    folder = root / below / "listops-1000"
    folder.mkdir(parents=True)
    rows = {
        "train": [("( ( ( ( [MAX 2 ) 9 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )", 9), ("7", 7), ("8", 7)],
        "val": [("( ( ( [SM 8 ) 9 ) ] )", 7)],
        "test": [("( ( ( [MED 1 ) 4 ) ] )", 2), ("( ( ( [MAX 1 ) 0 ) ] )", 1)],
    }
    for part, lines in rows.items():
        text = "".join(f"{source}\t{target}\n" for source, target in lines)
        (folder / f"basic_{part}.tsv").write_text("Source\tTarget\n" + text)
    return folder


@pytest.mark.parametrize("below", ["", "lra_release", "lra_release/lra_release"])
def test_released_listops_loses_its_brackets_and_its_header(tmp_path, below):
    write_listops(tmp_path, below)
    data = LRA("listops", root=str(tmp_path), batch_size=2)
    assert len(data.rows) == 0
    facts = data.describe()
    assert facts["rows"] == {"train": 3, "val": 1, "test": 2}
    assert (facts["task"], facts["source"], data.suffix) == ("listops", "release", "")
    seen = batches(data.test_dataloader())
    symbols = ["[MED", "1", "4", "]"]
    assert seen["input_ids"][0].tolist() == [IDS[s] for s in symbols]
    assert [int(label) for label in seen["labels"]] == [2, 1]
    train = batches(LRA("listops", root=str(tmp_path), batch_size=8).train_dataloader())
    for ids, mask, label in zip(*train.values(), strict=True):
        assert not ids[~mask.bool()].any()
        assert ids.shape[0] == 8  # the longest, padded
        if label == 9:
            assert evaluate(ids[mask.bool()].tolist()) == 9
    assert data.floors["test"] == {"majority": 0.0, "first_operator": 0.0}
    assert data.floors["val"] == {"majority": 1.0, "first_operator": 1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("7\t7\n", "does not begin with the header"),
        ("Source\tTarget\n7 7\n", "line 2: no expression, tab and digit"),
        ("Source\tTarget\n7\t7\n7\tx\n", "line 3: no expression, tab and digit"),
        ("Source\tTarget\n[FIRST 7 ]\t7\n", r"no ListOps symbol '\[FIRST'"),
    ],
)
def test_other_tables_are_refused(tmp_path, text, said):
    folder = write_listops(tmp_path)
    (folder / "basic_val.tsv").write_text(text)
    with pytest.raises(ValueError, match=said):
        LRA("listops", root=str(tmp_path)).setup()


def test_missing_relative_of_a_released_file_is_named(tmp_path):
    (write_listops(tmp_path) / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"no listops-1000/basic_val\.tsv in .*relatives are"):
        LRA("listops", root=str(tmp_path)).setup()


# Retrieval


def write_aan(root, rows):
    folder = root / "tsv_data"
    folder.mkdir(parents=True)
    for name in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{name}.tsv").write_bytes(b"".join(rows))
    return folder


PAIRS = [
    b'1.0\tP1\tP2\t"an opening quote that is never closed\tplain text\n',
    b'0.0\tP3\tP4\tsecond line, "quoted" inside\t\'"\'\n',
    b"1.0\tP5\tP6\t" + b"x" * 9_999 + b"yz" * 1000 + b"\t" + "caf\u00e9".encode() + b"\n",
    b"0.0\tP7\tP8\t\tempty first document\n",
]


def test_pairs_keep_their_quotes_and_are_cut_to_four_thousand_bytes(tmp_path):
    write_aan(tmp_path, PAIRS)
    data = LRA("retrieval", root=str(tmp_path), batch_size=2)
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape[:2] == batch["attention_mask"].shape[:2] == (2, 2)
    rows = texts(data.test_dataloader())
    assert rows[0] == (b'"an opening quote that is never closed', b"plain text", 1)
    assert rows[1] == (b'second line, "quoted" inside', b"'\"'", 0)
    assert rows[2] == (b"x" * 4000, "caf\u00e9".encode(), 1)
    assert rows[3] == (b"", b"empty first document", 0)
    assert (data.towers, data.n_classes, data.vocab_size) == (2, 2, 257)
    assert data.floors["test"] == {"majority": 0.5}


def test_ten_thousand_bytes_of_a_document_are_the_most_there_is(tmp_path):
    write_aan(tmp_path, PAIRS)
    rows = texts(LRA("retrieval", root=str(tmp_path), max_length=20_000).test_dataloader())
    assert rows[2][0] == b"x" * 9_999 + b"y"


def test_pairs_travel_to_workers(tmp_path):
    write_aan(tmp_path, PAIRS)
    data = LRA("retrieval", root=str(tmp_path))
    expected = texts(data.test_dataloader())
    again = pickle.loads(pickle.dumps(data.rows["test"]))
    assert len(again) == len(expected) == 4
    assert again[1]["labels"] == 0


def test_lines_that_are_no_pairs_are_refused(tmp_path):
    write_aan(tmp_path, [PAIRS[0], b"1.0\tP1\tP2\tone text\n"])
    with pytest.raises(ValueError, match="line 2: 4 columns; there must be a label"):
        LRA("retrieval", root=str(tmp_path)).setup()


# Pathfinder


def write_pathfinder(root, side, subset="curv_contour_length_14", *, binary=False):
    folder = root / f"pathfinder{side}" / subset
    (folder / "metadata").mkdir(parents=True)
    count = 0
    for shard in (0, 2, 10):  # 10 comes after 2
        (folder / f"imgs/{shard}").mkdir(parents=True)
        lines = []
        for i in range(7):
            path = folder / f"imgs/{shard}/sample_{i}.png"
            pixels = np.full((side, side), count, np.uint8)
            pixels[0, 1] = 255
            Image.fromarray(pixels).save(path)
            rest = [i, count % 2, 1.8, 14, 4, 5, 1.5, 2, 1]
            lines.append([f"imgs/{shard}", f"sample_{i}.png", *map(str, rest)])
            count += 1
        target = folder / f"metadata/{shard}.npy"
        if binary:
            np.save(target, np.array(lines))
        else:
            target.write_text("".join(" ".join(line) + "\n" for line in lines))
    (folder / "imgs/0/sample_3.png").write_bytes(b"")  # as one in the release is
    return folder


@pytest.mark.parametrize("binary", [False, True], ids=["text", "array"])
def test_released_pathfinder_skips_the_empty_image_and_splits_by_position(tmp_path, binary):
    write_pathfinder(tmp_path, 32, binary=binary)
    data = LRA("pathfinder32", root=str(tmp_path), batch_size=3)
    facts = data.describe()
    assert facts["rows"] == {"train": 16, "val": 2, "test": 2}
    assert (facts["task"], facts["source"]) == ("pathfinder32", "release")
    seen = batches(data.test_dataloader())
    assert [int(ids[0]) for ids in seen["input_ids"]] == [19, 20]
    assert [int(label) for label in seen["labels"]] == [1, 0]
    assert seen["input_ids"][0].shape == (1024,)
    assert int(seen["input_ids"][0][1]) == 255  # row by row
    train = sorted(int(ids[0]) for ids in batches(data.train_dataloader())["input_ids"])
    assert train == [i for i in range(17) if i != 3]


def test_other_difficulties_are_other_folders(tmp_path):
    write_pathfinder(tmp_path, 32, "curv_baseline")
    LRA("pathfinder32", root=str(tmp_path), difficulty="easy").setup()
    with pytest.raises(ValueError, match=r"no samples of pathfinder32 in .*looked for"):
        LRA("pathfinder32", root=str(tmp_path)).setup()
    with pytest.raises(ValueError, match="no difficulty 'hart'; nearest: hard"):
        LRA("pathfinder32", root=str(tmp_path), difficulty="hart").setup()


def test_path_x_is_pathfinder_at_128_pixels(tmp_path):
    write_pathfinder(tmp_path, 128)
    data = LRA("pathx", root=str(tmp_path), pixels="values", batch_size=2)
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == batch["pixel_values"].shape == (2, 16_384)
    expected = (batch["input_ids"] / 255 - 0.5) / 0.5
    assert torch.allclose(batch["pixel_values"], expected)


def test_images_that_do_not_fit_are_refused(tmp_path):
    folder = write_pathfinder(tmp_path, 32)
    Image.new("L", (16, 16)).save(folder / "imgs/10/sample_6.png")
    data = LRA("pathfinder32", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"sample_6\.png is \(16, 16\); it must be \(32, 32\)"):
        list(data.test_dataloader())
    (folder / "imgs/10/sample_6.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is no image"):
        list(data.test_dataloader())
    (folder / "metadata/2.npy").write_text("imgs/2 sample_0.png 0\n")
    with pytest.raises(ValueError, match="line 1: no folder, file, number and label"):
        LRA("pathfinder32", root=str(tmp_path)).setup()


# MEGA's files, packed files, the Hub


def write_mega(folder, rows):
    for name in ("input", "label"):
        (folder / name).mkdir(parents=True)
    for split, lines in rows.items():
        sources = "".join(" ".join(map(str, tokens)) + "\n" for tokens, _ in lines)
        (folder / f"input/{split}.src").write_text(sources)
        (folder / f"label/{split}.label").write_text("".join(f"{y}\n" for _, y in lines))


def test_megas_files_keep_their_ids_above_the_padding(tmp_path):
    rows = [([0, 5, 3], 1), ([7], 0)]
    write_mega(tmp_path / "listops", {"train": rows, "valid": rows[:1], "test": rows})
    data = LRA("listops", root=str(tmp_path))
    seen = batches(data.test_dataloader())
    assert [ids.tolist() for ids in seen["input_ids"]] == [[1, 6, 4], [8, 0, 0]]
    assert [mask.tolist() for mask in seen["attention_mask"]] == [[1, 1, 1], [1, 0, 0]]
    assert data.vocab_size == 9
    assert data.describe()["source"] == "mega"
    (tmp_path / "listops/label/valid.label").write_text("1\n0\n")
    with pytest.raises(ValueError, match=r"has 1 lines and .* 2"):
        LRA("listops", root=str(tmp_path)).setup()


def test_megas_images_are_images(tmp_path):
    rows = [(list(range(256)) * 4, 3), ([255] * 1024, 9)]
    write_mega(tmp_path, {"train": rows, "valid": rows, "test": rows})
    data = LRA("image", root=str(tmp_path), pixels="values")
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"][0].tolist() == rows[0][0]
    expected = (batch["input_ids"] / 255 - 0.48) / 0.24
    assert torch.allclose(batch["pixel_values"], expected)
    write_mega(tmp_path / "image", {s: [([1, 2], 3)] for s in ("train", "valid", "test")})
    with pytest.raises(ValueError, match="not every line is 1024 numbers from 0 to 255"):
        LRA("image", root=str(tmp_path)).setup()


def write_imdb(root):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    for part, count in (("train", 60), ("val", 20), ("test", 10)):
        rows = [
            {"text": f"{part} {i} caf\u00e9 " + "x" * 5000, "label": i % 2} for i in range(count)
        ]
        write_table(pyarrow.Table.from_pylist(rows), root / f"imdb_{part}.parquet")


def test_packed_reviews_hold_a_tenth_out_unless_told_otherwise(tmp_path):
    write_imdb(tmp_path)
    data = LRA("text", root=str(tmp_path))
    rows = {part: len(r) for part, r in (data.setup(), data.rows)[1].items()}
    assert rows["train"] + rows["val"] == 80
    assert 2 <= rows["val"] <= 16
    assert rows["test"] == 10
    train, val = (texts(loader) for loader in (data.train_dataloader(), data.val_dataloader()))
    assert not {text for text, _ in train} & {text for text, _ in val}
    assert all(len(text) == 4000 for text, _ in train)
    assert all(text.startswith((b"train ", b"val ")) for text, _ in train + val)
    assert "caf\u00e9".encode() in train[0][0]
    published = LRA("text", root=str(tmp_path), official_val=True)
    assert len((published.setup(), published.rows)[1]["train"]) == 80
    assert texts(published.val_dataloader()) == texts(published.test_dataloader())
    assert published.describe()["validated_on"] == "test"


def write_cifar(root, labels=None):
    for part, count in (("train", 40), ("test", 10)):
        x = np.arange(count, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
        y = np.sort(np.arange(count) % 10).astype(np.uint8)
        np.savez(root / f"cifar_gray_{part}.npz", x=x, y=y if labels is None else labels)


def test_packed_images_validate_on_a_tenth_of_every_class(tmp_path):
    write_cifar(tmp_path)
    data = LRA("image", root=str(tmp_path))
    assert data.describe()["rows"] == {"train": 36, "val": 4, "test": 10}
    val = batches(data.val_dataloader())
    assert len({int(y) for y in val["labels"]}) > 1  # the file is sorted by class
    train = batches(data.train_dataloader())
    seen = sorted(int(ids[0]) for ids in train["input_ids"] + val["input_ids"])
    assert seen == list(range(40))


def test_packed_archives_are_never_unpickled(tmp_path):
    write_cifar(tmp_path, labels=np.array([object()] * 40, dtype=object))
    with pytest.raises(ValueError, match=r"no archive of plain arrays.*allow_pickle=False"):
        LRA("image", root=str(tmp_path)).setup()
    np.savez(tmp_path / "cifar_gray_train.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="holds a; it must hold x and y"):
        LRA("image", root=str(tmp_path)).setup()
    (tmp_path / "cifar_gray_train.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="no archive of plain arrays"):
        LRA("image", root=str(tmp_path)).setup()


def test_hub_texts_and_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, column, values in (
        ("imdb", "text", [f"review {i}" for i in range(30)]),
        ("cifar", "img", [Image.new("RGB", (32, 32), (i, 100, 200)) for i in range(30)]),
    ):
        (tmp_path / name).mkdir()
        made = datasets.Dataset.from_dict({column: values, "label": [i % 2 for i in range(30)]})
        for split in ("train", "test"):
            made.to_parquet(str(tmp_path / name / f"{split}.parquet"))
    monkeypatch.setitem(lra_sources.HUB, "text", str(tmp_path / "imdb"))
    monkeypatch.setitem(lra_sources.HUB, "image", str(tmp_path / "cifar"))
    text = LRA("text", source="hub")
    assert sorted(texts(text.test_dataloader())) == sorted(
        (f"review {i}".encode(), i % 2) for i in range(30)
    )
    image = LRA("image", source="hub")
    assert image.describe()["rows"] == {"train": 27, "val": 3, "test": 30}
    luma = int(0.2989 * 29 + 0.5870 * 100 + 0.1140 * 200)
    assert set(batches(image.val_dataloader())["input_ids"][2].tolist()) == {luma}
    monkeypatch.setitem(lra_sources.HUB, "text", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="cannot read split 'train' of data set"):
        LRA("text", source="hub").setup()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'seqzoo\[hub\]'"):
        LRA("image", source="hub").setup()


# Generated


def test_generated_samples_carry_their_name_and_nothing_is_generated_in_a_named_folder(
    tmp_path, capsys
):
    data = LRA("listops", cache=str(tmp_path / "cache"), **TINY)
    assert data.suffix == "-gen"
    assert "listops-gen: no results to put beside published ones" in capsys.readouterr().err
    facts = data.describe()
    json.dumps(facts)
    assert (facts["task"], facts["source"]) == ("listops-gen", "generated")
    assert facts["generator"]["max_depth"] == 4
    for ids, mask, label in zip(*batches(data.train_dataloader()).values(), strict=True):
        assert evaluate(ids[mask.bool()].tolist()) == label
    assert set(facts["floors"]["val"]) == {"majority", "first_operator"}
    with pytest.raises(ValueError, match="no samples of listops in"):
        LRA("listops", root=str(tmp_path), **TINY).setup()


def test_generated_images_are_those_of_the_generator(tmp_path):
    shared = {"samples": {"train": 8, "val": 4, "test": 4}, "processes": 1, "difficulty": "easy"}
    data = LRA("pathfinder32", source="generated", cache=str(tmp_path), **shared)
    assert data.facts == {}
    assert data.describe()["task"] == "pathfinder32-easy-gen"
    batch = next(iter(data.val_dataloader()))
    images = np.load(next(tmp_path.glob("*/val-images.npy")))
    assert np.array_equal(batch["input_ids"].numpy(), images.reshape(4, -1))


def test_root_may_come_from_the_environment(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    monkeypatch.setenv("SEQZOO_DATA", str(tmp_path))
    assert LRA("image").describe()["source"] == "packed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "listop"}, "no task 'listop'; nearest: listops"),
        ({"task": "text", "source": "generated"}, "no source of text named 'generated'"),
        ({"task": "text", "pixels": "values"}, "text has no pixels"),
        ({"task": "image", "pixels": "real"}, "no kind of pixels 'real'"),
        (
            {"task": "image", "max_length": 512},
            "max_length=512 is not allowed; images of image are 1024",
        ),
        ({"task": "text", "root": "/nowhere"}, "there is no folder /nowhere"),
        ({"task": "text", "batch_size": 0}, "batch_size=0 is not allowed"),
    ],
)
def test_impossible_requests_are_refused_at_construction(options, said):
    with pytest.raises(ValueError, match=said):
        LRA(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "text"}, r"no samples of text \(no --data.root, and SEQZOO_DATA is not set\)"),
        ({"task": "listops", "generator": {"depth": 3}}, "no option .* named 'depth'; nearest"),
        ({"task": "listops", "samples": {"dev": 3}}, "no split 'dev'"),
    ],
)
def test_impossible_requests_are_refused_when_the_data_are_read(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        LRA(**options, cache=str(tmp_path)).setup()


@needs_data
def test_real_reviews_and_images():
    text = LRA("text", root=REAL)
    facts = text.describe()
    assert facts["rows"]["train"] + facts["rows"]["val"] == 25_000
    assert facts["rows"]["test"] == 25_000
    assert 2_250 < facts["rows"]["val"] < 2_750
    assert facts["floors"]["test"] == {"majority": 0.5}
    image = LRA("image", root=REAL)
    assert image.describe()["rows"] == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert 0.05 < image.floors["val"]["majority"] < 0.15


def test_digests_tell_other_data(tmp_path):
    folder = write_listops(tmp_path)
    first = LRA("listops", root=str(tmp_path)).describe()["digest"]
    assert LRA("listops", root=str(tmp_path)).describe()["digest"] == first
    path = folder / "basic_train.tsv"
    path.write_text(path.read_text().replace("8\t7", "8\t8"))
    assert LRA("listops", root=str(tmp_path)).describe()["digest"] != first
    assert formats.find(tmp_path, "listops-1000") == folder
