"""Reports: tables, figures, a page, claims and a regression verdict from the rows of many runs. Needs no JAX.

One row is one process. `find_rows` and `rows` read rows, `groups` and `comparability` decide which may be compared,
`statistics` and `ranking` draw the conclusions, `claims`, `planned_claims` and `study_tables` compare them with
EfficientLLM. `leaderboard` collects all of it as plain data; `markdown`, `figures` and `page` display that.

Letters of array names: V variants, B blocks, R draws.
"""
