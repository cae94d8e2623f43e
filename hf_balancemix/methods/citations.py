"""Where the compared methods come from, as BibTeX, for model cards. BalanceMix and Mixup stand in the template."""

from __future__ import annotations

_FOCAL = """@inproceedings{lin2017focal,
  title     = {Focal Loss for Dense Object Detection},
  author    = {Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Doll{\\'a}r, Piotr},
  booktitle = {International Conference on Computer Vision},
  year      = {2017}
}"""

_ASL = """@inproceedings{ridnik2021asymmetric,
  title     = {Asymmetric Loss for Multi-Label Classification},
  author    = {Ridnik, Tal and Ben-Baruch, Emanuel and Zamir, Nadav and Noy, Asaf and Friedman, Itamar and
               Protter, Matan and Zelnik-Manor, Lihi},
  booktitle = {International Conference on Computer Vision},
  year      = {2021}
}"""

_LARGE_LOSS = """@inproceedings{kim2022large,
  title     = {Large Loss Matters in Weakly Supervised Multi-Label Classification},
  author    = {Kim, Youngwook and Kim, Jae Myung and Akata, Zeynep and Lee, Jungwoo},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}"""

_MISSING_LABELS = """@article{zhang2021simple,
  title   = {Simple and Robust Loss Design for Multi-Label Learning with Missing Labels},
  author  = {Zhang, Youcai and Cheng, Yuhao and Huang, Xinyu and Wen, Fei and Feng, Rui and Li, Yaqian and
             Guo, Yandong},
  journal = {arXiv:2112.07368},
  year    = {2021}
}"""

_DISTRIBUTION_BALANCED = """@inproceedings{wu2020distribution,
  title     = {Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets},
  author    = {Wu, Tong and Huang, Qingqiu and Liu, Ziwei and Wang, Yu and Lin, Dahua},
  booktitle = {European Conference on Computer Vision},
  year      = {2020}
}"""

_CO_TEACHING = """@inproceedings{han2018coteaching,
  title     = {Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels},
  author    = {Han, Bo and Yao, Quanming and Yu, Xingrui and Niu, Gang and Xu, Miao and Hu, Weihua and Tsang, Ivor and
               Sugiyama, Masashi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2018}
}"""

_T_ESTIMATOR = """@inproceedings{li2022estimating,
  title     = {Estimating Noise Transition Matrix with Label Correlations for Noisy Multi-Label Learning},
  author    = {Li, Shikun and Xia, Xiaobo and Zhang, Hansong and Zhan, Yibing and Ge, Shiming and Liu, Tongliang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}"""

CITATIONS = {
    "focal": _FOCAL,
    "asl": _ASL,
    "ll-r": _LARGE_LOSS,
    "ll-ct": _LARGE_LOSS,
    "ll-cp": _LARGE_LOSS,
    "spl-hill": _MISSING_LABELS,
    "splc": _MISSING_LABELS,
    "db-loss": _DISTRIBUTION_BALANCED,
    "co-teaching": _CO_TEACHING,
    "t-estimator": _T_ESTIMATOR,
}
