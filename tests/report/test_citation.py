"""Whoever cites the paper cites the same paper."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from hf_balancemix.core.citation import CITATION

ROOT = Path(__file__).parents[2]


def bibtex_fields(entry: str) -> dict[str, str]:
    found = re.findall(r"(\w+)\s*= \{(.*?)\},?\n", entry, flags=re.DOTALL)
    return {name: " ".join(value.split()) for name, value in found}


def test_the_citation_file_and_the_readme_cite_the_paper_of_the_cards():
    fields = bibtex_fields(CITATION)
    assert set(fields) == {"title", "author", "booktitle", "year"}
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = [f"{author['family-names']}, {author['given-names']}" for author in cited["authors"]]
    in_file = [cited["title"], " and ".join(authors), cited["collection-title"], str(cited["year"])]
    assert in_file == list(fields.values())
    readme = re.search(r"```bibtex\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    assert bibtex_fields(readme) == fields
