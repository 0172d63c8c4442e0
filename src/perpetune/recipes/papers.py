"""The papers behind recipes and pieces: which a recipe is made after, and how they are cited."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from . import RECIPES

ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)")


class Paper(NamedTuple):
    """First author, and the others or that there are some, as BibTeX writes them; the title, and how it is called."""

    authors: str
    title: str


# every paper that a docstring of a recipe or a piece names; a test fails where one is missing
PAPERS = {
    "1902.00751": Paper(
        "Houlsby, Neil and others", "Parameter-Efficient Transfer Learning for NLP (bottleneck adapters)"
    ),
    "2101.00190": Paper(
        "Li, Xiang Lisa and Liang, Percy", "Prefix-Tuning: Optimizing Continuous Prompts for Generation"
    ),
    "2103.00020": Paper(
        "Radford, Alec and others", "Learning Transferable Visual Models From Natural Language Supervision (CLIP)"
    ),
    "2103.09762": Paper(
        "Saha, Gobinda and Garg, Isha and Roy, Kaushik", "Gradient Projection Memory for Continual Learning (GPM)"
    ),
    "2106.09685": Paper("Hu, Edward J. and others", "LoRA: Low-Rank Adaptation of Large Language Models"),
    "2106.10199": Paper(
        "Ben Zaken, Elad and Ravfogel, Shauli and Goldberg, Yoav",
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    ),
    "2109.05687": Paper(
        "Xu, Runxin and others",
        "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
    ),
    "2110.04366": Paper("He, Junxian and others", "Towards a Unified View of Parameter-Efficient Transfer Learning"),
    "2203.05482": Paper(
        "Wortsman, Mitchell and others", "Model soups: averaging weights of multiple fine-tuned models"
    ),
    "2203.12119": Paper("Jia, Menglin and others", "Visual Prompt Tuning (VPT)"),
    "2205.05638": Paper(
        "Liu, Haokun and others",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (IA3)",
    ),
    "2211.15583": Paper(
        "Fu, Zihao and others",
        "On the Effectiveness of Parameter-Efficient Fine-Tuning (SAM, second-order approximation)",
    ),
    "2212.04089": Paper("Ilharco, Gabriel and others", "Editing Models with Task Arithmetic"),
    "2303.07338": Paper(
        "Zhou, Da-Wei and others", "Revisiting Class-Incremental Learning with Pre-Trained Models (SimpleCIL)"
    ),
    "2306.01708": Paper("Yadav, Prateek and others", "TIES-Merging: Resolving Interference When Merging Models"),
    "2306.07280": Paper(
        "Qiu, Zeju and others", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning (OFT, COFT)"
    ),
    "2307.02251": Paper(
        "McDonnell, Mark D. and others", "RanPAC: Random Projections and Pre-trained Models for Continual Learning"
    ),
    "2310.14152": Paper(
        "Wang, Xiao and others", "Orthogonal Subspace Learning for Language Model Continual Learning (O-LoRA)"
    ),
    "2311.06243": Paper(
        "Liu, Weiyang and others", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (BOFT)"
    ),
    "2311.17601": Paper("Wistuba, Martin and others", "Continual Learning with Low Rank Adaptation (CoLoR)"),
    "2403.12030": Paper(
        "Zhou, Da-Wei and others",
        "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning (EASE)",
    ),
    "2404.00228": Paper(
        "Liang, Yan-Shuo and Li, Wu-Jun", "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning"
    ),
    "2404.04316": Paper(
        "Ma, Xinyu and others", "Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation (GOFT, qGOFT)"
    ),
    "2405.13383": Paper(
        "Qiao, Jingyang and others", "Gradient Projection For Continual Parameter-Efficient Tuning (PEGP)"
    ),
    "2410.10179": Paper(
        "Yang, Shuo and others", "Is Parameter Collision Hindering Continual Learning in LLMs? (N-LoRA)"
    ),
    "2411.02813": Paper(
        "Ning, Kun-Peng and others", "Sparse Orthogonal Parameters Tuning for Continual Learning (SoTU)"
    ),
    "2412.15571": Paper(
        "Momeni, Saleh and Mazumder, Sahisnu and Liu, Bing",
        "Continual Learning Using a Kernel-Based Method Over Foundation Models (KLDA)",
    ),
    "2501.09522": Paper(
        "Tang, Anke and others",
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging "
        "(OPCM)",
    ),
    "2504.07097": Paper(
        "Nayak, Nikhil Shivakumar and others",
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning (OSF)",
    ),
    "2508.08165": Paper(
        "Wang, Yan and Zhou, Da-Wei and Ye, Han-Jia",
        "Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based Class-Incremental Learning "
        "(TUNA)",
    ),
    "2510.13003": Paper(
        "Xiong, Yifeng and Xie, Xiaohui",
        "OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient Fine-Tuning",
    ),
    "2511.09926": Paper(
        "Rao, Xuan and others",
        "Compensating Distribution Drifts in Class-incremental Learning of Pre-trained Vision Transformers (SLDC)",
    ),
    "2511.13880": Paper(
        "Momeni, Saleh and Xiao, Changnan and Liu, Bing",
        "AnaCP: Toward Upper-Bound Continual Learning via Analytic Contrastive Projection",
    ),
    "2512.23017": Paper(
        "Qiao, Fuli and Mahdavi, Mehrdad",
        "Merge before Forget: A Single LoRA Continual Learning via Continual Merging (SLAO)",
    ),
}


def papers_of_recipe(name: str) -> list[str]:
    """arXiv numbers in the docstring of a recipe of the table; of a variant ("the same ...") those of the recipe it
    varies; else those of its module; none for a recipe of a user's own."""
    if name not in RECIPES:
        return []
    found = ARXIV.findall(RECIPES[name].__doc__ or "")
    above = max((n for n in RECIPES if name.startswith(f"{n}_")), key=len, default=None)
    if found or above is None:
        return found or ARXIV.findall(sys.modules[RECIPES[name].__module__].__doc__ or "")
    return papers_of_recipe(above)


def bibtex(number: str) -> str:
    """The entry of a paper on arXiv, under the title that it has there."""
    paper = PAPERS[number]
    title = re.sub(r" \([^()]*\)$", "", paper.title)  # how its method is called is ours
    return (
        f"@misc{{arxiv{number.replace('.', '')},\n  author = {{{paper.authors}}},\n  title = {{{title}}},\n"
        f"  year = {{20{number[:2]}}},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
        f"  url = {{https://arxiv.org/abs/{number}}}\n}}"
    )
