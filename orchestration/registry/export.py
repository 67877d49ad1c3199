"""A model as a program of torch.export: a file that torch alone runs, without our code."""

import copy
from pathlib import Path

import torch

from slot_models import ObjectFinder

_SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")  # where our code lies on this machine


def export(finder: ObjectFinder, path: Path) -> None:
    """Writes a .pt2: uint8 images [B, S, S, 3] of the model's size, any B from 1 -> what the finder says.

    The file is a zip of JSON and raw tensors. torch.export would add the example inputs by pickle; they are left out,
    so that nothing in it is pickled. ``torch.export.load(path).module()`` runs it.
    """
    images = torch.zeros(2, finder.image_size, finder.image_size, 3, dtype=torch.uint8)
    frozen = copy.deepcopy(finder).requires_grad_(False)
    with torch.no_grad():
        program = torch.export.export(frozen, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    program.example_inputs = None
    for node in program.graph.nodes:
        for key in _SOURCES:
            node.meta.pop(key, None)
    torch.export.save(program, path)
