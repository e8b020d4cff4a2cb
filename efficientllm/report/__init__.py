"""From the rows of many runs to tables, figures, a page, claims and a verdict. Needs no JAX.

One row is one process. `rows` reads them, `comparison` says which may be compared, `statistics` and `ranking` say what
follows from them, `claims`, `forecasts` and `study` set them beside EfficientLLM's; `markdown`, `figures` and `page`
only show it.

Letters of array names: V variants, B blocks, R draws.
"""
