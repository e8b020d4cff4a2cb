"""Weight-only quantization of kernels and tables: the forms, and the tree map that quantizes a model's parameters.

A form is a dataclass registered as ("quant", name). Its `leaf` makes the leaf (a `base.Rows`, which is a
`weights.Weight`) that replaces a kernel `[..., in, out]` or a table `[rows, width]`. Models know nothing of forms.

Letters of this package are lower case: r rows (outputs of a kernel, entries of a table), k inputs of a row, g groups of
a row, h bytes of a group's packed codes (half its weights), b columns of one group, m rows of x, c candidates of a
search, p parts of a row's width whose products are summed.
"""

KINDS = {"quant": "*"}
