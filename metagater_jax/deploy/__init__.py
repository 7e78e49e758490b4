"""Adapted networks on devices: smaller networks, files that run there, and adaptation there."""

from metagater_jax.deploy.compact import Compact, Cutting, compact, kept_channels

__all__ = ["Compact", "Cutting", "compact", "kept_channels"]
