"""efficientllm: one config, one command, one honest row of numbers for each efficiency technique.

Array names end in their shape, one letter a dimension: B batch, T query length, S key length, D model, H query heads,
G KV heads, K head size, F ffn hidden, E experts, V vocabulary, N layers, R rank. `q_BTHK` is a query of every head.
README.md beside this file says which question each package answers.
"""

KINDS = {"norm": "layers", "precision": "weights"}
