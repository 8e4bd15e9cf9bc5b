"""Conversion of a checkpoint: planned, then streamed, one decoder layer at a time."""

from openpi_duquant.conversion.checkpoint import convert
from openpi_duquant.conversion.checkpoint import open_source
from openpi_duquant.conversion.plan import Plan
from openpi_duquant.conversion.plan import make_plan
from openpi_duquant.conversion.tensors import convert_tensors
from openpi_duquant.conversion.tensors import folded_tensors

__all__ = ["Plan", "convert", "convert_tensors", "folded_tensors", "make_plan", "open_source"]
