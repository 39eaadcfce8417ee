"""Training pictures: tensors, the digits, image files, npz files and Hugging Face ``datasets``."""

from __future__ import annotations

from .dataset import Dataset, TensorDataset
from .folder import ImageFolder
from .huggingface import HuggingFaceDataset
from .npz import NpzDataset
from .opening import open_dataset
from .scikit_learn import digits

__all__ = [
    "Dataset",
    "HuggingFaceDataset",
    "ImageFolder",
    "NpzDataset",
    "TensorDataset",
    "digits",
    "open_dataset",
]
