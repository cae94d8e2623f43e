"""Decisions become corrected labels: exactly those, with who and when, for the data they are about and no other."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from conftest import label_dataset
from datasets import Dataset, Features, List, Value

from hf_balancemix import apply_corrections, load_noise_map
from hf_balancemix.audit import Corrections, LabelAudit
from hf_balancemix.data import given_labels, label_matrix

# What hurts in a CSV file: delimiters, quotes, line ends, other scripts, what looks like a formula or a number.
NAMES = ["cat, small", 'the "dog"', "two\nlines", "деревья", "木;林", "=1+1", " space ", "0123"]
TIME = "2026-11-27T09:30:00Z"


def make(ids=None) -> Dataset:
    """6 images: of the image i the classes i and i + 1 are present."""
    labels = np.zeros((6, len(NAMES)), dtype=np.uint8)
    for i in range(6):
        labels[i, [i, i + 1]] = 1
    return label_dataset(labels, NAMES, ids)


def decision(image_id, name, given, word="wrong", reviewer="ann", time=TIME) -> dict:
    return {
        "image_id": image_id,
        "class": name,
        "given": given,
        "decision": word,
        "reviewer": reviewer,
        "time": time,
    }


def save(rows, path, excel=False, delimiter=","):
    with open(path, "w", encoding="utf-8-sig" if excel else "utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, lineterminator="\r\n" if excel else "\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def audit_of(*rows) -> LabelAudit:
    """With the rows (image_id, class, given, score)."""
    kinds = {"image_id": "int64", "class": "string", "given": "int8", "score": "float32"}
    columns = dict(zip(kinds, map(list, zip(*rows, strict=True)), strict=True))
    features = Features({name: Value(kind) for name, kind in kinds.items()})
    return LabelAudit(Dataset.from_dict(columns, features=features), [])


@pytest.mark.parametrize("excel", [False, True, ";"], ids=["page", "excel", "excel with semicolons"])
@pytest.mark.parametrize("ids", [[10, 11, 12, 13, 14, 15], ["a,1.jpg", "я.jpg", '"c"', "07", "7", "e\nf"]])
def test_every_class_name_and_id_comes_through_the_file(tmp_path, ids, excel):
    dataset = make(ids)
    rows = [decision(ids[i], NAMES[k], int(k in (i, i + 1))) for i in range(6) for k in (0, i, i + 1, 7) if k]
    rows = list({(row["image_id"], row["class"]): row for row in [*rows, decision(ids[3], NAMES[0], 0)]}.values())
    path = save(rows, tmp_path / "decisions.csv", bool(excel), excel if isinstance(excel, str) else ",")
    corrected = apply_corrections(dataset.shuffle(seed=3), path)
    expected = label_matrix(dataset).numpy()
    for row in rows:
        expected[ids.index(row["image_id"]), NAMES.index(row["class"])] ^= 1
    order = [ids.index(image_id) for image_id in corrected["image_id"]]
    assert np.array_equal(label_matrix(corrected).numpy(), expected[order])
    assert np.array_equal(label_matrix(corrected, "given_labels").numpy(), label_matrix(dataset).numpy()[order])
    assert corrected.features["labels"] == dataset.features["labels"]
    assert all(row == sorted(row) for row in corrected["labels"])


def test_each_changed_label_says_who_what_and_when_also_from_a_parquet(tmp_path):
    dataset = make()
    decisions = [
        decision(2, "деревья", 1),
        decision(2, "0123", 0, reviewer="дя", time="2026-11-28T00:00:00Z"),
        decision(3, "деревья", 1, "right"),
        decision(4, "=1+1", 1, "unsure"),
    ]
    apply_corrections(dataset, decisions).to_parquet(tmp_path / "corrected.parquet")
    corrected = Dataset.from_parquet(str(tmp_path / "corrected.parquet"), cache_dir=str(tmp_path / "cache"))
    assert corrected["corrections"][2] == [
        {"class": "деревья", "given": 1, "corrected": 0, "by": "ann", "time": TIME},
        {"class": "0123", "given": 0, "corrected": 1, "by": "дя", "time": "2026-11-28T00:00:00Z"},
    ]
    assert [len(entries) for entries in corrected["corrections"]] == [0, 0, 2, 0, 0, 0]
    assert corrected["labels"][2] == [2, 7]
    assert corrected["given_labels"][2] == [2, 3]

    # A second round: what was given first stays, and the provenance goes on.
    again = apply_corrections(corrected, [decision(2, "деревья", 0, reviewer="eve"), decision(5, "=1+1", 1)])
    assert again["labels"][2] == [2, 3, 7]
    assert again["given_labels"][:] == dataset["labels"][:]
    assert [(entry["class"], entry["corrected"], entry["by"]) for entry in again["corrections"][2]] == [
        ("деревья", 0, "ann"),
        ("0123", 1, "дя"),
        ("деревья", 1, "eve"),
    ]
    assert again.features == corrected.features


def test_sure_rows_of_an_audit_are_applied_where_nobody_decided():
    dataset = make()
    audit = audit_of((0, "деревья", 0, 0.99), (0, "cat, small", 1, 0.97), (1, "0123", 0, 0.95), (2, "0123", 0, 0.9))
    alone = apply_corrections(dataset, audit, min_score=0.95)  # 0.95 as float32 is a little less than 0.95
    assert alone["labels"][:3] == [[1, 3], [1, 2, 7], [2, 3]]
    assert [entry["by"] for row in alone["corrections"] for entry in row] == [
        "audit, score 0.99, not reviewed",
        "audit, score 0.97, not reviewed",
        "audit, score 0.95, not reviewed",
    ]
    assert all(len(entry["time"]) == len(TIME) for row in alone["corrections"] for entry in row)

    reviewed = [decision(0, "деревья", 0, "right"), decision(0, "cat, small", 1, "unsure"), decision(2, "0123", 0)]
    both = apply_corrections(dataset, reviewed, audit=audit.rows, min_score=0.95)
    assert both["labels"][:3] == [[0, 1], [1, 2, 7], [2, 3, 7]]
    assert [entry["by"] for row in both["corrections"] for entry in row] == [
        "audit, score 0.95, not reviewed",
        "ann",
    ]


@pytest.mark.parametrize("kind", ["float32", "int8", "bool"])
def test_multi_hot_labels_keep_their_form_and_what_is_unknown(kind):
    unknown = None if kind == "bool" else -1
    rows = [[1, 0, 0], [0, 1, unknown], [1, 1, 0]]
    if kind == "float32":
        rows[2] = [1.0, 1.0, float("nan")]
    features = Features({"labels": List(Value(kind)), "image_id": Value("int64"), "more": Value("string")})
    dataset = Dataset.from_dict({"labels": rows, "image_id": [1, 2, 3], "more": list("xyz")}, features=features)
    corrected = apply_corrections(dataset, [decision(2, "LABEL_0", 0), decision(1, "LABEL_0", 1)])
    last = [1, 1, -1] if kind == "float32" else [1, 1, 0]
    assert given_labels(corrected).tolist() == [[0, 0, 0], [1, 1, -1], last]
    assert corrected.features["labels"] == features["labels"]
    assert corrected.column_names == ["labels", "image_id", "more", "given_labels", "corrections"]
    shared = Corrections.of([decision(2, "LABEL_0", 0), decision(1, "LABEL_0", 1)]).to_noise_map(dataset)
    theirs = shared.correct(dataset)
    assert given_labels(theirs).tolist() == given_labels(corrected).tolist()
    assert theirs.features["labels"] == features["labels"]
    with pytest.raises(ValueError, match=r"1 of 1 rows .*image_id '2', class 'LABEL_2': 0 instead of unknown"):
        apply_corrections(dataset, [decision(2, "LABEL_2", 0)])


def test_labels_in_unknown_labels_stay_unknown():
    dataset = label_dataset([[1, 0, 0], [0, 0, 1]], list("abc"), unknown_labels=[[0, 0, 1], [0, 0, 0]])
    corrected = apply_corrections(dataset, [decision(0, "b", 0)])
    assert given_labels(corrected).tolist() == [[1, 1, -1], [0, 0, 1]]
    with pytest.raises(ValueError, match="0 instead of unknown"):
        apply_corrections(dataset, [decision(0, "c", 0)])


@pytest.mark.parametrize("ids", [None, list("fedcba")])
def test_a_second_person_gets_the_corrected_data_from_the_given_and_the_shared_file(tmp_path, ids):
    dataset = make(ids)
    i = dataset["image_id"][:]
    corrections = Corrections.of([decision(i[0], NAMES[0], 1), decision(i[4], NAMES[0], 0, reviewer="bob")])
    corrections.to_noise_map(dataset).save(tmp_path / "corrections.parquet")
    corrected = corrections.apply(dataset)

    shared = load_noise_map(tmp_path / "corrections.parquet")
    theirs = shared.correct(make(ids).shuffle(seed=1)).sort("image_id")
    for column in ("labels", "given_labels"):
        assert theirs[column][:] == corrected.sort("image_id")[column][:]
        assert theirs.features[column] == corrected.features[column]
    assert shared.parameters == {"name": "Corrections", "by": {"ann": 1, "bob": 1}, "from": TIME, "to": TIME}
    assert shared.apply(corrected)["labels"][:] == dataset["labels"][:]

    other = make(ids)
    for data, message in (
        (corrected, "'cat, small' of image_id .* is . instead of . .2 of 2 differ"),
        (apply_corrections(other, [decision(i[1], NAMES[1], 1)]), "labels of 1 of 6 images differ"),
        (other.select(range(5)), "lacks 1, first image_id"),
    ):
        with pytest.raises(ValueError, match=message):
            shared.correct(data)


GOOD = decision(0, "cat, small", 1)


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ([GOOD, decision(77, "0123", 0), decision(78, "0123", 0)], r"2 of 3 rows .* image_id .* lacks: '77', '78'"),
        ([GOOD, decision(1, "elk", 0)], r"1 of 2 rows .* a class .* lacks: 'elk'"),
        ([GOOD, decision(1, "0123", 1)], r"1 of 2 rows .*image_id '1', class '0123': 1 instead of 0"),
        ([GOOD, GOOD | {"decision": "right"}], r"1 decisions disagree .*row 1: image_id '0', class 'cat, small'"),
        ([GOOD | {"decision": "Wrong"}], r"row 0: decision is 'Wrong'; it must be one of wrong, right, unsure"),
        ([GOOD | {"given": 2}], r"row 0: given is 2; it must be 1 or 0"),
        ([GOOD | {"given": None}], r"row 0 has no 'given'"),
        ([GOOD | {"image_id": 1.0}], r"row 0: image_id is 1.0"),
        ([], "the decisions have no row"),
        (None, "decisions and audit are None"),
    ],
)
def test_decisions_for_other_data_and_malformed_ones_are_refused_in_one_sentence(decisions, message):
    dataset = make()
    with pytest.raises(ValueError, match=message) as error:
        apply_corrections(dataset, decisions)
    assert str(error.value).count(". ") == 0
    assert dataset.column_names == ["labels", "image_id"]


def test_arguments_without_an_effect_are_refused(tmp_path):
    dataset, audit = make(), audit_of((0, "cat, small", 1, 0.9))
    for arguments, message in (
        ({"decisions": [GOOD], "min_score": 0.9}, "min_score is 0.9; an audit and min_score must go together"),
        ({"audit": audit}, "an audit is given without min_score"),
        ({"decisions": audit}, "an audit is given without min_score"),
        ({"decisions": audit, "audit": audit, "min_score": 0.5}, "decisions is an audit, and so is audit"),
        ({"audit": audit, "min_score": 0.95}, "min_score is 0.95 and the highest score of the audit 0.900"),
        ({"audit": audit, "min_score": 95}, r"min_score is 95; it must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_corrections(dataset, **arguments)
    with pytest.raises(FileNotFoundError, match="no decisions file"):
        apply_corrections(dataset, tmp_path / "absent.csv")
    with pytest.raises(TypeError, match="the decisions are a int"):
        apply_corrections(dataset, 5)
    path = save([{"image_id": 0, "class": "cat, small"}], tmp_path / "other.csv")
    with pytest.raises(ValueError, match="no column 'given' in the header"):
        apply_corrections(dataset, path)
    path = save([GOOD, GOOD | {"decision": "yes"}], tmp_path / "bad.csv")
    with pytest.raises(ValueError, match=r"bad.csv, line 3: decision is 'yes'"):
        apply_corrections(dataset, path)
    with pytest.raises(ValueError, match="column 'corrections' is"):
        apply_corrections(dataset.add_column("corrections", ["x"] * 6), [GOOD])


@pytest.mark.parametrize("score", ["high", float("nan"), -0.1, 2, [0.9], 10**400])
def test_a_score_that_is_none_is_refused_by_row(score):
    row = {"image_id": 1, "class": "ant", "given": 1, "score": score}
    with pytest.raises(ValueError, match=r"the audit, row 0: score is .*; it must be a number in"):
        Corrections.of(audit=[row], min_score=0.5)
