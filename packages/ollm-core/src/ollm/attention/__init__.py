"""Attention over keys and values that come in blocks: no layer's keys and values ever exist as one tensor.

`masks` says which keys a query sees, tile by tile; `kernels` computes one tile and its log-sum-exp; `blockwise` walks
the tiles and merges them. Pure torch: nothing here knows transformers, caches or stores.

The merge by log-sum-exp is that of FlashAttention (Dao et al., 2022, arXiv:2205.14135) and of online softmax
(Milakov and Gimelshein, 2018, arXiv:1805.02867).
"""
