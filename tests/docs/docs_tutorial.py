"""Runs the pages of docs/tutorials: their code blocks, one after the other, in the working folder.

A block of `bash` is commands of `balancemix` or `torchrun`, a block of `python` goes on where the one before has
stopped. A block after `<!-- not run: reason -->` is only read. What a page takes from the Hub is replaced by something
small and local.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TUTORIALS = REPOSITORY / "docs/tutorials"
# A run of seconds; flags that stand later on a command line win.
SHORT = [
    *("--image_size", "32", "--learning_rate", "0.01", "--global_batch_size", "8", "--num_train_epochs", "4"),
    *("--label_warmup_epochs", "2", "--disable_tqdm", "true", "--use_cpu"),
]
FROM_SCRATCH = ["--model_name_or_path", "test_resnet", "--from_scratch"]


def blocks(page: str, section: str = "") -> list[tuple[str, str]]:
    """The language and the text of each block that is run; of a section alone, from its heading to the next one."""
    text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
    if section:
        text = text[text.index(section) :]
        text = text[: text.index("\n## ", 1)]
    found = re.findall(r"(<!-- not run:[^>]*-->\n)?^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(language, code) for skipped, language, code in found if not skipped]


def run(
    page: str,
    section: str = "",
    *,
    flags: list[str] | None = None,
    replace: Mapping[str, str] | None = None,
    before: Callable[[str], None] = lambda code: None,
) -> dict[str, Any]:
    """Run a page, or a section of it; gives the names that its Python code has defined.

    `flags` are put behind those of `balancemix train`; `replace` is done in commands and in code, and each of its keys
    must occur; `before` is called before each block.
    """
    names: dict[str, Any] = {"__name__": page}
    unused = set(replace or {})
    for language, code in blocks(page, section):
        for old, new in (replace or {}).items():
            unused -= {old} if old in code else set()
            code = code.replace(old, new)
        before(code)
        if language == "python":
            exec(compile(code, f"{page}.md", "exec"), names)
            continue
        for line in code.replace("\\\n", " ").strip().splitlines():
            program, *argv = shlex.split(line, comments=True)
            if program == "torchrun":
                _torchrun([*argv, *(flags or [])])
                continue
            assert program == "balancemix", line
            main = importlib.import_module(f"hf_balancemix.scripts.{argv[0]}").main
            main([*argv[1:], *((flags or []) if argv[0] == "train" else [])])
    assert not unused, f"{page}.md has no {unused}"
    return names


def _torchrun(argv: list[str]) -> None:
    """In processes of their own, at a free port; scripts are the repository's."""
    argv = [str(REPOSITORY / word) if word.startswith("examples/") else word for word in argv]
    start = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*start, *argv], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
