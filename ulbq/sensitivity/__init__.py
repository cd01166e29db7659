"""Saliency: a non-negative score per weight that says how much the model depends on it."""

from ulbq.sensitivity.compute import compute_saliency
from ulbq.sensitivity.settings import KINDS, SaliencySettings
from ulbq.sensitivity.spectrum import TOP, Spectrum
from ulbq.sensitivity.stored import Saliency, block_file

__all__ = ["KINDS", "TOP", "Saliency", "SaliencySettings", "Spectrum", "block_file", "compute_saliency"]
