"""Whom a card cites: the package's paper, Mixup where the method mixes, and the method's own."""

from __future__ import annotations

import pytest
from conftest import arguments, tiny_vit

from hf_balancemix.methods import METHODS, trainer_for
from hf_balancemix.report.model_card import card_facts, render_model_card

OWN = {
    "focal": "lin2017focal", "asl": "ridnik2021asymmetric", "ll-r": "kim2022large", "ll-ct": "kim2022large",
    "ll-cp": "kim2022large", "spl-hill": "zhang2021simple", "splc": "zhang2021simple",
    "db-loss": "wu2020distribution", "co-teaching": "han2018coteaching", "t-estimator": "li2022estimating",
    "elr": "liu2020early", "nar": "burgert2026nar",
}  # fmt: skip


@pytest.mark.parametrize("alpha", [4.0, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_methods_that_mix_cite_mixup_beside_their_own_paper(method, alpha, dataset, tmp_path):
    args = arguments(tmp_path, mixup_alpha=alpha)
    trainer = trainer_for(method, args, model=tiny_vit(), train_dataset=dataset)
    citation = render_model_card(card_facts(trainer)).split("## Citation")[1]
    assert citation.count("zhang2018mixup") == (method != "bce" and alpha > 0)
    assert citation.count("song2024balancemix") == 1
    assert citation.count("@") == 1 + (method != "bce" and alpha > 0) + (method in OWN)
    if method in OWN:
        assert citation.count(OWN[method]) == 1
