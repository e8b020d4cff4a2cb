"""Operators with several kernels each, chosen by platform and shape: attention, scans, grouped products."""

KINDS = {
    "attention_kernel": "attention_kernels",
    "block_kernel": "block_sparse_attention",
    "grouped_kernel": "grouped_matmul",
    "matmul_kernel": "matmul_kernels",
    "rwkv_kernel": "rwkv_recurrence",
    "scan_kernel": "selective_scan",
}
