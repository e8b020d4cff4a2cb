"""Compressed forms of kernels and tables: which there are, and the tree map that puts them into a model.

A form is a dataclass registered as ("quant", name): `leaf` makes the leaf (a `rows.Rows`, which is a `weights.Weight`)
that takes the place of a kernel `[..., in, out]` or a table `[rows, width]`. Only weights are compressed. Models never
hear of it. Letters of this package: R rows (outputs of a kernel, entries of a table), K their width (inputs), G groups
of a row, H half a group, M rows of x.
"""

KINDS = {"quant": "*"}
