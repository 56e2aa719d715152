"""The arithmetic of the losses as PyTorch operations: eager on any device, Triton kernels on CUDA.

Each module holds one operation ``passion_plugin::…`` with its plain definition, its eager body and its gradient;
:mod:`passion_plugin.losses` checks arguments and calls them.
"""
