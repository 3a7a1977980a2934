"""Data: files that are wrong, documents, rows that are a pure function of their number."""

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes.parts.documents import documents, encoded, fill_in_the_middle
from deepzoo.recipes.parts.records import DataError, read
from deepzoo.recipes.parts.rows import Rows


@pytest.fixture(scope="module")
def model():
    return zoo.load("v2-nano")


def jsonl(path, *records):
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def made(lengths, given=1):
    pairs = [([100 * i + j for j in range(n)], min(given, n - 1)) for i, n in enumerate(lengths, 1)]
    return documents(pairs, [f"d{i}" for i in range(len(pairs))], 10**6)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "1"}', '{"text": '], r"train.jsonl:2: is not JSON .*mend the line"),
        (['{"text": "1"}', "[1]"], r"train.jsonl:2: expected a JSON object, got list"),
        (["[" * 100000], r"train.jsonl:1: is not JSON"),
        ([], r"train.jsonl: is empty"),
        (['{"text": "1"}', '{"txt": "2"}'], r"train.jsonl:2: field 'text' is missing.*has txt"),
        (['{"text": "1"}', '{"text": 2}'], r"train.jsonl:2: field 'text' is no text"),
        (['{"text": "1"}', '{"text": ""}'], r"train.jsonl:2: field 'text' is empty"),
        (['{"prompt": "1 + 1 ="}'], r"train.jsonl:1: field 'completion' is missing"),
        (['{"question": "1"}'], r"train.jsonl:1: expected a record with text, .*it has question"),
        (['{"text": "1 x 2"}'], r"train.jsonl:1: .*cannot spell"),
        (['{"messages": [{"role": "user", "content": "1"}]}'], r"at least two messages"),
        (
            ['{"messages": [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]}'],
            r"train.jsonl:1: the last message must be the assistant's",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, model, lines, message):
    path = jsonl(tmp_path / "train.jsonl", *lines)
    with pytest.raises(DataError, match=message) as caught:
        encoded(model, read(path))
    assert "\n" not in str(caught.value)


def test_bad_places_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="none of them"):
        read(tmp_path)
    jsonl(tmp_path / "a.jsonl", {"text": "1"})
    (tmp_path / "b.txt").write_text("2")
    with pytest.raises(DataError, match=re.escape(".jsonl and .txt")):
        read(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        read(tmp_path / "b.txt")


def test_folders_of_text_and_of_lines_are_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [r["text"] for r in read(tmp_path)] == ["a", "b"]


def test_parquet_equals_the_lines_it_was_made_of(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    from pyarrow import parquet

    rows = [{"prompt": f"{i} +", "completion": str(i)} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet")
    assert [dict(r) for r in records] == rows
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet"):
        read(tmp_path / "a.parquet")


def test_a_pair_is_prompt_completion_and_end_with_only_the_completion_learned(tmp_path, model):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "1 + 2 =", "completion": "3"})
    found = encoded(model, read(path))
    tokenizer = model.tokenizer
    expected = [tokenizer.bos_id, *tokenizer.encode("1 + 2 ="), *tokenizer.encode("3")]
    assert found.tokens.tolist() == [*expected, tokenizer.eos_ids[0]]
    assert found.given.tolist() == [5]


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(DataError, match="d1: token id 9 is outside the model's vocabulary of 9"):
        documents([([1], 0), ([3, 9], 0)], ["d0", "d1"], 9)


@pytest.mark.parametrize("split", [True, False])
def test_a_batch_is_a_pure_function_of_its_step(split):
    docs = made([5, 9, 3, 7, 4, 6, 8, 2, 5, 5, 6])
    one = Rows(docs, rows=2, length=11, split=split, seed=3)
    two = Rows(docs, rows=2, length=11, split=split, seed=3)
    late = two(17)  # without the batches before it
    for step in range(18):
        batch = one(step)
    for name in batch:
        np.testing.assert_array_equal(batch[name], late[name])
    other = Rows(docs, rows=2, length=11, split=split, seed=4)
    assert any((one(s)["tokens"] != other(s)["tokens"]).any() for s in range(3))


def test_whole_documents_each_come_once_an_epoch_and_stay_whole():
    docs = made([5, 9, 3, 7, 4, 6, 8, 2, 5, 5, 6])
    rows = Rows(docs, rows=1, length=11, seed=1)
    for epoch in range(3):
        begin = sum(rows.plan(e).rows for e in range(epoch))
        found = []
        for step in range(begin, begin + rows.plan(epoch).rows):
            batch = rows(step)
            for segment in range(batch["segments"].max() + 1):
                ids = batch["tokens"][0][batch["segments"][0] == segment].tolist()
                found.append(ids)
                weights = batch["weights"][0][batch["segments"][0] == segment]
                assert weights.tolist() == [0.0] + [1.0] * (len(ids) - 1)
            assert (batch["weights"][batch["segments"] < 0] == 0).all()
        assert sorted(found) == [
            docs.tokens[a:b].tolist() for a, b in zip(docs.starts, docs.starts[1:], strict=False)
        ]
    assert rows.plan(0).document.tolist() != rows.plan(1).document.tolist()


def test_a_stream_is_cut_into_full_rows_that_overlap_by_one():
    docs = made([5, 9, 3, 7, 4, 6, 8, 2, 5, 5, 6], given=0)
    rows = Rows(docs, rows=1, length=7, split=True, masked=False, seed=1)
    plan = rows.plan(0)
    order = plan.document[np.sort(np.unique(plan.document, return_index=True)[1])]
    stream = np.concatenate([docs.tokens[docs.starts[d] : docs.starts[d + 1]] for d in order])
    assert plan.rows == (docs.lengths.sum() - 1) // 7
    for step in range(plan.rows):
        batch = rows(step)
        assert batch["tokens"][0].tolist() == stream[step * 7 : step * 7 + 8].tolist()
        assert (batch["segments"] == 0).all() and (batch["weights"] == 1).all()


def test_overlong_documents_are_refused_cut_or_dropped_as_told():
    docs = made([5, 13, 4])
    with pytest.raises(DataError, match=r"d1: has 13 tokens, a row holds 12 \(1 of 3"):
        Rows(docs, rows=1, length=11)
    dropped = Rows(docs, rows=1, length=11, overlong="drop")
    assert sorted(dropped.plan(0).document.tolist()) == [0, 2]
    cut = Rows(docs, rows=1, length=11, overlong="cut")
    assert sorted((cut.plan(0).end - cut.plan(0).begin).tolist()) == [4, 5, 12]
    with pytest.raises(DataError, match="fewer than one row"):
        Rows(docs, rows=1, length=50, split=True)


def test_fill_in_the_middle_keeps_every_token_in_the_published_order(model):
    names = [f"<\uff5cfim\u2581{part}\uff5c>" for part in ("begin", "hole", "end")]
    marks: Any = SimpleNamespace(control=dict(zip(names, (900, 901, 902), strict=True)))
    docs = made([9, 12, 30, 2, 7] * 20)
    changed = fill_in_the_middle(docs, marks, rate=0.5, seed=1)
    count = 0
    for i, length in enumerate(docs.lengths):
        old = docs.tokens[docs.starts[i] : docs.starts[i + 1]].tolist()
        new = changed.tokens[changed.starts[i] : changed.starts[i + 1]].tolist()
        if new == old:
            continue
        count += 1
        assert len(new) == length + 3
        assert [new[0], new[1], new[-1]] == [old[0], 900, old[-1]]
        hole, end = new.index(901), new.index(902)
        prefix, suffix, middle = new[2:hole], new[hole + 1 : end], new[end + 1 : -1]
        assert prefix + middle + suffix == old[1:-1]
    assert 30 < count < 65  # of 80 that are long enough, half
    same = fill_in_the_middle(docs, marks, rate=0.5, seed=1)
    np.testing.assert_array_equal(changed.tokens, same.tokens)
    with pytest.raises(DataError, match="set the rate to 0"):
        fill_in_the_middle(docs, model.tokenizer, rate=0.1, seed=0)
