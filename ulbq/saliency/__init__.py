"""Saliency: a non-negative score per weight that says how much the model depends on it."""

from ulbq.saliency.compute import compute_saliency
from ulbq.saliency.settings import KINDS, SaliencySettings
from ulbq.saliency.spectrum import TOP, Spectrum
from ulbq.saliency.stored import Saliency, block_file

__all__ = [
    "KINDS",
    "TOP",
    "Saliency",
    "SaliencySettings",
    "Spectrum",
    "block_file",
    "compute_saliency",
]
