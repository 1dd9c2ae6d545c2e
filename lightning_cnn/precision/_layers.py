"""Layers that every reduced precision leaves in float32."""

from torch import nn

# they divide by a standard deviation, and their statistics are averages of many small steps
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
