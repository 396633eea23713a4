"""The operations as Triton kernels, for every GPU on which Triton runs: one module each, and the table of tile sizes.

This package and its modules are imported only when a call on a GPU may take these kernels: they import Triton. Each
module of an operation has functions of the names in `_C.pyi` without the operation's own, `forward` and `backward`,
that take the same keyword arguments, choose tiles by the architecture of the device (`launch.architecture`) and launch.
"""
