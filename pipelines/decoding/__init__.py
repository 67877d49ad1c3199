"""Decoding, in this thread or in processes of its own. Which one decides nothing but the speed.

A whole step is decoded into one array of pixels. What cannot be decoded comes back as the reason.
"""

from pipelines.decoding.decoder import Decoded, Decoder, Decoding, InThread
from pipelines.decoding.processes import Processes

__all__ = ["Decoded", "Decoder", "Decoding", "InThread", "Processes"]
