"""`balancemix audit`, and the tutorial of docs/audit.md, at the command line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments, make_dataset, tiny_vit
from PIL import Image

from hf_balancemix import BalanceMixTrainer, LabelAudit, from_csv
from hf_balancemix.scripts import audit as script
from hf_balancemix.scripts import train

DOCS = Path(__file__).parents[2] / "docs/audit.md"
# A network of a second, in place of a pretrained one, for which the documented commands would need the Hub.
TINY = [
    *("--model_name_or_path", "test_resnet", "--from_scratch", "--image_size", "32", "--learning_rate", "0.01"),
    *("--global_batch_size", "8", "--num_train_epochs", "4", "--label_warmup_epochs", "2", "--disable_tqdm", "True"),
]


def make_photos(folder: Path) -> None:
    """60 images whose colour is their label, of which every tenth is wrong."""
    folder.mkdir()
    lines = ["file_name,tags"]
    rng = np.random.default_rng(0)
    for i in range(60):
        kind = i % 3
        pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
        pixels[..., kind] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
        names = ["red", "green", "blue"]
        lines.append(f"{i}.png,{names[(kind + (i % 10 == 0)) % 3]}{';any' if i % 2 else ''}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def test_the_tutorial_from_a_noisy_folder_to_corrected_labels(tmp_path, monkeypatch, capsys):
    text = DOCS.read_text(encoding="utf-8")
    text = text[text.index("## From a noisy folder") : text.index("## What a row says")]
    steps = re.findall(r"^    balancemix ([^\n]*)$|^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert [bool(command) for command, _ in steps] == [True, True, False, True, True]
    make_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    for command, code in steps:
        if code:
            # What the page saves: here the reviewer finds every listed label wrong.
            rows = LabelAudit.load("outputs/balancemix").rows
            assert len(rows)
            lines = [f"{r['image_id']},{r['class']},{r['given']},wrong,ann,2026-01-01T00:00:00Z" for r in rows]
            Path("decisions.csv").write_text("\n".join(["image_id,class,given,decision,reviewer,time", *lines]))
            exec(code, {})
            continue
        name, *flags = shlex.split(command)
        if name == "train":
            train.main([*flags, *TINY])
            printed = capsys.readouterr().out
            if "--train_dir" in flags:
                assert re.search(
                    r"look at the \d+ labels of outputs/balancemix .*\n.* audit --model .* --html", printed
                )
        else:
            script.main(flags)
            assert "Suspicious labels:" in capsys.readouterr().out
    assert Path("report/index.html").is_file()
    assert Path("suspicious.csv").read_text().startswith("image_id,image,class,given,suggested,kind,score,")
    from datasets import load_from_disk

    corrected = load_from_disk("corrected")
    photos = from_csv("photos/labels.csv", "photos", label_column="tags", separator=";")
    assert sum(map(len, corrected["corrections"][:])) == len(rows)
    assert corrected["given_labels"][:] == photos["labels"][:]
    assert corrected["labels"][:] != photos["labels"][:]


@pytest.fixture
def model(tmp_path):
    """The folder of a short run."""
    trainer = BalanceMixTrainer(
        model=tiny_vit(), args=arguments(tmp_path / "run", judge="network"), train_dataset=make_dataset(tmp_path / "i")
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


def test_nothing_is_overwritten_and_nothing_is_ignored(model, tmp_path):
    (tmp_path / "report").mkdir()
    with pytest.raises(FileExistsError, match=r"report exists; it must not"):
        script.main(["--model", str(model), "--html", str(tmp_path / "report")])
    for flag, value in (("folds", 5), ("batch_size", 8), ("device", "cpu"), ("seed", 0)):
        with pytest.raises(ValueError, match=f"{flag} is {value!r}; it must come with data"):
            script.main(["--model", str(model), f"--{flag}", str(value)])
    with pytest.raises(ValueError, match="html is None; there must be pages"):
        script.main(["--model", str(model), "--push_to_hub", "user/x"])
    with pytest.raises(ValueError, match="max_eval_samples is 5; an audit is of the training data"):
        script.main(["--model", str(model), "--train_dir", str(tmp_path), "--max_eval_samples", "5"])
    with pytest.raises(FileNotFoundError, match="as a run of BalanceMix leaves it beside its model"):
        script.main(["--model", str(tmp_path)])


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    code = "from hf_balancemix.scripts.main import main; main()"
    for flags, message in (
        ([], "label_audit.parquet is absent"),
        (["--html", str(tmp_path)], f"{tmp_path} exists; it must not"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "audit", "--model", str(tmp_path), *flags],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.strip().startswith("error: ")
        assert message in done.stderr
        assert done.stderr.strip().count("\n") == 0
