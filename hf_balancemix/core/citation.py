"""The paper as BibTeX. README.md and CITATION.cff say the same, as a test checks."""

CITATION = """@inproceedings{song2024balancemix,
  title     = {Toward Robustness in Multi-label Classification:
               A Data Augmentation Strategy against Imbalance and Noise},
  author    = {Song, Hwanjun and Kim, Minseok and Lee, Jae-Gil},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year      = {2024}
}"""
