"""Saliency: a non-negative score per weight that says how much the model depends on it."""

from ulbq.saliency.compute import compute_saliency
from ulbq.saliency.settings import KINDS, SaliencyKind, SaliencySettings
from ulbq.saliency.spectrum import TOP, Spectrum
from ulbq.saliency.stored import Saliency, SaliencyDtype, block_file

__all__ = [
    "KINDS",
    "TOP",
    "Saliency",
    "SaliencyDtype",
    "SaliencyKind",
    "SaliencySettings",
    "Spectrum",
    "block_file",
    "compute_saliency",
]
