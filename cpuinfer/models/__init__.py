"""Architectures: one file each, found by the file's general.architecture."""

from cpuinfer.models.llama import Llama

ARCHITECTURES = {"llama": Llama}
