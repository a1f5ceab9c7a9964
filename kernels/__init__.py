"""Triton kernels, each with a plain-torch twin. None yet: the layer runs on torch.nn.functional.grouped_mm."""
